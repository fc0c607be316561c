"""Layers with several weights: each that is made of blocks is a `BlockLinear` of its own, under the weight's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ...discovery import PrunableWeight
from .linear import BlockLinear


class Matrix(NamedTuple):
    """One `BlockLinear` of a composite layer.

    Attributes:
        path: its name in the layer, ``"weight_ih_l0"`` or ``"in_proj_weight.2"``.
        tensor: the dense layer's weight that it stands for.
        part: which of that weight's matrices, where they are kept apart; ``None`` where it stands for all.
        layer: it.
    """

    path: str
    tensor: str
    part: int | None
    layer: BlockLinear


class BlockComposite(nn.Module):
    """Base of `BlockAttention`, `BlockRNNBase`, `BlockCell` and `BlockExperts`.

    Where the dense layer has a weight, there is a `BlockLinear` of the same name, or a list of them, one for each of
    its matrices. Weights that are not made of blocks stay what they were, under their own names, masks included.
    """

    def matrices(self) -> Iterator[Matrix]:
        """Its block layers, in the order of the dense layer's parameters."""
        for name, child in self._modules.items():
            if isinstance(child, BlockLinear) and name in self.compact_weights:
                yield Matrix(name, name, None, child)
            elif isinstance(child, nn.ModuleList) and name in self.compact_weights:
                yield from (Matrix(f"{name}.{i}", name, i, part) for i, part in enumerate(child))  # type: ignore[arg-type]

    @property
    def compact_weights(self) -> tuple[str, ...]:
        """Names of the weights that are blocks."""
        return tuple(self.compact_records)

    @property
    def compact_records(self) -> Mapping[str, PrunableWeight]:
        """How the dense layer stores the weights that are blocks."""
        records: Mapping[str, PrunableWeight] = self.__dict__.get("_compact_weights", {})
        return records

    def dense_weight(self, name: str) -> Tensor | None:
        """A weight that is not made of blocks, masked as it is now."""
        own: Any = self.__dict__.get(name)
        return self._parameters.get(name) if own is None else own

    def product(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b`` for one of its weights; ``x`` of shape ``(..., n)``."""
        child = self._modules.get(name)
        if child is None:
            weight = self.dense_weight(name)
            assert weight is not None
            return F.linear(x, weight, bias)
        y: Tensor = child(x)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        """What is dense."""
        dense = [name for name, p in self._parameters.items() if p is not None and p.dim() > 1]
        return f"dense: {', '.join(dense)}" if dense else ""

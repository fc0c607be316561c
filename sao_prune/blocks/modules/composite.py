"""Layers with several weights: each that is made of blocks is a `BlockLinear` of its own, under the weight's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from ...discovery import PrunableWeight
from .linear import BlockLinear


class Matrix(NamedTuple):
    """One `BlockLinear` of a composite layer.

    Attributes:
        path: its name in the layer, ``"weight_ih_l0"`` or ``"in_proj.2"``.
        tensor: the dense layer's weight that it stands for.
        part: which of that weight's matrices, where they are kept apart; ``None`` where it stands for all.
        layer: it.
    """

    path: str
    tensor: str
    part: int | None
    layer: BlockLinear


def child_name(tensor: str) -> str:
    """What the block layers are called that stand for a weight.

    Example:
        >>> child_name("in_proj_weight"), child_name("weight_ih_l0")
        ('in_proj', 'weight_ih_l0')
    """
    return tensor.removesuffix("_weight")


class BlockComposite(nn.Module):
    """Base of `BlockAttention`, `BlockRNNBase`, `BlockCell` and `BlockExperts`.

    Where the dense layer has a weight, there is a `BlockLinear` of its name (without a ``_weight`` at the end), or a
    list of them, one for each of its matrices. Weights that are not made of blocks stay what they were, under their
    own names, masks included.
    """

    def step(self, first: Proxy, *inputs: Any) -> Any:
        """A call as one step of a traced graph, as calls of torch's own layers are."""
        tracer = first.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (first, *inputs), {})  # type: ignore

    def matrices(self) -> Iterator[Matrix]:
        """Its block layers, in the order of the dense layer's parameters."""
        for tensor in self.compact_weights:
            name = child_name(tensor)
            child = self._modules[name]
            if isinstance(child, nn.ModuleList):
                yield from (Matrix(f"{name}.{i}", tensor, i, part) for i, part in enumerate(child))  # type: ignore[arg-type]
            else:
                yield Matrix(name, tensor, None, child)  # type: ignore[arg-type]

    def layers_of(self, tensor: str) -> list[BlockLinear]:
        """The block layers that stand for a weight."""
        return [m.layer for m in self.matrices() if m.tensor == tensor]

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
        child = self._modules.get(child_name(name))
        if child is None:
            weight = self.dense_weight(name)
            assert weight is not None
            return F.linear(x, weight, bias)
        # In autocast the product has its type.
        y: Tensor = child(x)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What is dense."""
        dense = [name for name, p in self._parameters.items() if p is not None and p.dim() > 1]
        return f"dense: {', '.join(dense)}" if dense else ""

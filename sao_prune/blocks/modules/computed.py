"""The dense weight of a block layer, computed for those who read it: what is written to it would be lost; it raises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._torch import tracing_state, transforms_active, without_subclasses
from ...prune.alias import WeightView, lend

_DATA: Any = Tensor.data


def refusal(kind: str) -> str:
    """What is said to those who write to the weight of such a layer, or replace it."""
    return (
        f"{kind}.weight is computed from blocks, nothing was written: write to blocks, or make the layer masked or "
        "dense first (sao_prune.expand(model), then remove)"
    )


class _Computed:
    """What such a weight was computed for; see `sao_prune.prune.alias.Source`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def note_write(self) -> None:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(refusal(self.kind))


class ComputedWeight(WeightView):
    """A dense weight that can be read, differentiated and copied, and refuses writes; so do its views."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """An alias outside the graph."""
        with without_subclasses():
            plain = _DATA.__get__(self)
        alias: Tensor = lend(self._source, self, plain)  # type: ignore[arg-type]
        return alias

    @data.setter
    def data(self, value: Tensor) -> None:
        assert self._source is not None
        self._source.note_write()


def computed(weight: Tensor, kind: str) -> Tensor:
    """A weight that refuses writes, wherever tensors can be subclassed.

    Args:
        weight: just computed.
        kind: of the layer, for the message.

    Returns:
        The same values, with the same graph.

    Example:
        >>> computed(torch.ones(2), "BlockLinear").zero_()
        Traceback (most recent call last):
        RuntimeError: BlockLinear.weight is computed from blocks, nothing was written: ...
    """
    if type(weight) is not Tensor or torch.compiler.is_compiling() or tracing_state() or transforms_active():
        return weight
    guarded = weight.as_subclass(ComputedWeight)
    guarded._source = _Computed(kind)
    return guarded

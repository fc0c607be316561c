"""How the blocks of a topology are laid out in one batch of equal matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.fx import Proxy

from ..topology import BlockTopology
from .order import Kind, Order


@dataclass(frozen=True, eq=False)
class Packing:
    """``groups`` matrices of ``rows x cols`` that hold every block of a topology, zeros between them.

    With ``merge = 1`` and even sets this is the blocks themselves. Merging puts ``merge`` neighbouring blocks on the
    diagonal of one matrix, for hardware that is bad at narrow ones; uneven sets are padded to the largest.

    Args:
        inputs: which input channel each of the ``groups * cols`` positions reads.
        outputs: which of the ``groups * rows`` positions holds each output channel.
        slots: position of every block value in the flattened ``(groups, rows, cols)``; ``None`` when they are the
            values in their own order.
        raw: leave the outputs in the order of the positions; the reader's input order makes up for it.
    """

    merge: int
    groups: int
    rows: int
    cols: int
    inputs: Order
    outputs: Order
    slots: Tensor | None
    raw: bool = False

    @property
    def size(self) -> int:
        """Numbers in the packed matrices, zeros included."""
        return self.groups * self.rows * self.cols

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return self.groups * self.rows if self.raw else len(self.outputs.index)

    @cached_property
    def channel_tables(self) -> tuple[Tensor, Tensor]:
        """The input and the output channel of every position, int32; -1 where a position is padding."""
        # On the CPU whatever the default device: the kernels read them.
        cpu = torch.device("cpu")
        inputs = torch.full((self.groups * self.cols,), -1, dtype=torch.int32, device=cpu)
        inputs[self.inputs.inverse] = torch.arange(len(self.inputs.inverse), dtype=torch.int32, device=cpu)
        outputs = torch.full((self.groups * self.rows,), -1, dtype=torch.int32, device=cpu)
        positions = torch.arange(len(outputs), device=cpu) if self.raw else self.outputs.index
        outputs[positions] = torch.arange(len(positions), dtype=torch.int32, device=cpu)
        return inputs, outputs

    def to(self, device: torch.device) -> Packing:
        """The same packing with its indices on another device."""
        if self.inputs.index.device == device:
            return self
        slots = None if self.slots is None else self.slots.to(device)
        inputs, outputs = self.inputs.to(device), self.outputs.to(device)
        return replace(self, inputs=inputs, outputs=outputs, slots=slots)

    def __deepcopy__(self, memo: dict[int, object]) -> Packing:
        return self

    def bias(self, bias: Tensor | None, plain: bool = False) -> Tensor | None:
        """A bias in the order of the positions."""
        if bias is None or self.outputs.kind is Kind.IDENTITY:
            return bias
        return fill(bias, self.outputs.index, self.groups * self.rows, plain=plain)


@lru_cache(maxsize=512)
def pack_topology(topology: BlockTopology, merge: int = 1) -> Packing:
    """Lay a topology's blocks out, ``merge`` to a matrix.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> p = pack_topology(interleaved(8, 8, 4), merge=2)
        >>> (p.groups, p.rows, p.cols), p.inputs.kind.value, p.outputs.kind.value
        ((2, 4, 4), 'strided', 'identity')
    """
    groups = -(-topology.groups // merge)
    row_group = _spread(topology.row_set, merge, groups)
    col_group = _spread(topology.col_set, merge, groups)
    rows, row_place = _places(topology.row_set, row_group, groups)
    cols, col_place = _places(topology.col_set, col_group, groups)
    slots = torch.cat(
        [
            (row_place[b.rows][:, :, None] * cols + (col_place[b.cols] % cols)[:, None, :]).flatten()
            for b in topology.buckets
        ]
    )
    exact = len(slots) == groups * rows * cols and torch.equal(slots, torch.arange(len(slots)))
    inputs = torch.zeros(groups * cols, dtype=torch.long)
    inputs[col_place] = torch.arange(len(col_place))
    outputs = torch.zeros(groups * rows, dtype=torch.long)
    outputs[row_place] = torch.arange(len(row_place))
    return Packing(
        merge,
        groups,
        rows,
        cols,
        Order.of(inputs, col_place),
        Order.of(row_place, outputs),
        None if exact else slots,
    )


def _spread(sets: Tensor, merge: int, groups: int) -> Tensor:
    """The matrix of every channel; those in no set fill up the emptiest ones."""
    group = torch.where(sets < 0, -1, sets // merge)
    for loose in torch.nonzero(group < 0).flatten().tolist():
        group[loose] = torch.bincount(group[group >= 0], minlength=groups).argmin()
    return group


def _places(sets: Tensor, group: Tensor, groups: int) -> tuple[int, Tensor]:
    """The width of the widest matrix and, for every channel, its position when all are padded to it.

    Merged blocks stand one after the other, so that an order that is strided without merging is so with it.
    """
    counts = torch.bincount(group, minlength=groups)
    width = int(counts.max())
    order = torch.argsort(torch.where(sets < 0, len(sets), sets), stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    start = counts.cumsum(0) - counts
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group)) - start[group[order]] + group[order] * width
    return width, place


class _Fill(torch.autograd.Function):
    """Write values into zeros at fixed slots; the gradient reads them back."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.slots = slots  # type: ignore[attr-defined]
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, slots, values)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.slots), None, None  # type: ignore[attr-defined]


def fill(values: Tensor, slots: Tensor, size: int, kernel: tuple[int, ...] = (), plain: bool = False) -> Tensor:
    """A ``(size, *kernel)`` tensor of zeros with ``values`` of shape ``(len(slots), *kernel)`` written at ``slots``."""
    if plain or isinstance(values, Proxy):
        return values.new_zeros(size, *kernel).index_copy(0, slots, values)
    return _Fill.apply(values, slots, size)  # type: ignore[no-any-return]

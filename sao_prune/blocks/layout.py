"""How the blocks of a topology are laid out in one batch of equal matrices, as told by the sets of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .._torch import check_later, without_transforms
from ..topology import BlockTopology, Seen, decode_sets, encode_sets
from .permutation import Kind, Permutation

_CAPTURED = (
    "this program was captured with other row_set and col_set than were loaded into it: capture it again from the "
    "model that has loaded them"
)
# More slices than this cost more than one gather.
_MOST_RUNS = 4


@dataclass(frozen=True, eq=False)
class Layout:
    """``groups`` matrices of ``rows x cols`` that hold every block of a topology, zeros between them.

    With ``merge = 1`` and even sets these are the blocks themselves. Merging puts ``merge`` neighbouring blocks on the
    diagonal of one matrix, for hardware that is bad at narrow ones; uneven sets are padded to the largest.

    Attributes:
        inputs: which input channel each of the ``groups * cols`` positions reads.
        outputs: which of the ``groups * rows`` positions holds each output channel.
        slots: position of every block value in the flattened ``(groups, rows, cols)``; ``None`` when they are the
            values in their own order.
        is_dealt: whether channel ``i`` is read by matrix ``i % groups`` at ``i // groups``, those missing at the end
            counted as zeros.
        own: shape of the ``blocks`` parameter without a kernel.
        channels: of the result.
        sources: channels of the input.
        codes: the encoded sets.
        runs: where the outputs lie matrix after matrix, but not all rows are some: ``(matrices, rows)`` of equal ones.
    """

    topology: BlockTopology
    merge: int
    groups: int
    rows: int
    cols: int
    inputs: Permutation
    outputs: Permutation
    slots: Tensor | None
    is_dealt: bool = False
    runs: tuple[tuple[int, int], ...] = ()
    own: torch.Size = field(init=False)
    channels: int = field(init=False)
    sources: int = field(init=False)
    codes: tuple[Tensor, Tensor] = field(init=False)
    _on: dict[torch.device, Layout] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Values in the packed matrices, zeros included."""
        return self.groups * self.rows * self.cols

    def __post_init__(self) -> None:
        # Not cached properties: before Python 3.12 those take a lock, which compilers cannot trace.
        buckets = self.topology.buckets
        own = torch.Size(buckets[0].shape if len(buckets) == 1 else (self.topology.nnz, 1))
        object.__setattr__(self, "own", own)
        object.__setattr__(self, "channels", len(self.outputs.index))
        object.__setattr__(self, "sources", len(self.inputs.inverse))
        sets = self.topology.row_set, self.topology.col_set
        device = self.inputs.index.device
        object.__setattr__(self, "codes", tuple(encode_sets(each).int().to(device) for each in sets))

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The input and the output channel of every position, int32 on the layout's device; -1 marks padding."""
        device = self.inputs.index.device
        inputs = torch.full((self.groups * self.cols,), -1, dtype=torch.int32, device=device)
        inputs[self.inputs.inverse] = torch.arange(len(self.inputs.inverse), dtype=torch.int32, device=device)
        outputs = torch.full((self.groups * self.rows,), -1, dtype=torch.int32, device=device)
        outputs[self.outputs.index] = torch.arange(len(self.outputs.index), dtype=torch.int32, device=device)
        return inputs, outputs

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Where the tables of a layout on the CPU are.

        Raises:
            RuntimeError: if it is elsewhere.
        """
        if not all(table.is_cpu for table in self.tables):
            raise RuntimeError(f"the sets are on {self.inputs.index.device}, the other operands on the CPU")
        return self.tables[0].data_ptr(), self.tables[1].data_ptr()

    def to(self, device: torch.device) -> Layout:
        """The same layout with its indices on another device."""
        if self.inputs.index.device == device:
            return self
        if device not in self._on:
            slots = None if self.slots is None else self.slots.to(device)
            inputs, outputs = self.inputs.to(device), self.outputs.to(device)
            self._on[device] = replace(self, inputs=inputs, outputs=outputs, slots=slots, _on={})
        return self._on[device]

    def __deepcopy__(self, memo: dict[int, object]) -> Layout:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return layout_of_topology, (self.topology, self.merge)

    def check_captured(self, row_set: Tensor, col_set: Tensor) -> None:
        """Let a program that is being captured say so if other sets are loaded into it: it holds these for good."""
        for buffer, codes in zip((row_set, col_set), self.codes):
            # An average may be one less.
            check_later(((buffer.int() - codes).abs() <= 1).all(), _CAPTURED)

    def pack(self, blocks: Tensor) -> Tensor:
        """The matrices ``(groups, rows, cols, *kernel)`` of a ``blocks`` parameter; differentiable.

        Raises:
            RuntimeError: if the parameter is not of this topology.
        """
        own = self.own
        if blocks.shape[: len(own)] != own:
            given = tuple(blocks.shape)
            raise RuntimeError(f"blocks of {self.topology} have shape {own} and the kernel's, got {given}")
        kernel, shape = blocks.shape[len(own) :], (self.groups, self.rows, self.cols)
        if self.slots is None:
            return blocks if self.merge == 1 and len(own) == 3 else blocks.reshape(*shape, *kernel)
        values = blocks.reshape(-1, *kernel)
        return values.new_zeros(self.size, *kernel).index_copy(0, self.slots, values).view(*shape, *kernel)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of `pack`: the values of the blocks in matrices, in the parameter's ``shape``."""
        if self.slots is None:
            return packed if packed.shape == shape else packed.reshape(shape)
        return packed.flatten(0, 2).index_select(0, self.slots).view(shape)

    def check(self, x: Tensor, dim: int, bias: Tensor | None) -> None:
        """Refuse operands whose channels are not the topology's.

        Raises:
            RuntimeError: telling what was given and what is expected.
        """
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.sources:
            given = tuple(x.shape)
            raise RuntimeError(f"expected an input of {self.sources} channels in dimension {dim}, got {given}")
        self.check_bias(bias)

    def check_bias(self, bias: Tensor | None) -> None:
        """Refuse a bias of another size.

        Raises:
            RuntimeError: telling what was given and what is expected.
        """
        if bias is not None and bias.shape != (self.channels,):
            raise RuntimeError(f"expected a bias of shape ({self.channels},), got {tuple(bias.shape)}")

    def inner_bias(self, bias: Tensor | None) -> Tensor | None:
        """A bias ``(m,)`` as a convolution of the blocks adds it, by positions; ``None`` for none."""
        if bias is None:
            return None
        if self.channels != self.groups * self.rows:
            return self.bias(bias)
        return bias if self.outputs.kind is Kind.IDENTITY else bias.index_select(0, self.outputs.inverse)

    def bias(self, bias: Tensor) -> Tensor:
        """A bias ``(m,)`` by positions, zeros where there is padding; differentiable."""
        return bias.new_zeros(self.groups * self.rows).index_copy(0, self.outputs.index, bias)


@lru_cache(maxsize=512)
def layout_of_topology(topology: BlockTopology, merge: int = 1) -> Layout:
    """Lay a topology's blocks out, ``merge`` to a matrix.

    Raises:
        RuntimeError: if that is none.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> p = layout_of_topology(interleaved(8, 8, 4), merge=2)
        >>> (p.groups, p.rows, p.cols), p.inputs.kind.value, p.outputs.kind.value
        ((2, 4, 4), 'strided', 'identity')
    """
    if merge < 1:
        raise RuntimeError(f"expected merge of at least 1, got {merge}")
    # Plain index arithmetic, whatever function transform or fake mode is on where it is first needed.
    with without_transforms():
        groups = -(-topology.groups // merge)
        row_group = _spread(topology.row_set, merge, groups)
        col_group = _spread(topology.col_set, merge, groups)
        rows, row_place = _places(topology.row_set, row_group, groups)
        cols, col_place = _places(topology.col_set, col_group, groups)
        # Blocks of one shape that hold all channels are packed as they are.
        exact = merge == 1 and topology.nnz == groups * rows * cols and len(topology.buckets) == 1
        if not exact:
            slots = torch.cat(
                [
                    (row_place[b.rows][:, :, None] * cols + (col_place[b.cols] % cols)[:, None, :]).flatten()
                    for b in topology.buckets
                ]
            )
            exact = len(slots) == groups * rows * cols and torch.equal(
                slots, torch.arange(len(slots), device=slots.device)
            )
        natural = torch.arange(len(col_place), device=col_place.device)
        inputs = natural.new_zeros(groups * cols)
        inputs[col_place] = natural
        outputs = natural.new_zeros(groups * rows)
        outputs[row_place] = torch.arange(len(row_place), device=row_place.device)
        into, out = Permutation.of(inputs, col_place), Permutation.of(row_place, outputs)
        dealt = torch.equal(col_place, natural % groups * cols + natural // groups)
        runs = _runs(row_place, groups, rows)
        return Layout(topology, merge, groups, rows, cols, into, out, None if exact else slots, dealt, runs)


def _runs(place: Tensor, groups: int, rows: int) -> tuple[tuple[int, int], ...]:
    """`Layout.runs`; empty where that is no short way to tell it."""
    counts = torch.bincount(place // rows, minlength=groups)
    device = place.device
    first = torch.arange(groups, device=device) * rows
    expected = torch.cat([torch.arange(count, device=device) + start for count, start in zip(counts.tolist(), first)])
    if len(place) == groups * rows or not torch.equal(place, expected):
        return ()
    widths, lengths = torch.unique_consecutive(counts, return_counts=True)
    return tuple(zip(lengths.tolist(), widths.tolist())) if len(widths) <= _MOST_RUNS else ()


def _spread(sets: Tensor, merge: int, groups: int) -> Tensor:
    """The matrix of every channel; those in no set fill up the emptiest ones."""
    group = torch.where(sets < 0, -1, sets // merge)
    for loose in torch.nonzero(group < 0).flatten().tolist():
        group[loose] = torch.bincount(group[group >= 0], minlength=groups).argmin()
    return group


def _places(sets: Tensor, group: Tensor, groups: int) -> tuple[int, Tensor]:
    """The width of the widest matrix and, for every channel, its position when all are padded to it.

    Merged blocks stand one after the other, so that a permutation that is strided without merging is so with it.
    """
    counts = torch.bincount(group, minlength=groups)
    width = int(counts.max())
    order = torch.argsort(torch.where(sets < 0, len(sets), sets), stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    start = counts.cumsum(0) - counts
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group), device=group.device) - start[group[order]] + group[order] * width
    return width, place


class _Known(Seen):
    """The layout of two set buffers, for as long as they hold what it was made from."""

    __slots__ = ("layout",)

    def __init__(self, row_set: Tensor, col_set: Tensor, layout: Layout) -> None:
        super().__init__(row_set, col_set)
        self.layout = layout


_KNOWN: dict[tuple[int, int, int], _Known] = {}
_MOST_KNOWN = 4096


def layout_of(row_set: Tensor, col_set: Tensor, merge: int = 1) -> Layout:
    """The layout that two buffers of encoded sets describe, on their device: always of what they hold now.

    On the CPU the contents are compared at every call; on other devices, where that would wait for the device, the
    tensors' version counters.

    Raises:
        RuntimeError: if their memory has been freed, which torch itself would read.
    """
    if not (row_set.data_ptr() and col_set.data_ptr()):
        raise RuntimeError("row_set or col_set has no memory: it has been freed, or there are no channels")
    key = id(row_set), id(col_set), merge
    known = _KNOWN.get(key)
    if known is not None and known.holds(row_set, col_set):
        return known.layout
    # Ordinary tensors, also where the first pass of a model is within a function transform.
    with without_transforms():
        topology = BlockTopology(decode_sets(row_set), decode_sets(col_set))
        layout = layout_of_topology(topology, merge).to(row_set.device)
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _Known(row_set, col_set, layout)
    return layout

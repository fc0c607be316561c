"""The draws of one residual block: topologies of its layers first, then the values that make the block orthogonal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from ..allocation import Allocation
from ..discovery.branch import PAIRED, BranchLayer
from ..discovery.residual import ResidualBlock
from ..seeds import named_generator
from ..topology import GENERATORS, BlockTopology, even_sizes, exact_sizes, make_topology
from ..weights import Mirror, mirror_topology, orthogonal_blocks
from ..weights.residual import (
    Relay,
    closing_matrices,
    closing_topology,
    deal,
    mirrored_matrix,
    padded_block,
    projection_block,
    relay,
    values_on,
)
from ..weights.rotation import plain_branch, rotation_less_identity
from .base import TopologyDrawer
from .draw import Draw
from .halves import half_budget

Values = Callable[[torch.Generator], Sequence[Tensor]]


class Unfit(Exception):
    """A block whose layers' shapes or topologies do not allow it, with the reason."""


@dataclass(frozen=True)
class BranchPlan:
    """What the layers of one block get.

    Attributes:
        block: the block.
        topologies: one for each weight, by its name; of the whole, mirrored channels.
        near: why the block will not be exactly orthogonal; empty where it will.
        values: given a generator, their matrices.
    """

    block: ResidualBlock
    topologies: Mapping[str, BlockTopology]
    near: str
    values: Values = field(repr=False)

    def draws(self, allocations: Mapping[str, Allocation], seed: int) -> list[Draw]:
        """The draws of its layers."""
        matrices = self.values(named_generator(seed, "values", "residual", self.block.name))
        out = []
        for (name, topology), matrix in zip(self.topologies.items(), matrices):
            single = matrix.dim() == 3 and matrix.shape[2] == 1
            blocks = values_on(topology, matrix[..., 0] if single else matrix)
            out.append(Draw(allocations[name].weight, (topology,), (blocks,)))
        return out


class BranchPlanner:
    """Plans residual blocks one after another, so that each mixes other channels than the one before."""

    def __init__(self, kind: str, drawer: TopologyDrawer, allocations: Mapping[str, Allocation], seed: int) -> None:
        self._kind, self._drawer, self._allocations, self._seed = kind, drawer, allocations, seed
        self._turn = -1

    def plan(self, block: ResidualBlock) -> BranchPlan:
        """The plan of one block.

        Raises:
            Unfit: with the reason why there is none.
        """
        self._turn += 1
        if block.reason is not None:
            raise Unfit(block.reason)
        for layer in block.layers:
            if layer.weight not in self._allocations:
                raise Unfit(f"{layer.weight} is not pruned")
            if self._allocations[layer.weight].weight.parts > 1:
                raise Unfit(f"{layer.weight} consists of separate matrices")
        if block.kind == "plain":
            return self._plain(block)
        shapes = [self._allocations[layer.weight].weight.matrix for layer in block.layers]
        sides = [shapes[0][1], *(rows for rows, _ in shapes)]
        if any(side % 2 for side in sides):
            raise Unfit("it has an odd number of channels, which cannot be mirrored")
        if [cols for _, cols in shapes] != sides[:-1]:
            raise Unfit("its layers do not read one another's channels")
        if block.shortcut == "identity":
            grown = [b > a for a, b in pairwise(sides[:-1])]
            shrunk = [b < a for a, b in pairwise(sides[:-1])]
            if any(any(grown[:index]) for index, shrinks in enumerate(shrunk) if shrinks):
                raise Unfit("its hidden widths grow and shrink again")
            return self._identity(block)
        return self._resized(block)

    def _identity(self, block: ResidualBlock) -> BranchPlan:
        relays = [self._relay(layer, exact=True) for layer in block.layers[:-1]]
        last = self._allocations[block.layers[-1].weight]
        rows, cols, groups, nnz = half_budget(last, Mirror.INNER)
        carried = torch.arange(rows, device="cpu")
        for step in relays:
            carried = carried[step.picked]
        distinct = carried.unique()
        repeats = cols // len(distinct) if relays else 1
        groups = min(groups, len(distinct))
        if nnz is not None:
            sizes = exact_sizes(rows, len(distinct), max(nnz // repeats, rows))
        else:
            sizes = even_sizes(rows, len(distinct), groups)
        row_set = deal(*sizes, distinct, self._order(block, rows))
        closing = closing_topology(row_set, carried)

        def values(generator: torch.Generator) -> list[Tensor]:
            written, taken = closing_matrices(row_set, carried, generator)
            return [*(step.matrix() for step in relays), mirrored_matrix(written - taken, -written)]

        return BranchPlan(block, self._wholes(block, relays, closing), "", values)

    def _resized(self, block: ResidualBlock) -> BranchPlan:
        relays = [self._relay(layer, exact=False, beside=block.projection) for layer in block.layers[:-1]]
        if block.shortcut == "fixed":
            return self._padded(block, relays)
        closing = self._half(block.layers[-1].weight)
        topologies = self._wholes(block, relays, closing)
        assert block.projection is not None
        beside = self._beside(block.projection, closing)
        fresh, twice = _carried(relays, closing.shape[1])
        near = "its shortcut is a layer"
        if beside is not None:
            topologies = {**topologies, block.projection.weight: mirror_topology(beside, Mirror.INNER)}

        def values(generator: torch.Generator) -> list[Tensor]:
            if beside is None:
                last = closing.scatter(orthogonal_blocks([closing], [generator])[0])
                pair = [mirrored_matrix(last, -last)]
            else:
                pair = [mirrored_matrix(w, -w) for w in projection_block(closing, beside, fresh, twice, generator)]
            return [*(step.matrix() for step in relays), *pair]

        return BranchPlan(block, topologies, near if beside is not None else f"{near} that starts at zero", values)

    def _padded(self, block: ResidualBlock, relays: Sequence[Relay]) -> BranchPlan:
        """Beside a shortcut that strides and pads: cleared and written anew where the widths double, else silent."""
        rows, hidden, groups, nnz = half_budget(self._allocations[block.layers[-1].weight], Mirror.INNER)
        fresh, twice = _carried(relays, hidden)
        count = rows // 2
        units = (twice >= 0).nonzero().flatten()
        outputs = (torch.arange(2 * count, device="cpu") + (block.padding or 0)) % rows
        feasible = (
            block.padding is not None
            and hidden == rows == 2 * len(units)
            and len(outputs.unique()) == rows
            and nnz is None
        )
        if not feasible or groups > count:
            closing = self._half(block.layers[-1].weight)
            why = "its shortcut changes the size" + (f", for more than {count} blocks" if feasible else "")

            def silent(_: torch.Generator) -> list[Tensor]:
                return [
                    *(step.matrix() for step in relays),
                    torch.zeros(2 * rows, 2 * hidden, dtype=torch.float32, device="cpu"),
                ]

            return BranchPlan(block, self._wholes(block, relays, closing), f"{why}: the branch starts silent", silent)
        unit = units[torch.argsort(twice[units])]
        sizes = even_sizes(count, count, groups)[0]
        sets = deal(sizes, sizes, torch.arange(count, device="cpu"), self._order(block, count))
        row_set, col_set = (
            torch.empty(rows, dtype=torch.long, device="cpu"),
            torch.empty(hidden, dtype=torch.long, device="cpu"),
        )
        row_set[outputs] = sets.repeat(2)
        col_set[unit] = sets
        col_set[(twice < 0).nonzero().flatten()] = torch.arange(groups, device="cpu").repeat_interleave(sizes)
        topology = BlockTopology(row_set, col_set)

        def values(generator: torch.Generator) -> list[Tensor]:
            last = padded_block(topology, fresh, unit, block.padding or 0, generator)
            return [*(step.matrix() for step in relays), last]

        return BranchPlan(block, self._wholes(block, relays, topology), "its shortcut changes the size", values)

    def _plain(self, block: ResidualBlock) -> BranchPlan:
        allocations = [self._allocations[layer.weight] for layer in block.layers]
        (rows, cols), groups, nnz = allocations[0].weight.matrix, allocations[0].groups, allocations[0].nnz
        if allocations[-1].weight.matrix != (cols, rows):
            raise Unfit("its last layer does not give back what its first reads")
        near = ""
        if len(allocations) == 1:
            sizes = even_sizes(rows, rows, groups) if nnz is None else exact_sizes(rows, rows, nnz)
            sets = deal(sizes[0], sizes[0], torch.arange(rows, device="cpu"), self._order(block, rows))
            only = {block.layers[0].weight: BlockTopology(sets, sets)}
            return BranchPlan(block, only, near, lambda generator: [rotation_less_identity(sets, generator)])
        if groups != allocations[1].groups or nnz != allocations[1].nnz:
            raise Unfit("its two layers are asked for different topologies")
        activation = block.activations[0]
        paired = PAIRED.get(activation) if rows % 2 == 0 else None
        if paired is None and activation != "none":
            near = f"{activation} is linear only near 0"
        if paired is not None:
            rows, cols, groups, nnz = half_budget(allocations[0], Mirror.ENTRY)
        topology = self._make(block, rows, cols, groups, nnz)
        wholes, _ = plain_branch(topology, torch.Generator(), paired=paired)
        by_name = dict(zip((layer.weight for layer in block.layers), wholes))
        return BranchPlan(block, by_name, near, lambda generator: plain_branch(topology, generator, paired=paired)[1])

    def _relay(self, layer: BranchLayer, *, exact: bool, beside: BranchLayer | None = None) -> Relay:
        """A carrying layer; where ``exact``, one that carries every channel equally often."""
        weight = self._allocations[layer.weight].weight
        rows, cols, groups, _ = half_budget(self._allocations[layer.weight], Mirror.INNER)
        kernel, taps, corner = prod(weight.kernel), layer.taps, layer.taps[0]
        if beside is not None:
            # The shortcut brings the first corner of every cell; the branch brings the others first.
            taps = (*taps[1:], taps[0])
        if exact and rows > cols:
            if rows % cols:
                raise Unfit(f"{layer.weight} has more outputs than inputs, but no multiple of them")
            sizes = even_sizes(cols, cols, groups)[0]
            generator = named_generator(self._seed, "topology", self._kind, rows, cols, groups)
            return relay(
                GENERATORS[self._kind](rows // cols * sizes, sizes, generator), taps, kernel, self._turn, corner
            )
        return relay(self._half(layer.weight), taps, kernel, self._turn, corner)

    def _half(self, name: str) -> BlockTopology:
        rows, cols, groups, nnz = half_budget(self._allocations[name], Mirror.INNER)
        return self._drawer(rows, cols, groups=groups, nnz=nnz, name=(name, 0))

    def _wholes(
        self, block: ResidualBlock, relays: Sequence[Relay], closing: BlockTopology
    ) -> dict[str, BlockTopology]:
        wholes = [*(step.whole for step in relays), mirror_topology(closing, Mirror.INNER)]
        return {layer.weight: whole for layer, whole in zip(block.layers, wholes)}

    def _beside(self, projection: BranchLayer, closing: BlockTopology) -> BlockTopology | None:
        """The shortcut's topology with the outputs' sets of the branch; ``None`` where it cannot have them."""
        allocation = self._allocations.get(projection.weight)
        if allocation is None or allocation.weight.parts > 1:
            return None
        rows, cols, groups, nnz = half_budget(allocation, Mirror.INNER)
        if rows != closing.shape[0] or groups != closing.groups or nnz is not None:
            return None
        sizes = torch.empty(groups, dtype=torch.long, device="cpu")
        sizes[torch.argsort(closing.row_sizes, descending=True, stable=True)] = even_sizes(rows, cols, groups)[1]
        like = make_topology("interleaved", groups, groups, groups=groups)
        sets = like.row_set.repeat_interleave(sizes)
        order = named_generator(self._seed, "topology", "residual", projection.weight)
        return BlockTopology(closing.row_set, sets[torch.randperm(cols, generator=order, device="cpu")])

    def _order(self, block: ResidualBlock, count: int) -> Tensor:
        """All channels, in an order of the block's own, so that one block mixes what another keeps apart."""
        if self._kind == "interleaved":
            # Perfect shuffles: digit after digit of a channel's number.
            shuffle = _even_shuffle(count, self._allocations[block.layers[-1].weight].groups)
            order = torch.arange(count, device="cpu")
            for _ in range(self._turn % count):
                order = order[shuffle]
            return order
        return torch.randperm(
            count, generator=named_generator(self._seed, "topology", "residual", block.name), device="cpu"
        )

    def _make(self, block: ResidualBlock, rows: int, cols: int, groups: int, nnz: int | None) -> BlockTopology:
        """A topology of the block's own."""
        topology = make_topology(
            self._kind,
            rows,
            cols,
            groups=groups if nnz is None else None,
            nnz=nnz,
            generator=named_generator(self._seed, "topology", "residual", block.name),
        )
        if self._kind == "interleaved":
            return BlockTopology(topology.row_set, topology.col_set[self._order(block, cols)])
        return topology


def _even_shuffle(count: int, groups: int) -> Tensor:
    """The permutation that deals channels to groups in turn and puts the groups one after another.

    Example:
        >>> _even_shuffle(6, 2).tolist()
        [0, 2, 4, 1, 3, 5]
    """
    return make_topology("interleaved", count, count, groups=min(groups, count)).col_order


def _carried(relays: Sequence[Relay], hidden: int) -> tuple[Tensor, Tensor]:
    """Which hidden units carry what a strided shortcut does not; and for others the shortcut's input, each once."""
    channel = (
        torch.arange(hidden, device="cpu") if not relays else torch.arange(relays[0].topology.shape[1], device="cpu")
    )
    place = torch.zeros_like(channel)
    for step in relays:
        moved = torch.where(step.tap == step.corner, 0, 1 + step.tap)
        channel, place = channel[step.picked], place[step.picked] * (1 + step.taps) + moved
    key = channel * (int(place.max()) + 1) + place
    first = torch.zeros(len(key), dtype=torch.bool, device="cpu")
    seen: set[int] = set()
    for index, value in enumerate(key.tolist()):
        first[index] = value not in seen
        seen.add(value)
    fresh = ((place > 0) & first).nonzero().flatten()
    return fresh, torch.where((place == 0) & first, channel, -1)

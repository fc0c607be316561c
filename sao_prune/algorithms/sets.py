"""Block topologies for trained weights: from their energies, or by a rule that does not look at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..allocation import Allocation
from ..seeds import named_generator
from ..topology import (
    BlockTopology,
    clustered,
    clustered_pair,
    coarsened,
    even_sizes,
    exact_sizes,
    followed,
    make_topology,
    split,
)
from .base import Stage


class Sets:
    """Gives every weight its topologies.

    Args:
        kind: ``"clustered"`` or the name of a rule.
        allocations: what each weight is asked for.
        seed: base seed.
        stage: of a schedule: sets are split inside those that there are.
        feeds: for a weight the one that consumes its outputs and shall have its sets for them, and that one's energy.
    """

    def __init__(
        self,
        kind: str,
        allocations: Sequence[Allocation],
        seed: int,
        stage: Stage | None,
        feeds: Mapping[int, tuple[int, Tensor]],
    ) -> None:
        self._kind, self._allocations, self._seed, self._stage = kind, allocations, seed, stage
        self._feeds = feeds
        self._given: dict[int, Tensor] = {}
        self.taken_over: set[int] = set()

    def __call__(self, index: int, energies: list[Tensor], first: int = 0) -> tuple[BlockTopology, ...]:
        """One topology for each of a weight's matrices from the ``first`` on, given the energies of their entries."""
        if self._kind != "clustered":
            return self._by_rule(index, len(energies))
        now: list[BlockTopology | None] = [None] * len(energies)
        if self._stage is not None:
            own = self._stage.units[index][first : first + len(energies)]
            now = [BlockTopology.from_mask(unit) for unit in own]
        found = tuple(self._searched(index, first + n, energy, now[n]) for n, energy in enumerate(energies))
        if index in self._feeds:
            self._given[self._feeds[index][0]] = found[0].row_set
        return found

    def _by_rule(self, index: int, parts: int) -> tuple[BlockTopology, ...]:
        """Layers of one shape share their sets, as everywhere in the library."""
        allocation, final = self._allocations[index], self._final(index)
        key = (self._kind, *allocation.weight.matrix, final.groups, final.nnz)
        generator = named_generator(self._seed, "topology", *key)
        groups = None if final.nnz is not None else final.groups
        rows, cols = allocation.weight.matrix
        made = make_topology(self._kind, rows, cols, groups=groups, nnz=final.nnz, generator=generator)
        return (coarsened(made, allocation.groups),) * parts

    def _searched(self, index: int, part: int, energy: Tensor, now: BlockTopology | None) -> BlockTopology:
        allocation, sizes, energy = self._allocations[index], self._sizes(index), _moderate(energy)
        generator = named_generator(self._seed, "clusters", allocation.weight.name, part, allocation.groups)
        if index in self._given:
            found = followed(energy, self._given[index], sizes, now)
            if found is not None:
                self.taken_over.add(index)
                return found
        if now is not None:
            return split(energy, now, sizes, generator)
        if index in self._feeds:
            consumer, its_energy = self._feeds[index]
            rows = self._sizes(consumer)[0]
            if len(rows) == len(sizes[0]):
                return clustered_pair(energy, its_energy, sizes, rows, generator)
        return clustered(energy, sizes=sizes, generator=generator)

    def _sizes(self, index: int) -> tuple[Tensor, Tensor]:
        allocation, final = self._allocations[index], self._final(index)
        (rows, cols), exact = allocation.weight.matrix, final.nnz is not None
        fine = exact_sizes(rows, cols, final.nnz or 0) if exact else even_sizes(rows, cols, final.groups)
        row_sizes, col_sizes = (side.view(allocation.groups, -1).sum(1) for side in fine)
        return row_sizes, col_sizes

    def _final(self, index: int) -> Allocation:
        return self._allocations[index] if self._stage is None else self._stage.final[index]


def _moderate(energy: Tensor) -> Tensor:
    """Very large or small energies times a power of two, which changes no choice and leaves room for sums."""
    exponent = int(torch.frexp(energy.max()).exponent)
    return energy if abs(exponent) < 64 else torch.ldexp(energy, torch.tensor(-exponent, device=energy.device))

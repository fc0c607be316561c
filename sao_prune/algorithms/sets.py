"""Block topologies for trained weights: from their energies, or by a rule that does not look at them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..allocation import Allocation
from ..seeds import named_generator
from ..topology import BlockTopology, clustered, coarsened, even_sizes, exact_sizes, make_topology, split
from .base import Stage


class Sets:
    """Gives every weight its topologies.

    Args:
        kind: ``"clustered"`` or the name of a rule.
        allocations: what each weight is asked for.
        seed: base seed.
        stage: of a schedule: sets are split inside those that there are.
    """

    def __init__(self, kind: str, allocations: Sequence[Allocation], seed: int, stage: Stage | None) -> None:
        self._kind, self._allocations, self._seed, self._stage = kind, allocations, seed, stage

    def __call__(self, index: int, energies: list[Tensor]) -> tuple[BlockTopology, ...]:
        """One topology for each of a weight's matrices, given the energies of their entries."""
        allocation, kind, stage = self._allocations[index], self._kind, self._stage
        (rows, cols), name = allocation.weight.matrix, allocation.weight.name
        final = allocation if stage is None else stage.final[index]
        if kind != "clustered":
            # Layers of one shape share their sets, as everywhere in the library.
            key = (kind, rows, cols, final.groups, final.nnz)
            generator = named_generator(self._seed, "topology", *key)
            groups = None if final.nnz is not None else final.groups
            made = make_topology(kind, rows, cols, groups=groups, nnz=final.nnz, generator=generator)
            return (coarsened(made, allocation.groups),) * len(energies)
        exact = final.nnz is not None
        sizes = exact_sizes(rows, cols, final.nnz or 0) if exact else even_sizes(rows, cols, final.groups)
        row_sizes, col_sizes = (side.view(allocation.groups, -1).sum(1) for side in sizes)
        out = []
        for part, energy in enumerate(energies):
            generator = named_generator(self._seed, "clusters", name, part, allocation.groups)
            if stage is None:
                out.append(clustered(energy, sizes=(row_sizes, col_sizes), generator=generator))
            else:
                now = BlockTopology.from_mask(stage.units[index][part])
                out.append(split(energy, now, (row_sizes, col_sizes), generator))
        return tuple(out)

"""The halves of mirrored weights: how much is asked of them, and their topologies."""

from __future__ import annotations

from ..allocation import Allocation
from ..topology import BlockTopology
from ..weights import Mirror
from .base import TopologyDrawer


def half_topologies(allocation: Allocation, mirror: Mirror | None, drawer: TopologyDrawer) -> tuple[BlockTopology, ...]:
    """A topology for every part of a weight, between the halves of its mirrored sides."""
    rows, cols, groups, nnz = half_budget(allocation, mirror)
    weight = allocation.weight
    return tuple(
        drawer(rows, cols, groups=groups, nnz=nnz, name=(weight.name, part), own=weight.stacked)
        for part in range(weight.parts)
    )


def half_budget(allocation: Allocation, mirror: Mirror | None) -> tuple[int, int, int, int | None]:
    """Rows, columns, groups and edges of the matrix that is mirrored; of the weight's own where none is."""
    weight, groups, nnz = allocation.weight, allocation.groups, allocation.nnz
    rows, cols = weight.matrix
    if mirror is not None:
        rows, cols = mirror.half(rows, cols)
        groups = min(groups, rows, cols)
        if nnz is not None:
            nnz = max(round(nnz * rows * cols / (weight.matrix[0] * weight.matrix[1])), rows, cols)
    return rows, cols, groups, nnz

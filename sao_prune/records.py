"""How the layers of a model become the records of a report: planned, done, left alone, or read back."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .allocate import Allocation
from .methods import Draw
from .report import LayerRecord
from .topology import BlockTopology
from .walk import ALREADY_PRUNED, PrunableWeight

_FEW = 0.05


def left_alone(weight: PrunableWeight) -> LayerRecord:
    """A weight with a reason."""
    total = weight.numel if weight.shape else 0
    return LayerRecord(weight.name, weight.kind, weight.shape, None, None, total, total, weight.reason)


def pruned(allocation: Allocation, groups: int | None, edges: int) -> LayerRecord:
    """A weight of which ``edges`` matrix entries, over all its parts, stay."""
    weight = allocation.weight
    nnz = edges * prod(weight.kernel)
    requested = 1 - allocation.density
    return LayerRecord(
        weight.name, weight.kind, weight.shape, groups, requested, nnz, weight.numel, None, _note(weight)
    )


def done(allocation: Allocation, draw: Draw) -> LayerRecord:
    """A weight after its draw."""
    return pruned(allocation, draw.groups, draw.edges)


def read_back(module: nn.Module, weight: PrunableWeight) -> LayerRecord:
    """A weight as it is found: masked, baked, or dense.

    Without a mask it counts as baked if its non-zeros are blocks, or if more than a few of its units are zero.
    """
    masked = weight.reason == ALREADY_PRUNED
    tensor = getattr(module, f"{weight.tensor}_mask" if masked else weight.tensor).detach()
    entries = weight.matrices(tensor != 0)
    units = entries.flatten(3).any(3) if weight.kernel else entries
    # A delta-orthogonal convolution is zero off its centre tap, but its kernels are there: count whole kernels.
    nnz = int(entries.sum()) if masked else int(units.sum()) * prod(weight.kernel)
    groups = block_count(units)
    share = 1 - nnz / weight.numel
    if not masked and (nnz == 0 or share == 0 or (share < _FEW and groups is None)):
        total = weight.numel
        return LayerRecord(weight.name, weight.kind, weight.shape, None, None, total, total, "dense")
    return LayerRecord(weight.name, weight.kind, weight.shape, groups, None, nnz, weight.numel, None, _note(weight))


def compact(path: str, module: Any) -> LayerRecord:
    """A block layer, told by its dense weight's shape."""
    shape, groups = module.weight_shape, module.topology.groups
    name = f"{path}.weight" if path else "weight"
    total = torch.Size(shape).numel()
    return LayerRecord(name, type(module).__name__, shape, groups, None, module.blocks.numel(), total, None, "compact")


def block_count(units: Tensor) -> int | None:
    """How many blocks each part of ``(parts, m, n)`` has; ``None`` if they differ or are not complete blocks."""
    try:
        counts = {BlockTopology.from_mask(part).groups for part in units}
    except ValueError:
        return None
    return counts.pop() if len(counts) == 1 else None


def _note(weight: PrunableWeight) -> str:
    notes = [f"{weight.parts} matrices"] if weight.parts > 1 else []
    notes += [f"tied to {path}.{tensor}" for path, tensor in weight.aliases]
    return "; ".join(notes)

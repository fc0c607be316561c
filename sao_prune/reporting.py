"""What was done to a model: one record a layer, totals, and a table; and how layers become records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .algorithms import Draw, Fidelity, ResidualRecord, Values
from .allocation import Allocation
from .discovery import ALREADY_PRUNED, PrunableWeight
from .tables import Column, Line, TableReport, plain, shape_text
from .topology import BlockTopology

_FEW = 0.05


class SparsityWarning(UserWarning):
    """Layers whose achieved sparsity is more than one percentage point from the requested one."""


@dataclass(frozen=True)
class LayerRecord:
    """One weight of the model.

    Attributes:
        name: full parameter name.
        kind: class of its module.
        shape: shape of the weight.
        groups: blocks of each of its matrices; ``None`` where it is not made of blocks.
        requested: requested sparsity; ``None`` where it is unknown or the layer is skipped.
        nnz: weights that stay.
        total: weights in all.
        reason: why the layer is skipped; ``None`` if it is pruned.
        note: anything else worth knowing.
        other: whether it is a parameter in no layer of a kind that is pruned.
        fidelity: what is left of a trained weight's work, from methods that look.
        values: ``"kept"``, the weight's own values stay where the mask is one; ``"drawn"``, new ones stand there and
            what was trained is lost; ``"solved"``, they were computed from the weight's own and from data; ``None``
            where it is unknown or the layer is skipped.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int | None
    requested: float | None
    nnz: int
    total: int
    reason: str | None = None
    note: str = ""
    other: bool = False
    fidelity: Fidelity | None = None
    values: Values | None = None

    @property
    def achieved(self) -> float:
        """Achieved sparsity."""
        return 1 - self.nnz / self.total if self.total else 0.0

    @property
    def pruned(self) -> bool:
        """Whether the layer is pruned."""
        return self.reason is None


@dataclass(frozen=True)
class Report(TableReport):
    """All layers of a model and their totals; prints as a table.

    Attributes:
        layers: the records, in the order of the walk; after them those of other parameters of two or more dimensions.
        parameters: parameters of the whole model before pruning, biases and norms included.
        title: heading of the table.
        residuals: the residual blocks in execution order and, where it was measured, the whole network, where a method
            minds them.
    """

    layers: tuple[LayerRecord, ...]
    parameters: int
    title: str = ""
    residuals: tuple[ResidualRecord, ...] = ()

    columns: ClassVar[tuple[Column, ...]] = (
        Column("layer"),
        *(Column(heading, "right") for heading in ("shape", "groups", "sparsity %", "weights")),
        Column("values"),
        Column(""),
    )

    @property
    def pruned(self) -> tuple[LayerRecord, ...]:
        """The records of the pruned layers."""
        return tuple(layer for layer in self.layers if layer.pruned)

    @property
    def skipped(self) -> tuple[LayerRecord, ...]:
        """The records of the layers that are skipped."""
        return tuple(layer for layer in self.layers if not layer.pruned and not layer.other)

    @property
    def others(self) -> tuple[LayerRecord, ...]:
        """The records of parameters of two or more dimensions in no layer of a kind that is pruned."""
        return tuple(layer for layer in self.layers if layer.other)

    @property
    def sparsity(self) -> float:
        """Achieved sparsity over the pruned layers."""
        total = sum(layer.total for layer in self.pruned)
        return 1 - self.nnz / total if total else 0.0

    @property
    def requested(self) -> float | None:
        """Requested sparsity over the pruned layers, if known."""
        total = sum(layer.total for layer in self.pruned)
        asked = [layer.requested for layer in self.pruned]
        if not total or any(r is None for r in asked):
            return None
        return sum(layer.total * (layer.requested or 0.0) for layer in self.pruned) / total

    @property
    def nnz(self) -> int:
        """Weights that stay in the pruned layers."""
        return sum(layer.nnz for layer in self.pruned)

    @property
    def remaining(self) -> int:
        """Parameters of the whole model that stay."""
        return self.parameters - sum(layer.total - layer.nnz for layer in self.pruned)

    def off_target(self, tolerance: float = 0.01) -> tuple[LayerRecord, ...]:
        """Pruned layers whose sparsity differs from the requested one by more than ``tolerance``."""
        return tuple(
            layer
            for layer in self.pruned
            if layer.requested is not None and abs(layer.achieved - layer.requested) > tolerance
        )

    def warning(self, *, layerwise: bool = True) -> str | None:
        """The text of a `SparsityWarning`: layers that keep nothing, or, if ``layerwise``, layers off target."""
        dead = [layer.name for layer in self.pruned if not layer.nnz]
        if dead:
            return f"{len(dead)} of {len(self.pruned)} layers keep no weight at all: {', '.join(dead[:6])}" + (
                ", .." if len(dead) > 6 else ""
            )
        off = self.off_target()
        if not off or not layerwise:
            return None
        named = ", ".join(
            f"{layer.name} ({_percent(layer.requested)} -> {_percent(layer.achieved)})" for layer in off[:6]
        )
        more = f" and {len(off) - 6} more" if len(off) > 6 else ""
        return (
            f"{len(off)} of {len(self.pruned)} layers cannot have the requested sparsity to within a percentage point: "
            f"{named}{more}; fit='exact' comes closer, or give them a sparsity of their own"
        )

    def lines(self) -> list[Line]:
        """One line a layer."""
        return [
            Line(
                (
                    layer.name.removesuffix(".weight"),
                    shape_text(layer.shape),
                    str(layer.groups) if layer.groups else "-",
                    _sparsity(layer),
                    f"{layer.nnz:,}",
                    layer.values or "-",
                    layer.note if layer.pruned else f"{layer.reason}",
                ),
                dim=not layer.pruned,
            )
            for layer in self.layers
        ]

    def rows(self) -> list[dict[str, Any]]:
        """The fields of each record, and its achieved sparsity."""
        return [{**plain(layer), "achieved": layer.achieved, "pruned": layer.pruned} for layer in self.layers]

    def totals(self) -> dict[str, Any]:
        """Parameters and sparsities of the whole model, and the residual blocks."""
        return {
            "parameters": self.parameters,
            "remaining": self.remaining,
            "nnz": self.nnz,
            "sparsity": self.sparsity,
            "requested": self.requested,
            "residuals": self.residuals,
        }

    def caption(self) -> str:
        """The totals, and a line for each residual block."""
        return "\n".join([self.summary(), *map(str, self.residuals)])

    def summary(self) -> str:
        """One line of totals."""
        asked = self.requested
        wanted = f" (requested {_percent(asked)})" if asked is not None else ""
        others = f", {len(self.others)} other parameters" if self.others else ""
        return (
            f"{len(self.pruned)} layers pruned, {len(self.skipped)} kept dense{others}; sparsity of the pruned layers "
            f"{_percent(self.sparsity)}{wanted}; {self.remaining:,} of {self.parameters:,} parameters stay"
        )


def _sparsity(layer: LayerRecord) -> str:
    """What was achieved, after what was asked where the two differ."""
    if not layer.pruned:
        return "-"
    asked, got = f"{100 * (layer.requested or 0):.3f}", f"{100 * layer.achieved:.3f}"
    return got if layer.requested is None or asked == got else f"{asked} -> {got}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3f} %"


def skipped(weight: PrunableWeight, *, other: bool = False) -> LayerRecord:
    """A weight with a reason."""
    total = weight.numel if weight.shape else 0
    return LayerRecord(weight.name, weight.kind, weight.shape, None, None, total, total, weight.reason, other=other)


def pruned(allocation: Allocation, groups: int | None, edges: int, values: Values) -> LayerRecord:
    """A weight of which ``edges`` matrix entries, over all its parts, stay, with values of this origin."""
    weight = allocation.weight
    nnz = edges * prod(weight.kernel)
    requested = 1 - allocation.density
    return LayerRecord(
        weight.name, weight.kind, weight.shape, groups, requested, nnz, weight.numel, None, _note(weight), values=values
    )


def done(allocation: Allocation, draw: Draw, note: str = "") -> LayerRecord:
    """A weight after its draw."""
    record = pruned(allocation, draw.groups, draw.edges, draw.origin)
    said = filter(None, (record.note, str(draw.fidelity or ""), note))
    return replace(record, nnz=draw.nnz, note="; ".join(said), fidelity=draw.fidelity)


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


def packed(path: str, module: Any) -> LayerRecord:
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
    notes += ["kept weights are standardised, so not isometric"] if weight.standardised else []
    notes += [f"tied to {path}.{tensor}" for path, tensor in weight.aliases]
    return "; ".join(notes)

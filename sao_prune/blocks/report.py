"""What `compact` did to each layer, and what it gained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from ..tables import Column, Line, TableReport, plain, shape_text
from .plan import Plan

EXPANDED = "expanded"


@dataclass(frozen=True)
class CompactRecord:
    """One linear or convolutional layer.

    Attributes:
        name: path of the module.
        kind: class of the dense layer.
        shape: shape of the dense weight.
        groups: number of blocks; ``None`` where there are none.
        execution: how it runs; of a layer that is not compact, what it computes along with itself.
        ratio: measured time of the dense layer divided by that of this one; ``None`` if not measured.
        reason: why the layer was skipped, or what `expand` did with it; ``None`` if it is compact.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int | None = None
    execution: str = ""
    ratio: float | None = None
    reason: str | None = None

    @property
    def compact(self) -> bool:
        """Whether the layer holds only its blocks now."""
        return self.reason is None


@dataclass(frozen=True)
class CompactReport(TableReport):
    """All linear and convolutional layers; prints as a table.

    Attributes:
        layers: the records, in the order of registration.
        title: heading of the table.
        plan: how the compact layers run, to be given to `compact` again; ``None`` after `expand`.
        note: anything else worth knowing, such as why there are no native kernels.
    """

    layers: tuple[CompactRecord, ...]
    title: str = ""
    plan: Plan | None = None
    note: str = ""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("layer"),
        Column("kind"),
        Column("shape", "right"),
        Column("blocks", "right"),
        Column("times dense", "right"),
        Column("runs as"),
    )

    @property
    def compact(self) -> tuple[CompactRecord, ...]:
        """The records of the compact layers."""
        return tuple(layer for layer in self.layers if layer.compact)

    @property
    def expanded(self) -> tuple[CompactRecord, ...]:
        """The records of the layers that `expand` has made dense again."""
        return tuple(layer for layer in self.layers if layer.reason == EXPANDED)

    @property
    def skipped(self) -> tuple[CompactRecord, ...]:
        """The records of the other layers that are not compact."""
        return tuple(layer for layer in self.layers if layer.reason not in (None, EXPANDED))

    def summary(self) -> str:
        """One line of totals."""
        note = f"; {self.note}" if self.note else ""
        expanded = f", {len(self.expanded)} expanded" if self.expanded else ""
        return f"{len(self.compact)} layers compact{expanded}, {len(self.skipped)} skipped{note}"

    def lines(self) -> list[Line]:
        """One line a layer."""
        return [
            Line(
                (
                    layer.name or "(the model)",
                    layer.kind,
                    shape_text(layer.shape),
                    str(layer.groups) if layer.groups else "-",
                    "-" if layer.ratio is None else f"{layer.ratio:.2f}x",
                    _runs_as(layer),
                ),
                dim=not layer.compact,
            )
            for layer in self.layers
        ]

    def rows(self) -> list[dict[str, Any]]:
        """The fields of each record."""
        return [plain(layer) for layer in self.layers]

    def totals(self) -> dict[str, Any]:
        """The note, and the plan as it is saved."""
        return {"note": self.note, "plan": None if self.plan is None else json.loads(self.plan.to_json())}


def _runs_as(layer: CompactRecord) -> str:
    if layer.compact:
        return layer.execution
    runs = f"; runs as {layer.execution}" if layer.execution else ""
    return EXPANDED if layer.reason == EXPANDED else f"skipped: {layer.reason}{runs}"

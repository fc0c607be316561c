"""What `compact` did to each layer, and what it gained."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from .plan import Plan

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CompactRecord:
    """One linear or convolutional layer.

    Attributes:
        name: path of the module.
        kind: class of the dense layer.
        shape: shape of the dense weight.
        groups: number of blocks; ``None`` where there are none.
        execution: how it runs.
        ratio: measured time of the dense layer divided by that of this one; ``None`` if not measured.
        reason: why the layer was left as it was; ``None`` if it is compact.
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
class CompactReport:
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

    @property
    def compact(self) -> tuple[CompactRecord, ...]:
        """The records of the compact layers."""
        return tuple(layer for layer in self.layers if layer.compact)

    @property
    def left(self) -> tuple[CompactRecord, ...]:
        """The records of the layers that were left as they were."""
        return tuple(layer for layer in self.layers if not layer.compact)

    def summary(self) -> str:
        """One line of totals."""
        note = f"; {self.note}" if self.note else ""
        return f"{len(self.compact)} layers compact, {len(self.left)} left as they were{note}"

    def table(self) -> Table:
        """The report as a rich table."""
        from rich.table import Table

        table = Table(title=self.title or None, caption=self.summary(), title_justify="left", caption_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("kind")
        table.add_column("shape", justify="right")
        table.add_column("blocks", justify="right")
        table.add_column("runs as")
        table.add_column("times dense", justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name or "(the model)",
                layer.kind,
                " x ".join(map(str, layer.shape)) or "-",
                str(layer.groups) if layer.groups else "-",
                layer.execution if layer.compact else f"left: {layer.reason}",
                "-" if layer.ratio is None else f"{layer.ratio:.2f}x",
                style=None if layer.compact else "dim",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=140, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

"""What the figures of a report show, as numbers: a chart has panels, a panel has a line a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..summary import Row

# More panels than this are not read; those left out are named in the caption.
MOST_PANELS = 24

Values = tuple[float, ...]
# A place on an axis and its text.
Tick = tuple[float, str]


@dataclass(frozen=True)
class Line:
    """One method: values with their lowest and highest.

    Attributes:
        form: ``band`` for a curve with a shaded band; ``bars`` for points with error bars; ``level`` for one value
            that holds everywhere.
    """

    method: str
    x: Values
    y: Values
    low: Values
    high: Values
    form: str = "band"


@dataclass(frozen=True)
class Panel:
    """The lines of one network and amount.

    Attributes:
        label: of its own horizontal axis, and ``ticks`` on it; without them the chart's hold.
    """

    title: str
    lines: tuple[Line, ...]
    label: str = ""
    ticks: tuple[Tick, ...] | None = None


@dataclass(frozen=True)
class Chart:
    """One figure: panels with the same axes.

    Attributes:
        name: of its file, without the suffix.
        caption: a sentence or two on what is drawn, and what is left out.
        labels: of the axes.
        limits: of the vertical axis.
        ticks: places on the horizontal axis and their texts; ``None`` leaves them to whole numbers.
        logarithmic: the vertical axis.
        headline: it shows what the comparison is about, and so stands before the tables.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    labels: tuple[str, str]
    limits: tuple[float, float]
    ticks: tuple[Tick, ...] | None = None
    logarithmic: bool = False
    headline: bool = False

    @property
    def columns(self) -> int:
        """How many panels stand beside one another."""
        return {1: 1, 2: 2, 4: 2}.get(len(self.panels), 3)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have a line, in order."""
        return tuple(dict.fromkeys(line.method for panel in self.panels for line in panel.lines))


def at_most(panels: Sequence[Panel]) -> tuple[tuple[Panel, ...], str]:
    """As many panels as are read, and a sentence on the others."""
    left_out = len(panels) - MOST_PANELS
    return tuple(panels[:MOST_PANELS]), f" {left_out} more networks are in the tables." if left_out > 0 else ""


def over_seeds(method: str, x: Values, runs: Sequence[Sequence[float]], form: str) -> Line:
    """Fractions at every x, one a seed, as per cent."""
    percent = [[100 * value for value in values] for values in runs]
    return Line(method, x, tuple(map(fmean, percent)), tuple(map(min, percent)), tuple(map(max, percent)), form)


def accuracy_limits(panels: Iterable[Panel]) -> tuple[float, float]:
    """Room for every line, the same in all panels."""
    lines = [line for panel in panels for line in panel.lines]
    if not lines:
        return 0.0, 100.0
    low, high = min(min(line.low) for line in lines), max(max(line.high) for line in lines)
    room = max(0.04 * (high - low), 0.1)
    return max(0.0, low - room), min(100.0 + room, high + room)


def rows_by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by what ``key`` says of them, in order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found

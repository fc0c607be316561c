"""The figure of what accuracy costs: in multiply-adds, in seconds and in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..summary import Row, Summary
from .chart import Chart, Panel, Tick, accuracy_limits, at_most, over_seeds, rows_by
from .table import groups, stored_bytes

# Places for ticks, few to many; the first choice that gives enough of them is taken.
_NUMBERS = [
    [multiple * 10.0**power for power in range(16) for multiple in multiples]
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))
]
_SIXTIETHS = ((1, 10), (1, 5, 20), (1, 2, 5, 10, 20, 40), (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50))
_TIMES = [
    [0.01, 0.1, *(value * unit for unit in (1, 60) for value in values), *(3600 * hours for hours in numbers)]
    for values, numbers in zip(_SIXTIETHS, _NUMBERS)
]
_ENOUGH = 3


def cost_chart(summary: Summary) -> Chart | None:
    """Final accuracy against multiply-adds, seconds (of the processor where no other device took part) and bytes.

    Networks that were trained in a single way are in the table only.
    """
    # A machine that does other work beside it makes a training last longer, not take more of the processor.
    seconds, time = ("cpu_seconds", "processor time") if summary.on_cpu else ("seconds", "time")
    costs = (
        _Cost("multiply-adds of one image", lambda row: row.flops, _NUMBERS, _count),
        _Cost(f"{time} of one training", lambda row: getattr(row, seconds), _TIMES, _time),
        _Cost("bytes of the parameters", stored_bytes, _NUMBERS, lambda value: f"{_count(value)}B"),
    )
    panels = []
    for group in groups(summary):
        for cost in costs:
            rows = [row for row in group.rows if row.accuracies and cost.of(row)]
            # A single point has nothing beside it to be compared with.
            if len(rows) > 1:
                panels.append(_panel(group.title, cost, rows))
    if not panels:
        return None
    shown, left_out = at_most(panels)
    return Chart(
        "cost",
        "Accuracy against its cost",
        "Final accuracy on the test set: mean over seeds, with bars from the lowest to the highest; the further up and "
        "to the left, the better. Multiply-adds are those with a weight that is not zero, times are medians, bytes "
        "those of the parameters that are not zero, four each, without the positions that an irregular mask must "
        f"store beside them. The horizontal axes are logarithmic.{left_out}",
        shown,
        ("", "test accuracy (%)"),
        accuracy_limits(shown),
        headline=True,
    )


@dataclass(frozen=True)
class _Cost:
    """A cost of a row, where ticks for it may stand, and how its values read."""

    label: str
    of: Callable[[Row], float | None]
    places: Sequence[Sequence[float]]
    say: Callable[[float], str]


def _panel(title: str, cost: _Cost, rows: Sequence[Row]) -> Panel:
    """One cost of one network: a point for every row, those of a method joined from the least sparse on."""

    def place(row: Row) -> float:
        return math.log10(cost.of(row) or 1)

    lines = []
    for method, members in rows_by(rows, lambda row: row.configuration.method.title).items():
        members.sort(key=lambda row: row.sparsity or 0.0)
        lines.append(over_seeds(method, tuple(map(place, members)), [row.accuracies for row in members], "bars"))
    return Panel(title, tuple(lines), cost.label, _ticks([place(row) for row in rows], cost))


def _ticks(places: Sequence[float], cost: _Cost) -> tuple[Tick, ...]:
    """Round values between the lowest and the highest; where they lie too close together for that, these two."""
    low, high = min(places), max(places)
    room = max(0.06 * (high - low), 0.02)
    found: list[float] = []
    for choice in cost.places:
        found = [place for place in map(math.log10, choice) if low - room <= place <= high + room]
        if len(found) >= _ENOUGH:
            break
    if len(found) < 2:
        found = sorted({low, high})
    return tuple((place, cost.say(10**place)) for place in found)


def _time(seconds: float) -> str:
    """A time in the unit that suits it, with no more digits than it has."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g}\u00a0{unit}"
    return f"{seconds:.3g}\u00a0s"


def _count(value: float) -> str:
    """A number with three digits and a prefix: 1.2 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}\u00a0{prefix}"
    return f"{value:.3g}\u00a0"

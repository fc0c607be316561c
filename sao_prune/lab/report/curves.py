"""Figures over epochs and over layers: a curve a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ..summary import Row, Summary
from .chart import MOST_PANELS, Chart, Line, Panel, Values, accuracy_limits, at_most, over_seeds
from .table import groups

# More points than this do not make a curve of a few centimetres clearer.
_MOST_POINTS = 100
# Singular values below this leave the figure through its lower edge: the signal is gone either way.
_FLOOR = 1e-12


def accuracy_chart(summary: Summary) -> Chart | None:
    """Accuracy over epochs, a panel for every network and amount."""
    step = -(-max(len(curve) for row in summary.rows for curve in row.curves or [()]) // _MOST_POINTS)

    def line(row: Row) -> Line | None:
        if not row.curves:
            return None
        # A run that diverged, and so stopped early, keeps its last accuracy.
        longest = max(len(curve) for curve in row.curves)
        runs = [[*curve, *[curve[-1]] * (longest - len(curve))] for curve in row.curves]
        epochs = range(longest, 0, -step)[::-1]
        values = [[run[epoch - 1] for run in runs] for epoch in epochs]
        return over_seeds(row.configuration.method.title, tuple(map(float, epochs)), values, "band")

    panels, left_out = _panels(summary, line)
    if not panels:
        return None
    often = "every epoch" if step == 1 else f"every {step} epochs"
    return Chart(
        "accuracy",
        "Accuracy over training",
        f"Accuracy on the test set after {often}: mean over seeds, lowest to highest shaded.{left_out}",
        panels,
        ("epoch", "test accuracy (%)"),
        accuracy_limits(panels),
    )


def spectrum_chart(summary: Summary) -> Chart | None:
    """Singular values of the Jacobian at initialisation, a panel for every network and amount."""

    def line(row: Row) -> Line | None:
        if row.spectrum is None or not row.spectrum["depth"]:
            return None
        mean, low, high = (_above_floor(row.spectrum[key]) for key in ("mean", "smallest", "largest"))
        return Line(row.configuration.method.title, tuple(map(float, row.spectrum["depth"])), mean, low, high)

    panels, left_out = _panels(summary, line)
    if not panels:
        return None
    return Chart(
        "jacobian",
        "Signal through depth, before training",
        "Singular values of the Jacobian from the input to the output of layer k at initialisation, "
        f"{_directions(summary)}: mean, smallest to largest shaded. Isometry is 1 everywhere.{left_out}",
        panels,
        ("layer k", "singular value"),
        _spectrum_limits(panels),
        logarithmic=True,
    )


def _panels(summary: Summary, line: Callable[[Row], Line | None]) -> tuple[tuple[Panel, ...], str]:
    """A panel for every network and amount, with dense in each of its network; only the sparsest if there are many."""
    by_network: list[list[Panel]] = []
    for group in groups(summary):
        dense = [row for row in group.rows if row.configuration.method.is_dense]
        of_network = []
        for block in group.blocks:
            pruned = [row for row in block.rows if not row.configuration.method.is_dense]
            if not pruned and len(group.blocks) > 1:
                continue
            members = sorted([*dense, *pruned], key=lambda row: summary.rows.index(row))
            lines = tuple(found for row in members if (found := line(row)) is not None)
            if lines:
                of_network.append(Panel(", ".join(text for text in (group.title, block.title) if text), lines))
        by_network.append(of_network)
    everything = [panel for panels in by_network for panel in panels]
    if len(everything) <= MOST_PANELS:
        return tuple(everything), ""
    shown, left_out = at_most([panels[-1] for panels in by_network if panels])
    return shown, f" Of each network, only the last amount is drawn.{left_out}"


def _above_floor(values: Iterable[float | None]) -> Values:
    """What a logarithmic axis can show; a value that was not finite, and so is not in the results, is a gap."""
    return tuple(math.nan if value is None else max(value, _FLOOR / 1e3) for value in values)


def _spectrum_limits(panels: Iterable[Panel]) -> tuple[float, float]:
    lines = [line for panel in panels for line in panel.lines]
    means = [value for line in lines for value in line.y if math.isfinite(value)]
    highs = [value for line in lines for value in line.high if math.isfinite(value)]
    return max(_FLOOR, min(means, default=1.0) / 10), max(10.0, 3 * max(highs, default=1.0))


def _directions(summary: Summary) -> str:
    found = dict.fromkeys(row.spectrum.get("directions") for row in summary.rows if row.spectrum is not None)
    return " or ".join(
        f"along {'all directions of the input' if count is None else f'a random subspace of {count} dimensions'}"
        for count in found
    )

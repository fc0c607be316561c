"""The figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .summary import Row, Summary

Values = NDArray[np.float64]
Member = tuple[int, Row]

# Okabe and Ito's colours can be told apart with any colour vision; dashes and markers help without colour.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = (
    "-",
    "-",
    (0, (6, 2)),
    (0, (4, 1.5, 1, 1.5)),
    (0, (2, 1.5)),
    (0, (7, 2, 1, 2)),
    (0, (1, 1.2)),
)
_MARKERS = ("o", "s", "^", "D", "v", "X", "P")

# Singular values below this leave the figure through its lower edge: the signal is gone either way.
_FLOOR = 1e-12


def draw_accuracy(summary: Summary, path: Path) -> bool:
    """Accuracy over epochs, a panel for every network and amount: mean over seeds, lowest to highest as a band.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in summary.rows if row.curves]
    if not rows:
        return False
    groups = _groups(summary, rows)
    figure, panels = _grid(len(groups), columns=2, size=(7.0, 4.2), margin=0.8)
    figure.suptitle(f"{_name(summary)}\naccuracy over training: mean over seeds, lowest to highest shaded", fontsize=11)
    for axes, (title, members) in zip(panels, groups):
        for style, row in members:
            curves = _padded(row.curves)
            label = fill(f"{row.arm.method.title}: {curves[:, -1].mean():.1f} %", 24)
            epochs = np.arange(1, curves.shape[1] + 1)
            _line(axes, epochs, curves.mean(0), (curves.min(0), curves.max(0)), style, label)
        axes.set(title=title, xlabel="epoch", ylabel="accuracy on the test set (%)", ylim=(0, 102))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, handlelength=3)
    _save(figure, panels, path)
    return True


def draw_spectra(summary: Summary, path: Path) -> bool:
    """Singular values of the input-to-layer Jacobian at initialisation, a panel for every arm.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in summary.rows if row.spectrum is not None]
    if not rows:
        return False
    titles = _styles(summary)
    figure, panels = _grid(len(rows), columns=4, size=(2.9, 2.5), margin=0.9, share=True)
    figure.suptitle(
        f"{_name(summary)}\nJacobian from the input to layer k, at initialisation: "
        "mean singular value, smallest to largest shaded",
        fontsize=11,
    )
    for axes, row in zip(panels, rows):
        assert row.spectrum is not None
        mean, low, high = (
            np.maximum(np.array(row.spectrum[key]), _FLOOR / 1e3) for key in ("mean", "smallest", "largest")
        )
        style = titles.index(row.arm.method.title)
        _line(axes, np.array(row.spectrum["depth"]), mean, (low, high), style, row.arm.title)
        axes.axhline(1, color="#888888", linewidth=0.8, zorder=1)
        axes.set_title(fill(row.arm.title, 34), fontsize=10)
        axes.set_yscale("log")
    spectra = [row.spectrum for row in rows if row.spectrum is not None]
    lowest, highest = min(min(s["mean"]) for s in spectra), max(max(s["largest"]) for s in spectra)
    panels[0].set_ylim(max(_FLOOR, lowest / 1e3), max(10.0, 3 * highest))
    figure.supxlabel("layer k", fontsize=10)
    figure.supylabel("singular value", fontsize=10)
    _save(figure, panels, path)
    return True


def _name(summary: Summary) -> str:
    return summary.recipe.title or summary.recipe.name


def _styles(summary: Summary) -> list[str]:
    """Method titles in the order of the recipe: a style goes with each."""
    return list(dict.fromkeys(row.arm.method.title for row in summary.rows))


def _groups(summary: Summary, rows: Sequence[Row]) -> list[tuple[str, list[Member]]]:
    """Rows of one network and one amount together, with dense in each group of its network; a style goes with each."""
    titles = _styles(summary)
    groups = []
    for setting in summary.recipe.settings:
        for options in setting.network.grid():
            of_network = [row for row in rows if row.arm.setting == setting and row.arm.options == options]
            for amount in setting.prune.grid():
                members = [row for row in of_network if row.arm.prune in ({}, amount)]
                if members:
                    arm = max((row.arm for row in members), key=lambda arm: len(arm.amount_title))
                    title = ", ".join(text for text in (arm.network_title, arm.amount_title) if text)
                    groups.append((title, [(titles.index(row.arm.method.title), row) for row in members]))
    return groups


def _padded(curves: Sequence[Sequence[float]]) -> Values:
    """Per cent, one row a run; a run that diverged, and so stopped early, keeps its last accuracy."""
    longest = max(len(curve) for curve in curves)
    return 100 * np.array([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves])


def _grid(
    count: int, columns: int, size: tuple[float, float], margin: float, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, each of ``size`` inches, with room for titles above and beside them."""
    columns = min(count, columns)
    lines = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns + margin, size[1] * lines + margin), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = []
    for index in range(count):
        shared = panels[0] if share and panels else None
        axes = figure.add_subplot(lines, columns, index + 1, sharex=shared, sharey=shared)
        if share:
            axes.tick_params(labelleft=index % columns == 0, labelbottom=index + columns >= count)
        panels.append(axes)
    return figure, panels


def _line(axes: Axes, x: NDArray[Any], y: Values, band: tuple[Values, Values], style: int, label: str) -> None:
    colour = _COLOURS[style % len(_COLOURS)]
    # Lines that lie on one another still show: their markers stand at different places.
    gap = max(1, len(x) // 40)
    marks = (style % 5 * gap, 5 * gap) if len(x) > 5 else 1
    axes.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0, zorder=2)
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=_DASHES[style % len(_DASHES)],
        marker=_MARKERS[style % len(_MARKERS)],
        markevery=marks,
        markersize=4.5,
        linewidth=1.7,
        label=label,
        zorder=3,
    )


def _save(figure: Figure, panels: Sequence[Axes], path: Path) -> None:
    for axes in panels:
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)

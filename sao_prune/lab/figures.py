"""The figures of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .summary import Row, Summary

# Okabe and Ito's colours: told apart with any colour vision; dashes and markers tell them apart without colour.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = (
    "-",
    "-",
    (0, (6, 2)),
    (0, (4, 1.5, 1, 1.5)),
    (0, (2, 1.5)),
    (0, (7, 2, 1, 2, 1, 2)),
    (0, (1, 1.2)),
)
_MARKERS = ("o", "s", "^", "D", "v", "X", "P")

# Singular values below this are drawn on the lower edge: the signal is gone either way.
_FLOOR = 1e-12


def draw_accuracy(summary: Summary, path: Path) -> bool:
    """Accuracy over epochs: mean over seeds as a line, lowest to highest as a band. False if there is none yet."""
    rows = [row for row in summary.rows if row.curves]
    if not rows:
        return False
    figure, panels = _panels(summary, rows, "Accuracy on the test set over training")
    for axes, members in panels:
        for style, row in members:
            length = max(len(curve) for curve in row.curves)
            # A diverged run stops early: it keeps its last accuracy.
            curves = 100 * np.array([[*curve, *[curve[-1]] * (length - len(curve))] for curve in row.curves])
            epochs = np.arange(1, length + 1)
            label = f"{row.arm.method.title}  {curves[:, -1].mean():.1f} %"
            _line(axes, epochs, curves.mean(0), (curves.min(0), curves.max(0)), style, label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy on the test set (%)")
        axes.set_ylim(0, 102)
        axes.set_xlim(0.8, summary.recipe.train.epochs + 0.2)
    _finish(figure, [axes for axes, _ in panels], path)
    return True


def draw_spectra(summary: Summary, path: Path) -> bool:
    """Singular values of the input-to-layer Jacobian at initialisation: mean line, smallest to largest as a band."""
    rows = [row for row in summary.rows if row.spectrum is not None]
    if not rows:
        return False
    figure, panels = _panels(
        summary, rows, "Singular values of the Jacobian from the input to layer k, at initialisation"
    )
    for axes, members in panels:
        for style, row in members:
            assert row.spectrum is not None
            mean, low, high = (
                np.maximum(np.array(row.spectrum[key], dtype=float), _FLOOR) for key in ("mean", "smallest", "largest")
            )
            _line(axes, np.array(row.spectrum["depth"]), mean, (low, high), style, row.arm.method.title)
        axes.set_yscale("log")
        axes.set_xlabel("layer k")
        axes.set_ylabel("singular value")
        axes.set_ylim(bottom=_FLOOR)
    _finish(figure, [axes for axes, _ in panels], path)
    return True


Member = tuple[int, Row]


def _panels(summary: Summary, rows: Sequence[Row], title: str) -> tuple[Figure, list[tuple[Axes, list[Member]]]]:
    """One panel for every network and amount of the grid; dense is in each panel of its network."""
    methods = [method.title for method in summary.recipe.methods]
    groups = [(options, amount) for options in summary.recipe.network.grid() for amount in summary.recipe.prune.grid()]
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(5.2 * columns + 2.4, 4.3 * lines + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{summary.recipe.title or summary.recipe.name}", fontsize=11)
    panels = []
    for index, (options, amount) in enumerate(groups):
        axes = figure.add_subplot(lines, columns, index + 1)
        members = [
            (methods.index(row.arm.method.title), row)
            for row in rows
            if row.arm.network_options == options and row.arm.prune in ({}, amount)
        ]
        if len(groups) > 1:
            axes.set_title(next(iter(_subtitle(members))), fontsize=10)
        panels.append((axes, members))
    return figure, panels


def _subtitle(members: Sequence[Member]) -> Iterator[str]:
    for _, row in reversed(members):
        yield row.arm.title.partition(", ")[2]
    yield ""


def _line(
    axes: Axes, x: np.ndarray, y: np.ndarray, band: tuple[np.ndarray, np.ndarray], style: int, label: str
) -> None:
    colour = _COLOURS[style % len(_COLOURS)]
    every = max(1, len(x) // 8)
    # Lines that lie on one another still show: each has its markers at places of its own.
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=_DASHES[style % len(_DASHES)],
        linewidth=1.8,
        marker=_MARKERS[style % len(_MARKERS)],
        markersize=5,
        markevery=(style % every if every > 1 else 0, every),
        label=label,
        zorder=3,
    )
    axes.fill_between(x, *band, color=colour, alpha=0.13, linewidth=0, zorder=2)


def _finish(figure: Figure, panels: Sequence[Axes], path: Path) -> None:
    for axes in panels:
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, handlelength=3)
    figure.savefig(path)

"""Figures that look finished: titles, units, legends, colours for every kind of vision, light and dark.

Every function takes numbers and returns a matplotlib figure; `save` writes it. matplotlib is needed only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from ..files import replacing

Theme = Literal["light", "dark"]


@dataclass(frozen=True)
class _Look:
    ground: str
    ink: str
    faint: str
    colours: tuple[str, ...]


# Okabe and Ito's colours, which any colour vision tells apart, lightened where they would sink into a dark ground.
_LOOKS: dict[str, _Look] = {
    "light": _Look("#ffffff", "#1a1a1a", "#d9d9d9", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9")),
    "dark": _Look("#14171c", "#e8e8e8", "#3a3f47", ("#56B4E9", "#FF8A3D", "#2FCB9E", "#E79CC5", "#F0E442", "#9FB7FF")),
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "X")


def gap_against_sparsity(
    gaps: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    sparsities: Sequence[float],
    title: str = "Ramanujan gap of one layer",
    theme: Theme = "light",
) -> Figure:
    """Ramanujan gap against sparsity: a row for each definition, a panel for each method, a line for each width.

    Args:
        gaps: ``gaps[definition][method][width]``, one number a sparsity.
        sparsities: in [0, 1).
        title: heading of the figure.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure.
    """
    methods = list(next(iter(gaps.values())))
    figure, grid = _panels(len(gaps), len(methods), (3.5, 2.9), title, theme)
    at = np.arange(len(sparsities))
    for line, (definition, by_method) in zip(grid, gaps.items()):
        for axes, (method, widths) in zip(line, by_method.items()):
            for index, (width, values) in enumerate(widths.items()):
                axes.plot(at, values, **_style(index, theme), label=f"width {width}")
            axes.axhline(0, color=_LOOKS[theme].ink, linewidth=1)
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter(_plain)
            axes.margins(y=0.08)
            axes.set_xticks(at, [f"{100 * s:g}" for s in sparsities], rotation=45, ha="right")
            axes.set_title(f"{method}, {definition}", fontsize=10)
        line[0].set_ylabel("gap (positive: Ramanujan)")
        _same_limits(line)
    for axes in grid[-1]:
        axes.set_xlabel("sparsity (%)")
    _legend(figure, grid[0][0])
    return figure


def eigenvalue_spectra(
    spectra: Mapping[str, Tensor], title: str = "Eigenvalues of the adjacency matrix", theme: Theme = "light"
) -> Figure:
    """Histograms of eigenvalues, a panel for each spectrum, counts on a logarithmic axis.

    Args:
        spectra: eigenvalues, by name.
        title: heading of the figure.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure.
    """
    figure, grid = _panels(1, len(spectra), (3.1, 2.9), title, theme)
    for index, (axes, (name, values)) in enumerate(zip(grid[0], spectra.items())):
        numbers = values.double().numpy()
        reach = float(np.abs(numbers).max()) * 1.15
        axes.hist(numbers, bins=np.linspace(-reach, reach, 62).tolist(), color=_LOOKS[theme].colours[index % 6])
        axes.set_yscale("log")
        axes.set_ylim(0.7, len(numbers) * 2)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("eigenvalue")
    grid[0][0].set_ylabel("eigenvalues (count)")
    return figure


def reachability_matrices(
    matrices: Mapping[str, Mapping[str, Tensor]], title: str = "Reachability", theme: Theme = "light"
) -> Figure:
    """Boolean matrices, a row for each method, a panel for each depth: which inputs (across) reach which outputs.

    Args:
        matrices: boolean ``(outputs, inputs)`` matrices, by method and by depth.
        title: heading of the figure.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure.
    """
    rows, columns = len(matrices), len(next(iter(matrices.values())))
    figure, grid = _panels(rows, columns, (1.75, 1.95), title, theme)
    look = _LOOKS[theme]
    for index, (line, (name, by_depth)) in enumerate(zip(grid, matrices.items())):
        for axes, (depth, matrix) in zip(line, by_depth.items()):
            shades = ListedColormap([look.faint, look.colours[index % 6]])
            axes.imshow(matrix.numpy(), cmap=shades, vmin=0, vmax=1, interpolation="nearest", rasterized=True)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_aspect("equal")
            axes.grid(False)
            axes.set_title(f"{depth}\n{_share(matrix)}", fontsize=9)
        line[0].set_ylabel(f"{name}\noutputs", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("inputs", fontsize=9)
    return figure


def singular_value_histograms(
    values: Mapping[str, Mapping[str, Tensor]], title: str = "Singular values of the Jacobian", theme: Theme = "light"
) -> Figure:
    """Distributions of singular values: a panel for each outer key, a stepped histogram for each inner one.

    Args:
        values: singular values, by panel and by name.
        title: heading of the figure.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure.
    """
    figure, grid = _panels(1, len(values), (3.3, 3.0), title, theme)
    look = _LOOKS[theme]
    for axes, (name, by_method) in zip(grid[0], values.items()):
        reach = max(1.05, *(float(v.max()) * 1.02 for v in by_method.values()))
        bins = np.linspace(0, reach, 41).tolist()
        for index, (method, numbers) in enumerate(by_method.items()):
            colour = look.colours[index % 6]
            axes.hist(numbers.numpy(), bins, color=colour, alpha=0.25)
            axes.hist(
                numbers.numpy(),
                bins,
                histtype="step",
                color=colour,
                linewidth=1.6,
                linestyle=_DASHES[index % 4],
                label=method,
            )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("singular value")
        axes.set_yscale("symlog", linthresh=10)
        axes.set_yticks([0, 10, 100], ["0", "10", "100"])
        axes.set_ylim(0, 400)
    grid[0][0].set_ylabel("singular values (count)")
    _legend(figure, grid[0][0])
    return figure


def accuracy_bars(
    accuracies: Mapping[str, Mapping[str, float]], title: str = "Accuracy on the test set", theme: Theme = "light"
) -> Figure:
    """Accuracy (%) as bars: a cluster for each outer key, a bar for each inner one.

    Args:
        accuracies: in percent, by cluster and by name.
        title: heading of the figure.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure.
    """
    figure, grid = _panels(1, 1, (max(4.0, 0.55 * sum(map(len, accuracies.values())) + 2), 3.4), title, theme)
    axes, look = grid[0][0], _LOOKS[theme]
    names = list(dict.fromkeys(method for by_method in accuracies.values() for method in by_method))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        at = [c + (index - (len(names) - 1) / 2) * width for c, g in enumerate(accuracies.values()) if name in g]
        heights = [g[name] for g in accuracies.values() if name in g]
        bars = axes.bar(at, heights, 0.92 * width, color=look.colours[index % 6], label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, color=look.ink, padding=2)
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 108)
    axes.grid(False, axis="x")
    _legend(figure, axes)
    return figure


def storage_against_density(
    densities: Sequence[float],
    numbers: Mapping[str, Sequence[float]],
    title: str = "Numbers to store a sparse matrix",
    theme: Theme = "light",
) -> Figure:
    """Numbers stored, as a share of the dense matrix's, against density; a line for each format.

    Args:
        densities: shares of weights that stay, in [0, 1].
        numbers: of values to store, by scheme.
        title: heading of the figure.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure.
    """
    figure, grid = _panels(1, 1, (5.2, 3.6), title, theme)
    axes = grid[0][0]
    for index, (name, values) in enumerate(numbers.items()):
        axes.plot(densities, values, **{**_style(index, theme), "marker": None}, label=name)
    axes.axhline(1, color=_LOOKS[theme].ink, linewidth=1)
    axes.annotate("the dense matrix", (0, 1), (4, 4), textcoords="offset points", fontsize=9, color=_LOOKS[theme].ink)
    axes.set(xlabel="density", ylabel="numbers stored / dense matrix's", xlim=(0, max(densities)), ylim=(0, None))
    axes.legend(frameon=False, labelcolor=_LOOKS[theme].ink, loc="lower right")
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; its folder is made if need be.

    Args:
        figure: the figure.
        path: of the file; its ending tells the format, PNG where it has none.

    Returns:
        What was written.

    Raises:
        ValueError: an ending that matplotlib writes no format for.
    """
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    kind = path.suffix[1:].lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        # Figures that are drawn anew differ only where their numbers do.
        figure.savefig(scratch, format=kind, dpi=130, metadata={"Software": None} if kind == "png" else None)
    return path


def _panels(
    rows: int, columns: int, size: tuple[float, float], title: str, theme: Theme
) -> tuple[Figure, list[list[Axes]]]:
    """A titled figure of ``rows x columns`` panels, each of ``size`` inches."""
    if theme not in _LOOKS:
        raise ValueError(f"theme is 'light' or 'dark', got {theme!r}")
    look = _LOOKS[theme]
    figure = Figure((size[0] * columns + 0.4, size[1] * rows + 0.9), layout="constrained", facecolor=look.ground)
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=look.ink, fontsize=12)
    grid = [
        [figure.add_subplot(rows, columns, 1 + row * columns + column) for column in range(columns)]
        for row in range(rows)
    ]
    for axes in (a for line in grid for a in line):
        axes.set_facecolor(look.ground)
        axes.tick_params(colors=look.ink, labelsize=9)
        axes.grid(True, color=look.faint, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(look.faint)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(look.ink)
    return figure, grid


def _plain(value: float, position: float) -> str:
    return f"{value:g}"


def _share(matrix: Tensor) -> str:
    """Share of ones; never rounded up to all of them."""
    return "all" if bool(matrix.all()) else f"{int(1e4 * float(matrix.double().mean())) / 100:.2f} %"


def _style(index: int, theme: Theme) -> dict[str, Any]:
    colours = _LOOKS[theme].colours
    return {
        "color": colours[index % len(colours)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.8,
    }


def _same_limits(line: Sequence[Axes]) -> None:
    low = min(axes.get_ylim()[0] for axes in line)
    high = max(axes.get_ylim()[1] for axes in line)
    for axes in line:
        axes.set_ylim(low, high)


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    colour = figure.get_suptitle() and axes.xaxis.label.get_color()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, labelcolor=colour
    )

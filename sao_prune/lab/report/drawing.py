"""Charts drawn: a PNG with all panels, and a small SVG for each panel whose colours a page decides."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ...files import replacing
from .chart import Chart, Line, Panel, Tick

# Any colour vision tells these apart, each on its ground; dashes and markers help without colour. The first is dense's.
LIGHT = {"ink": "#1b1f24", "faint": "#d8dce1"}
_ON_LIGHT = ("#0072b2", "#c2410c", "#00805a", "#b0488a", "#8c6d00", "#6a51a3", "#5c4033", "#4d7c0f")
LIGHT |= {f"c{i}": c for i, c in enumerate(_ON_LIGHT, 1)}
DARK = {"ink": "#e6e8eb", "faint": "#3a3f47"}
_ON_DARK = ("#56b4e9", "#ff8a3d", "#2fcb9e", "#e79cc5", "#f0e442", "#a99bff", "#d6a77a", "#a3d65c")
DARK |= {f"c{i}": c for i, c in enumerate(_ON_DARK, 1)}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "X", "P")

# Inches: of a panel of a PNG by the columns it shares the width with, of a letter of a tick, and of the broad SVGs.
_PNG_WIDTHS = {1: 8.0, 2: 5.2, 3: 4.1}
_LETTER = 0.075
_BROAD = {1: (10.4, 4.0), 2: (5.2, 3.1)}

Styles = Mapping[str, int]


def styles(methods: Sequence[tuple[str, bool]]) -> dict[str, int]:
    """A style for every method, the same in all figures: 0 for dense, from 1 on for the others."""
    pruned = list(dict.fromkeys(title for title, is_dense in methods if not is_dense))
    return {title: 0 if is_dense else 1 + pruned.index(title) for title, is_dense in methods}


def draw_png(chart: Chart, path: Path, heading: str, style: Styles) -> None:
    """All panels with one legend below them, on white."""
    with _plain_text():
        columns = chart.columns
        lines = -(-len(chart.panels) // columns)
        legend = -(-len(chart.methods) // (2 * columns))
        size = (_PNG_WIDTHS[columns] * columns + 0.6, 2.9 * lines + 1.0 + 0.25 * legend)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        width = int(size[0] * 13)
        figure.suptitle(f"{fill(heading, width)}\n{fill(chart.caption, width)}", fontsize=9.5)
        for index, panel in enumerate(chart.panels):
            axes = figure.add_subplot(lines, columns, index + 1)
            axes.set_title(fill(panel.title, 48), fontsize=9.5)
            _draw(figure, axes, chart, panel, style)
        handles = [Line2D([], [], **_look(style[method]), markersize=4.5, linewidth=1.6) for method in chart.methods]
        labels = [fill(_shown(method), 36) for method in chart.methods]
        columns = min(len(labels), 2 * columns)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2)
        with replacing(path) as part:
            figure.savefig(part, format="png")


def draw_svgs(chart: Chart, style: Styles, names: Mapping[str, str]) -> list[str]:
    """SVGs of every panel, without its title; their colours are CSS variables with the names of `LIGHT`.

    Where fewer than three panels share the width of the page, each is drawn twice, for a broad page and for a slim one,
    and the page's style shows one of them.

    Args:
        names: what a method's name stands for, shown where the pointer rests on its line.
    """
    with _plain_text():
        sizes = {"slim": (4.2, 2.8)}
        if chart.columns < 3:
            sizes["broad"] = _BROAD[chart.columns]
        return [
            "".join(
                _panel(chart, panel, style, names, f"{chart.name}{index}{form}", size, form)
                for form, size in sizes.items()
            )
            for index, panel in enumerate(chart.panels)
        ]


def _panel(
    chart: Chart,
    panel: Panel,
    style: Styles,
    names: Mapping[str, str],
    place: str,
    size: tuple[float, float],
    form: str,
) -> str:
    figure = Figure(figsize=size)
    # The same margins in every panel, so that axes stand below one another.
    left, bottom = 0.567 / size[0], 0.462 / size[1]
    axes = figure.add_axes((left, bottom, 1 - left - 0.063 / size[0], 1 - bottom - 0.07 / size[1]))
    _draw(figure, axes, chart, panel, style)
    titles = [names.get(line.method, line.method) for line in panel.lines]
    told = [
        line.method if line.method == title else f"{line.method}: {title}" for line, title in zip(panel.lines, titles)
    ]
    return _svg(figure, place, form, told)


def draw_swatch(index: int, place: str) -> str:
    """The line and marker of a style, as an SVG for the legend at a place of the page."""
    with _plain_text():
        figure = Figure(figsize=(0.46, 0.16))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.plot((0.0, 0.5, 1.0), (0.5, 0.5, 0.5), **_look(index), markersize=4.5, linewidth=1.6, markevery=(1, 2))
        return _svg(figure, f"{place}-style{index}", "swatch")


def _draw(figure: Figure, axes: Axes, chart: Chart, panel: Panel, style: Styles) -> None:
    # Many bands over one another would hide the lines.
    shade = min(0.12, 0.5 / max(1, len(panel.lines)))
    for order, line in enumerate(panel.lines):
        _line(axes, line, style[line.method], order, shade)
    axes.set(xlabel=panel.label or chart.labels[0], ylabel=chart.labels[1], ylim=chart.limits)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.tick_params(labelsize=8.5, colors=LIGHT["ink"])
    if chart.logarithmic:
        axes.axhline(1, color=LIGHT["ink"], linewidth=0.7, zorder=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(_power))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = panel.ticks or chart.ticks
    if ticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    else:
        places = [tick[0] for tick in ticks]
        if panel.ticks is not None:
            places += [x for line in panel.lines for x in line.x]
        low, high = min(places), max(places)
        room = max(0.06 * (high - low), 0.02 if panel.ticks else 0.1)
        axes.set_xlim(low - room, high + room)
        # The axis in inches: its panel may be broad or slim.
        inches = axes.get_position().width * figure.get_figwidth()
        axes.set_xticks(*zip(*_apart(ticks, (high - low) / inches)))
    axes.grid(True, which="major", color=LIGHT["faint"], linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT["ink"])
        spine.set_linewidth(0.7)


def _line(axes: Axes, line: Line, index: int, order: int, shade: float) -> None:
    """Draw a line; its parts are named after their order, so that `_svg` can say whose they are."""
    look, name = _look(index), f"line-{order}"
    colour = look["color"]
    if line.form == "level":
        axes.axhspan(line.low[0], line.high[0], color=colour, alpha=shade, linewidth=0, zorder=1)
        axes.axhline(line.y[0], color=colour, linewidth=1.4, zorder=2, gid=name)
        return
    if line.form == "bars":
        below = [mean - low for mean, low in zip(line.y, line.low)]
        above = [high - mean for mean, high in zip(line.y, line.high)]
        bars: dict[str, Any] = {"elinewidth": 1.0, "capsize": 2.5, "capthick": 1.0}
        axes.errorbar(line.x, line.y, (below, above), **look, **bars, markersize=4.5, linewidth=1.5, zorder=3, gid=name)
        return
    # Lines that lie on one another still show: their markers stand at different places.
    gap = max(1, len(line.x) // 40)
    marks = (order % 5 * gap, 5 * gap) if len(line.x) > 5 else 1
    axes.fill_between(line.x, line.low, line.high, color=colour, alpha=shade, linewidth=0, zorder=2)
    axes.plot(line.x, line.y, **look, markevery=marks, markersize=4, linewidth=1.5, zorder=3, gid=name)


def _look(index: int) -> dict[str, Any]:
    if index == 0:
        return {"color": LIGHT["ink"], "linestyle": "-", "marker": "o"}
    turn = index - 1
    return {
        "color": LIGHT[f"c{turn % len(_ON_LIGHT) + 1}"],
        "linestyle": _DASHES[turn % len(_DASHES)],
        "marker": _MARKERS[(turn + 1) % len(_MARKERS)],
    }


def _apart(ticks: Sequence[Tick], inch: float) -> list[Tick]:
    """The ticks whose texts do not run into one another, on an axis where an inch is so much."""
    kept = [ticks[0]]
    for tick in ticks[1:]:
        widest = max(len(tick[1]), len(kept[-1][1]))
        if tick[0] - kept[-1][0] >= _LETTER * inch * (widest + 1):
            kept.append(tick)
    return kept


def _power(value: float, _: int) -> str:
    """A power of ten, such as 10⁻³, without mathtext."""
    exponent = round(math.log10(value))
    if exponent in (0, 1):
        return f"{10**exponent}"
    return "10" + f"{exponent}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _shown(label: str) -> str:
    """matplotlib leaves labels that begin with an underscore out of a legend."""
    return f"\u200b{label}" if label.startswith("_") else label


@contextmanager
def _plain_text() -> Iterator[None]:
    """Titles are a user's text: a dollar sign is no mathematics, and a letter that the font lacks is no accident."""
    ink = {f"{part}color": LIGHT["ink"] for part in ("text.", "axes.label", "xtick.", "ytick.")}
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", **ink}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _svg(figure: Figure, name: str, form: str, titles: Sequence[str] = ()) -> str:
    """A figure as an SVG element for a page: no colours or fonts of its own, no names that another could have.

    Args:
        name: of the figure, its own in the page.
        form: the element's class.
        titles: what the lines are called where the pointer rests on them.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg class="{form}" viewBox="\1" aria-hidden="true">', svg, count=1
    )
    svg = re.sub(r'<g id="line-(\d+)">', lambda m: f"<g><title>{escape(titles[int(m[1])])}</title>", svg)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _rounded, svg)
    for variable, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\s+", " ", svg).replace("> <", "><")


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a tenth of a point."""
    return re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), attribute[0])

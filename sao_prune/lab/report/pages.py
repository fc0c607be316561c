"""The report as one HTML page that needs nothing else, and as Markdown, from the templates beside this module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..summary import Summary
from .attacked import attacked
from .chart import Chart
from .drawing import DARK, LIGHT, Styles, draw_svgs, draw_swatch
from .isometry import residual_blocks
from .names import full_names
from .pace import paces
from .table import groups
from .views import choices, results
from .words import caption, choice, command, compute, facts, progress, remarks


def html_page(summary: Summary, charts: Sequence[Chart], style: Styles) -> str:
    """The whole page: text, tables, figures, style and the script that sorts tables; nothing to fetch."""
    names = full_names(summary.rows)
    return render(
        "report.html.j2",
        **_content(summary, charts),
        facts=facts(summary),
        progress=progress(summary),
        drawn={chart.name: draw_svgs(chart, style, names) for chart in charts},
        swatches={
            chart.name: {method: draw_swatch(style[method], chart.name) for method in chart.methods} for chart in charts
        },
        recipe_text=summary.recipe_text,
    )


def markdown_text(summary: Summary, charts: Sequence[Chart]) -> str:
    """The report as Markdown; its figures lie beside it."""
    return render("report.md.j2", **_content(summary, charts), remarks=remarks(summary))


def _content(summary: Summary, charts: Sequence[Chart]) -> dict[str, Any]:
    """What both forms say."""
    found = groups(summary)
    return {
        "title": summary.heading,
        "caption": caption(summary),
        "headlines": [chart for chart in charts if chart.headline],
        "others": [chart for chart in charts if not chart.headline],
        "results": [
            view
            for group in found
            for view in (results(group), *attacked(group), *paces(group), *residual_blocks(group))
        ],
        "choice": choice(summary),
        "choices": choices(found),
        "names": full_names(summary.rows),
        "command": command(summary.recipe),
        "compute": compute(summary),
        "environments": summary.environments,
    }


def render(template: str, **content: Any) -> str:
    """A template filled in: HTML with every text escaped, or Markdown, which escapes by its filter ``plain``."""
    return _environment().get_template(template).render(content)


@cache
def style_sheet() -> str:
    """The page's CSS: its file, below the colours of the figures."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK))
    screen = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f":root{{{light}}}\n{screen}\n{_file('page.css')}"


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["plain"] = _plain
    made.globals.update(style_sheet=Markup(style_sheet()), script=Markup(_file("page.js")))
    return made


def _file(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _plain(text: str) -> str:
    """One line of text that Markdown takes as it is, in a table too."""
    return "".join(f"\\{c}" if c in "\\`*_<[|" else c for c in " ".join(text.split()))

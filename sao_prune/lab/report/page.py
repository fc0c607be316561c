"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources

from ..summary import Row, Summary
from .chart import Chart
from .drawing import DARK, LIGHT, Styles, draw_svgs, draw_swatch
from .markup import Markup, element
from .table import COLUMNS, Block, Group, groups, rate_text, rates_of
from .words import caption, choice, command, compute, facts, progress


def html_page(summary: Summary, charts: Sequence[Chart], style: Styles) -> str:
    """The whole page: text, tables, figures, style; no scripts and nothing to fetch."""
    found = groups(summary)
    body = [
        _header(summary),
        _contents(charts),
        *(_chart(chart, style) for chart in charts if chart.headline),
        element("section", element("h2", "Results"), *(_results(group) for group in found), id="results"),
        *(_chart(chart, style) for chart in charts if not chart.headline),
        _choices(summary, found),
        _again(summary),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", summary.heading),
        element("style", Markup(style_sheet())),
    )
    return "<!doctype html>\n" + element("html", head, element("body", element("main", *body)), lang="en") + "\n"


@cache
def style_sheet() -> str:
    """The page's CSS: its file, below the colours of the figures."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK))
    rules = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    screen = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f":root{{{light}}}\n{screen}\n{rules}"


def _header(summary: Summary) -> Markup:
    terms = (element("div", element("dt", term), element("dd", text)) for term, text in facts(summary))
    warnings = (element("p", line, class_="unfinished", role="status") for line in progress(summary))
    return element(
        "header",
        element("p", "sao-prune report", class_="eyebrow"),
        element("h1", summary.heading),
        *warnings,
        element("dl", *terms, class_="facts"),
        element("p", caption(summary), class_="lead"),
    )


def _contents(charts: Sequence[Chart]) -> Markup:
    """Links to the sections, in the order of the page."""
    first, others = ([(c.name, c.title) for c in charts if c.headline is headline] for headline in (True, False))
    sections = [
        *first,
        ("results", "Results"),
        *others,
        ("learning-rates", "Learning rates"),
        ("again", "To run it again"),
    ]
    links = (element("li", element("a", title, href=f"#{name}")) for name, title in sections)
    return element("nav", element("ul", *links), aria_label="Contents")


def _results(group: Group) -> Markup:
    notes = list(dict.fromkeys(note for row in group.rows for note in row.notes))
    head = element("thead", element("tr", *(element("th", column.title, scope="col") for column in COLUMNS)))
    table = _scrolling(group.title or "Results", head, *(_block(block, notes) for block in group.blocks))
    below = [element("ol", *(element("li", note) for note in notes), class_="notes")] if notes else []
    return element("section", *_titled(group), table, *below, class_="group")


def _block(block: Block, notes: Sequence[str]) -> Markup:
    best = block.best()
    return _body(block, (_row(row, row in best, notes) for row in block.rows), len(COLUMNS))


def _body(block: Block, rows: Iterable[Markup], columns: int) -> Markup:
    """Rows of a table below the amount that they share."""
    title = element("tr", element("th", block.title, colspan=str(columns), scope="rowgroup"), class_="amount")
    return element("tbody", *([title] if block.title else []), *rows)


def _row(row: Row, best: bool, notes: Sequence[str]) -> Markup:
    marks = ", ".join(map(str, sorted(notes.index(note) + 1 for note in row.notes)))
    name = element("th", row.arm.method.title, *([element("sup", marks)] if marks else []), scope="row")
    cells = (_cell(column.text(row), best and column.title == "accuracy %") for column in COLUMNS[1:])
    return element("tr", name, *cells, class_="best" if best else None)


def _cell(text: str, strong: bool) -> Markup:
    return element("td", element("strong", text) if strong else text, class_="none" if text in ("-", "") else None)


def _scrolling(label: str, *parts: str) -> Markup:
    """A table that scrolls by itself where it is wider than the page, with the keyboard too."""
    return element("div", element("table", *parts), class_="wide", tabindex="0", role="region", aria_label=label)


def _titled(group: Group) -> list[Markup]:
    return [element("h3", group.title)] if group.title else []


def _chart(chart: Chart, style: Styles) -> Markup:
    entries = (
        element("li", Markup(draw_swatch(style[method], chart.name)), element("span", method))
        for method in chart.methods
    )
    panels = (
        element("div", *([element("h3", panel.title)] if panel.title else []), Markup(svg), class_="panel")
        for panel, svg in zip(chart.panels, draw_svgs(chart, style))
    )
    return element(
        "section",
        element("h2", chart.title),
        element(
            "figure",
            element("figcaption", chart.caption),
            element("ul", *entries, class_="legend"),
            element("div", *panels, class_="panels"),
        ),
        id=chart.name,
    )


def _choices(summary: Summary, found: Sequence[Group]) -> Markup:
    tables = [element("div", *_titled(group), _rates(group), class_="choice") for group in found if rates_of(group)]
    return element(
        "section",
        element("h2", "How the learning rates were chosen"),
        element("p", choice(summary)),
        *([element("p", "Held-out accuracy in per cent; the chosen rate is emphasised.")] if tables else []),
        *([element("div", *tables, class_="choices")] if tables else []),
        id="learning-rates",
    )


def _rates(group: Group) -> Markup:
    rates = rates_of(group)
    head = [element("th", "method", scope="col"), *(element("th", f"lr {lr:g}", scope="col") for lr in rates)]

    def line(row: Row) -> Markup:
        known = {rate.lr: rate for rate in row.rates}
        cells = (_cell(rate_text(known[lr]) if lr in known else "", lr == row.lr) for lr in rates)
        return element("tr", element("th", row.arm.method.title, scope="row"), *cells)

    bodies = (_body(block, map(line, block.rows), len(head)) for block in group.blocks)
    label = f"Held-out accuracy {group.title}".strip()
    return _scrolling(label, element("thead", element("tr", *head)), *bodies)


def _again(summary: Summary) -> Markup:
    return element(
        "section",
        element("h2", "To run it again"),
        element("pre", element("code", command(summary.recipe)), tabindex="0"),
        element("p", compute(summary)),
        element("ul", *(element("li", f"Made with {made}.") for made in summary.environments)),
        element(
            "p",
            "Beside this page, every training is a line of ",
            element("code", "results.jsonl"),
            ", and the results are also in ",
            element("code", "results.csv"),
            " and ",
            element("code", "report.md"),
            ".",
        ),
        element(
            "details",
            element("summary", "The recipe"),
            element("pre", element("code", summary.recipe_text), tabindex="0"),
        ),
        id="again",
    )

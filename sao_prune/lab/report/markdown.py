"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..summary import Row, Summary
from .chart import Chart
from .table import COLUMNS, Group, groups, rate_text, rates_of, row_title
from .words import caption, choice, command, compute, remarks


def markdown_text(summary: Summary, charts: Sequence[Chart]) -> str:
    """The page; its figures lie beside it."""
    parts = [f"# {_plain(summary.heading)}", caption(summary)]
    parts += [_figure(chart) for chart in charts if chart.headline]
    for group in groups(summary):
        parts += _titled(group, _results(group))
    notes = remarks(summary)
    if notes:
        parts.append("\n".join(f"- {_plain(line)}" for line in notes))
    parts += [_figure(chart) for chart in charts if not chart.headline]
    parts += ["## How the learning rates were chosen", choice(summary)]
    for group in groups(summary):
        if rates_of(group):
            parts += _titled(group, _choices(group))
    parts += [
        "## To run it again",
        f"```sh\n{command(summary.recipe)}\n```",
        "`recipe.yaml` is the recipe, every training is a line of `results.jsonl`, and the tables of results are also "
        f"in `results.csv`. {compute(summary)}",
        "\n".join(f"- made with {environment}" for environment in summary.environments),
    ]
    return "\n\n".join(parts) + "\n"


def _figure(chart: Chart) -> str:
    return f"![{_plain(chart.title)}]({chart.name}.png)\n\n{chart.caption}"


def _titled(group: Group, table: str) -> list[str]:
    return [f"### {_plain(group.title)}", table] if group.title else [table]


def _results(group: Group) -> str:
    best = [row for block in group.blocks for row in block.best()]

    def texts(row: Row) -> list[str]:
        return [_strong(column.text(row), row in best and column.title == "accuracy %") for column in COLUMNS]

    return _table([column.title for column in COLUMNS], (texts(row) for row in group.rows))


def _choices(group: Group) -> str:
    rates = rates_of(group)
    lines = []
    for row in group.rows:
        found = {rate.lr: rate for rate in row.rates}
        texts = [_strong(rate_text(found[lr]), lr == row.lr) if lr in found else "" for lr in rates]
        lines.append([_plain(row_title(row)), *texts])
    return _table(["held-out accuracy %", *(f"lr {lr:g}" for lr in rates)], lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows)


def _strong(text: str, strong: bool) -> str:
    return f"**{_plain(text)}**" if strong else _plain(text)


def _plain(text: str) -> str:
    """One line of text that Markdown takes as it is."""
    return "".join(f"\\{c}" if c in "\\`*_<[" else c for c in " ".join(text.split()))

"""The comparison of two runs: on the terminal, as a page, as Markdown and as CSV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ...files import write_atomically
from ..comparison import Comparison, Match, compare
from ..summary import Row
from .names import full_names
from .pages import render
from .spreadsheet import csv_text
from .table import COLUMNS, groups, number, percent, row_title
from .terminal import print_table
from .views import Line, Part, Table, Text
from .words import several

_TEXT = {column.title: column.text for column in COLUMNS}

# A column's name and its text.
_COLUMNS: dict[str, Callable[[Match], str]] = {
    "A: accuracy %": lambda match: _TEXT["accuracy %"](match.a),
    "B: accuracy %": lambda match: _TEXT["accuracy %"](match.b),
    "B − A": lambda match: percent(match.difference, sign="+"),
    "p": lambda match: number(match.p, ".2g"),
    "seeds": lambda match: f"{match.common} paired" if match.common else f"{len(match.a.seeds)}, {len(match.b.seeds)}",
    "A: MACs %": lambda match: _TEXT["MACs %"](match.a),
    "B: MACs %": lambda match: _TEXT["MACs %"](match.b),
    "A: time s": lambda match: _TEXT["time s"](match.a),
    "B: time s": lambda match: _TEXT["time s"](match.b),
}

# The columns of comparison.csv: plain numbers, for programs.
_FIELDS: dict[str, Callable[[Match], object]] = {
    "method": lambda match: match.b.configuration.title,
    "accuracy_mean_a": lambda match: match.a.mean,
    "accuracy_mean_b": lambda match: match.b.mean,
    "difference": lambda match: match.difference,
    "p_value": lambda match: match.p,
    "paired_seeds": lambda match: match.common,
    "seeds_a": lambda match: len(match.a.seeds),
    "seeds_b": lambda match: len(match.b.seeds),
    "flops_a": lambda match: match.a.flops,
    "flops_b": lambda match: match.b.flops,
    "nonzero_a": lambda match: match.a.nonzero,
    "nonzero_b": lambda match: match.b.nonzero,
    "seconds_median_a": lambda match: match.a.seconds,
    "seconds_median_b": lambda match: match.b.seconds,
}


def write_comparison(a: Path, b: Path, out: Path, warn: Callable[[str], None]) -> Comparison:
    """Write ``comparison.html``, ``comparison.md`` and ``comparison.csv`` of two runs' folders into a third.

    Raises:
        ResultsError: if one of the folders holds no results, or they have no row in common.
    """
    found = compare(a, b, warn)
    content = {
        "title": f"{found.names[1]} against {found.names[0]}",
        "caption": _caption(found),
        "runs": [(letter, *run) for letter, *run in zip("AB", found.names, found.summaries)],
        "tables": _tables(found),
        "missing": _missing(found),
        "names": full_names(row for summary in found.summaries for row in summary.rows),
        "changes": found.changes,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "comparison.html", render("comparison.html.j2", **content))
    write_atomically(out / "comparison.md", render("comparison.md.j2", **content))
    write_atomically(out / "comparison.csv", csv_text(_FIELDS, found.matches))
    return found


def print_comparison(found: Comparison, console: Console) -> None:
    """A table a network, and below them what only one of the runs has."""
    console.print(f"[bold]{escape(found.names[1])} (B) against {escape(found.names[0])} (A)[/]", highlight=False)
    for table in _tables(found):
        console.print()
        print_table(table, console, narrow=("A: accuracy %", "B: accuracy %", "B − A", "p", "seeds"))
    console.print()
    console.print(f"[dim]{escape(_caption(found))}[/]", highlight=False)
    for line in _missing(found):
        console.print(escape(f"- {line}"), highlight=False, soft_wrap=True)


def _tables(found: Comparison) -> list[Table]:
    """The matches by the networks and amounts of B."""
    names, matches = full_names(match.b for match in found.matches), list(found.matches)

    def line(match: Match) -> Line:
        title = match.b.configuration.method.title
        return Line(title, names[title], row_title(match.b), tuple(Text(text(match)) for text in _COLUMNS.values()))

    def of(row: Row) -> list[Match]:
        return [match for match in matches if match.b is row]

    tables = []
    for group in groups(found.summaries[1]):
        parts = [
            Part(block.title, tuple(line(match) for row in block.rows for match in of(row))) for block in group.blocks
        ]
        parts = [part for part in parts if part.lines]
        if parts:
            tables.append(Table(group.title, group.title or "Comparison", ("method", *_COLUMNS), tuple(parts)))
    return tables


def _caption(found: Comparison) -> str:
    """How the numbers came about."""
    data = [several(setting.data.name for setting in summary.recipe.settings) for summary in found.summaries]
    where = f"the test set of {data[0]}" if data[0] == data[1] else f"the test sets of {data[0]} (A) and {data[1]} (B)"
    unpaired = (
        " Where fewer than two seeds are in common, the means are compared, with Welch's t-test."
        if any(not match.common for match in found.matches)
        else ""
    )
    return (
        f"Accuracy on {where}: mean and standard deviation over seeds. B − A is the mean difference in percentage "
        f"points over the seeds that both runs have, p the p-value of a paired two-sided t-test.{unpaired} MACs are "
        "multiply-adds with a weight that is not zero as a share of the dense network's, time is that of one training "
        "(median)."
    )


def _missing(found: Comparison) -> list[str]:
    """What only one of the runs has."""
    return [
        f"only in {letter}: {'; '.join(row.configuration.title for row in rows)}"
        for letter, rows in zip("AB", found.unmatched)
        if rows
    ]

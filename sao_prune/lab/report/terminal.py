"""The report on a terminal."""

from __future__ import annotations

from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..summary import Row, Summary
from .table import COLUMNS, groups
from .words import caption, choice, remarks

# With fewer characters in a line, only the narrow columns are shown.
_WIDE = 132


def print_report(summary: Summary, console: Console) -> None:
    """A table a network, and below them what a reader must know about their rows."""
    console.print(f"[bold]{escape(summary.heading)}[/]", highlight=False)
    for group in groups(summary):
        console.print()
        table = _table(console.width >= _WIDE)
        if group.title:
            table.title = escape(group.title)
        for block in group.blocks:
            if block.title:
                table.add_section()
                table.add_row(escape(block.title), style="dim")
            best = block.best()
            for row in block.rows:
                table.add_row(*_texts(row, table), style="bold" if row in best else None)
        console.print(table)
    console.print()
    console.print(f"[dim]{escape(caption(summary))} {escape(choice(summary))}[/]", highlight=False)
    for line in remarks(summary):
        console.print(escape(f"- {line}"), highlight=False, soft_wrap=True)


def _table(wide: bool) -> Table:
    table = Table(title_justify="left", title_style="bold", box=HORIZONTALS, show_edge=False)
    for column in COLUMNS:
        if column is COLUMNS[0]:
            table.add_column(column.title, overflow="fold", min_width=6)
        elif wide or column.narrow:
            table.add_column(column.title, justify="right", no_wrap=True)
    return table


def _texts(row: Row, table: Table) -> list[str]:
    shown = {column.header for column in table.columns}
    texts = [column.text(row) for column in COLUMNS[1:] if column.title in shown]
    return [escape(text) for text in (row.arm.method.title, *texts)]

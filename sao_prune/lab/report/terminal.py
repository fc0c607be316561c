"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Collection

from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from ..summary import Summary
from .attacked import attacked, fitting
from .isometry import residual_blocks
from .pace import paces, pacing
from .table import COLUMNS, groups
from .views import Table, results
from .words import caption, choice, remarks

# With fewer characters in a line, only the narrow columns are shown.
_WIDE = 132


def print_report(summary: Summary, console: Console) -> None:
    """A table a network, and below them what a reader must know about their rows."""
    console.print(f"[bold]{escape(summary.heading)}[/]", highlight=False)
    narrow = [column.title for column in COLUMNS if column.narrow]
    for group in groups(summary):
        console.print()
        print_table(results(group), console, narrow)
        for view in attacked(group):
            print_table(view, console, fitting(view))
        for view in paces(group):
            print_table(view, console, pacing(view))
        for view in residual_blocks(group):
            print_table(view, console, view.head)
    console.print()
    console.print(f"[dim]{escape(caption(summary))} {escape(choice(summary))}[/]", highlight=False)
    for line in remarks(summary):
        console.print(escape(f"- {line}"), highlight=False, soft_wrap=True)


def print_table(view: Table, console: Console, narrow: Collection[str]) -> None:
    """One table; the columns that are not ``narrow`` only where the terminal is wide."""
    shown = [title in narrow or console.width >= _WIDE for title in view.head[1:]]
    table = RichTable(title_justify="left", title_style="bold", box=HORIZONTALS, show_edge=False)
    table.title = escape(view.title) or None
    table.add_column(view.head[0], overflow="fold", min_width=6)
    for title, wanted in zip(view.head[1:], shown):
        if wanted:
            table.add_column(title, justify="right", no_wrap=True)
    for part in view.parts:
        if part.title:
            table.add_section()
            table.add_row(escape(part.title), style="dim")
        for line in part.lines:
            texts = [line.name, *(field.text for field, wanted in zip(line.texts, shown) if wanted)]
            table.add_row(*map(escape, texts), style="bold" if line.best else None)
    console.print(table)

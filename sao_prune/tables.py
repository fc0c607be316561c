"""The base of every report: rows, one line of totals, and the same as a table, plain data or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from io import StringIO
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 140


class Column(NamedTuple):
    """One column of a table; text that is too long for the first and the last is folded, numbers never are."""

    heading: str
    justify: Literal["left", "right"] = "left"


class Line(NamedTuple):
    """One line of a table: its cells, and whether it is of secondary interest."""

    cells: Sequence[str]
    dim: bool = False


class TableReport:
    """Base of the reports of the verbs, which are frozen dataclasses with a ``title``.

    Subclasses say what their `columns`, `lines`, `rows` and `summary` are; `table`, ``str``, `to_dict` and `to_json`
    follow from these.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> report = sao_prune.apply(net, groups=4, seed=0)
        >>> isinstance(report, TableReport), report.rows()[1]["name"], report.to_dict()["sparsity"]
        (True, '1.weight', 0.75)
    """

    title: str
    columns: ClassVar[tuple[Column, ...]] = ()

    def lines(self) -> list[Line]:
        """The table's lines."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """One mapping a record, of plain values, for a data frame or a file of comma-separated values."""
        raise NotImplementedError

    def summary(self) -> str:
        """One line of totals."""
        raise NotImplementedError

    def totals(self) -> dict[str, Any]:
        """What `to_dict` has beside the title, the summary and the rows."""
        return {}

    def caption(self) -> str:
        """What stands below the table."""
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: text, numbers, booleans, ``None``, lists and mappings."""
        whole = {"title": self.title, "summary": self.summary(), **self.totals(), "rows": self.rows()}
        return {key: plain(value) for key, value in whole.items()}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON; numbers that are not finite are null.

        Args:
            indent: spaces for each level; ``None`` writes one line.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def table(self) -> Table:
        """The report as a rich table."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self.title or None,
            caption=self.caption(),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for number, column in enumerate(self.columns):
            folds = number in (0, len(self.columns) - 1)
            table.add_column(column.heading, justify=column.justify, no_wrap=not folds, overflow="fold")
        for line in self.lines():
            # As text: names may have brackets, which rich would take for its own.
            table.add_row(*map(Text, line.cells), style="dim" if line.dim else None)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        # The caption goes below by itself: a table folds it to its own width.
        table = self.table()
        table.caption = None
        console = Console(file=StringIO(), width=_WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return "\n".join([*(line.rstrip() for line in capture.get().splitlines()), self.caption()])


def plain(value: Any) -> Any:
    """A value as JSON can hold it: records as mappings, tuples as lists, other things as their text.

    Args:
        value: anything.

    Returns:
        Text, a finite number, a boolean, ``None``, or a list or mapping of such.

    Example:
        >>> plain({"shape": (2, 3), "share": float("inf")})
        {'shape': [2, 3], 'share': None}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def shape_text(shape: Sequence[int]) -> str:
    """A shape for a table: ``64x32x3x3``; ``-`` where there is none.

    Args:
        shape: of a tensor.

    Returns:
        The text.

    Example:
        >>> shape_text((64, 32))
        '64x32'
    """
    return "x".join(map(str, shape)) or "-"

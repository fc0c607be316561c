"""The table of what attacks leave and what is certified, where a recipe asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean, stdev

from ..summary import Row
from .names import full_names
from .table import Block, Group, number, percent, row_title
from .views import Line, Part, Table, Text

_AGAINST = "vs SAO (p)"


def attacked(group: Group) -> list[Table]:
    """The table of one network, in a list; an empty list where nothing was measured."""
    measured = _measured(group.rows)
    if not measured:
        return []
    names = full_names(group.rows)

    def line(row: Row) -> Line:
        title = row.configuration.method.title
        texts = []
        for name in measured:
            texts += [Text(_level(row, name)), *([Text(_difference(row, name))] if name in _tested(measured) else [])]
        return Line(title, names[title], row_title(row), tuple(texts))

    def part(block: Block) -> Part:
        return Part(block.title, tuple(map(line, block.rows)))

    head = ["method"]
    for name in measured:
        head += [f"{name} %", *([_AGAINST] if name in _tested(measured) else [])]
    title = f"{group.title}, under attack" if group.title else "Under attack"
    return [Table(title, title, tuple(head), tuple(map(part, group.blocks)))]


def fitting(view: Table) -> list[str]:
    """The columns of such a table that fit into 80 characters."""
    return [title for title in view.head if title not in (_AGAINST, "clean %", "PGD %")]


def attacked_fields(rows: Iterable[Row]) -> dict[str, Callable[[Row], object]]:
    """Further columns of results.csv: means and standard deviations, fractions."""
    fields: dict[str, Callable[[Row], object]] = {}
    for name in _measured(rows):
        key = name.replace(" ", "_").lower()
        fields[f"{key}_mean"] = partial(_mean, name=name)
        fields[f"{key}_sd"] = partial(_spread, name=name)
    return fields


def _tested(measured: Iterable[str]) -> list[str]:
    """What methods are compared by."""
    return [name for name in measured if name not in ("clean", "PGD")]


def _measured(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.robustness))


def _mean(row: Row, name: str) -> float | None:
    values = row.robustness.get(name)
    return fmean(values) if values else None


def _spread(row: Row, name: str) -> float | None:
    values = row.robustness.get(name, ())
    return stdev(values) if len(values) > 1 else None


def _level(row: Row, name: str) -> str:
    spread = _spread(row, name)
    return percent(_mean(row, name)) + ("" if spread is None else f" ± {percent(spread)}")


def _difference(row: Row, name: str) -> str:
    found = row.robustness_against_sao.get(name)
    return "-" if found is None else f"{percent(found.difference, sign='+')} ({number(found.p, '.2g')})"

"""The table of residual blocks at initialisation: how nearly orthogonal they were before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..results import Record
from ..summary import Row
from .names import full_names
from .table import Block, Group
from .views import Line, Part, Table, Text

_HEAD = ("residual blocks at initialisation", "how many", "singular values before", "after")


def residual_blocks(group: Group) -> list[Table]:
    """The table of one network, in a list; an empty list where no method looks for such blocks.

    Of each method, a line for the blocks of every kind, from the smallest singular value of one of them to the largest
    of another, and one for the network from its input to its output.
    """
    names = full_names(group.rows)

    def lines(row: Row) -> Iterator[Line]:
        title = row.configuration.method.title
        blocks = [record for record in _measured(row) if record["name"]]
        kinds = {status: [b for b in blocks if b["status"] == status] for status in ("exact", "near", "left")}
        for status, alike in kinds.items():
            if alike:
                yield _line(title, names[title], status, str(len(alike)), alike)
        for network in _measured(row):
            if not network["name"]:
                yield _line(title, names[title], "whole network", "", [network])

    def part(block: Block) -> Part:
        return Part(block.title, tuple(line for row in block.rows for line in lines(row)))

    parts = [found for found in map(part, group.blocks) if found.lines]
    label = f"{group.title}, residual blocks" if group.title else "Residual blocks"
    return [Table(label, label, _HEAD, tuple(parts))] if parts else []


def _measured(row: Row) -> Sequence[Record]:
    return (row.spectrum or {}).get("residuals", ())


def _line(title: str, full: str, kind: str, count: str, records: Sequence[Record]) -> Line:
    texts = (count, *(_range(record[when] for record in records) for when in ("before", "after")))
    return Line(f"{title}, {kind}", f"{full}, {kind}", f"{title}, {kind}", tuple(map(Text, texts)))


def _range(extremes: Iterable[Sequence[float | None] | None]) -> str:
    """From the smallest to the largest; a dash where one could not be measured."""
    found = [value for pair in extremes for value in (pair or (None, None))]
    known = [value for value in found if value is not None]
    if len(known) < len(found):
        return "-"
    # Four digits behind the point; what is orthogonal up to rounding is 1.0000.
    return f"{min(known):.4f} – {max(known):.4f}"

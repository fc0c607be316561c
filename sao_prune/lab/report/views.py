"""Tables as the templates show them: texts, with what stands out and what they are called in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..summary import Row
from .names import full_names
from .table import COLUMNS, Block, Group, rate_text, rates_of, row_title
from .words import chosen_by


@dataclass(frozen=True)
class Text:
    """One field of a table."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        name: the method's, as the table shows it; ``full`` is what that stands for, ``title`` the name with the amount.
        marks: numbers of the notes below the table.
        best: it reads highest among its rivals.
    """

    name: str
    full: str
    title: str
    texts: tuple[Text, ...]
    marks: tuple[int, ...] = ()
    best: bool = False


@dataclass(frozen=True)
class Part:
    """Lines below a common title, which may be empty."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: a heading above it, or empty; ``label`` is its name for those who cannot see it.
        head: the names of its columns, that of the methods first.
        notes: what a reader must know about lines, in the order of their marks.
    """

    title: str
    label: str
    head: tuple[str, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[Line, ...]:
        """The lines of all parts."""
        return tuple(line for part in self.parts for line in part.lines)


def results(group: Group) -> Table:
    """The results of one network."""
    notes = tuple(dict.fromkeys(note for row in group.rows for note in row.notes))
    names = full_names(group.rows)

    def part(block: Block) -> Part:
        best = block.best()

        def line(row: Row) -> Line:
            texts = (Text(c.text(row), row in best and c.title == "accuracy %") for c in COLUMNS[1:])
            marks = sorted(notes.index(note) + 1 for note in row.notes)
            return _line(row, names, texts, tuple(marks), row in best)

        return Part(block.title, tuple(map(line, block.rows)))

    head = tuple(column.title for column in COLUMNS)
    return Table(group.title, group.title or "Results", head, tuple(map(part, group.blocks)), notes)


def choices(groups: Sequence[Group]) -> list[Table]:
    """What each learning rate reached on the held-out images, a table for every network that had a choice."""
    return [_choice(group, rates_of(group)) for group in groups if rates_of(group)]


def _choice(group: Group, rates: Sequence[float]) -> Table:
    names = full_names(group.rows)

    def line(row: Row) -> Line:
        known = {rate.lr: rate for rate in row.rates}
        texts = (Text(rate_text(known[lr]) if lr in known else "", lr == row.lr) for lr in rates)
        return _line(row, names, texts)

    head = (f"held-out {chosen_by(group.rows[0].configuration.setting)} %", *(f"lr {lr:g}" for lr in rates))
    label = f"Held-out accuracy {group.title}".strip()
    return Table(group.title, label, head, _parts(group.blocks, line))


def _parts(blocks: Iterable[Block], line: Callable[[Row], Line]) -> tuple[Part, ...]:
    return tuple(Part(block.title, tuple(map(line, block.rows))) for block in blocks)


def _line(
    row: Row, names: Mapping[str, str], texts: Iterable[Text], marks: tuple[int, ...] = (), best: bool = False
) -> Line:
    title = row.configuration.method.title
    return Line(title, names[title], row_title(row), tuple(texts), marks, best)

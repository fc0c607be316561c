"""What a table of results holds: its columns, their texts and numbers, and which rows stand together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..summary import Rate, Row, Summary


@dataclass(frozen=True)
class Column:
    """A column that people read.

    Attributes:
        narrow: it is among those that fit into 80 characters.
    """

    title: str
    text: Callable[[Row], str]
    narrow: bool = False


@dataclass(frozen=True)
class Block:
    """Rows that compete: the methods at one amount.

    Attributes:
        title: the amount, where the recipe has several.
    """

    title: str
    rows: tuple[Row, ...]

    def best(self) -> list[Row]:
        """The pruned rows whose mean accuracy reads highest; none where all finished ones read the same."""
        finished = [row for row in self.rows if len(row.accuracies) == len(row.configuration.setting.seeds)]
        rivals = [row for row in finished if not row.configuration.method.is_dense]
        read = [float(percent(row.mean)) for row in rivals]
        return [row for row, value in zip(rivals, read) if min(read) < value == max(read)]


@dataclass(frozen=True)
class Group:
    """All rows of one network of one case.

    Attributes:
        title: what tells it from the recipe's other groups; empty where there is but one.
    """

    title: str
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all blocks."""
        return tuple(row for block in self.blocks for row in block.rows)


def groups(summary: Summary) -> list[Group]:
    """The rows by network, and below it by amount; dense stands in the first block where there are several amounts."""
    found = []
    for setting in summary.recipe.settings:
        for options in setting.network.grid():
            rows = [
                row
                for row in summary.rows
                if row.configuration.setting == setting and row.configuration.options == options
            ]
            amounts = setting.prune.grid()
            if len(amounts) == 1:
                blocks = [Block("", tuple(rows))]
            else:
                blocks = [_block(rows, amount) for amount in [{}, *amounts]]
            if rows:
                found.append(Group(rows[0].configuration.network_title, tuple(block for block in blocks if block.rows)))
    return found


def _block(rows: Sequence[Row], amount: object) -> Block:
    members = tuple(row for row in rows if row.configuration.prune == amount)
    return Block(members[0].configuration.amount_title if members else "", members)


def row_title(row: Row) -> str:
    """Its name inside its group: the method, and the amount where there are several."""
    return ", ".join(text for text in (row.configuration.method.title, row.configuration.amount_title) if text)


def percent(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A fraction as per cent; a dash where there is none."""
    return "-" if value is None else f"{100 * value:{sign}.{digits}f}".replace("-", "−")


def number(value: float | None, form: str) -> str:
    """A number in a format; a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


def _accuracy(row: Row) -> str:
    return percent(row.mean) + ("" if row.spread is None else f" ± {percent(row.spread)}")


def _range(row: Row) -> str:
    return f"{percent(min(row.accuracies))}–{percent(max(row.accuracies))}" if row.accuracies else "-"


def _difference(row: Row) -> str:
    return "-" if row.against_sao is None else percent(row.against_sao.difference, sign="+")


def _p_value(row: Row) -> str:
    return number(None if row.against_sao is None else row.against_sao.p, ".2g")


def _operations(row: Row) -> str:
    return "-" if row.flops is None or not row.dense_flops else f"{100 * row.flops / row.dense_flops:.1f}"


def _execution_word(text: str) -> str:
    """The form that a training ran in; a magnitude mask may have a few layers that happen to be blocks.

    Example:
        >>> _execution_word("compact: 51 of 52 layers"), _execution_word("compact: 1 of 52 layers"), _execution_word("")
        ('compact', 'masked', '-')
    """
    counts = re.match(r"compact: (\d+) of (\d+) layers", text)
    if counts and 2 * int(counts[1]) < int(counts[2]):
        return "masked"
    held = ", held" if text.endswith("weights held") else ""
    return (re.split(r"\W", text)[0] or "-") + held


COLUMNS = (
    Column("method", row_title, narrow=True),
    Column("sparsity %", lambda row: percent(row.sparsity, 3), narrow=True),
    Column("accuracy %", _accuracy, narrow=True),
    Column("range", _range),
    Column("vs SAO", _difference, narrow=True),
    Column("p", _p_value),
    Column("lr", lambda row: number(row.lr, "g"), narrow=True),
    Column("non-zero", lambda row: number(row.nonzero, ","), narrow=True),
    Column("MACs %", _operations),
    Column("time s", lambda row: number(row.seconds, ".1f"), narrow=True),
    Column("CPU s", lambda row: number(row.cpu_seconds, ".1f")),
    Column("execution", lambda row: _execution_word(row.execution)),
)


def rates_of(group: Group) -> tuple[float, ...]:
    """The learning rates that the group's methods chose from, the highest first; none where the grid left no choice."""
    return tuple(sorted({rate.lr for row in group.rows for rate in row.rates}, reverse=True))


def rate_text(rate: Rate) -> str:
    """Its held-out accuracy in per cent."""
    return percent(rate.accuracy) + (" (diverged)" if rate.diverged else "")


def stored_bytes(row: Row) -> int | None:
    """Bytes of the parameters that are not zero, in 32 bits each."""
    return None if row.nonzero is None else 4 * row.nonzero


# The columns of results.csv: plain numbers, for programs.
FIELDS: dict[str, Callable[[Row], object]] = {
    "method": lambda row: row.configuration.title,
    "network": lambda row: row.configuration.setting.network.name,
    "sparsity": lambda row: row.sparsity,
    "accuracy_mean": lambda row: row.mean,
    "accuracy_sd": lambda row: row.spread,
    "accuracy_min": lambda row: min(row.accuracies, default=None),
    "accuracy_max": lambda row: max(row.accuracies, default=None),
    "seeds": lambda row: len(row.accuracies),
    "lr": lambda row: row.lr,
    "nonzero": lambda row: row.nonzero,
    "parameters": lambda row: row.parameters,
    "nonzero_bytes": stored_bytes,
    "seconds_median": lambda row: row.seconds,
    "cpu_seconds_median": lambda row: row.cpu_seconds,
    "flops": lambda row: row.flops,
    "dense_flops": lambda row: row.dense_flops,
    "difference_from_sao": lambda row: row.against_sao and row.against_sao.difference,
    "p_value": lambda row: row.against_sao and row.against_sao.p,
    "execution": lambda row: row.execution,
}

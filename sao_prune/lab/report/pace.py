"""The table of the loss, the speed and the memory of trainings, where they were recorded."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median, stdev

from ..summary import Row
from .names import full_names
from .table import Block, Group, number, row_title, stored_bytes
from .views import Line, Part, Table, Text

_HEAD = ("method", "test loss, nats", "steps / s", "steps / CPU s", "weights kB")
# Where a run recorded it.
_MEMORY = ("step kB", "saved kB")


def paces(group: Group) -> list[Table]:
    """The table of one network, in a list; an empty list where a finished row did not record its steps.

    Loss is the cross-entropy in nats, mean and standard deviation over the seeds; speeds are medians; weights are the
    parameters that are not zero, four bytes each. A training step's memory is what it holds at the end of its forward
    pass (`step_memory`), and the part of it that autograd saved for the backward pass.
    """
    finished = [row for row in group.rows if row.accuracies]
    if not finished or not all(row.speeds for row in finished):
        return []
    names = full_names(group.rows)
    measured = any(row.memory for row in finished)

    def line(row: Row) -> Line:
        title = row.configuration.method.title
        wall, processor = (_typical_speed(row, clock) for clock in (0, 1))
        size = stored_bytes(row)
        kilobytes = number(None if size is None else size / 1e3, ",.1f")
        cells = [_loss(row), number(wall, ".1f"), number(processor, ".1f"), kilobytes]
        if measured:
            cells += [number(None if size is None else size / 1e3, ",.0f") for size in (_held(row), _saved(row))]
        return Line(title, names[title], row_title(row), tuple(map(Text, cells)))

    def part(block: Block) -> Part:
        return Part(block.title, tuple(map(line, block.rows)))

    title = f"{group.title}, loss and speed" if group.title else "Loss and speed"
    head = _HEAD + _MEMORY if measured else _HEAD
    return [Table(title, title, head, tuple(map(part, group.blocks)))]


def pacing(view: Table) -> list[str]:
    """The columns of such a table that fit into 80 characters."""
    return [title for title in view.head if title != "steps / CPU s" or _MEMORY[0] not in view.head]


def _mean_loss(row: Row) -> float | None:
    """Mean test loss over the seeds, nats; none where one is not finite."""
    losses = _finite(row)
    return fmean(losses) if losses else None


def _loss_spread(row: Row) -> float | None:
    """Its sample standard deviation."""
    losses = _finite(row)
    return stdev(losses) if len(losses) > 1 else None


def _typical_speed(row: Row, clock: int) -> float | None:
    """Median steps a second by the wall clock (0) or by processor time (1)."""
    return median(speeds[clock] for speeds in row.speeds) if row.speeds else None


def _held(row: Row) -> int | None:
    """Bytes that a training step holds at the end of its forward pass."""
    return sum(row.memory.values()) if row.memory else None


def _saved(row: Row) -> int | None:
    """Those of them that autograd saved for the backward pass."""
    return row.memory.get("saved")


def _finite(row: Row) -> list[float]:
    losses = [loss for loss in row.losses if loss is not None]
    return losses if len(losses) == len(row.losses) else []


def _loss(row: Row) -> str:
    spread = _loss_spread(row)
    return number(_mean_loss(row), ".3f") + ("" if spread is None else f" ± {spread:.3f}")


# Further columns of results.csv.
PACE_FIELDS: dict[str, Callable[[Row], object]] = {
    "loss_mean": _mean_loss,
    "loss_sd": _loss_spread,
    "steps_per_second_median": lambda row: _typical_speed(row, 0),
    "steps_per_cpu_second_median": lambda row: _typical_speed(row, 1),
    "step_bytes": _held,
    "step_saved_bytes": _saved,
}

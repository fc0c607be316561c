"""Training on several processes: what each of them does, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LabError
from ..launch import is_first_of_machine, local_rank, processes

T = TypeVar("T")

# How long the others wait for the first: while it fetches a data set, say. Whoever started them ends them if one dies.
PATIENCE = timedelta(hours=4)


def world() -> int:
    """How many processes train together; 1 without `torch.distributed`.

    Example:
        >>> world(), rank()
        (1, 0)
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def own_share(batch: Tensor) -> Tensor:
    """This process's part of a batch: every ``world``-th element, from the ``rank``-th on."""
    return batch[rank() :: world()]


def summed(*values: float, device: torch.device) -> list[float]:
    """Each value summed over the processes; on one process, the values."""
    if world() == 1:
        return [*values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def from_first(value: T) -> T:
    """The first process's value, on every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def in_turn(check: Callable[[], None]) -> None:
    """On each machine, call ``check`` in the first process, which may fetch what is missing, and then in the others.

    Raises:
        LabError: on every process, if it was raised on any.
    """
    for turn in (True, False):
        problem = None
        if is_first_of_machine() == turn:
            try:
                check()
            except LabError as error:
                if world() == 1:
                    raise
                problem = f"process {rank()}: {error}"
        problems = [problem]
        if world() > 1:
            problems = [None] * world()
            dist.all_gather_object(problems, problem)
        first = next(filter(None, problems), None)
        if first is not None:
            raise LabError(first)


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: batch normalisation counts apart on each."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def process_group(wanted: str | None = None) -> Iterator[torch.device | None]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, for as long as the ``with`` lasts.

    Args:
        wanted: ``cpu`` or ``cuda``; CUDA where there is one if nothing is said.

    Raises:
        LabError: if there are fewer GPUs than processes, or another device is wanted.

    Yields:
        This process's device, or ``None`` in an ordinary process, for which nothing changes.

    Example:
        >>> with process_group() as device:
        ...     print(device)
        None
    """
    if processes() == 1:
        yield None
        return
    device = _own_device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _own_device(wanted: str | None) -> torch.device:
    wanted = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise LabError(f"several processes train together on cpu or cuda, got --device {wanted}")
    index = local_rank()
    if wanted == "cpu":
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise LabError(
            f"process {index} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
            f"start no more than that, or give --device cpu"
        )
    return torch.device("cuda", index)

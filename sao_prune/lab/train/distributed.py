"""Training on several processes: what each of them does, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


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


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: batch normalisation counts apart on each."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def process_group() -> Iterator[torch.device | None]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, for as long as the ``with`` lasts.

    Yields:
        This process's device, or ``None`` in an ordinary process, for which nothing changes.

    Example:
        >>> with process_group() as device:
        ...     print(device)
        None
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield None
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()

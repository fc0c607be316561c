"""Whether a set fits, before it is read."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import DataError

_GIB = 2**30


def need_memory(name: str, needed: int, device: torch.device | None = None) -> None:
    """Make sure that ``needed`` bytes are free, in main memory or on a CUDA device.

    Raises:
        DataError: with what is needed and what is there, in GiB.
    """
    free = free_memory() if device is None else torch.cuda.mem_get_info(device)[0]
    if free is not None and needed > free:
        where = "main memory" if device is None else str(device)
        raise DataError(
            f"{name} does not fit in {where}: {needed / _GIB:.1f} GiB are needed, {free / _GIB:.1f} GiB are there; "
            f"take a smaller size:, or fewer images with subset: and test_subset:"
        )


def free_memory() -> int | None:
    """Bytes of main memory that a new allocation can have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*found, *_group_limit()], default=None)


def _group_limit() -> list[int]:
    """What the control group of a container still allows."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = next(x for x in (group / "memory.stat").read_text().splitlines() if x.startswith("file "))
        return [] if limit == "max" else [int(limit) - int(used) + int(cache.split()[1])]
    except (OSError, ValueError, StopIteration):
        return []

"""Seeds: one base seed, and an independent generator for everything that has a name."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from numbers import Integral
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Seed = int | torch.Generator | None


def base_seed(seed: Seed) -> int:
    """One integer from whatever a user may pass; the global generator is read, never advanced.

    Args:
        seed: an integer; a generator, which gives its next number; or ``None`` for `torch.initial_seed`, which in a
            distributed run is taken from rank 0, so that every rank draws the same (all ranks must then call).

    Returns:
        The integer.

    Raises:
        TypeError: for anything else.

    Example:
        >>> base_seed(7), base_seed(torch.Generator().manual_seed(0)) == base_seed(torch.Generator().manual_seed(0))
        (7, True)
    """
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (1,), generator=seed, device=seed.device))
    if seed is None:
        value = [torch.initial_seed()]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(value, src=0)
        return value[0]
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int, a torch.Generator or None, got {seed!r}")
    return int(seed)


def from_rank_zero(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank of a distributed run; all ranks must call. Elsewhere just the result.

    For decisions that rest on data, which differ from rank to rank. An error of rank 0 is raised on all.

    Args:
        compute: called on rank 0 alone.

    Returns:
        What it returns.

    Raises:
        Exception: that of rank 0.

    Example:
        >>> from_rank_zero(lambda: 3)
        3
    """
    if not (dist.is_available() and dist.is_initialized()):
        return compute()
    held: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            held = [compute()]
        except Exception as error:
            held = [error]
    dist.broadcast_object_list(held, src=0)
    if isinstance(held[0], Exception):
        raise held[0]
    return held[0]  # type: ignore[no-any-return]


def named_generator(base: int, *name: object) -> torch.Generator:
    """A CPU generator that depends on the base seed and the name alone, not on what else is drawn.

    Args:
        base: the base seed.
        *name: anything with a repr that tells it from others.

    Returns:
        A fresh generator.

    Example:
        >>> seeds = [named_generator(0, name).initial_seed() for name in ("a", "a", "b")]
        >>> seeds[0] == seeds[1], seeds[1] == seeds[2]
        (True, False)
    """
    digest = blake2b(repr((base, *name)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

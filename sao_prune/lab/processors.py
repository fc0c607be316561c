"""Threads on processors of their own, for timings of runtimes whose threads wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def apart(threads: int) -> list[int]:
    """A processor for each thread; none where that cannot be chosen, or there are too few.

    On virtual machines, whose processors share no cache that the scheduler knows of, it wakes the threads of a call on
    one and the same, and a call of half a millisecond takes four.

    Args:
        threads: how many.

    Returns:
        Numbers of processors, as many as threads or none.

    Example:
        >>> apart(1)
        []
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return allowed[:threads] if 1 < threads <= len(allowed) else []


def affinities(processors: Sequence[int]) -> str:
    """What ONNX Runtime is to be told of the threads beside the one that calls: ``session.intra_op_thread_affinities``.

    Example:
        >>> affinities([0, 1, 4])
        '2;5'
    """
    return ";".join(str(number + 1) for number in processors[1:])


@contextmanager
def staying(processors: Sequence[int]) -> Iterator[None]:
    """This thread runs on the first of these processors, and afterwards where it ran before; an empty list changes
    nothing."""
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

"""Time several ways of doing one thing in turn, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter, thread_time

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of every repetition of each way, by its name."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds."""
        return median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long ``slow`` takes as ``fast``: ratio of the medians."""
        return self.median(slow) / self.median(fast)

    def best_ratio(self, slow: str, fast: str) -> float:
        """The same of the least times, which other work on the machine disturbs least."""
        return min(self.seconds[slow]) / min(self.seconds[fast])


def clock() -> float:
    """Seconds: wall clock, or with one thread that thread's own time, which nothing else on the machine disturbs."""
    return thread_time() if torch.get_num_threads() == 1 else perf_counter()


def race(ways: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 2) -> Times:
    """Run every way ``warm_up`` times, then all of them in turn ``repeats`` times.

    Each turn is two runs, of which the second is timed: the first finds the caches and the allocator as another way
    left them, which nobody who trains or serves one model meets.
    """
    for way in ways.values():
        for _ in range(warm_up):
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            way()
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return Times(seconds)


@dataclass(frozen=True)
class Row:
    """One line of the result table.

    Attributes:
        work: what was run.
        against: what it is compared with.
        target: what was asked for, such as ``>= 12x``; empty for a line that is there for information.
        measured: what came out, by median.
        best: what came out, by least time; ``None`` where there is no such thing.
        note: anything else worth knowing.
    """

    work: str
    against: str
    target: str
    measured: str
    best: str = ""
    met: bool | None = None
    note: str = ""


def at_least(work: str, against: str, target: float | None, times: Times, slow: str, fast: str, note: str = "") -> Row:
    """A row for "``fast`` is at least ``target`` times as fast as ``slow``"."""
    measured, best = times.ratio(slow, fast), times.best_ratio(slow, fast)
    milliseconds = f"{1e3 * times.median(slow):.4g} ms / {1e3 * times.median(fast):.4g} ms"
    return Row(
        work,
        against,
        "" if target is None else f">= {target:g}x",
        f"{measured:.2f}x",
        f"{best:.2f}x",
        None if target is None else measured >= target,
        f"{milliseconds}{'; ' + note if note else ''}",
    )


def at_most(work: str, against: str, target: float, times: Times, fast: str, other: str, note: str = "") -> Row:
    """A row for "``fast`` takes at most ``target`` times as long as ``other``"."""
    measured, best = times.ratio(fast, other), times.best_ratio(fast, other)
    milliseconds = f"{1e3 * times.median(fast):.4g} ms / {1e3 * times.median(other):.4g} ms"
    return Row(
        work,
        against,
        f"<= {target:g}x its time",
        f"{measured:.2f}x",
        f"{best:.2f}x",
        measured <= target,
        f"{milliseconds}{'; ' + note if note else ''}",
    )

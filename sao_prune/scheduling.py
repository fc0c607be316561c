"""When to prune and how much, or when to move: the schedules that `sao_prune.schedule` follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from numbers import Real
from typing import Literal, get_args

Shape = Literal["cubic", "linear", "one-shot", "iterative"]


@dataclass(frozen=True)
class Schedule:
    """When to prune and how much, counted in optimizer steps.

    Attributes:
        start: optimizer steps before the first pruning; 0 prunes when `schedule` is called.
        end: optimizer steps before the last pruning, after which the full sparsity is reached.
        steps: how often to prune, evenly from ``start`` to ``end``.
        shape: the share of the full sparsity at the fraction ``t`` of the prunings: ``"cubic"``, ``1 - (1 - t)^3``
            (Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878); ``"linear"``, ``t``; ``"iterative"``, the same
            share of what is left each time (Han et al., 2015, https://arxiv.org/abs/1506.02626); ``"one-shot"``, all
            of it at ``start``.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> plan = Schedule(start=100, end=400, steps=4, shape="linear")
        >>> plan.events, [plan.density(step, 0.2) for step in plan.events]
        ((100, 200, 300, 400), [0.8, 0.6, 0.4, 0.2])
    """

    start: int = 0
    end: int = 0
    steps: int = 1
    shape: Shape = "cubic"

    def __post_init__(self) -> None:
        for option, ge in (("start", 0), ("end", 0), ("steps", 1)):
            _check_count(option, getattr(self, option), ge)
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {', '.join(map(repr, get_args(Shape)))}, got {self.shape!r}")
        if self.shape != "one-shot" and self.end < self.start:
            raise ValueError(f"end must not be before start, got start={self.start}, end={self.end}")
        if self.shape != "one-shot" and self.steps > self.end - self.start + 1:
            raise ValueError(
                f"{self.steps} prunings do not fit between optimizer steps {self.start} and {self.end}: at most one "
                "after each"
            )

    @property
    def events(self) -> tuple[int, ...]:
        """The optimizer steps after which it prunes."""
        if self.shape == "one-shot":
            return (self.start,)
        if self.steps == 1:
            return (self.end,)
        return tuple(self.start + round(i * (self.end - self.start) / (self.steps - 1)) for i in range(self.steps))

    def density(self, step: int, final: float) -> float:
        """Share of entries that stay after ``step`` optimizer steps where ``final`` stay at the end."""
        events = self.events
        past = sum(event <= step for event in events)
        if past == len(events):
            return final
        t = past / len(events)
        if self.shape == "iterative":
            return final**t
        return round(1 - (1 - final) * (1 - (1 - t) ** 3 if self.shape == "cubic" else t), 12)


@dataclass(frozen=True)
class Moves:
    """When a topology moves while it trains, counted in optimizer steps; how many entries there are stays the same.

    Attributes:
        steps: optimizer steps of the whole training.
        every: optimizer steps between moves; the first move comes after as many.
        until: share of the training after which nothing moves any more.

    Raises:
        ValueError: for a value out of range, or if nothing would ever move.

    Source: the schedule of RigL (Evci et al., 2020, https://arxiv.org/abs/1911.11134), which has 100 and 0.75.

    Example:
        >>> over = Moves(steps=1000, every=200)
        >>> list(over.events), over.decay(200), round(over.decay(600), 3)
        ([200, 400, 600], 0.8345653031794291, 0.095)
    """

    steps: int
    every: int = 100
    until: float = 0.75

    def __post_init__(self) -> None:
        for option in ("steps", "every"):
            _check_count(option, getattr(self, option), 1)
        check_share("until", self.until)
        if not self.events:
            raise ValueError(
                f"nothing would move: the first move comes after {self.every} optimizer steps, and there are none "
                f"from {self.end} of {self.steps} on; give a smaller every"
            )

    @property
    def end(self) -> int:
        """The first optimizer step after which nothing moves any more."""
        return round(self.until * self.steps)

    @property
    def events(self) -> Sequence[int]:
        """The optimizer steps after which it moves."""
        return range(self.every, self.end, self.every)

    def decay(self, step: int) -> float:
        """The factor on how much moves after ``step`` optimizer steps: a half cosine from 1 to 0."""
        return (1 + cos(pi * step / self.end)) / 2 if step < self.end else 0.0


def check_share(option: str, value: object) -> None:
    """Refuse what is no share in (0, 1].

    Args:
        option: what the user calls it.
        value: what was given.

    Raises:
        ValueError: for any other value.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ValueError(f"{option} must be a share in (0, 1], got {value!r}")


def _check_count(option: str, value: object, ge: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < ge:
        raise ValueError(f"{option} must be a whole number of at least {ge}, got {value!r}")

"""When to prune and how much: the schedule that `sao_prune.schedule` follows."""

from __future__ import annotations

from dataclasses import dataclass
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
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < ge:
                raise ValueError(f"{option} must be a whole number of at least {ge}, got {value!r}")
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

"""What a run shows while it works: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# Lines of a terminal that the view leaves to what is around its table.
_AROUND = 8


@dataclass(frozen=True)
class MethodProgress:
    """How far one method is.

    Attributes:
        title: the method's name in tables.
        done, running, left: trials: trainings and measurements, those that choose learning rates included.
        held_out, test: the best accuracy that a trial reached so far, as fractions: on the held-out part of the
            training set, and on the test set.
    """

    title: str
    done: int
    running: int
    left: int
    held_out: float | None = None
    test: float | None = None


class Display(Protocol):
    """Progress in steps: one an epoch, one a measurement."""

    def stage(self, text: str) -> None:
        """What is done before the steps begin."""

    def start(self, steps: int, done: int) -> None:
        """Work begins; ``done`` of the ``steps`` are on the disk already."""

    def expect(self, steps: int) -> None:
        """So many steps there are in all by now: what trials show may ask for more."""

    def step(self, title: str, detail: str, steps: int = 1) -> None:
        """``steps`` more are done of what ``title`` names."""

    def methods(self, progress: Sequence[MethodProgress]) -> None:
        """How far each method is by now."""

    def note(self, text: str) -> None:
        """Something worth a line that stays."""


class PlainDisplay(AbstractContextManager["PlainDisplay"]):
    """A line for every note, and one for the progress at most every few seconds."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self._console, self._every = console, every
        self._steps = self._done = 0
        self._methods: Sequence[MethodProgress] = ()
        self._last = time.monotonic()
        # When the work of this run began, and how much was done by then.
        self._begun: tuple[float, int] | None = None

    def stage(self, text: str) -> None:
        """See `Display`."""
        self.note(f"{text} ..")

    def start(self, steps: int, done: int) -> None:
        """See `Display`."""
        self._steps, self._done = steps, done

    def expect(self, steps: int) -> None:
        """See `Display`."""
        self._steps = steps

    def step(self, title: str, detail: str, steps: int = 1) -> None:
        """See `Display`."""
        self._done += steps
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            told = [f"{self._done}/{self._steps} steps", *self._trials(), *self._time_left()]
            self.note(f"{', '.join(told)}; {title}: {detail}")

    def methods(self, progress: Sequence[MethodProgress]) -> None:
        """See `Display`."""
        self._methods = progress
        self._begun = self._begun or (time.monotonic(), self._done)

    def note(self, text: str) -> None:
        """See `Display`."""
        self._console.print(escape(text), soft_wrap=True, highlight=False)

    def _trials(self) -> list[str]:
        return [f"trials: {_trials(self._methods)}"] if self._methods else []

    def _time_left(self) -> list[str]:
        if self._begun is None or self._done <= self._begun[1]:
            return []
        each = (time.monotonic() - self._begun[0]) / (self._done - self._begun[1])
        return [f"about {timedelta(seconds=round(each * max(0, self._steps - self._done)))} left"]

    def __exit__(self, *error: object) -> None:
        pass


class LiveDisplay(AbstractContextManager["LiveDisplay"]):
    """One bar over the whole run with what is being trained beside it, and below it a line a method."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._methods: Sequence[MethodProgress] = ()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=None, detail="")
        self._live = Live(console=console, get_renderable=self._view, refresh_per_second=4)

    def stage(self, text: str) -> None:
        """See `Display`."""
        self._progress.update(self._task, description=escape(text))

    def start(self, steps: int, done: int) -> None:
        """See `Display`."""
        self._progress.update(self._task, total=steps, completed=done)

    def expect(self, steps: int) -> None:
        """See `Display`."""
        self._progress.update(self._task, total=steps)

    def step(self, title: str, detail: str, steps: int = 1) -> None:
        """See `Display`."""
        self._progress.update(self._task, advance=steps, description=escape(title), detail=escape(detail))

    def methods(self, progress: Sequence[MethodProgress]) -> None:
        """See `Display`."""
        self._methods = progress

    def note(self, text: str) -> None:
        """See `Display`."""
        self._console.print(escape(text), highlight=False)

    def _view(self) -> RenderableType:
        return Group(self._progress, _table(self._methods, self._console.height)) if self._methods else self._progress

    def __enter__(self) -> LiveDisplay:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()


def make_display(console: Console) -> LiveDisplay | PlainDisplay:
    """The live view where ``console`` is a terminal, else plain lines."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def _table(progress: Sequence[MethodProgress], height: int) -> Table:
    """A line a method, as many as the terminal has room for: those at work first, then those with work left."""
    room = max(1, height - _AROUND)
    chosen = sorted(range(len(progress)), key=lambda i: (not progress[i].running, not progress[i].left, i))[:room]
    table = Table(box=None, padding=(0, 2), caption_justify="left", caption=_caption(progress, len(progress) - room))
    table.add_column("method", overflow="ellipsis", no_wrap=True)
    for name in ("done", "running", "left", "best held-out %", "best test %"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in (progress[i] for i in sorted(chosen)):
        counts = (str(method.done), str(method.running or "-"), str(method.left or "-"))
        style = "bold" if method.running else "" if method.left else "dim"
        table.add_row(escape(method.title), *counts, _percent(method.held_out), _percent(method.test), style=style)
    return table


def _caption(progress: Sequence[MethodProgress], hidden: int) -> str:
    more = f"; {hidden} more methods" if hidden > 0 else ""
    return f"trials: {_trials(progress)}{more}"


def _trials(progress: Sequence[MethodProgress]) -> str:
    done, running, left = (sum(getattr(m, name) for m in progress) for name in ("done", "running", "left"))
    return f"{done} done, {running} running, {left} left"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"

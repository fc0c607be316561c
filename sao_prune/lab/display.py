"""What a run shows while it works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display(Protocol):
    """Progress in steps: one an epoch, one a measurement."""

    def stage(self, text: str) -> None:
        """What is done before the steps begin."""

    def start(self, steps: int, done: int) -> None:
        """Work begins; ``done`` of the ``steps`` are on the disk already."""

    def step(self, title: str, detail: str, steps: int = 1) -> None:
        """``steps`` more are done of what ``title`` names."""

    def note(self, text: str) -> None:
        """Something worth a line that stays."""


class PlainDisplay:
    """A line for every note, and one for the progress at most every few seconds."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self._console, self._every = console, every
        self._steps = self._done = 0
        self._last = time.monotonic()

    def stage(self, text: str) -> None:
        """See `Display`."""
        self.note(f"{text} ..")

    def start(self, steps: int, done: int) -> None:
        """See `Display`."""
        self._steps, self._done = steps, done

    def step(self, title: str, detail: str, steps: int = 1) -> None:
        """See `Display`."""
        self._done += steps
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self.note(f"{self._done}/{self._steps} steps; {title}: {detail}")

    def note(self, text: str) -> None:
        """See `Display`."""
        self._console.print(escape(text), soft_wrap=True, highlight=False)

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class LiveDisplay:
    """One bar over the whole run, with what is being trained beside it."""

    def __init__(self, console: Console) -> None:
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

    def stage(self, text: str) -> None:
        """See `Display`."""
        self._progress.update(self._task, description=escape(text))

    def start(self, steps: int, done: int) -> None:
        """See `Display`."""
        self._progress.update(self._task, total=steps, completed=done)

    def step(self, title: str, detail: str, steps: int = 1) -> None:
        """See `Display`."""
        self._progress.update(self._task, advance=steps, description=escape(title), detail=escape(detail))

    def note(self, text: str) -> None:
        """See `Display`."""
        self._progress.console.print(escape(text), highlight=False)

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def make_display(console: Console) -> LiveDisplay | PlainDisplay:
    """The live bar where ``console`` is a terminal, else plain lines."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)

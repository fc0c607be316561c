"""Work in fresh processes, so that a crash, a hang or a full memory costs one item and not the run."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Item, Value]):
    """What became of one item: a value, or the reason why there is none.

    Attributes:
        item: what was worked on.
        value: what the function returned; ``None`` after a failure.
        error: one line that says what went wrong; ``None`` after success.
        died: whether the process ended without an answer.
    """

    item: Item
    value: Value | None = None
    error: str | None = None
    died: bool = False


@dataclass
class _Worker(Generic[Item]):
    process: Any
    item: Item
    deadline: float


def isolated(
    function: Callable[[Item], Value],
    items: Sequence[Item],
    *,
    jobs: int = 1,
    timeout: float = 600.0,
    preload: Sequence[str] = (),
) -> Iterator[Outcome[Item, Value]]:
    """Call a function on each item, every call in a process of its own, and yield the outcomes as they come.

    Args:
        function: importable by its name, so that another process finds it.
        items: its arguments, picklable.
        jobs: processes at a time.
        timeout: seconds after which a process is killed.
        preload: modules to import once; every process starts as a copy of one that has them.

    Yields:
        One `Outcome` an item, in the order of completion.

    Raises:
        ValueError: if ``jobs`` is not positive.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    method = "spawn" if sys.platform == "win32" else "forkserver"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([*preload])
    waiting = list(reversed(items))
    running: dict[Connection, _Worker[Item]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                receiver, worker = _start(context, function, waiting.pop(), timeout)
                running[receiver] = worker
            next_deadline = min(worker.deadline for worker in running.values())
            ready = wait(list(running), timeout=max(0.0, next_deadline - time.monotonic()))
            late = [c for c, worker in running.items() if time.monotonic() > worker.deadline and c not in ready]
            for receiver in [c for c in running if c in ready]:
                yield _collect(receiver, running.pop(receiver))
            for receiver in late:
                worker = running.pop(receiver)
                _stop(worker)
                receiver.close()
                yield Outcome(worker.item, error=f"took longer than {timeout:g} s and was stopped")
    finally:
        for worker in running.values():
            _stop(worker)


def _start(
    context: Any, function: Callable[[Item], Any], item: Item, timeout: float
) -> tuple[Connection, _Worker[Item]]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(function, item, sender), daemon=True)
    process.start()
    sender.close()
    return receiver, _Worker(process, item, time.monotonic() + timeout)


def _work(function: Callable[[Any], Any], item: Any, sender: Connection) -> None:
    message: tuple[Any, str | None]
    try:
        message = (function(item), None)
    except Exception as error:
        message = (None, one_line(error))
    sender.send(message)
    sender.close()


def _collect(receiver: Connection, worker: _Worker[Item]) -> Outcome[Item, Any]:
    try:
        value, error = receiver.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode
        ended = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if code == -9 else ""
        return Outcome(worker.item, error=f"the process ended with {ended}{hint}", died=True)
    finally:
        receiver.close()
        worker.process.join()
    return Outcome(worker.item, value, error)


def _stop(worker: _Worker[Any]) -> None:
    with suppress(OSError):
        worker.process.kill()
    worker.process.join()


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line: its class and the start of its message.

    Example:
        >>> one_line(ValueError("no  such\\nlayer"))
        'ValueError: no such layer'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else f"{text[: limit - 2]}.."

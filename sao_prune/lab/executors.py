"""Where trials are worked on: in this process, in processes of their own, or in several together."""

from __future__ import annotations

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from threading import Thread
from typing import Any

from .errors import FollowerError, LabError
from .isolate import one_line
from .server import start_server
from .training import from_first, rank
from .trials import Trial
from .work import OnEpoch, Worker, Workplace

Result = dict[str, Any]


class Executor(AbstractContextManager["Executor"], ABC):
    """Takes trials and gives futures of their records; nothing goes on after its ``with``.

    Attributes:
        slots: how many trials it works on at a time.
    """

    slots = 1

    @abstractmethod
    def submit(self, trial: Trial) -> Future[Result]:
        """Begin a trial."""

    def __exit__(self, *error: object) -> None:
        """End what is under way."""


class WorkerLost(Exception):
    """The worker of a trial went away: its machine, its process or the way to it."""


def lost(error: BaseException) -> bool:
    """Whether a trial failed because its worker went away, so that another may succeed.

    Example:
        >>> lost(WorkerLost("node 3 does not answer")), lost(ValueError("too sparse"))
        (True, False)
    """
    return isinstance(error, WorkerLost | BrokenExecutor | CancelledError)


class InProcess(Executor):
    """One trial at a time, in this process, with progress epoch by epoch."""

    def __init__(self, place: Workplace, progress: Callable[[Trial], OnEpoch]) -> None:
        self._worker, self._progress = Worker(place), progress

    def submit(self, trial: Trial) -> Future[Result]:
        """Do the trial; its future is done on return. What a user interrupts is not caught."""
        future: Future[Result] = Future()
        try:
            future.set_result(self._worker.work(trial, self._progress(trial)))
        except Exception as error:
            future.set_exception(error)
        return future


class Processes(Executor):
    """So many processes on this machine, each a pool of its own, so that the death of one costs its trial alone.

    None outlives this process, however that ends.
    """

    def __init__(self, place: Workplace, jobs: int) -> None:
        self.slots = jobs
        self._place = place
        self._context = start_server()
        self._pools: dict[ProcessPoolExecutor, Future[Result] | None] = {}

    def submit(self, trial: Trial) -> Future[Result]:
        """Begin a trial in an idle process; there is one as long as no more than ``slots`` are under way."""
        for pool in [pool for pool, last in self._pools.items() if last is None or last.done()]:
            try:
                future = self._pools[pool] = pool.submit(_work, trial)
                return future
            except BrokenExecutor:
                # Its process died, under a trial or after one.
                del self._pools[pool]
        pool = ProcessPoolExecutor(1, mp_context=self._context, initializer=_hire, initargs=(self._place,))
        self._pools[pool] = None
        future = self._pools[pool] = pool.submit(_work, trial)
        return future

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            for process in [process for pool in self._pools for process in (pool._processes or {}).values()]:
                process.kill()
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None


def _hire(place: Workplace) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(place)


def _end_with_parent() -> None:
    """A worker whose driver was killed would wait for its next trial for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(trial: Trial) -> Result:
    assert _worker is not None, "the pool's initializer made it"
    return _worker.work(trial)


class DataParallel(Executor):
    """One trial at a time, its batches shared by the processes of ``torchrun`` or ``accelerate launch``.

    The first process decides and writes; the others `follow`. An error in a trial ends the run: the others may be in
    the middle of what the failed one no longer takes part in.
    """

    def __init__(self, place: Workplace, progress: Callable[[Trial], OnEpoch]) -> None:
        self._worker, self._progress = Worker(place), progress

    def submit(self, trial: Trial) -> Future[Result]:
        """Tell the others, and do the trial together with them.

        Raises:
            LabError: if it fails.
        """
        from_first(trial)
        future: Future[Result] = Future()
        try:
            future.set_result(self._worker.work(trial, self._progress(trial)))
        except Exception as error:
            raise LabError(f"{trial.title}: {error if isinstance(error, LabError) else one_line(error)}") from error
        return future

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            from_first(None)


def follow(place: Workplace) -> None:
    """Work on the trials that the first process names, until it is through.

    Raises:
        FollowerError: if a trial fails, or the first process ended before its time.
    """
    worker = Worker(place)
    try:
        while (trial := from_first(None)) is not None:
            worker.work(trial)
    except Exception as error:
        raise FollowerError(f"process {rank()}: {error if isinstance(error, LabError) else one_line(error)}") from error

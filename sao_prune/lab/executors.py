"""Where cells are worked on: in this process, in processes of their own, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol

from .cells import Cell
from .errors import LabError
from .train import from_first
from .work import OnEpoch, Worker, Workplace

Result = dict[str, Any]


class Executor(Protocol):
    """Takes cells and gives futures of their records.

    Attributes:
        slots: how many cells it works on at a time.
    """

    slots: int

    def submit(self, cell: Cell) -> Future[Result]:
        """Begin a cell."""

    def __enter__(self) -> Executor:
        """Ready to work."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing goes on after this."""


def lost(error: BaseException) -> bool:
    """Whether a cell failed because its worker went away, so that another may succeed."""
    return isinstance(error, BrokenExecutor | CancelledError) or type(error).__module__.startswith("ray")


class InProcess:
    """One cell at a time, in this process, with progress epoch by epoch."""

    slots = 1

    def __init__(self, place: Workplace, progress: Callable[[Cell], OnEpoch]) -> None:
        self._worker, self._progress = Worker(place), progress

    def submit(self, cell: Cell) -> Future[Result]:
        """Do the cell; its future is done on return. What a user interrupts is not caught."""
        future: Future[Result] = Future()
        try:
            future.set_result(self._worker.work(cell, self._progress(cell)))
        except Exception as error:
            future.set_exception(error)
        return future

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Processes:
    """So many processes on this machine, each a pool of its own, so that the death of one costs its cell alone."""

    def __init__(self, place: Workplace, jobs: int) -> None:
        self.slots = jobs
        self._place = place
        method = "spawn" if sys.platform == "win32" else "forkserver"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(["sao_prune.lab.work"])
        self._idle: list[ProcessPoolExecutor] = []
        self._pools: list[ProcessPoolExecutor] = []

    def submit(self, cell: Cell) -> Future[Result]:
        """Begin a cell in an idle process; there is one as long as no more than ``slots`` are under way."""
        pool = self._idle.pop() if self._idle else self._start()
        future = pool.submit(_work, cell)
        future.add_done_callback(lambda done: self._free(pool, done))
        return future

    def _start(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, mp_context=self._context, initializer=_hire, initargs=(self._place,))
        self._pools.append(pool)
        return pool

    def _free(self, pool: ProcessPoolExecutor, done: Future[Result]) -> None:
        broken = not done.cancelled() and isinstance(done.exception(), BrokenExecutor)
        if not broken:
            self._idle.append(pool)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools:
            if kind is not None:
                for process in list((pool._processes or {}).values()):
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None


def _hire(place: Workplace) -> None:
    global _worker
    _worker = Worker(place)


def _work(cell: Cell) -> Result:
    assert _worker is not None, "the pool's initializer made it"
    return _worker.work(cell)


class DataParallel:
    """One cell at a time, its batches shared by the processes of ``torchrun`` or ``accelerate launch``.

    The first process decides and writes; the others `follow`.
    """

    slots = 1

    def __init__(self, place: Workplace, progress: Callable[[Cell], OnEpoch]) -> None:
        self._inside = InProcess(place, progress)

    def submit(self, cell: Cell) -> Future[Result]:
        """Tell the others, and do the cell together with them."""
        from_first(cell)
        return self._inside.submit(cell)

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            from_first(None)


def follow(place: Workplace) -> None:
    """Work on the cells that the first process names, until it is through."""
    worker = Worker(place)
    while (cell := from_first(None)) is not None:
        worker.work(cell)


class RayCluster:
    """A Ray cluster: each cell a task with its request for processors, tried again where a node is lost.

    Args:
        address: of the cluster, or ``auto``.
        cpus, gpus: what one cell asks for.

    Raises:
        LabError: if Ray is not installed or no cluster answers.
    """

    def __init__(self, place: Workplace, address: str, cpus: float = 1, gpus: float = 0) -> None:
        if find_spec("ray") is None:
            raise LabError("--ray needs Ray: pip install 'sao-prune[ray]'")
        import ray

        self._ray, self._place = ray, place
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise LabError(f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:200]}") from error
        have = ray.cluster_resources()
        by_cpu = have.get("CPU", 0) / cpus if cpus else float("inf")
        by_gpu = have.get("GPU", 0) / gpus if gpus else float("inf")
        self.slots = int(min(by_cpu, by_gpu, 1024))
        if self.slots < 1:
            ray.shutdown()
            offer = f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
            raise LabError(f"the cluster has {offer}; one cell asks for {cpus:g} and {gpus:g}")
        self._task = ray.remote(_work_anywhere).options(num_cpus=cpus, num_gpus=gpus, max_retries=3)

    def submit(self, cell: Cell) -> Future[Result]:
        """Hand a cell to the cluster."""
        future: Future[Result] = self._task.remote(self._place, cell).future()
        return future

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()


def _work_anywhere(place: Workplace, cell: Cell) -> Result:
    global _worker
    if _worker is None or _worker.place != place:
        _worker = Worker(place)
    return _worker.work(cell)

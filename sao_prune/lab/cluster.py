"""Trials on a Ray cluster."""

from __future__ import annotations

import getpass
import socket
import tempfile
from concurrent.futures import Future
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import LabError
from .executors import Executor, Result, WorkerLost
from .isolate import one_line
from .trials import Trial
from .work import Worker, Workplace

# More than a cluster's scheduler should have to hold.
MOST_SLOTS = 1024


class RayCluster(Executor):
    """A Ray cluster: each trial a task with its request for processors. Results come back as values.

    Args:
        place: with absolute paths; a node that lacks the folder uses one of its own among its temporary files.
        address: of the cluster, or ``auto``.
        cpus, gpus: what one trial asks for.

    Raises:
        LabError: if Ray is not installed, no cluster answers, or no node of it is large enough.
    """

    def __init__(self, place: Workplace, address: str, cpus: float = 1, gpus: float = 0) -> None:
        self._ray, self._place = connect(address), place
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self.slots = min(MOST_SLOTS, count_slots(nodes, cpus, gpus))
        if self.slots < 1:
            self._ray.shutdown()
            offers = "; ".join(sorted({f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes}))
            raise LabError(
                f"no node of the Ray cluster at {address!r} is large enough: one trial asks for {cpus:g} CPUs and "
                f"{gpus:g} GPUs, its {len(nodes)} nodes have {offers}"
            )
        # A lost trial is the sweep's to try again, which tells of it; Ray would do so in silence.
        self._task = self._ray.remote(_work_anywhere).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)

    def submit(self, trial: Trial) -> Future[Result]:
        """Hand a trial to the cluster."""
        future: Future[Result] = Future()

        def pass_on(answer: Future[tuple[Result | None, str]]) -> None:
            error = answer.exception()
            if error is None:
                result, told = answer.result()
                if result is not None:
                    future.set_result(result)
                else:
                    future.set_exception(LabError(told))
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                # It did not get as far as the trial: the node lacks a package, say.
                future.set_exception(LabError(one_line(getattr(error, "cause", error))))
            else:
                future.set_exception(WorkerLost(one_line(error)))

        self._task.remote(self._place, trial).future().add_done_callback(pass_on)
        return future

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()


def connect(address: str) -> Any:
    """The module ``ray``, connected to a cluster.

    Args:
        address: ``host:port`` of the cluster's head, or ``auto`` for the cluster that this machine belongs to.

    Raises:
        LabError: if it is not installed, or the cluster does not answer.
    """
    if find_spec("ray") is None:
        raise LabError("--ray needs Ray: pip install 'sao-prune[ray]'")
    import ray

    try:
        if address != "auto":
            _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise LabError(
            f"cannot join a Ray cluster at {address!r}: {one_line(error)}; start one with: ray start --head"
        ) from error
    return ray


def _knock(address: str) -> None:
    """Find out at once whether somebody listens: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        raise ValueError("an address is auto, or host:port of the head")
    socket.create_connection((host, int(port)), timeout=10).close()


def count_slots(nodes: list[dict[str, float]], cpus: float, gpus: float) -> int:
    """How many trials the nodes have room for at a time; a trial does not stretch over two nodes.

    Args:
        nodes: the resources of each, by Ray's names.

    Example:
        >>> count_slots([{"CPU": 3}, {"CPU": 3, "GPU": 1}], cpus=2, gpus=0)
        2
        >>> count_slots([{"CPU": 3}, {"CPU": 3, "GPU": 1}], cpus=1, gpus=0.5)
        2
    """
    asked = {"CPU": cpus, "GPU": gpus}
    rooms = [[int(node.get(name, 0) / amount + 1e-9) for name, amount in asked.items() if amount > 0] for node in nodes]
    return sum(min(room, default=MOST_SLOTS) for room in rooms)


_worker: Worker | None = None


def _work_anywhere(place: Workplace, trial: Trial) -> tuple[Result | None, str]:
    """A trial's record, or one line on why there is none: the driver need not know the exception's class."""
    global _worker
    if not place.folder.is_dir():
        place = replace(place, folder=_own_folder(place.folder.name))
    try:
        if _worker is None or _worker.place != place:
            _worker = Worker(place)
        return _worker.work(trial), ""
    except Exception as error:
        return None, str(error) if isinstance(error, LabError) else one_line(error)


def _own_folder(run: str) -> Path:
    """Where a node keeps weights and unfinished trainings if the driver's folder is not there."""
    return Path(tempfile.gettempdir()) / f"sao-prune-{getpass.getuser()}" / run

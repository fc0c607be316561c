"""Runs a recipe: every method under identical conditions, every finished trial on the disk."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch

from ..files import write_atomically
from .cluster import RayCluster
from .data import DataSource, load_dataset
from .display import Display, MethodProgress
from .errors import LabError
from .executors import DataParallel, Executor, InProcess, Processes, follow, lost
from .isolate import one_line
from .methods import check_method
from .network import build_network
from .recipe import Recipe, read_recipe
from .results import Record, ResultsLog
from .robustness import check_bounds
from .training import History, in_turn, process_group, rank, world
from .training.holding import check_holdable
from .trials import Trial, choose_lr, count_trials, known_trials
from .work import OnEpoch, Workplace, denormals_flushed, pick_device

# A trial whose worker died this often is left to the next run.
TRIES = 3


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes, where data comes from and who works: all that is not part of the comparison.

    Attributes:
        jobs: processes on this machine; with more than one, each has its share of the cores.
        ray: address of a Ray cluster, or ``auto``; takes the place of ``jobs``.
        cpus, gpus: of the cluster, for one trial.
        tensorboard: write event files below the run's folder.

    Raises:
        LabError: if a number is out of range, or ``jobs`` and ``ray`` are given together.
    """

    out: Path = Path("runs")
    source: DataSource = field(default_factory=DataSource)
    device: str | None = None
    jobs: int = 1
    ray: str | None = None
    cpus: float = 1
    gpus: float = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise LabError(f"--jobs counts processes, at least 1, got {self.jobs}")
        if self.ray is not None and self.jobs > 1:
            raise LabError("--jobs is for this machine; on a Ray cluster --cpus and --gpus say what one training gets")
        if min(self.cpus, self.gpus) < 0:
            raise LabError(f"--cpus and --gpus cannot be negative, got {self.cpus:g} and {self.gpus:g}")


def run_recipe(path: Path, options: RunOptions, display: Display, profile: str | None = None) -> Path:
    """Run a recipe to its end, or on from where an earlier run of it stopped.

    Args:
        path: the recipe's file.
        profile: one of its profiles, which has a folder of its own.

    Returns:
        The folder with ``results.jsonl`` and a copy of the recipe.

    Raises:
        LabError: if the recipe, the data, the network, a method or the device cannot be had, before any training; or
            at the end, if a trial failed.
    """
    with denormals_flushed(), process_group(options.device) as own_device:
        if own_device is not None and (options.jobs > 1 or options.ray is not None):
            raise LabError("--jobs and --ray are for trainings beside each other: start them without torchrun")
        file = read_recipe(path, profile)
        recipe = file.recipe
        display.stage(f"checking the data, networks and methods of {recipe.name}")
        in_turn(lambda: _check_configurations(recipe, options.source))
        folder = options.out / recipe.name
        place = _workplace(options, folder, own_device)
        if rank() > 0:
            follow(place)
            return folder
        with ResultsLog(folder / "results.jsonl", display.note) as log:
            copy = folder / "recipe.yaml"
            if not (copy.exists() and copy.samefile(path)):
                write_atomically(copy, file.text)
            sweep = Sweep(recipe, log, display, place)
            with _executor(options, place, sweep) as executor:
                display.stage("training")
                sweep.run(executor)
    return folder


def _check_configurations(recipe: Recipe, source: DataSource) -> None:
    """Find out whether all data is there, every network can be built and every method applied, before hours are spent.

    Raises:
        LabError: for the first that cannot.
    """
    for setting in recipe.settings:
        data = load_dataset(setting.data, source)
        every = sorted(setting.configurations(), key=lambda each: repr(each.network_options))
        for _, alike in itertools.groupby(every, key=lambda each: each.network_options):
            same = list(alike)
            options = same[0].network_options
            model = build_network(setting.network.name, options, len(data.classes), data.sizes)
            if setting.train.loss.is_certified or (setting.robustness is not None and setting.robustness.radii):
                check_bounds(model)
            if setting.train.hold:
                check_holdable(model)
            for configuration in same:
                check_method(model, configuration)


class Sweep:
    """The trials of one recipe, with their results in one log, handed out as they become known."""

    def __init__(self, recipe: Recipe, log: ResultsLog, display: Display, place: Workplace) -> None:
        self._log, self._display, self._place = log, display, place
        self._configurations = recipe.every_configuration()
        self._counted: set[tuple[int, str]] = set()
        self._live: set[str] = set()
        self._trained: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._failed: dict[str, str] = {}

    def run(self, executor: Executor) -> None:
        """All trials that are not on the disk yet.

        Raises:
            LabError: at the end, if a trial failed; the others are done.
        """
        self._display.start(self._steps(), 0)
        self._account()
        self._display.methods(self._progress(set()))
        under_way: dict[Future[Record], Trial] = {}
        while True:
            while len(under_way) < executor.slots:
                trial = next(self._missing({trial.key for trial in under_way.values()}), None)
                if trial is None:
                    break
                # Before it begins: one that works in this process comes back when it is done.
                self._display.methods(self._progress({trial.key, *(other.key for other in under_way.values())}))
                under_way[executor.submit(trial)] = trial
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                self._collect(under_way.pop(future), future)
            self._display.expect(self._steps())
            self._account()
            self._display.methods(self._progress({trial.key for trial in under_way.values()}))
        if self._failed:
            first = next(iter(self._failed.values()))
            raise LabError(f"{len(self._failed)} trials failed; the same command tries them again. The first: {first}")

    def on_epoch(self, trial: Trial) -> OnEpoch:
        """What shows the progress of a training in this process."""
        epochs = trial.steps
        self._live.add(trial.key)

        def tell(history: History) -> None:
            done = len(history.accuracy)
            # A diverged training takes its remaining steps at once.
            steps = 1 if history.status == "ok" else epochs - done + 1
            self._display.step(trial.title, f"epoch {done}/{epochs}, accuracy {history.accuracy[-1]:.1%}", steps)

        return tell

    def _missing(self, busy: Set[str]) -> Iterator[Trial]:
        """The trials that can be begun now, in the order of work; dense ones again where their weights are wanted."""
        records = self._log.records
        for configuration in self._configurations:
            for trial in known_trials(configuration, records):
                if trial.key in records or trial.key in busy or trial.key in self._failed:
                    continue
                if trial.start is None:
                    yield trial
                    continue
                start = trial.start.key
                if start in busy or start in self._failed or start not in records:
                    continue
                # What was trained in this run is where its worker can find it, which may be another machine's disk.
                yield trial if start in self._trained or self._place.weights(trial.start).is_file() else trial.start

    def _collect(self, trial: Trial, future: Future[Record]) -> None:
        error = future.exception()
        if error is None:
            self._log.append({"key": trial.key, **future.result()})
            self._trained.add(trial.key)
            return
        self._tries[trial.key] += 1
        told = str(error) if isinstance(error, LabError) else one_line(error)
        if lost(error) and self._tries[trial.key] < TRIES:
            self._display.note(f"{trial.title}: its worker was lost ({told}); once more")
            return
        self._failed[trial.key] = f"{trial.title}: {told}"
        self._display.note(f"failed: {trial.title}: {told}")

    def _account(self) -> None:
        """Tell of what is done and was not told yet."""
        records = self._log.records
        for index, configuration in enumerate(self._configurations):
            final = False
            trials = known_trials(configuration, records)
            for trial in trials:
                if trial.key not in records or (index, trial.key) in self._counted:
                    continue
                self._counted.add((index, trial.key))
                final |= trial.kind == "final"
                if trial.key in self._live and trial.kind != "spectrum":
                    self._live.discard(trial.key)
                else:
                    self._display.step(trial.title, "done", trial.steps)
            finals = [
                records[trial.key]["result"] for trial in trials if trial.kind == "final" and trial.key in records
            ]
            if final and len(finals) == len(configuration.setting.seeds):
                accuracy, lr = fmean(result["accuracy"] for result in finals), choose_lr(configuration, records)
                self._display.note(
                    f"{configuration.title}: {accuracy:.1%} on the test set (mean of {len(finals)}), lr {lr:g}"
                )

    def _steps(self) -> int:
        """Of all trials, as far as they are known."""
        return sum(count_trials(configuration, self._log.records)[1] for configuration in self._configurations)

    def _progress(self, busy: Set[str]) -> list[MethodProgress]:
        """How far each method is, in the order of the recipe."""
        records, found = self._log.records, dict[str, MethodProgress]()
        for configuration in self._configurations:
            title, trials = configuration.method.title, known_trials(configuration, records)
            before = found.get(title, MethodProgress(title, 0, 0, 0))
            done = [trial for trial in trials if trial.key in records]
            running = sum(trial.key in busy and trial.key not in records for trial in trials)
            best = {"select": before.held_out, "final": before.test}
            for trial in done:
                if trial.kind in best:
                    best[trial.kind] = max(best[trial.kind] or 0.0, records[trial.key]["result"]["accuracy"])
            left = count_trials(configuration, records)[0] - len(done) - running
            found[title] = MethodProgress(
                title,
                before.done + len(done),
                before.running + running,
                before.left + left,
                best["select"],
                best["final"],
            )
        return list(found.values())


def _executor(options: RunOptions, place: Workplace, sweep: Sweep) -> Executor:
    if options.ray is not None:
        gpus = options.gpus or (1 if place.device.startswith("cuda") else 0)
        return RayCluster(place, options.ray, options.cpus, gpus)
    if world() > 1:
        return DataParallel(place, sweep.on_epoch)
    if options.jobs > 1:
        return Processes(place, options.jobs)
    return InProcess(place, sweep.on_epoch)


def _workplace(options: RunOptions, folder: Path, own_device: torch.device | None) -> Workplace:
    if options.ray is None:
        device = str(own_device or pick_device(options.device))
        return Workplace(folder, options.source, device, _threads(options.jobs), options.tensorboard)
    # On the nodes, the working folder is another; whether they have a GPU is theirs to find out.
    device = options.device or ("cuda" if options.gpus else str(pick_device()))
    source = replace(options.source, data_dir=options.source.data_dir.expanduser().resolve())
    return Workplace(folder.resolve(), source, device, max(1, int(options.cpus)), options.tensorboard)


def _threads(jobs: int) -> int | None:
    """Each process's share of the cores; no more than this process has, which ``OMP_NUM_THREADS`` may limit."""
    if jobs == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // jobs), torch.get_num_threads())

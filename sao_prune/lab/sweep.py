"""Runs a recipe: every method under identical conditions, every finished cell on the disk."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import sao_prune

from .choice import choose_lr, final_cells, selection_cells, spectrum_cell
from .data import Dataset, DataSource, load_dataset
from .depth import depth_spectrum
from .display import Display
from .errors import LabError
from .methods import check_method, prune_network
from .network import build_network, initial_network
from .recipe import Cell, Recipe, load_recipe
from .results import ResultsLog, write_atomically
from .train import History, train


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes, where data comes from and which device works: all that is not part of the comparison."""

    out: Path = Path("runs")
    source: DataSource = field(default_factory=DataSource)
    device: str | None = None


def run_recipe(path: Path, options: RunOptions, display: Display) -> Path:
    """Run a recipe to its end, or on from where an earlier run of it stopped.

    Args:
        path: the recipe's file.

    Returns:
        The folder with ``results.jsonl`` and a copy of the recipe.

    Raises:
        LabError: if the recipe, the data, the network, a method or the device cannot be had; before any training.
    """
    with _denormals_flushed():
        recipe = load_recipe(path)
        device = pick_device(options.device)
        data = load_dataset(recipe.data.name, options.source)
        check_arms(recipe, len(data.classes))
        folder = options.out / recipe.name
        with ResultsLog(folder / "results.jsonl", display.note) as log:
            copy = folder / "recipe.yaml"
            if not (copy.exists() and copy.samefile(path)):
                write_atomically(copy, path.read_text(encoding="utf-8"))
            Sweep(recipe, data.to(device), log, display).run()
    return folder


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU.

    Raises:
        LabError: if the one asked for is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LabError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_arms(recipe: Recipe, classes: int) -> None:
    """Find out whether every network can be built and every method applied, before hours are spent on the first.

    Raises:
        LabError: for the first that cannot.
    """
    for options in recipe.network.grid():
        model = build_network(recipe.network.name, options, classes)
        for arm in recipe.arms():
            if arm.network_options == options:
                check_method(model, arm.method, arm.prune)


class Sweep:
    """The cells of one recipe on one device, with their results in one log."""

    def __init__(self, recipe: Recipe, data: Dataset, log: ResultsLog, display: Display) -> None:
        self._recipe, self._data, self._log, self._display = recipe, data, log, display
        self._held = data.holdout(recipe.data.holdout)
        self._device = data.train_x.device
        self._environment = describe_environment(self._device)
        self._initial = lru_cache(maxsize=4)(self._draw_initial)

    def run(self) -> None:
        """All cells that are not on the disk yet, method by method."""
        recipe, arms = self._recipe, list(self._recipe.arms())
        rates = len(recipe.lr.grid) * len(recipe.lr.seeds) if len(recipe.lr.grid) > 1 else 0
        self._display.start(len(arms) * (1 + (rates + len(recipe.seeds)) * recipe.train.epochs), 0)
        for arm in arms:
            self._cell(spectrum_cell(recipe, arm))
            for cells in selection_cells(recipe, arm).values():
                for cell in cells:
                    self._cell(cell)
            lr = choose_lr(recipe, arm, self._log.records)
            assert lr is not None, "every training that decides was run"
            results = [self._cell(cell) for cell in final_cells(recipe, arm, lr)]
            accuracy = fmean(result["accuracy"] for result in results)
            self._display.note(f"{arm.title}: {accuracy:.1%} on the test set (mean of {len(results)}), lr {lr:g}")

    def _cell(self, cell: Cell) -> Mapping[str, Any]:
        """The cell's result, from the disk if it is there."""
        steps = 1 if cell.train is None else cell.train.epochs
        if cell.key in self._log.records:
            self._display.step(cell.title, "on the disk already", steps)
        else:
            result = self._measure(cell) if cell.train is None else self._train(cell)
            self._log.append(
                {
                    "key": cell.key,
                    "title": cell.title,
                    "cell": cell.content(),
                    "result": result,
                    "environment": self._environment,
                }
            )
        result_on_disk: Mapping[str, Any] = self._log.records[cell.key]["result"]
        return result_on_disk

    def _train(self, cell: Cell) -> dict[str, Any]:
        assert cell.train is not None
        assert cell.lr is not None
        epochs, title = cell.train.epochs, cell.title

        def on_epoch(history: History) -> None:
            done = len(history.accuracy)
            # A diverged training takes its remaining steps at once.
            steps = 1 if history.status == "ok" else epochs - done + 1
            self._display.step(title, f"epoch {done}/{epochs}, accuracy {history.accuracy[-1]:.1%}", steps)

        model, pruned = self._network(cell)
        data = self._data if cell.holdout is None else self._held
        history = train(model, data, cell.train, cell.lr, cell.seed, on_epoch)
        return {
            **asdict(pruned),
            "status": history.status,
            "accuracy": history.accuracy[-1],
            "loss": history.test_loss[-1],
            "seconds": history.seconds,
            "curve": {key: getattr(history, key) for key in ("accuracy", "test_loss", "train_loss")},
        }

    def _measure(self, cell: Cell) -> dict[str, Any]:
        model, pruned = self._network(cell)
        self._display.step(cell.title, "singular values of the Jacobian")
        return {**asdict(pruned), **asdict(depth_spectrum(model, self._data.train_x[0]))}

    def _network(self, cell: Cell) -> tuple[nn.Module, Any]:
        """The pruned network: pruned on the CPU, so that every device starts from the same weights."""
        arm = cell.arm
        model = deepcopy(self._initial(arm.network, tuple(arm.network_options.items()), arm.gain, cell.seed))
        pruned = prune_network(model, arm.method, arm.gain, arm.prune, cell.seed)
        return model.to(self._device), pruned

    def _draw_initial(self, network: str, options: tuple[tuple[str, Any], ...], gain: float, seed: int) -> nn.Module:
        return initial_network(network, dict(options), len(self._data.classes), gain, seed)


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Deep networks that pass no signal compute with denormal numbers, which slow a CPU down many times over.

    Threads take this setting over from the one that starts them, so it must come before the first parallel work of the
    process; where a pool of threads exists already, its threads stay slow, and nothing else changes.
    """
    before = float(torch.tensor(1e-40) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a result was made with; not part of its key."""
    processor = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "sao_prune": sao_prune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type}: {processor}",
        "threads": torch.get_num_threads(),
    }

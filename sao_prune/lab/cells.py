"""Cells: the units of work of a comparison, and which of them an arm needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from statistics import fmean
from typing import Any

from .data.names import is_sequences
from .recipe import Arm
from .results import Record

# Part of every key: raise it when training changes in a way that makes old results incomparable.
RESULT_FORMAT = 2


@dataclass(frozen=True)
class Cell:
    """One unit of work: a training (``select`` on the held-out part, ``final`` on the test set) or a ``spectrum``.

    Its key is a digest of all that its result depends on, so equal keys mean equal results. Options that have their
    default value are not part of it, so that keys outlive new options.

    Attributes:
        start: the dense training whose weights a -T method prunes.
    """

    kind: str
    arm: Arm
    seed: int
    lr: float | None = None
    start: Cell | None = None

    def content(self) -> dict[str, Any]:
        """What the key is made of, ready for JSON; names for tables are not part of it."""
        setting, method = self.arm.setting, self.arm.method
        data = _said(setting.data)
        data.pop("holdout", None)
        content: dict[str, Any] = {
            "kind": self.kind,
            "data": data,
            "network": setting.network.name,
            "options": dict(self.arm.options),
            "gain": setting.gain,
            "init": setting.init,
            "method": {"name": method.name, "options": dict(method.options)},
            "prune": dict(self.arm.prune),
            "seed": self.seed,
        }
        if self.kind != "spectrum":
            content.update(lr=self.lr, train=_said(self.arm.train))
        if self.kind == "select":
            content["holdout"] = setting.data.holdout
        if self.start is not None:
            content["start"] = self.start.key
        return content

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits of a SHA-256."""
        text = json.dumps([RESULT_FORMAT, self.content()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """One line for a progress display."""
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        return f"{self.arm.title}{rate}, seed {self.seed}"

    @property
    def leaves_weights(self) -> bool:
        """Whether a -T method of the recipe starts from what this training leaves."""
        trained_first = any(method.is_trained_first for method in self.arm.setting.methods)
        return self.arm.method.is_dense and self.kind != "spectrum" and trained_first

    @property
    def steps(self) -> int:
        """Its share of the progress: epochs, or one measurement."""
        return 1 if self.kind == "spectrum" else self.arm.train.epochs


def _said(spec: Any) -> dict[str, Any]:
    """The fields of a dataclass that do not have their default value."""
    said = {}
    for f in fields(spec):
        value = getattr(spec, f.name)
        if f.default is MISSING or value != f.default:
            said[f.name] = _said(value) if is_dataclass(value) else value
    return said


def selection_cells(arm: Arm, records: Mapping[str, Record]) -> dict[float, list[Cell]] | None:
    """The trainings that decide between learning rates, by rate; none where the grid leaves no choice.

    Returns:
        ``None`` while a -T method waits for the learning rate of its dense phase.
    """
    rates = arm.setting.lr
    if len(rates.grid) == 1:
        return {}
    start_lr = _start_lr(arm, records)
    if start_lr is None and arm.method.is_trained_first:
        return None
    return {lr: [_training("select", arm, seed, lr, start_lr) for seed in rates.seeds] for lr in rates.grid}


def choose_lr(arm: Arm, records: Mapping[str, Record]) -> float | None:
    """The learning rate with the best mean accuracy on the held-out part of the training set.

    A rate with a diverged run comes after every rate without one. Ties go to the lower held-out loss, then to the
    smaller rate. ``None`` if a training that decides is missing.
    """
    cells = selection_cells(arm, records)
    if cells is None:
        return None
    if not cells:
        return arm.setting.lr.grid[0]
    ranks = {}
    for lr, group in cells.items():
        keys = [cell.key for cell in group]
        if any(key not in records for key in keys):
            return None
        results = [records[key]["result"] for key in keys]
        ranks[lr] = (
            -sum(r["status"] != "ok" for r in results),
            fmean(r["accuracy"] for r in results),
            -fmean(float("inf") if r["loss"] is None else r["loss"] for r in results),
            -lr,
        )
    return max(ranks, key=lambda lr: ranks[lr])


def final_cells(arm: Arm, records: Mapping[str, Record]) -> list[Cell] | None:
    """The trainings that the table reports, one a seed, at the chosen learning rate; ``None`` before it is chosen."""
    lr, start_lr = choose_lr(arm, records), _start_lr(arm, records)
    if lr is None or (start_lr is None and arm.method.is_trained_first):
        return None
    return [_training("final", arm, seed, lr, start_lr) for seed in arm.setting.seeds]


def spectrum_cell(arm: Arm) -> Cell | None:
    """The measurement at initialisation, for the first seed.

    None for a -T method, which starts from a training, and for tokens, which have no derivative.
    """
    if arm.method.is_trained_first or is_sequences(arm.setting.data.name):
        return None
    return Cell("spectrum", arm, arm.setting.seeds[0])


def known_cells(arm: Arm, records: Mapping[str, Record]) -> list[Cell]:
    """The cells of an arm as far as they are known by now, in the order of work."""
    spectrum, choosing = spectrum_cell(arm), selection_cells(arm, records) or {}
    cells = [] if spectrum is None else [spectrum]
    return cells + [cell for group in choosing.values() for cell in group] + (final_cells(arm, records) or [])


def count_cells(arm: Arm) -> tuple[int, int]:
    """How many cells an arm has, and their steps."""
    setting = arm.setting
    rates = len(setting.lr.grid) * len(setting.lr.seeds) if len(setting.lr.grid) > 1 else 0
    trainings, spectra = rates + len(setting.seeds), int(spectrum_cell(arm) is not None)
    return trainings + spectra, trainings * arm.train.epochs + spectra


def _training(kind: str, arm: Arm, seed: int, lr: float, start_lr: float | None) -> Cell:
    start = None if start_lr is None else Cell(kind, arm.dense, seed, start_lr)
    return Cell(kind, arm, seed, lr, start)


def _start_lr(arm: Arm, records: Mapping[str, Record]) -> float | None:
    return choose_lr(arm.dense, records) if arm.method.is_trained_first else None

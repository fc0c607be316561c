"""Trials: the units of work of a comparison, and which of them a configuration needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from statistics import fmean
from typing import Any

from .data.names import is_sequences
from .recipe import Configuration
from .results import Record
from .robustness import score

# Part of every key: raise it when training changes in a way that makes old results incomparable.
RESULT_FORMAT = 2


@dataclass(frozen=True)
class Trial:
    """One unit of work: a training (``select`` on the held-out part, ``final`` on the test set) or a ``spectrum``.

    Its key is a digest of all that its result depends on, so equal keys mean equal results. Options that have their
    default value are not part of it, so that keys outlive new options.

    Attributes:
        start: the dense training whose weights a -T method prunes.
    """

    kind: str
    configuration: Configuration
    seed: int
    lr: float | None = None
    start: Trial | None = None

    def content(self) -> dict[str, Any]:
        """What the key is made of, ready for JSON; names for tables are not part of it."""
        setting, method = self.configuration.setting, self.configuration.method
        data = _said(setting.data)
        data.pop("holdout", None)
        content: dict[str, Any] = {
            "kind": self.kind,
            "data": data,
            "network": setting.network.name,
            "options": self.configuration.network_options,
            "gain": setting.gain,
            "init": setting.init,
            "method": {"name": method.name, "options": dict(method.options)},
            "prune": dict(self.configuration.prune),
            "seed": self.seed,
        }
        if self.kind != "spectrum":
            content.update(lr=self.lr, train=_said(self.configuration.train))
        if self.kind != "spectrum" and setting.robustness is not None:
            content["robustness"] = _said(setting.robustness)
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
        return f"{self.configuration.title}{rate}, seed {self.seed}"

    @property
    def leaves_weights(self) -> bool:
        """Whether a -T method of the recipe starts from what this training leaves."""
        trained_first = any(method.is_trained_first for method in self.configuration.setting.methods)
        return self.configuration.method.is_dense and self.kind != "spectrum" and trained_first

    @property
    def steps(self) -> int:
        """Its share of the progress: epochs, or one measurement."""
        return 1 if self.kind == "spectrum" else self.configuration.train.epochs


def _said(spec: Any) -> dict[str, Any]:
    """The fields of a dataclass that do not have their default value."""
    said = {}
    for f in fields(spec):
        value = getattr(spec, f.name)
        if f.default is MISSING or value != f.default:
            said[f.name] = _said(value) if is_dataclass(value) else value
    return said


def selection_trials(configuration: Configuration, records: Mapping[str, Record]) -> dict[float, list[Trial]] | None:
    """The trainings that decide between learning rates, by rate; none where the grid leaves no choice.

    Where the best of the grid is its lowest or highest rate, those beyond it that the recipe allows are among them as
    soon as that is known.

    Returns:
        ``None`` while a -T method waits for the learning rate of its dense phase.
    """
    rates = configuration.setting.lr
    if len(rates.grid) == 1:
        return {}
    start_lr = _start_lr(configuration, records)
    if start_lr is None and configuration.method.is_trained_first:
        return None
    trials = {lr: _selection(configuration, lr, start_lr) for lr in rates.grid}
    for _ in range(rates.extend):
        best = _best(configuration, trials, records)
        further = None if best is None else rates.beyond(trials, best)
        if further is None:
            break
        trials[further] = _selection(configuration, further, start_lr)
    return trials


def choose_lr(configuration: Configuration, records: Mapping[str, Record]) -> float | None:
    """The learning rate with the best mean accuracy on the held-out part of the training set, or what stands for it.

    What stands for it is the robust or certified accuracy of a recipe that asks for these.

    A rate with a diverged run comes after every rate without one. Ties go to the lower held-out loss, then to the
    smaller rate. ``None`` if a training that decides is missing.
    """
    trials = selection_trials(configuration, records)
    if trials is None:
        return None
    if not trials:
        return configuration.setting.lr.grid[0]
    return _best(configuration, trials, records)


def _best(
    configuration: Configuration, trials: Mapping[float, Sequence[Trial]], records: Mapping[str, Record]
) -> float | None:
    ranks = {}
    for lr, group in trials.items():
        keys = [trial.key for trial in group]
        if any(key not in records for key in keys):
            return None
        results = [records[key]["result"] for key in keys]
        ranks[lr] = (
            -sum(r["status"] != "ok" for r in results),
            fmean(score(r, configuration.setting.robustness) for r in results),
            -fmean(float("inf") if r["loss"] is None else r["loss"] for r in results),
            -lr,
        )
    return max(ranks, key=lambda lr: ranks[lr])


def final_trials(configuration: Configuration, records: Mapping[str, Record]) -> list[Trial] | None:
    """The trainings that the table reports, one a seed, at the chosen learning rate; ``None`` before it is chosen."""
    lr, start_lr = choose_lr(configuration, records), _start_lr(configuration, records)
    if lr is None or (start_lr is None and configuration.method.is_trained_first):
        return None
    return [_training("final", configuration, seed, lr, start_lr) for seed in configuration.setting.seeds]


def spectrum_trial(configuration: Configuration) -> Trial | None:
    """The measurement at initialisation, for the first seed.

    None for a -T method, which starts from a training, and for tokens, which have no derivative.
    """
    if configuration.method.is_trained_first or is_sequences(configuration.setting.data.name):
        return None
    return Trial("spectrum", configuration, configuration.setting.seeds[0])


def known_trials(configuration: Configuration, records: Mapping[str, Record]) -> list[Trial]:
    """The trials of a configuration as far as they are known by now, in the order of work."""
    spectrum, choosing = spectrum_trial(configuration), selection_trials(configuration, records) or {}
    trials = [] if spectrum is None else [spectrum]
    return (
        trials
        + [trial for group in choosing.values() for trial in group]
        + (final_trials(configuration, records) or [])
    )


def count_trials(configuration: Configuration, records: Mapping[str, Record]) -> tuple[int, int]:
    """How many trials a configuration has as far as is known by now, and their steps."""
    setting = configuration.setting
    choosing = selection_trials(configuration, records)
    rates = len(setting.lr.grid) if choosing is None else len(choosing)
    trainings, spectra = (
        rates * len(setting.lr.seeds) + len(setting.seeds),
        int(spectrum_trial(configuration) is not None),
    )
    return trainings + spectra, trainings * configuration.train.epochs + spectra


def _selection(configuration: Configuration, lr: float, start_lr: float | None) -> list[Trial]:
    return [_training("select", configuration, seed, lr, start_lr) for seed in configuration.setting.lr.seeds]


def _training(kind: str, configuration: Configuration, seed: int, lr: float, start_lr: float | None) -> Trial:
    start = None if start_lr is None else Trial(kind, configuration.dense, seed, start_lr)
    return Trial(kind, configuration, seed, lr, start)


def _start_lr(configuration: Configuration, records: Mapping[str, Record]) -> float | None:
    return choose_lr(configuration.dense, records) if configuration.method.is_trained_first else None

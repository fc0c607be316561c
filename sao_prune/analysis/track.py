"""Watching isometry during training (thesis figures 4.8 and 4.11)."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from ..files import replacing
from ..seeds import Seed
from .spectra import Method, jacobian_spectrum


@dataclass(frozen=True)
class IsometryRecord:
    """Statistics of the singular values of the input-output Jacobian at one step."""

    step: int
    mean: float
    smallest: float
    largest: float
    variance: float


class track_isometry:
    """A callback that records mean, least, largest and variance of the Jacobian's singular values.

    Call it once a training step or epoch; it measures on its first call and on every ``every``-th one after that, and
    leaves the model's mode and gradients as they were.

    Args:
        model: the network, or the part of it to watch.
        x: the batch at which the Jacobian is taken.
        every: measure on every so many calls.
        method: as in `jacobian_spectrum`.
        seed: of the random probes.

    Raises:
        ValueError: if ``every`` is not positive.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 4)
        >>> tracker = track_isometry(torch.nn.Sequential(layer, torch.nn.Tanh()), torch.zeros(1, 4))
        >>> for step in range(3):
        ...     tracker()
        >>> [record.step for record in tracker.records]
        [0, 1, 2]
    """

    def __init__(self, model: nn.Module, x: Tensor, every: int = 1, method: Method = "auto", seed: Seed = 0) -> None:
        if every < 1:
            raise ValueError(f"every counts calls between measurements, at least 1, got {every}")
        self.model, self.x, self.every, self.method, self.seed = model, x, every, method, seed
        self.calls = 0
        self.records: list[IsometryRecord] = []

    def __call__(self) -> None:
        """Measure, if this call is one of the ``every``-th."""
        step, self.calls = self.calls, self.calls + 1
        if step % self.every == 0:
            s = jacobian_spectrum(self.model, self.x, method=self.method, seed=self.seed)
            self.records.append(IsometryRecord(step, s.mean, s.smallest, s.largest, s.variance))

    def to_csv(self, path: str | Path) -> Path:
        """Write the records, one a line, to ``path``; returns it."""
        path = Path(path)
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(IsometryRecord.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(record) for record in self.records)
        return path

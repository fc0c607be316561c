"""A training on the disk, so that one that was cut off goes on to the same bits."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...files import replacing
from ...pruner import Pruner
from .distributed import from_first, rank
from .history import History

FORMAT = 1
SECONDS_BETWEEN = 30.0


@dataclass
class TrainingState:
    """All that changes while a network is trained; what is random is drawn anew every epoch from the seed.

    Attributes:
        average: the moving average of the model, if there is one.
        pruner: what shrinks the model's masks, if they shrink.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Any
    history: History
    pruner: Pruner | None = None


class Checkpoint:
    """The file of one training. Without a path, all that it does is nothing.

    Args:
        path: where; its folder is made.
        identity: what the training is; a file that says another is not resumed from.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path, self._identity = path, identity
        self._written, self._epochs = time.monotonic(), 0

    def resume(self, state: TrainingState) -> None:
        """Put the file's state, if there is one that fits, in place of ``state``'s, on every process.

        A file that is damaged, or of another training, is passed over with a warning.
        """
        if self._path is None:
            return
        content = from_first(self._read(state) if rank() == 0 else None)
        if content is None:
            return
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        if state.pruner is not None:
            state.pruner.load_state_dict(content["pruner"])
        state.history = History.restored(content["history"])
        self._epochs = state.history.epochs

    def save(self, state: TrainingState, *, now: bool = False) -> None:
        """Write, in one step, unless the last time was less than 30 s ago; ``now`` writes whatever is not on the disk.

        A disk that cannot be written to costs the checkpoint, not the training: there is a warning.
        """
        due = now or time.monotonic() - self._written >= SECONDS_BETWEEN
        if self._path is None or rank() != 0 or not due or self._epochs == state.history.epochs:
            return
        content = {
            "identity": self._identity,
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "average": None if state.average is None else state.average.state_dict(),
            "history": asdict(state.history),
            "pruner": None if state.pruner is None else state.pruner.state_dict(),
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as part, part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            warnings.warn(f"cannot write the checkpoint {self._path}: {error}", RuntimeWarning, stacklevel=2)
        self._written, self._epochs = time.monotonic(), state.history.epochs

    def _read(self, state: TrainingState) -> dict[str, Any] | None:
        """The file's content, if it is sound and this training's."""
        assert self._path is not None
        if not self._path.exists():
            return None
        try:
            content = torch.load(self._path, map_location="cpu", weights_only=True)
            problem = self._problem(content, state)
        except Exception as error:
            # Damaged bytes fail in as many ways as there are readers between here and the tensors.
            problem = f"it is damaged ({type(error).__name__})"
        if problem is None:
            return dict(content)
        warnings.warn(
            f"the checkpoint {self._path} is not used: {problem}; training starts anew", RuntimeWarning, stacklevel=4
        )
        return None

    def _problem(self, content: Any, state: TrainingState) -> str | None:
        """Why the content cannot take the state's place; found out before anything is touched."""
        if content["identity"] != self._identity:
            return "it is of another training"
        History.restored(content["history"])
        if not _alike(content["model"], state.model.state_dict()):
            return "it is of another network"
        average = None if state.average is None else state.average.state_dict()
        if (average is None) != (content["average"] is None) or not _alike(content["average"] or {}, average or {}):
            return "it is of another network"
        if (state.pruner is None) != (content.get("pruner") is None):
            return "it prunes in another way"
        groups = zip(content["optimizer"]["param_groups"], state.optimizer.state_dict()["param_groups"], strict=True)
        if any(given["params"] != own["params"] for given, own in groups):
            return "its optimizer is another"
        return None


def _alike(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> bool:
    """Whether names, shapes and types are the same."""
    return given.keys() == own.keys() and all(
        given[key].shape == own[key].shape and given[key].dtype == own[key].dtype for key in own
    )

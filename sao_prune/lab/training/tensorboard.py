"""A training as TensorBoard shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LabError
from .history import History


class TensorBoardWriter:
    """Writes a history's scalars to event files, one step an epoch: `write` can be a training's ``on_epoch``.

    Args:
        folder: where the event files go; TensorBoard shows a folder as one run.

    Raises:
        LabError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LabError(
                "TensorBoard event files need tensorboard, which is not installed: pip install 'sao-prune[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(str(folder))
        self._epochs, self._records = 0, 0

    def write(self, history: History) -> None:
        """Write what was added since the last call; after a resumption, that is everything."""
        for epoch in range(self._epochs, history.epochs):
            for name in ("train_loss", "test_loss", "accuracy", "lr"):
                self._writer.add_scalar(name, getattr(history, name)[epoch], epoch + 1)
        for record in history.isometry[self._records :]:
            for name in ("mean", "smallest", "largest", "variance"):
                self._writer.add_scalar(f"isometry/{name}", getattr(record, name), record.step)
        self._epochs, self._records = history.epochs, len(history.isometry)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

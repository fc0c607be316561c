"""Event files hold what the history holds."""

import sys
from pathlib import Path

import pytest

from sao_prune.analysis import IsometryRecord
from sao_prune.lab.errors import LabError
from sao_prune.lab.training import History
from sao_prune.lab.training.tensorboard import TensorBoardWriter


def test_scalars_of_every_epoch_are_in_the_folder_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = History(isometry=[IsometryRecord(0, 1.0, 0.5, 1.5, 0.25)])
    with TensorBoardWriter(tmp_path) as writer:
        for epoch in range(3):
            for name in ("train_loss", "test_loss", "accuracy", "lr"):
                getattr(history, name).append(epoch + 0.5)
            writer.write(history)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("train_loss", "test_loss", "accuracy", "lr"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(1, 0.5), (2, 1.5), (3, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("isometry/smallest")] == [(0, 0.5)]


def test_without_tensorboard_there_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LabError, match=r"pip install 'sao-prune\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)

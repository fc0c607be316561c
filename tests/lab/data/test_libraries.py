"""Data sets under the names of torchvision and timm."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from timm.data import IterableImageDataset

from sao_prune.lab.data import DataSource, DataSpec, load_dataset
from sao_prune.lab.data.names import TORCHVISION
from sao_prune.lab.errors import DataError

from .conftest import write_idx_set


@pytest.mark.parametrize("name", ["torchvision/KMNIST", "torchvision/kmnist", "timm/torch/kmnist"])
def test_a_grey_set_stays_grey(tmp_path: Path, name: str) -> None:
    images = write_idx_set(tmp_path / "KMNIST" / "raw", [3, 1, 2])
    data = load_dataset(DataSpec(name, size=28), DataSource(tmp_path))
    assert torch.equal(data.train_x[:, 0], images)
    assert data.test_y.tolist() == [3, 1, 2]
    assert data.classes[0] == "o"


def test_a_set_without_a_test_part_is_split_for_good(tmp_path: Path, write_images: Callable[..., None]) -> None:
    for green, name in enumerate(("Forest", "River")):
        write_images(tmp_path / "eurosat" / "2750" / name, [(i, green, 0) for i in range(10)], (64, 64), "png")
    one, two = (load_dataset(DataSpec("torchvision/EuroSAT", size=16), DataSource(tmp_path)) for _ in range(2))
    assert one.classes == ("Forest", "River")
    assert one.test_y.tolist() == [0, 0, 1, 1]
    assert torch.equal(one.test_x[:, 1, 0, 0].long(), one.test_y)
    assert torch.equal(one.test_x, two.test_x)
    reds = torch.cat([one.train_x, one.test_x])[:, :2, 0, 0].unique(dim=0)
    assert len(reds) == 20


def test_every_torchvision_name_is_a_class_with_these_options() -> None:
    import inspect

    for name, (train, test) in TORCHVISION.items():
        allowed = inspect.signature(getattr(torchvision.datasets, name)).parameters
        assert "kwargs" in allowed or {*train, *(test or {}), "download"} <= set(allowed)


def test_a_stream_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [(Image.new("RGB", (20, 10), (i, 0, 0)), i % 2) for i in range(6)]
    asked = []

    def create(name: str, root: str, split: str, download: bool) -> IterableImageDataset:
        asked.append((name, root, split, download))
        if split == "test":
            raise ValueError("no such split")
        return IterableImageDataset(None, reader=pictures)

    monkeypatch.setattr(timm.data, "create_dataset", create)
    data = load_dataset(DataSpec("timm/tfds/pets", size=8, subset=4), DataSource(tmp_path))
    assert [split for _, _, split, _ in asked] == ["train", "test", "validation"]
    assert data.test_y.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.test_x[:, 0, 0, 0].tolist() == list(range(6))
    assert data.train_y.bincount().tolist() == [2, 2]
    assert data.classes == ("0", "1")


def test_timms_own_failure_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"timm/tfds/nowhere cannot be had from timm \(.+\): put its files under"):
        load_dataset("timm/tfds/nowhere", DataSource(tmp_path))


def test_timms_folder_is_the_data_folder_itself(tmp_path: Path, write_images: Callable[..., None]) -> None:
    for part in ("train", "validation"):
        write_images(tmp_path / part / "a", [(9, 8, 7)])
    data = load_dataset("timm/folder", DataSource(tmp_path))
    assert data.test_x[0, :, 0, 0].tolist() == [9, 8, 7]

"""Data sets: complete, standardised, split without overlap, and helpful when they are not there."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.lab import data
from sao_prune.lab.data import DataSource, load_dataset, stratified_split
from sao_prune.lab.errors import DataError

from .test_idx import idx_bytes


def write_idx_set(folder: Path, labels: list[int], size: int = 28) -> None:
    folder.mkdir(parents=True)
    images = torch.randint(0, 256, (len(labels), size, size), dtype=torch.uint8)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.tensor(labels, dtype=torch.uint8)))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {name: dataclasses.replace(spec, folders=()) for name, spec in data._IDX_SETS.items()}
    monkeypatch.setattr(data, "_IDX_SETS", bare)


def test_digits_are_all_there_standardised_and_split_for_good() -> None:
    one, two = load_dataset("digits"), load_dataset("digits")
    assert one.train_x.shape[1:] == one.test_x.shape[1:] == (1, 32, 32)
    assert len(one.train_y) + len(one.test_y) == 1797
    assert abs(float(one.train_x.mean())) < 1e-5
    assert abs(float(one.train_x.std()) - 1) < 1e-5
    assert torch.equal(one.test_x, two.test_x)
    for label in range(10):
        share = (one.test_y == label).sum() / ((one.test_y == label).sum() + (one.train_y == label).sum())
        assert 0.19 < float(share) < 0.21


def test_holdout_takes_from_the_training_set_and_never_touches_the_test_set() -> None:
    full = load_dataset("digits")
    held = full.holdout(0.2)
    assert len(held.train_y) + len(held.test_y) == len(full.train_y)
    rows = {tuple(image.flatten().tolist()) for image in full.train_x}
    assert all(tuple(image.flatten().tolist()) in rows for image in held.test_x)
    assert torch.equal(held.test_y.bincount(), (full.train_y.bincount() * 0.2).round().long())


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(4, 40), min_size=1, max_size=5),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 999),
)
def test_a_split_is_a_partition_with_the_same_share_of_every_class(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert labels[held].bincount().tolist() == [round(fraction * n) for n in counts]
    assert torch.equal(held, stratified_split(labels, fraction, seed)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 0.01])
def test_a_split_that_empties_a_class_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"held-out fraction|too few"):
        stratified_split(torch.tensor([0, 0, 1, 1]), fraction, 0)


def test_the_message_for_missing_fashion_mnist_tells_all_three_ways(tmp_path: Path, nothing_installed: None) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("fashion-mnist", DataSource(tmp_path))
    for way in ("dataset-fashion-mnist", "--data-dir", "--download", str(tmp_path)):
        assert way in str(caught.value)


@pytest.mark.usefixtures("nothing_installed")
def test_a_torchvision_folder_is_found_and_padded_to_32_pixels(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "FashionMNIST" / "raw", list(range(10)))
    found = load_dataset("fashion-mnist", DataSource(tmp_path))
    assert found.train_x.shape == (10, 1, 32, 32)
    assert found.test_y.tolist() == list(range(10))
    border = found.train_x[:, :, :2]
    assert torch.equal(border, border[0, 0, 0, 0].expand_as(border))


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("labels", "size", "said"), [([0, 10], 28, "label 10"), ([0, 1], 27, r"\(27, 27\)"), ([], 28, "0 images but")]
)
def test_idx_files_that_do_not_fit_are_refused(tmp_path: Path, labels: list[int], size: int, said: str) -> None:
    write_idx_set(tmp_path / "FashionMNIST" / "raw", labels, size)
    with pytest.raises(DataError, match=said):
        load_dataset("fashion-mnist", DataSource(tmp_path))


@pytest.mark.usefixtures("nothing_installed")
def test_a_download_goes_to_the_data_folder_and_its_failure_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    def fetch(root: str, download: bool) -> None:
        assert download
        write_idx_set(Path(root) / "FashionMNIST" / "raw", [0, 1])

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    assert load_dataset("fashion-mnist", DataSource(tmp_path, download=True)).train_y.tolist() == [0, 1]

    def fail(root: str, download: bool) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(DataError, match="no route"):
        load_dataset("fashion-mnist", DataSource(tmp_path / "other", download=True))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="digits, fashion-mnist, mnist"):
        load_dataset("imagenet")

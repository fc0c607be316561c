"""Data sets: complete, measured, cut to size, and helpful when they are not there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sao_prune.lab.data import DataSource, DataSpec, digits, load_dataset
from sao_prune.lab.errors import DataError


def test_digits_are_all_there_and_split_for_good() -> None:
    one, two = load_dataset("digits"), load_dataset("digits")
    assert one.train_x.dtype == one.test_x.dtype == torch.uint8
    assert one.train_x.shape[1:] == one.test_x.shape[1:] == one.image_shape == (1, 32, 32)
    assert len(one.train_y) + len(one.test_y) == 1797
    assert torch.equal(one.test_x, two.test_x)
    for label in range(10):
        share = (one.test_y == label).sum() / ((one.test_y == label).sum() + (one.train_y == label).sum())
        assert 0.19 < float(share) < 0.21


def test_the_grey_levels_of_the_digits_are_those_of_the_originals() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset(DataSpec("digits", size=8))
    images = torch.cat([data.train_x, data.test_x]).flatten(1)
    originals = (torch.from_numpy(load_digits().images) * 255 / 16).round().byte().flatten(1)
    assert sorted(map(bytes, images.numpy())) == sorted(map(bytes, originals.numpy()))


@pytest.mark.parametrize("size", [24, 32, 36])
def test_images_have_the_size_that_is_asked_for(size: int) -> None:
    data = load_dataset(DataSpec("digits", size=size, subset=50, test_subset=20))
    assert data.train_x.shape == (50, 1, size, size)
    assert data.test_x.shape == (20, 1, size, size)


def test_a_subset_is_the_same_for_ever_part_of_the_larger_one_and_leaves_the_test_set_whole() -> None:
    whole = load_dataset("digits")
    small, large = (load_dataset(DataSpec("digits", subset=n)) for n in (100, 200))
    assert torch.equal(small.train_x, load_dataset(DataSpec("digits", subset=100)).train_x)
    assert {bytes(x) for x in small.train_x.numpy()} < {bytes(x) for x in large.train_x.numpy()}
    assert torch.equal(small.test_x, whole.test_x)
    assert small.train_y.bincount().tolist() == pytest.approx([10] * 10, abs=1)


def test_a_subset_larger_than_the_set_says_what_there_is() -> None:
    with pytest.raises(DataError, match="2000 images cannot be had from 1438 images of 10 classes: ask for 10 to 1438"):
        load_dataset(DataSpec("digits", subset=2000))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "imagenet",
            "digits, mnist, fashion-mnist, cifar-10, cifar-100, cinic-10, copying, torchvision/NAME, timm/NAME",
        ),
        ("cifar10", "did you mean 'cifar-10'"),
        ("torchvision/LSUN", "unknown data set 'torchvision/LSUN'.*torchvision/SVHN"),
        ("torchvision/SVNH", "did you mean 'torchvision/SVHN'"),
        ("timm/cifar10", "timm/torch/NAME"),
        ("folder:", "needs a path"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_dataset(name)
    assert DataSpec(name).problem()[0] == "name"


def test_augmentations_are_checked() -> None:
    assert "crop, flip, autoaugment" in DataSpec("digits", augment=("rotate",)).problem()[1]
    assert "twice" in DataSpec("digits", augment=("flip", "flip")).problem()[1]


def test_a_set_that_does_not_fit_says_how_much_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sao_prune.lab.data import memory

    monkeypatch.setattr(memory, "free_memory", lambda: 3 * 2**28)
    with pytest.raises(DataError, match=r"0.9 GiB are needed, 0.8 GiB are there; take a smaller size:"):
        memory.need_memory("big", 2**30 - 2**27)
    memory.need_memory("small", 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    with pytest.raises(DataError, match=r"does not fit in cuda:1: 2.0 GiB are needed, 1.0 GiB are there"):
        memory.need_memory("big", 2**31, torch.device("cuda:1"))


def test_what_is_needed_is_compared_with_what_is_free_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_images: Callable[..., None]
) -> None:
    from sao_prune.lab.data import memory

    for part in ("train", "test"):
        write_images(tmp_path / part / "a", [1, 2, 3])
        (tmp_path / part / "a" / "0.png").write_bytes(b"damaged, but never looked at")
    monkeypatch.setattr(memory, "free_memory", lambda: 6 * 3 * 64 * 64 - 1)
    with pytest.raises(DataError, match="does not fit in main memory"):
        load_dataset(DataSpec(f"folder:{tmp_path}", size=64))


def test_free_memory_is_some_and_less_than_there_is() -> None:
    from sao_prune.lab.data.memory import free_memory

    free = free_memory()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("mnist", ("MNIST/raw", "--download")),
        ("cifar-10", ("cifar-10-batches-py", "cifar-10-python.tar.gz", "--download")),
        ("cifar-100", ("cifar-100-python", "--download")),
        ("cinic-10", ("CINIC-10.tar.gz", "--download")),
        ("torchvision/KMNIST", ("KMNIST", "--download")),
        ("timm/torch/kmnist", ("timm", "--download")),
        ("timm/hfds/mnist", ("network", "--download")),
        ("folder:nowhere", ("train", "test, val, validation, valid")),
    ],
)
def test_a_missing_set_is_one_error_with_the_ways_to_get_it(name: str, ways: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, DataSource(tmp_path))
    for way in ways:
        assert way in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("torchvision/CIFAR10", "cifar-10-batches-py"),
        ("timm/torch/cifar100", "cifar-100-python"),
        ("torchvision/mnist", "MNIST/raw"),
    ],
)
def test_a_set_known_under_two_names_is_read_by_the_reader_that_verifies_it(
    name: str, own: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=own):
        load_dataset(name, DataSource(tmp_path))


def test_digits_are_those_of_the_library() -> None:
    """They are read from its file without importing it."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = digits._read_table()
    theirs = datasets.load_digits()
    assert (pixels == theirs.images).all()
    assert (labels == theirs.target).all()
    assert pixels.dtype == theirs.images.dtype
    assert labels.dtype == theirs.target.dtype

"""MNIST's kind: found where packagers put it, verified, padded, fetched when asked."""

import dataclasses
import gzip
from pathlib import Path

import pytest
import torch

from sao_prune.lab.data import DataSource, DataSpec, load_dataset, mnist
from sao_prune.lab.errors import DataError

from .conftest import write_idx_set


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {name: dataclasses.replace(spec, folders=()) for name, spec in mnist._SETS.items()}
    monkeypatch.setattr(mnist, "_SETS", bare)


pytestmark = pytest.mark.usefixtures("nothing_installed")


def test_the_message_for_missing_fashion_mnist_tells_all_three_ways(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("fashion-mnist", DataSource(tmp_path))
    for way in ("dataset-fashion-mnist", "--data-dir", "--download", str(tmp_path)):
        assert way in str(caught.value)


@pytest.mark.usefixtures("unknown_files")
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "FashionMNIST", "fashion-mnist"])
def test_a_folder_is_found_and_images_are_padded_in_the_middle(tmp_path: Path, folder: str) -> None:
    images = write_idx_set(tmp_path / folder, list(range(10)))
    found = load_dataset("fashion-mnist", DataSource(tmp_path))
    assert found.train_x.shape == (10, 1, 32, 32)
    assert found.test_y.tolist() == list(range(10))
    assert torch.equal(found.train_x[:, 0, 2:30, 2:30], images)
    assert int(found.train_x.long().sum()) == int(images.long().sum())


@pytest.mark.usefixtures("unknown_files")
def test_mean_and_deviation_are_those_before_padding(tmp_path: Path) -> None:
    images = write_idx_set(tmp_path / "MNIST" / "raw", [0, 1, 2, 3]).double()
    for size in (28, 32, 36):
        found = load_dataset(DataSpec("mnist", size=size), DataSource(tmp_path))
        assert found.mean == pytest.approx([float(images.mean())], rel=1e-12)
        assert found.std == pytest.approx([float(images.std(correction=0))], rel=1e-12)


@pytest.mark.usefixtures("unknown_files")
def test_larger_images_are_resized_and_keep_their_brightness(tmp_path: Path) -> None:
    images = write_idx_set(tmp_path / "MNIST" / "raw", [0, 1])
    found = load_dataset(DataSpec("mnist", size=14), DataSource(tmp_path))
    assert found.train_x.shape == (2, 1, 14, 14)
    assert float(found.train_x.float().mean()) == pytest.approx(float(images.float().mean()), abs=3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_not_the_published_one_is_named(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_idx_set(folder, [0, 1])
    if packed:
        for path in list(folder.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*damaged.*sha256 differs.*delete it and fetch"):
        load_dataset("mnist", DataSource(tmp_path))


@pytest.mark.usefixtures("unknown_files")
@pytest.mark.parametrize(
    ("labels", "size", "said"), [([0, 10], 28, "label 10"), ([0, 1], 27, r"\(27, 27\)"), ([], 28, "0 images but")]
)
def test_idx_files_that_do_not_fit_are_refused(tmp_path: Path, labels: list[int], size: int, said: str) -> None:
    write_idx_set(tmp_path / "FashionMNIST" / "raw", labels, size)
    with pytest.raises(DataError, match=said):
        load_dataset("fashion-mnist", DataSource(tmp_path))


@pytest.mark.usefixtures("unknown_files")
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

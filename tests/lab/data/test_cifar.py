"""CIFAR's pickles: read as data, never as programs."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sao_prune.lab.data import DataSource, DataSpec, load_dataset
from sao_prune.lab.errors import DataError

from .conftest import python2_pickle

NAMES = [f"class {i}" for i in range(100)]


def batch(seed: int, labels: list[int], key: str = "labels") -> dict[str, Any]:
    data = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {"batch_label": "a batch", "data": data, key: labels}


def write_cifar10(root: Path) -> dict[str, Any]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {f"data_batch_{i}": batch(i, [2 * i - 2, 2 * i - 1]) for i in range(1, 6)}
    batches["test_batch"] = batch(9, list(range(10)))
    for name, content in {**batches, "batches.meta": {"label_names": NAMES[:10]}}.items():
        (folder / name).write_bytes(python2_pickle(content))
    return batches


@pytest.mark.usefixtures("unknown_files")
def test_the_published_format_is_read(tmp_path: Path) -> None:
    batches = write_cifar10(tmp_path)
    found = load_dataset("cifar-10", DataSource(tmp_path))
    assert found.classes == tuple(NAMES[:10])
    assert found.image_shape == (3, 32, 32)
    assert found.train_y.tolist() == found.test_y.tolist() == list(range(10))
    assert torch.equal(found.train_x[2].flatten(), torch.from_numpy(batches["data_batch_2"]["data"][0]))
    assert torch.equal(found.test_x.flatten(1), torch.from_numpy(batches["test_batch"]["data"]))


@pytest.mark.usefixtures("unknown_files")
def test_it_agrees_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10, cifar

    write_cifar10(tmp_path)
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    theirs, ours = CIFAR10(tmp_path), load_dataset("cifar-10", DataSource(tmp_path))
    assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), ours.train_x.numpy())
    assert theirs.targets == ours.train_y.tolist()
    assert tuple(theirs.classes) == ours.classes


@pytest.mark.usefixtures("unknown_files")
def test_cifar_100_has_its_fine_labels_and_pads_to_36_pixels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100" / "cifar-100-python"
    folder.mkdir(parents=True)
    content = {**batch(0, [99, 0, 42], "fine_labels"), "coarse_labels": [1, 2, 3]}
    for name, value in {"train": content, "test": content, "meta": {"fine_label_names": NAMES}}.items():
        (folder / name).write_bytes(python2_pickle(value))
    found = load_dataset(DataSpec("cifar-100", size=36), DataSource(tmp_path))
    assert found.train_y.tolist() == [99, 0, 42]
    assert torch.equal(found.train_x[:, :, 2:34, 2:34].flatten(1), torch.from_numpy(content["data"]))
    assert found.mean == pytest.approx(content["data"].reshape(3, 3, 1024).mean((0, 2)))


@pytest.mark.usefixtures("unknown_files")
@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_today_and_columns_first_are_read_too(tmp_path: Path, protocol: int, order: Any) -> None:
    batches = write_cifar10(tmp_path)
    content = {**batches["test_batch"], "data": np.asarray(batches["test_batch"]["data"], order=order)}
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content, protocol))
    found = load_dataset("cifar-10", DataSource(tmp_path))
    assert torch.equal(found.test_x.flatten(1), torch.from_numpy(batches["test_batch"]["data"]))


def test_a_file_that_is_not_the_published_one_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match=r"batches.meta: damaged.*md5 differs.*delete it"):
        load_dataset("cifar-10", DataSource(tmp_path))


class Touch:
    """Unpickled by Python's own means, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("unknown_files")
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_file_can_run_anything(tmp_path: Path, protocol: int) -> None:
    write_cifar10(tmp_path)
    evidence = tmp_path / "evidence"
    content = pickle.dumps({"label_names": Touch(evidence)}, protocol)
    pickle.loads(content)
    evidence.unlink()
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(content)
    with pytest.raises(DataError, match=r"batches.meta: .*which no file of this set needs"):
        load_dataset("cifar-10", DataSource(tmp_path))
    assert not evidence.exists()


@pytest.mark.usefixtures("unknown_files")
@pytest.mark.parametrize(
    "content",
    [
        python2_pickle({"labels": [0]}),
        python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
        python2_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
        python2_pickle({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}),
        python2_pickle({"data": np.zeros((1, 3072), np.int16), "labels": [0]}),
        python2_pickle({"data": [1, 2], "labels": [0]}),
        python2_pickle([1, 2]),
        python2_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [0]})[:-100],
        b"",
        b"cnumpy.core.multiarray\n_reconstruct\nN.",
    ],
)
def test_damage_is_one_sentence_with_the_file(tmp_path: Path, content: bytes) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch: .*fetch it again"):
        load_dataset("cifar-10", DataSource(tmp_path))


@pytest.mark.usefixtures("unknown_files")
def test_the_archive_is_fetched_with_torchvisions_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        assert url.endswith(f"/{filename}")
        assert md5 == torchvision.datasets.CIFAR10.tgz_md5
        write_cifar10(Path(root))

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    found = load_dataset("torchvision/cifar10", DataSource(tmp_path / "new", download=True))
    assert found.test_y.tolist() == list(range(10))

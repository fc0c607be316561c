"""Image folders: CINIC-10 and any other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sao_prune.lab.data import DataSource, DataSpec, folder, load_dataset
from sao_prune.lab.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WriteImages = Callable[..., None]


@pytest.fixture
def cinic(tmp_path: Path, write_images: WriteImages, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CINIC-10 with three images a class; red tells the class, green the part."""
    monkeypatch.setattr(folder, "CINIC_PER_CLASS", 3)
    for green, part in enumerate(("train", "valid", "test")):
        for red, name in enumerate(CLASSES):
            write_images(tmp_path / "CINIC-10" / part / name, [(red, green, blue) for blue in range(3)])
    return tmp_path


def test_cinic_trains_on_train_and_tests_on_test(cinic: Path) -> None:
    data = load_dataset("cinic-10", DataSource(cinic))
    assert data.classes == CLASSES
    assert data.train_x.shape == data.test_x.shape == (30, 3, 32, 32)
    assert torch.equal(data.train_x[:, 0, 0, 0].long(), data.train_y)
    assert data.train_x[:, 1].unique().tolist() == [0]
    assert data.test_x[:, 1].unique().tolist() == [2]


def test_cinic_is_padded_to_36_pixels_and_resized_to_24(cinic: Path) -> None:
    large, small = (load_dataset(DataSpec("cinic-10", size=n), DataSource(cinic)) for n in (36, 24))
    assert large.image_shape == (3, 36, 36)
    assert not large.test_x[:, :, :2].any()
    assert small.image_shape == (3, 24, 24)
    assert small.mean == large.mean


def test_an_incomplete_cinic_names_the_folder(cinic: Path) -> None:
    (cinic / "CINIC-10" / "test" / "frog" / "1.png").unlink()
    with pytest.raises(DataError, match=r"test/frog: 2 images, not 3; unpack CINIC-10 again"):
        load_dataset("cinic-10", DataSource(cinic))


def test_cinic_is_fetched_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    asked = {}

    def fetch(url: str, root: str, extract_root: str, md5: str) -> None:
        asked.update(url=url, extract_root=extract_root, md5=md5)
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    with pytest.raises(DataError, match=r"downloading cinic-10 into .* failed: File not found or corrupted"):
        load_dataset("cinic-10", DataSource(tmp_path, download=True))
    assert asked["extract_root"] == str(tmp_path / "CINIC-10")
    assert len(asked["md5"]) == 32


@pytest.mark.parametrize("test", ["test", "val", "validation", "valid"])
def test_a_folder_of_images_of_any_size_and_kind(tmp_path: Path, write_images: WriteImages, test: str) -> None:
    for part in ("train", test):
        write_images(tmp_path / "mine" / part / "wide", [(250, 0, 0), (240, 0, 0)], (80, 40), "jpg")
        write_images(tmp_path / "mine" / part / "grey", [7], (10, 30), "png")
        write_images(tmp_path / "mine" / part / "small" / "deeper", [(0, 0, 200)], (4, 4), "bmp")
    data = load_dataset(DataSpec("folder:mine", size=24), DataSource(tmp_path))
    assert data.classes == ("grey", "small", "wide")
    assert data.train_y.tolist() == data.test_y.tolist() == [0, 1, 2, 2]
    assert data.image_shape == (3, 24, 24)
    assert torch.equal(data.train_x[0], torch.full((3, 24, 24), 7, dtype=torch.uint8))
    assert data.train_x[1, 2].unique().tolist() == [200]
    same = load_dataset(DataSpec(f"folder:{tmp_path / 'mine'}", size=24))
    assert torch.equal(data.train_x, same.train_x)


def test_the_middle_square_is_kept(tmp_path: Path) -> None:
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 255
    for part in ("train", "test"):
        (tmp_path / part / "only").mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / part / "only" / "0.png")
    data = load_dataset(DataSpec(f"folder:{tmp_path}", size=8))
    assert data.train_x.unique().tolist() == [255]


def test_only_the_images_of_the_subset_are_read(tmp_path: Path, write_images: WriteImages) -> None:
    for part in ("train", "test"):
        write_images(tmp_path / part / "a", [(i, 0, 0) for i in range(6)], (8, 8))
    spec = DataSpec(f"folder:{tmp_path}", size=8, subset=2)
    kept = load_dataset(spec).train_x[:, 0, 0, 0].tolist()
    for i in set(range(6)) - set(kept):
        (tmp_path / "train" / "a" / f"{i}.png").write_bytes(b"damaged")
    assert load_dataset(spec).train_x[:, 0, 0, 0].tolist() == kept
    with pytest.raises(DataError, match=r"train/a/\d.png: cannot be read as an image .*replace or delete it"):
        load_dataset(f"folder:{tmp_path}")


def test_a_file_of_another_format_is_not_handed_to_a_program(tmp_path: Path, write_images: WriteImages) -> None:
    for part in ("train", "test"):
        write_images(tmp_path / part / "a", [1])
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(DataError, match=r"0.png: cannot be read"):
        load_dataset(f"folder:{tmp_path}")


def test_folders_that_do_not_fit_together_are_refused(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path / "train" / "a", [1])
    with pytest.raises(DataError, match="needs a folder train and one of test, val, validation, valid"):
        load_dataset(f"folder:{tmp_path}")
    write_images(tmp_path / "test" / "b", [1])
    with pytest.raises(DataError, match=r"test: classes that .*train has not: b"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "a")
    (tmp_path / "test" / "a" / "0.png").rename(tmp_path / "test" / "a" / "0.txt")
    with pytest.raises(DataError, match=r"test: no image files in it"):
        load_dataset(f"folder:{tmp_path}")

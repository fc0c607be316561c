"""Folders of class folders of image files: CINIC-10, and any other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .checksum import CINIC_ARCHIVE_MD5
from .raw import Part, RawSet
from .source import DataSource, fetch, missing

# Formats that Pillow decodes itself, and their usual endings.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_TEST_NAMES = ("test", "val", "validation", "valid")
_THREADS = 4

_CINIC_URL = "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz"
_CINIC_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CINIC_PER_CLASS = 9000

Fit = Callable[[Any, int], Any]


def read_cinic(name: str, size: int, source: DataSource) -> RawSet:
    """Read CINIC-10, 32 x 32 in colour: its ``train`` part to train on, its ``test`` part to test.

    The ``valid`` part is left out: learning rates are chosen on a held-out share of the training part, as for every
    other set.

    Raises:
        DataError: if the folder is missing or incomplete, telling where it is looked for.
    """
    folders = source.folders("CINIC-10", "cinic-10", "CINIC10", "cinic10", "cinic")
    folder = _find_parts(folders)
    if folder is None and source.download:
        fetch(name, source, _fetch_cinic)
        folder = _find_parts(folders)
    if folder is None:
        raise missing(
            name,
            folders,
            f"unpack {_CINIC_URL} into {folders[0]}",
            "point --data-dir at the folder that holds it",
            "have it downloaded with --download",
        )
    parts = [_class_files(folder / part, _CINIC_CLASSES) for part in ("train", "test")]
    for part, files in zip(("train", "test"), parts):
        for cls, of_class in zip(_CINIC_CLASSES, files):
            if len(of_class) != CINIC_PER_CLASS:
                raise DataError(
                    f"{folder / part / cls}: {len(of_class)} images, not {CINIC_PER_CLASS}; unpack CINIC-10 again"
                )
    train, test = (_part(files, size, _shrink_to) for files in parts)
    return RawSet(_CINIC_CLASSES, 3, train, test)


def read_folder(name: str, size: int, source: DataSource) -> RawSet:
    """Read ``folder:PATH``: in PATH a folder ``train`` and one of ``test``, ``val``, ``validation`` and ``valid``.

    A relative path starts in the data folder. Images become RGB; each is resized so that its shorter side is ``size``,
    and the middle square is kept.

    Raises:
        DataError: if a part is missing or empty, or the test part has other classes.
    """
    root = source.data_dir.expanduser() / Path(name.removeprefix("folder:")).expanduser()
    train = root / "train"
    test = next((root / part for part in _TEST_NAMES if (root / part).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DataError(
            f"{root}: needs a folder train and one of {', '.join(_TEST_NAMES)}, with one folder a class in each"
        )
    classes = tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
    strange = sorted({entry.name for entry in test.iterdir() if entry.is_dir()} - set(classes))
    if strange or not classes:
        raise DataError(f"{test}: classes that {train} has not: {', '.join(strange)}" if strange else f"{train}: empty")
    parts = [_part(_class_files(folder, classes), size, square) for folder in (train, test)]
    return RawSet(classes, 3, parts[0], parts[1])


def square(image: Any, size: int) -> Any:
    """The middle square of an image, resized."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def to_tensor(image: Any) -> Tensor:
    """A grey or RGB image as uint8, ``(C, h, w)``."""
    values = np.array(image)
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)


def _find_parts(folders: list[Path]) -> Path | None:
    return next((f for f in folders if all((f / part).is_dir() for part in ("train", "test"))), None)


def _fetch_cinic(torchvision: Any, folder: Path) -> None:
    torchvision.datasets.utils.download_and_extract_archive(
        _CINIC_URL, str(folder), extract_root=str(folder / "CINIC-10"), md5=CINIC_ARCHIVE_MD5
    )


def _class_files(folder: Path, classes: tuple[str, ...]) -> list[list[Path]]:
    """The image files of every class, sorted."""
    found = [sorted(path for path in (folder / cls).rglob("*") if path.suffix.lower() in _ENDINGS) for cls in classes]
    if not any(found):
        raise DataError(f"{folder}: no image files in it ({', '.join(sorted(_ENDINGS))})")
    return found


def _part(files: list[list[Path]], size: int, fit: Fit) -> Part:
    paths = [path for of_class in files for path in of_class]
    labels = torch.repeat_interleave(torch.arange(len(files)), torch.tensor([len(of_class) for of_class in files]))
    return Part(labels, partial(_read_files, paths, size, fit))


def _read_files(paths: list[Path], size: int, fit: Fit, indices: Tensor) -> Tensor:
    with ThreadPoolExecutor(_THREADS) as pool:
        images = pool.map(lambda i: _read_file(paths[i], size, fit), indices.tolist())
        first = next(images)
        made = torch.empty(len(indices), *first.shape, dtype=torch.uint8)
        made[0] = first
        for i, image in enumerate(images, start=1):
            if image.shape != first.shape:
                raise DataError(
                    f"{paths[int(indices[i])]}: {tuple(image.shape[1:])} pixels, others have {tuple(first.shape[1:])}"
                )
            made[i] = image
    return made


def _read_file(path: Path, size: int, fit: Fit) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.draft("RGB", (size, size))
            return to_tensor(fit(image.convert("RGB"), size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or delete it") from error


def _shrink_to(image: Any, size: int) -> Any:
    return square(image, size) if max(image.size) > size else image

"""MNIST and Fashion-MNIST: four idx files each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import DataError
from .checksum import verify
from .idx import parse_idx, read_bytes
from .raw import Part, RawSet, array_part
from .source import DataSource, fetch, missing

_PARTS = ("train", "t10k")


@dataclass(frozen=True)
class _IdxSet:
    """A set in MNIST's format: torchvision's class (also its folder's name), and the folders of other packagers."""

    torchvision: str
    folders: tuple[str, ...]
    ways: tuple[str, ...]
    classes: tuple[str, ...]


_SETS = {
    "mnist": _IdxSet("MNIST", (), (), tuple(str(i) for i in range(10))),
    "fashion-mnist": _IdxSet(
        "FashionMNIST",
        ("/usr/share/datasets/fashion-mnist",),
        ("install Debian's package dataset-fashion-mnist",),
        ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}


def read_mnist(name: str, size: int, source: DataSource) -> RawSet:
    """Read ``mnist`` or ``fashion-mnist``, 28 x 28, from where Debian or torchvision puts it, or fetch it.

    Raises:
        DataError: if the files are missing, telling where they are looked for.
    """
    spec = _SETS[name]
    usual = (f"{spec.torchvision}/raw", spec.torchvision, name, f"{name}/raw")
    folders = source.folders(*spec.folders, *usual)
    files = _find(folders)
    if files is None and source.download:
        fetch(name, source, lambda tv, folder: getattr(tv.datasets, spec.torchvision)(str(folder), download=True))
        files = _find(folders)
    if files is None:
        raise missing(
            name,
            folders,
            *spec.ways,
            f"point --data-dir at a folder that holds torchvision's {spec.torchvision}/raw",
            "have it downloaded with --download",
        )
    train, test = (_read_part(name, files[part, "images"], files[part, "labels"]) for part in _PARTS)
    return RawSet(spec.classes, 1, train, test)


def _find(folders: list[Path]) -> dict[tuple[str, str], Path] | None:
    """The four files of the first folder that has them all, unpacked rather than packed."""
    kinds = {"images": 3, "labels": 1}
    for folder in folders:
        found = {}
        for part in _PARTS:
            for kind, dims in kinds.items():
                name = f"{part}-{kind}-idx{dims}-ubyte"
                for candidate in (folder / f"{name}.gz", folder / name):
                    if candidate.is_file():
                        found[part, kind] = candidate
        if len(found) == len(_PARTS) * len(kinds):
            return found
    return None


def _read_part(name: str, images_path: Path, labels_path: Path) -> Part:
    images, labels = _read_file(name, images_path, 3), _read_file(name, labels_path, 1)
    if images.shape[0] != labels.shape[0] or images.shape[0] == 0:
        raise DataError(f"{images_path}: {images.shape[0]} images but {labels.shape[0]} labels; fetch both again")
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_path}: images of {tuple(images.shape[1:])} pixels, not (28, 28); fetch it again")
    classes = len(_SETS[name].classes)
    if int(labels.max()) >= classes:
        raise DataError(f"{labels_path}: a label {int(labels.max())} in a set of {classes} classes; fetch it again")
    return array_part(images.unsqueeze(1), labels)


def _read_file(name: str, path: Path, dims: int) -> Tensor:
    content = read_bytes(path)
    values = parse_idx(content, dims, path)
    verify(name, path, content)
    return values

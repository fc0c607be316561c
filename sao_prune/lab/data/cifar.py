"""CIFAR-10 and CIFAR-100 in the Python version that torchvision fetches: pickles, read without running them.

The checksum comes first. The unpickler then knows two names, both of them stand-ins that only keep what they are given,
so no function that a file names is ever called, numpy's own among them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .checksum import verify
from .idx import read_bytes
from .raw import Part, RawSet, array_part
from .source import DataSource, fetch, missing

_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class _Cifar:
    """A set as torchvision describes it: its class's name, and what that does not say."""

    torchvision: str
    labels: str
    classes: int

    @property
    def published(self) -> Any:
        """torchvision's class, for the folder, files, checksums and archive that it names; it is never made.

        Raises:
            DataError: if torchvision is not installed.
        """
        try:
            from torchvision import datasets
        except ImportError as error:
            raise DataError("CIFAR needs torchvision: pip install 'sao-prune[lab]'") from error
        return getattr(datasets, self.torchvision)

    @property
    def checksums(self) -> dict[str, str]:
        """MD5 of every file."""
        cls = self.published
        return dict([*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])])


_SETS = {"cifar-10": _Cifar("CIFAR10", "labels", 10), "cifar-100": _Cifar("CIFAR100", "fine_labels", 100)}


def read_cifar(name: str, size: int, source: DataSource) -> RawSet:
    """Read ``cifar-10`` or ``cifar-100``, 32 x 32 in colour, from where torchvision puts it, or fetch it.

    Raises:
        DataError: if the files are missing or damaged, telling where they are looked for.
    """
    spec = _SETS[name]
    cls = spec.published
    usual = (cls.base_folder, *(f"{parent}/{cls.base_folder}" for parent in (name, cls.__name__, cls.__name__.lower())))
    folders = source.folders(*usual)
    folder = _find(spec, folders)
    if folder is None and source.download:
        fetch(name, source, partial(_fetch, spec))
        folder = _find(spec, folders)
    if folder is None:
        raise missing(
            name,
            folders,
            f"point --data-dir at the folder that holds {cls.base_folder} (unpack {cls.filename} there)",
            "have it downloaded with --download",
        )
    file = folder / cls.meta["filename"]
    classes = tuple(_load(name, file)[cls.meta["key"]])
    if len(classes) != spec.classes:
        raise DataError(f"{file}: {len(classes)} class names, not {spec.classes}; fetch it again")
    train, test = (_read_part(name, folder, [file for file, _ in files]) for files in (cls.train_list, cls.test_list))
    return RawSet(classes, 3, train, test)


def _fetch(spec: _Cifar, torchvision: Any, folder: Path) -> None:
    """Fetch and unpack the archive that torchvision knows; its class would also unpickle what is in it."""
    cls = spec.published
    torchvision.datasets.utils.download_and_extract_archive(
        cls.url, str(folder), filename=cls.filename, md5=cls.tgz_md5
    )


def _find(spec: _Cifar, folders: list[Path]) -> Path | None:
    """The first folder with all files."""
    files = spec.checksums
    return next((folder for folder in folders if all((folder / file).is_file() for file in files)), None)


def _read_part(name: str, folder: Path, files: Sequence[str]) -> Part:
    spec = _SETS[name]
    images, labels = [], []
    for file in files:
        content = _load(name, folder / file)
        try:
            images.append(content["data"].numpy().reshape(-1, *_SHAPE))
            labels.append(np.asarray(content[spec.labels], dtype=np.int64))
            fits = len(images[-1]) == len(labels[-1]) > 0 and labels[-1].min() >= 0 and labels[-1].max() < spec.classes
        except (KeyError, AttributeError, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{folder / file}: not a batch of {name} ({error}); fetch it again") from error
        if not fits:
            raise DataError(f"{folder / file}: labels that do not fit the images of {name}; fetch it again")
    return array_part(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def _load(name: str, path: Path) -> dict[str, Any]:
    content = read_bytes(path)
    verify(name, path, content, _SETS[name].checksums.get(path.name))
    try:
        found = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # Damage can surface as any exception at all.
        raise DataError(f"{path}: cannot be read as a file of {name} ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no mapping, so it is no file of {name}; fetch it again")
    return found


class _Array:
    """What the file says about an array."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def numpy(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The array, if it is one of bytes.

        Raises:
            ValueError: if it is anything else.
        """
        _, shape, dtype, fortran, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if dtype.name not in ("u1", "|u1") or len(raw) != prod(shape):
            raise ValueError("its data is no array of bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C").copy(order="C")


class _DType:
    """The name of a type."""

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Knows arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("numpy", "dtype"):
            return _DType
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of this set needs")

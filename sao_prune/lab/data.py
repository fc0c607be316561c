"""Image sets small enough to live on the device as one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError
from .idx import read_idx

IMAGE_SIZE = 32


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images ``(N, 1, 32, 32)``, standardised by the training set's mean and deviation, and labels ``(N,)``.

    Attributes:
        classes: the class names, in label order.
    """

    name: str
    classes: tuple[str, ...]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device | str) -> Dataset:
        """The same set on another device."""
        tensors = {key: getattr(self, key).to(device) for key in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **tensors)

    def holdout(self, fraction: float, seed: int = 0) -> Dataset:
        """Split the *training* set; the held-out part takes the place of the test set, which is gone.

        Args:
            fraction: how much of every class is held out, in (0, 1).
        """
        kept, held = stratified_split(self.train_y, fraction, seed)
        x, y = self.train_x, self.train_y
        return replace(self, train_x=x[kept], train_y=y[kept], test_x=x[held], test_y=y[held])


@dataclass(frozen=True)
class DataSource:
    """Where data may come from: the folder that ``--data-dir`` names, and whether downloading is allowed."""

    data_dir: Path = Path("data")
    download: bool = False


@dataclass(frozen=True)
class _IdxSet:
    """A set in MNIST's format: torchvision's class (also its folder's name), and the folders other packagers use."""

    torchvision: str
    folders: tuple[Path, ...]
    hint: str
    classes: tuple[str, ...]


_DIGIT_NAMES = tuple(str(i) for i in range(10))
_IDX_SETS = {
    "fashion-mnist": _IdxSet(
        "FashionMNIST",
        (Path("/usr/share/datasets/fashion-mnist"),),
        "install Debian's package dataset-fashion-mnist, ",
        ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "mnist": _IdxSet("MNIST", (), "", _DIGIT_NAMES),
}


def load_dataset(name: str, source: DataSource | None = None) -> Dataset:
    """Load a data set by name: ``digits``, ``fashion-mnist`` or ``mnist``.

    Raises:
        DataError: if the name is unknown, or the files are damaged or missing (the message says how to get them).

    Example:
        >>> load_dataset("digits").train_x.shape
        torch.Size([1438, 1, 32, 32])
    """
    loaders = dataset_loaders()
    if name not in loaders:
        raise DataError(f"unknown data set {name!r}; allowed: {', '.join(loaders)}")
    return loaders[name](source or DataSource())


def dataset_loaders() -> dict[str, Callable[[DataSource], Dataset]]:
    """Every data set by name, with the function that loads it."""
    return {"digits": _load_digits, **{name: partial(_load_idx_set, name) for name in _IDX_SETS}}


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two parts of a labelled set, the second with ``fraction`` of every class, both in ascending order.

    Raises:
        ValueError: if ``fraction`` is not in (0, 1) or would leave a class out of either part.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    cpu_labels = labels.cpu()
    for label in cpu_labels.unique().tolist():
        members = (cpu_labels == label).nonzero().flatten()
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise ValueError(f"class {label} has {len(members)} images: too few to hold out {fraction:.0%} of them")
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten().to(labels.device), held.nonzero().flatten().to(labels.device)


def _load_digits(_: DataSource) -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8 x 8 in 17 grey levels, upsampled; every class split 80 / 20."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install 'sao-prune[lab]'") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    train, test = stratified_split(labels, 0.2, seed=0)
    return _standardised(Dataset("digits", _DIGIT_NAMES, images[train], labels[train], images[test], labels[test]))


def _load_idx_set(name: str, source: DataSource) -> Dataset:
    spec = _IDX_SETS[name]
    torchvision_folder = source.data_dir / spec.torchvision / "raw"
    folders = [*spec.folders, torchvision_folder, source.data_dir / name]
    files = _find_idx_files(folders)
    if files is None and source.download:
        _download(spec.torchvision, source.data_dir)
        files = _find_idx_files([torchvision_folder])
    if files is None:
        raise DataError(
            f"{name} is not on this machine (looked in {', '.join(str(f) for f in folders)}): {spec.hint}"
            f"point --data-dir at a folder that holds torchvision's {spec.torchvision}/raw, "
            f"or have it downloaded with --download"
        )
    parts = {}
    for part in ("train", "t10k"):
        images, labels = read_idx(files[f"{part}-images"], 3), read_idx(files[f"{part}-labels"], 1)
        _check_pair(files[f"{part}-images"], images, labels, len(spec.classes))
        padding = (IMAGE_SIZE - images.shape[-1]) // 2
        parts[part] = F.pad(images.float().unsqueeze(1), [padding] * 4), labels.long()
    return _standardised(Dataset(name, spec.classes, *parts["train"], *parts["t10k"]))


def _find_idx_files(folders: list[Path]) -> dict[str, Path] | None:
    """The four files of the first folder that has them all."""
    parts = ("train", "t10k")
    kinds = {"images": 3, "labels": 1}
    names = {f"{p}-{kind}": f"{p}-{kind}-idx{dims}-ubyte" for p in parts for kind, dims in kinds.items()}
    for folder in folders:
        found = {}
        for key, name in names.items():
            for candidate in (folder / f"{name}.gz", folder / name):
                if candidate.is_file():
                    found[key] = candidate
        if len(found) == len(names):
            return found
    return None


def _download(torchvision_name: str, data_dir: Path) -> None:
    try:
        import torchvision
    except ImportError as error:
        raise DataError("--download needs torchvision: pip install 'sao-prune[lab]'") from error
    try:
        getattr(torchvision.datasets, torchvision_name)(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"downloading {torchvision_name} into {data_dir} failed: {error}") from error


def _check_pair(path: Path, images: Tensor, labels: Tensor, classes: int) -> None:
    if images.shape[0] != labels.shape[0] or images.shape[0] == 0:
        raise DataError(f"{path}: {images.shape[0]} images but {labels.shape[0]} labels; fetch both again")
    if images.shape[1:] != (28, 28):
        raise DataError(f"{path}: images of {tuple(images.shape[1:])} pixels, not (28, 28); fetch it again")
    if int(labels.max()) >= classes:
        raise DataError(f"{path}: a label {int(labels.max())} in a set of {classes} classes; fetch the labels again")


def _standardised(data: Dataset) -> Dataset:
    mean, std = data.train_x.mean(), data.train_x.std()
    return replace(data, train_x=(data.train_x - mean) / std, test_x=(data.test_x - mean) / std)

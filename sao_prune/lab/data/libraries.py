"""Image classification sets under the names of torchvision and timm."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import DataError
from .folder import square, to_tensor
from .memory import need_memory
from .names import TORCHVISION, torchvision_class
from .raw import Part, RawSet, array_part
from .source import DataSource
from .split import stratified_split

# How many images are looked at to find out whether a set is grey.
_LOOKED_AT = 64
_GREY_MODES = ("1", "L", "I", "I;16", "F")


def read_torchvision(name: str, size: int, source: DataSource) -> RawSet:
    """Read ``torchvision/NAME`` with torchvision's class of that name, which finds, fetches and verifies the files.

    Raises:
        DataError: if torchvision is missing or does not have the set.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{name} needs torchvision: pip install 'sao-prune[lab]'") from error
    cls = torchvision_class(name)
    assert cls is not None
    train_options, test_options = TORCHVISION[cls]
    root = str(source.data_dir.expanduser())

    def make(options: dict[str, object]) -> Any:
        try:
            return getattr(datasets, cls)(root, download=source.download, **options)
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            raise DataError(
                f"{name} cannot be had from torchvision ({_first_line(error)}): put its files under {root} as "
                f"torchvision does, or have it downloaded with --download"
            ) from error

    train = make(train_options)
    if test_options is None:
        return _split(train, size)
    return _joined(train, make(test_options), size)


def read_timm(name: str, size: int, source: DataSource) -> RawSet:
    """Read ``timm/NAME`` with ``timm.data.create_dataset``: ``timm/tfds/..``, ``timm/hfds/..``, ``timm/torch/..``.

    Raises:
        DataError: if timm is missing or does not have the set.
    """
    try:
        from timm.data import create_dataset
    except ImportError as error:
        raise DataError(f"{name} needs timm: pip install 'sao-prune[lab]'") from error
    wanted, root = name.removeprefix("timm/"), str(source.data_dir.expanduser())
    if wanted.startswith(("hfds/", "hfids/")) and not source.download:
        raise DataError(f"{name} is read over the network: allow that with --download")

    def make(*splits: str) -> Any:
        said = ""
        for split in splits:
            try:
                return create_dataset(wanted, root=root, split=split, download=source.download)
            except (Exception, SystemExit) as error:  # Every reader of timm's fails in its own way.
                said = said or f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(
            f"{name} cannot be had from timm ({said}): put its files under {root} as its reader expects, or have it "
            f"downloaded with --download"
        )

    train, test = make("train"), make("test", "validation")
    if not isinstance(train, IterableDataset):
        return _joined(train, test, size)
    parts = [_read_stream(name, stream, size) for stream in (train, test)]
    return RawSet(_class_names(train, parts[0].labels), 3, parts[0], parts[1])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def _joined(train: Any, test: Any, size: int) -> RawSet:
    """Two data sets with an index."""
    channels = _channels(train)
    labels = [_labels(dataset) for dataset in (train, test)]
    parts = [Part(y, partial(_read, dataset, size, channels)) for y, dataset in zip(labels, (train, test))]
    return RawSet(_class_names(train, torch.cat(labels)), channels, parts[0], parts[1])


def _split(whole: Any, size: int) -> RawSet:
    """One data set; a fifth of every class, always the same, is the test part."""
    labels, channels = _labels(whole), _channels(whole)

    def part(members: Tensor) -> Part:
        return Part(labels[members], lambda indices: _read(whole, size, channels, members[indices]))

    kept, held = stratified_split(labels, 0.2, seed=0)
    return RawSet(_class_names(whole, labels), channels, part(kept), part(held))


def _labels(dataset: Any) -> Tensor:
    """Labels without decoding an image, where the data set has them in a place that is usual; else one by one."""
    for name in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, name, None)
        if found is not None and len(found) == len(dataset):
            labels = torch.as_tensor(found)
            if labels.dim() == 1 and not labels.is_floating_point():
                return labels.long()
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def _class_names(dataset: Any, labels: Tensor) -> tuple[str, ...]:
    count = int(labels.max()) + 1
    names = getattr(dataset, "classes", None) or ()
    return tuple(map(str, names)) if len(names) >= count else tuple(str(i) for i in range(count))


def _channels(dataset: Any) -> int:
    """1 if images from all over the set are grey, else 3."""
    step = max(1, len(dataset) // _LOOKED_AT)
    return 1 if all(dataset[i][0].mode in _GREY_MODES for i in range(0, len(dataset), step)) else 3


def _read(dataset: Any, size: int, channels: int, indices: Tensor) -> Tensor:
    return _stack((dataset[i][0] for i in indices.tolist()), len(indices), size, channels)


def _read_stream(name: str, stream: Any, size: int) -> Part:
    """A data set without an index, read from its beginning to its end."""
    need_memory(name, len(stream) * 3 * size**2 if hasattr(stream, "__len__") else 0)
    images, labels = [], []
    for image, label in stream:
        images.append(to_tensor(square(image.convert("RGB"), size)))
        labels.append(int(label))
    if not images:
        raise DataError(f"{name}: no images in it")
    return array_part(torch.stack(images), torch.tensor(labels))


def _stack(images: Iterable[Any], count: int, size: int, channels: int) -> Tensor:
    made = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for i, image in enumerate(images):
        made[i] = to_tensor(square(image.convert("L" if channels == 1 else "RGB"), size))
    return made

"""From a specification to a data set: read, choose, fit, measure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import DataError
from .cifar import read_cifar
from .dataset import Dataset, channel_statistics
from .digits import read_digits
from .folder import read_cinic, read_folder
from .libraries import read_timm, read_torchvision
from .memory import need_memory
from .mnist import read_mnist
from .names import is_sequences, own_name
from .raw import Part, RawSet, pad, shrink
from .sequences import read_sequences
from .source import DataSource
from .spec import DataSpec
from .split import stratified_subset

Reader = Callable[[str, int, DataSource], RawSet]

# A subset is the same one for every seed of a training.
SUBSET_SEED = 0

_NAMED: dict[str, Reader] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "fashion-mnist": read_mnist,
    "cifar-10": read_cifar,
    "cifar-100": read_cifar,
    "cinic-10": read_cinic,
}
_PREFIXED: dict[str, Reader] = {"torchvision/": read_torchvision, "timm/": read_timm, "folder:": read_folder}


def load_dataset(spec: DataSpec | str, source: DataSource | None = None) -> Dataset:
    """Load a data set, on the CPU.

    Mean and deviation are measured on the training images that are used, after resizing and before padding (so those
    of MNIST are the ones in the literature, 0.1307 and 0.3081 of 255).

    Args:
        spec: or a name alone, for all images at 32 x 32.

    Returns:
        Images, or sequences of tokens.

    Raises:
        DataError: if the name is unknown, the files are damaged or missing (the message says how to get them), there
            are fewer images than asked for, or they do not fit in memory.

    Example:
        >>> load_dataset("digits").train_x.shape
        torch.Size([1438, 1, 32, 32])
        >>> load_dataset(DataSpec("digits", size=24, subset=100)).train_x.shape
        torch.Size([100, 1, 24, 24])
    """
    spec = DataSpec(spec) if isinstance(spec, str) else spec
    if problem := spec.problem():
        raise DataError(problem[1])
    if is_sequences(spec.name):
        return read_sequences(spec, source or DataSource())
    name = own_name(spec.name)
    found = _reader(name)(name, spec.size, source or DataSource())
    chosen = [_choose(found.train.labels, spec.subset), _choose(found.test.labels, spec.test_subset)]
    need_memory(spec.name, sum(map(len, chosen)) * found.channels * spec.size**2)
    train_x, test_x = (_images(part, which, spec.size) for part, which in zip((found.train, found.test), chosen))
    mean, std = channel_statistics(train_x)
    return Dataset(
        spec.name,
        found.classes,
        pad(train_x, spec.size),
        found.train.labels[chosen[0]],
        pad(test_x, spec.size),
        found.test.labels[chosen[1]],
        mean,
        std,
    )


def _reader(name: str) -> Reader:
    return _NAMED.get(name) or next(reader for prefix, reader in _PREFIXED.items() if name.startswith(prefix))


def _choose(labels: Tensor, count: int | None) -> Tensor:
    return torch.arange(len(labels)) if count is None else stratified_subset(labels, count, SUBSET_SEED)


def _images(part: Part, chosen: Tensor, size: int) -> Tensor:
    return shrink(part.read(chosen), size)

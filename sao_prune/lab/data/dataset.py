"""A set of images or sequences that lives on the device as one tensor a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .augment import augment as augmented
from .memory import need_memory
from .split import random_split, stratified_split

_GREY_LEVELS = 256

# The label of a step of which nothing is asked; torch's default of `cross_entropy`.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as bytes, ``(N, C, S, S)`` uint8, and labels ``(N,)`` int64, on one device.

    Or sequences of tokens, ``(N, steps)`` uint8, and a label a step, ``(N, steps)`` int64, `IGNORED` where there is
    none; every sequence has as many as the others.

    Attributes:
        classes: the class names, in label order.
        mean, std: of every channel of the training images, in grey levels 0..255; measured where they are not given.
        tokens: size of the vocabulary of sequences; 0 for images.

    Raises:
        TypeError: if images or tokens are no bytes.

    Example:
        >>> x, y = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2), torch.tensor([0, 1])
        >>> data = Dataset("two", ("a", "b"), x, y, x, y)
        >>> data.mean, data.batch(torch.tensor([1]))[1]
        ((3.5,), tensor([1]))
    """

    name: str
    classes: tuple[str, ...]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tokens: int = 0

    def __post_init__(self) -> None:
        for key in ("train_x", "test_x"):
            if (dtype := getattr(self, key).dtype) != torch.uint8:
                raise TypeError(f"{key} must be uint8, got {dtype}")
        if not self.mean and not self.is_sequences:
            mean, std = channel_statistics(self.train_x)
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)

    @property
    def is_sequences(self) -> bool:
        """Tokens and a label a step, instead of images."""
        return self.tokens > 0

    @property
    def sizes(self) -> dict[str, int]:
        """What a network must know of its inputs: channels and side of images, or the vocabulary of sequences."""
        if self.is_sequences:
            return {"tokens": self.tokens}
        return {"in_chans": self.channels, "img_size": self.train_x.shape[3]}

    @property
    def example(self) -> Tensor:
        """A batch of one input, on the CPU, all zero."""
        kind = torch.long if self.is_sequences else torch.float32
        return torch.zeros(1, *self.train_x.shape[1:], dtype=kind)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train_x.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.train_x.shape[2], self.train_x.shape[3]

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.train_x.device

    def to(self, device: torch.device | str) -> Dataset:
        """The same set on another device.

        Raises:
            DataError: if it does not fit into the memory of a CUDA device.
        """
        device = torch.device(device)
        if device.type == "cuda" and self.device.type != "cuda":
            need_memory(self.name, self.train_x.nbytes + self.test_x.nbytes, device)
        tensors = {key: getattr(self, key).to(device) for key in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **tensors)

    def holdout(self, fraction: float, seed: int = 0) -> Dataset:
        """Split the *training* set; the held-out part takes the place of the test set, which is gone.

        Of images every class keeps its share; sequences are drawn.

        Mean and deviation stay those of the whole training set, so that a network sees the same images in both.

        Args:
            fraction: how much of every class is held out, in (0, 1).

        Raises:
            DataError: if a class is too small for it.
        """
        split = random_split if self.is_sequences else stratified_split
        kept, held = split(self.train_y, fraction, seed)
        x, y = self.train_x, self.train_y
        return replace(self, train_x=x[kept], train_y=y[kept], test_x=x[held], test_y=y[held])

    def standardise(self, images: Tensor) -> Tensor:
        """Images of bytes, ``(.., C, S, S)``, as float32 with the training set's mean at 0 and its deviation at 1.

        Tokens as int64.
        """
        if self.is_sequences:
            return images.long()
        mean, std = _constants(self.mean, self.std, images.device)
        return images.float().sub_(mean).div_(std)

    def batch(
        self, indices: Tensor, augment: Sequence[str] = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The training images and labels of these indices, augmented and standardised, on the set's device.

        Args:
            indices: on any device; a copy from the CPU costs little.
            augment: see `DataSpec`.
            generator: of every draw, and needed for one; of the CPU, for the same images on every device.

        Raises:
            ValueError: if there is something to draw and nothing to draw from.
        """
        chosen = indices.to(self.device)
        images = self.train_x[chosen]
        if augment:
            if generator is None:
                raise ValueError(f"augmenting with {', '.join(augment)} needs a generator")
            images = augmented(images, augment, generator)
        return self.standardise(images), self.train_y[chosen]


def labelled(labels: Tensor) -> int:
    """How many labels there are; of sequences, those of steps of which nothing is asked do not count.

    Example:
        >>> labelled(torch.tensor([[IGNORED, 3, 1]]))
        2
    """
    return int((labels != IGNORED).sum())


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of uint8 images, in grey levels.

    Both come from whole counts of every grey level, so they do not depend on the order of summation. A channel of one
    value gets the deviation 1, and is all zero once standardised.

    Example:
        >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
        ((127.5,), (127.5,))
    """
    levels = torch.arange(_GREY_LEVELS, dtype=torch.float64)
    mean, std = [], []
    for channel in images.unbind(1):
        share = channel.flatten().bincount(minlength=_GREY_LEVELS).double().cpu() / channel.numel()
        mean.append(float(share @ levels))
        std.append(float((share @ (levels - mean[-1]).square()).sqrt()) or 1.0)
    return tuple(mean), tuple(std)


@lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """As tensors, kept so that no batch waits for a copy to the device."""
    shape = (len(mean), 1, 1)
    return torch.tensor(mean, device=device).reshape(shape), torch.tensor(std, device=device).reshape(shape)

"""What a reader hands over: labels at once, images when asked for, so that a subset is all that is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Images resized at a time: floating point takes four times the room.
_CHUNK = 4096


@dataclass(frozen=True)
class Part:
    """The training or the test part.

    Attributes:
        labels: ``(N,)`` int64.
        read: images of some indices, uint8 ``(n, C, h, w)``, all of one size.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RawSet:
    """A data set as its reader found it."""

    classes: tuple[str, ...]
    channels: int
    train: Part
    test: Part


def array_part(images: Tensor, labels: Tensor) -> Part:
    """A part whose images are in memory."""
    return Part(labels.long(), lambda indices: images[indices])


def shrink(images: Tensor, size: int) -> Tensor:
    """Images larger than ``size`` resized to it, bilinear with antialiasing; others as they are.

    Args:
        images: uint8, ``(N, C, h, w)``.
    """
    if max(images.shape[-2:]) <= size:
        return images
    return resize(images, size)


def resize(images: Tensor, size: int) -> Tensor:
    """Images resized to a square, bilinear with antialiasing.

    Args:
        images: ``(N, C, h, w)``, of any type, in grey levels.

    Returns:
        uint8, ``(N, C, size, size)``.
    """
    made = torch.empty(len(images), images.shape[1], size, size, dtype=torch.uint8)
    for part, out in zip(images.split(_CHUNK), made.split(_CHUNK)):
        scaled = F.interpolate(part.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
        out.copy_(scaled.round_().clamp_(0, 255))
    return made


def pad(images: Tensor, size: int) -> Tensor:
    """Images smaller than ``size`` in the middle of black squares of it.

    Example:
        >>> pad(torch.ones(1, 1, 1, 2, dtype=torch.uint8), 3)
        tensor([[[[0, 0, 0],
                  [1, 1, 0],
                  [0, 0, 0]]]], dtype=torch.uint8)
    """
    down, right = (max(0, size - side) for side in images.shape[-2:])
    if not down and not right:
        return images
    return F.pad(images, [right // 2, right - right // 2, down // 2, down - down // 2])

"""The operator ``torch.ops.sao_prune.max_pool``: max pooling that keeps a byte a window for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import cpu
from .dispatch import Definition, define
from .functional import Geometry
from .operands import check_memory
from .permutation import is_channels_last

Found = Sequence[Tensor | None]
# The most places of a window, as a byte numbers them, and a stride that the kernels' numbers have room for.
_MOST, _WIDEST = 256, (1 << 31) - 1


def knows(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the kernels know such windows: in two dimensions, in images for half at least."""
    if not len(kernel) == len(stride) == len(padding) == 2:
        return False
    small = min(*kernel, *stride) > 0 and prod(kernel) <= _MOST and max(stride) <= _WIDEST
    return small and all(0 <= 2 * p <= k for p, k in zip(padding, kernel))


def _attributes(x: Tensor, attributes: Any) -> tuple[tuple[int, ...], Geometry]:
    """Kernel and geometry, of windows of which a part lies in the image.

    Raises:
        RuntimeError: telling what was given.
    """
    kernel, stride, padding = (tuple(numbers) for numbers in attributes)
    geometry = Geometry(stride, padding, (1,) * len(kernel))
    fits = x.dim() == 4 and knows(kernel, stride, padding)
    if not fits or min(geometry.output(x.shape[2:], kernel)) < 1:
        given = f"a kernel of {kernel}, stride {stride}, padding {padding} and an input of shape {tuple(x.shape)}"
        raise RuntimeError(
            f"expected windows of at most {_MOST} places, no more than {_WIDEST} apart, that lie in images for half at "
            f"least, got {given}"
        )
    return kernel, geometry


def serves(x: Tensor) -> bool:
    """Whether the kernels take such images: channels last, without gaps."""
    return is_channels_last(x) and x.is_contiguous(memory_format=torch.channels_last)


def _room(x: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Room for a result, which lies in memory as its input does."""
    batch, channels, *space = x.shape
    high, wide = geometry.output(space, kernel)
    if is_channels_last(x):
        return x.new_empty(batch, high, wide, channels).permute(0, 3, 1, 2)
    return x.new_empty(batch, channels, high, wide)


def _corners(y: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Line and column of every window's first place."""
    lines, columns = (
        torch.arange(n, device=y.device) * s - p for n, s, p in zip(y.shape[2:], geometry.stride, geometry.padding)
    )
    return lines[:, None], columns


def _pool(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    (x,) = inputs
    check_memory(x)
    kernel, geometry = _attributes(x, attributes)
    if x.numel() and serves(x) and cpu.ready(x):
        return cpu.pool_forward(x, kernel, geometry, keep)
    found, flat = F.max_pool2d(x, kernel, geometry.stride, geometry.padding, return_indices=True)
    y = _room(x, kernel, geometry).copy_(found)
    lines, columns = _corners(y, geometry)
    wide = x.shape[3]
    places = (flat // wide - lines) * kernel[1] + flat % wide - columns
    return y, torch.empty_like(y, dtype=torch.uint8).copy_(places) if keep else None


def _pool_backward(
    grad: Tensor, inputs: Any, constants: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]
) -> Found:
    (x,), (_, places) = inputs, kept
    check_memory(x, grad, places)
    kernel, geometry = _attributes(x, attributes)
    shape = *x.shape[:2], *geometry.output(x.shape[2:], kernel)
    if places is None or places.dtype is not torch.uint8 or not shape == grad.shape == places.shape:
        given = [None if t is None else (t.dtype, tuple(t.shape)) for t in (grad, places)]
        raise RuntimeError(f"expected a gradient and places, as bytes, of shape {shape}, got {given[0]} and {given[1]}")
    if x.numel() and serves(x) and cpu.ready(x, grad):
        return (cpu.pool_backward(grad, x, kernel, geometry, places),)
    lines, columns = _corners(grad, geometry)
    place = places.long()
    flat = (lines + place // kernel[1]) * x.shape[3] + columns + place % kernel[1]
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dx.flatten(2).scatter_add_(2, flat.flatten(2), grad.flatten(2))
    return (dx,)


def _pool_fake(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    (x,) = inputs
    y = _room(x, *_attributes(x, attributes))
    return y, torch.empty_like(y, dtype=torch.uint8) if keep else None


def _pool_reference(inputs: Any, constants: Any, attributes: Any) -> Tensor:
    return F.max_pool2d(inputs[0], *attributes)


max_pool = define(
    Definition(
        "max_pool",
        ("Tensor x",),
        (),
        ("int[] kernel", "int[] stride", "int[] padding"),
        1,
        _pool,
        _pool_backward,
        _pool_fake,
        _pool_reference,
    )
)

"""Max pooling of images in channels-last format by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional import Geometry
from .launch import call
from .memory import empty, empty_like

_LAST = (0, 2, 3, 1)


def pool_forward(x: Tensor, kernel: tuple[int, ...], geometry: Geometry, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The greatest of every window and, if it is to be kept, its place in the window."""
    y = empty((*x.shape[:2], *geometry.output(x.shape[2:], kernel)), _LAST)
    places = torch.empty_like(y, dtype=torch.uint8) if keep else None
    call("pool_forward", x, y, places, *_numbers(x, y, kernel, geometry))
    return y, places


def pool_backward(grad: Tensor, x: Tensor, kernel: tuple[int, ...], geometry: Geometry, places: Tensor) -> Tensor:
    """The gradient of ``x``."""
    dx = empty_like(x)
    grad, places = (t.contiguous(memory_format=torch.channels_last) for t in (grad, places))
    call("pool_backward", grad, places, dx, *_numbers(x, grad, kernel, geometry))
    return dx


def _numbers(x: Tensor, y: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    sizes = *x.shape, *y.shape[2:]
    return *sizes, *kernel, *geometry.stride, *geometry.padding, torch.get_num_threads()

"""Max pooling between block convolutions by the kernels: torch's keeps eight bytes a window, and under a compiler its
gradient takes longer than theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..max_pool import MOST, max_pool, serves
from .base import is_plain


class NativeMaxPool2d(nn.MaxPool2d):
    """A max pooling that the kernels compute where they can: of images in channels-last format, in single precision."""

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether a module can be made one: torch's own, with options that the kernels know."""
        if type(module) is not nn.MaxPool2d or "forward" in module.__dict__ or cpu.library() is None:
            return False
        kernel, _, padding = sides = _sides(module)
        known = not module.return_indices and not module.ceil_mode and _pair(module.dilation) == (1, 1)
        small = min(*kernel, *sides[1]) > 0 and kernel[0] * kernel[1] <= MOST
        return known and small and all(0 <= 2 * p <= k for p, k in zip(padding, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """As of any max pooling."""
        if is_plain(x) or not _is_taken(x):
            return super().forward(x)
        kernel, stride, padding = _sides(self)
        if any(n + 2 * p < k for n, k, p in zip(x.shape[2:], kernel, padding)):
            return super().forward(x)
        return max_pool(x, kernel, stride, padding)[0]  # type: ignore[no-any-return]


def _is_taken(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype is torch.float32 and x.dim() == 4 and serves(x)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _sides(module: nn.MaxPool2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)

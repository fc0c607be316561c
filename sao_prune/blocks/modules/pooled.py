"""Max pooling between block convolutions by the kernels: torch's keeps eight bytes a window, and under a compiler its
gradient takes longer than theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..max_pool import knows, max_pool, serves
from .base import is_plain

_Options = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class NativeMaxPool2d(nn.MaxPool2d):
    """A max pooling that the kernels compute where they can: of images in channels-last format, in single precision."""

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether a module can be made one: torch's own, with options that the kernels know."""
        if type(module) is not nn.MaxPool2d or "forward" in module.__dict__ or cpu.library() is None:
            return False
        return _options(module) is not None

    def forward(self, input: Tensor) -> Tensor:
        """As of any max pooling."""
        x = input
        # Asked for at every call: options can be changed at any time, to any.
        options = None if is_plain(x) or not _is_taken(x) else _options(self)
        if options is None or any(n + 2 * p < k for n, k, p in zip(x.shape[2:], options[0], options[2])):
            return super().forward(x)
        return max_pool(x, *options)[0]  # type: ignore[no-any-return]


def _is_taken(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype is torch.float32 and x.dim() == 4 and serves(x)


def _options(module: nn.MaxPool2d) -> _Options | None:
    """Kernel, stride and padding, where the kernels know them."""
    kernel, stride, padding = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
    if module.return_indices or module.ceil_mode or _pair(module.dilation) != (1, 1):
        return None
    return (kernel, stride, padding) if knows(kernel, stride, padding) else None


def _pair(value: Any) -> tuple[int, ...]:
    """An option for both dimensions; nothing if it is told in another way, of the many that torch takes."""
    pair = (value, value) if isinstance(value, int) else value
    known = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
    return tuple(pair) if known else ()

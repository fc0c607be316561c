"""Which operands the kernels can take."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

ACTIVATIONS = ("", "relu", "gelu", "silu", "tanh")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: ``TRITON_INTERPRET=1`` before Triton was first imported."""
    if not available():
        return False
    from triton.runtime.interpreter import InterpretedFunction

    from . import kernels

    return isinstance(kernels.product, InterpretedFunction)


def suits_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "") -> bool:
    """Whether `linear_forward` can take these: ``x`` of shape ``(N, n)``, ``weight`` of shape ``(g, r, c)``."""
    return (
        _suits((x, weight, bias), activation)
        and (x.dim(), weight.dim()) == (2, 3)
        and (x.stride(1) == 1 or x.shape[1] == 1)
        and weight.is_contiguous()
    )


def suits_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "") -> bool:
    """Whether `conv_forward` can take these: ``x`` channels last, ``weight`` ``(g, r, c, kh, kw)``."""
    return (
        _suits((x, weight, bias), activation)
        and (x.dim(), weight.dim()) == (4, 5)
        and (x.stride(1) == 1 or x.shape[1] == 1)
        and weight.is_contiguous()
    )


def _suits(tensors: tuple[Tensor | None, ...], activation: str) -> bool:
    present = [t for t in tensors if t is not None]
    first = present[0]
    if activation not in ACTIVATIONS or first.dtype not in DTYPES:
        return False
    if any(t.dtype is not first.dtype or t.device != first.device for t in present):
        return False
    if any(t.numel() >= 2**31 for t in present[1:]):
        return False
    if first.device.type == "cuda":
        # ROCm's wavefronts and matrix instructions are others; nothing was tried there.
        return available() and torch.version.hip is None and torch.cuda.get_device_capability(first.device) >= (8, 0)
    # Reading the environment first keeps Triton from being imported for a CPU that will never run it.
    return first.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and interpreted()

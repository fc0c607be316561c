"""Block products of few rows: the weight is used as it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import Layout
from .launch import ACTS, call

FEW, _FEWER = 16, 8  # rows at most, of large and of small blocks
LARGE = 1 << 12  # weights of a block
_SHARE = 1 << 16  # weights that are worth a thread


def are_few(x: Tensor, layout: Layout) -> bool:
    """Whether these are rows, one after the other, and so few."""
    most = FEW if layout.rows * layout.cols >= LARGE else _FEWER
    # A single channel lies both ways: by its strides in columns, and then so does the result.
    return x.numel() <= most * x.shape[-1] and x.is_contiguous() and x.stride(-1) == 1


def few_forward(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str) -> Tensor:
    """``f(x W^T + b)`` of rows that `are_few`; weight and bias are contiguous."""
    n, m = x.shape[-1], layout.channels
    y = torch.empty((*x.shape[:-1], m), dtype=torch.float32, device="cpu")
    threads = min(torch.get_num_threads(), max(1, weight.numel() // _SHARE))
    sizes = x.numel() // n, n, m, layout.groups, layout.rows, layout.cols
    call("few_forward", x, weight, bias, y, *sizes, *layout.addresses, threads, ACTS[activation])
    return y

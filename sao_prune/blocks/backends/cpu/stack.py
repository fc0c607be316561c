"""Linear layers one behind the other, with the activations behind them, in one kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...functional import MATRIX
from ...layout import Layout
from ...permutation import dense, is_column_major
from ..torch import is_transposed
from .launch import ACTS, call_with, panel_lines
from .linear import OF_RESULT, rows_of, shaped
from .memory import empty

# Floats of a layer's panel and its results that a core keeps at hand, and the fewest and most rows of one: measured.
_PANEL = 1 << 18, 32, 128
_COLUMNS = (1, 0)
# Fewer rows are left to kernels that share a layer's blocks between the threads.
_LEAST_ROWS = 16


class _Layer(ctypes.Structure):
    """As the kernels have it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inputs", "outputs")),
        *((name, ctypes.c_long) for name in ("n", "m", "groups", "rows", "cols")),
        ("act", ctypes.c_int),
    )


@lru_cache(maxsize=512)
def _described(layouts: tuple[Layout, ...], acts: tuple[str, ...]) -> tuple[ctypes.Array[_Layer], int]:
    """The layers, whose tables the layouts hold, and the most channels of one."""
    sizes = [(a.sources, a.channels, a.groups, a.rows, a.cols) for a in layouts]
    each = [_Layer(*a.addresses, *size, ACTS[act]) for a, size, act in zip(layouts, sizes, acts)]
    return (_Layer * len(each))(*each), max(n + m for n, m, *_ in sizes)


def stack_suits(x: Tensor) -> bool:
    """Whether the kernels take a batch of this shape and order."""
    return not is_transposed(x) and x.numel() >= _LEAST_ROWS * x.shape[-1]


def stack_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    layouts: Sequence[Layout],
    activations: Sequence[str],
    keep: bool,
) -> list[Tensor | None]:
    """The results of all layers; of those before the last only to ``keep``."""
    columns = x.dim() == 2 and is_column_major(x)
    flat = x if columns else dense(rows_of(x))
    layers, widest = _described(tuple(layouts), tuple(activations))
    order, last = _COLUMNS if columns else None, len(layouts) - 1
    results = [empty((len(flat), a.channels), order) if keep or i == last else None for i, a in enumerate(layouts)]
    held = [dense(w) for w in weights], [None if b is None else dense(b) for b in biases], results
    lines, threads = _panels(flat, widest)
    tensors = [_pointers(each) for each in held]
    call_with(
        "stack_forward", layers, len(layers), *tensors, flat.data_ptr(), len(flat), columns, lines, threads
    )  # fmt: skip
    return [None if y is None else shaped(y, x, MATRIX) for y in results]


def stack_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    layouts: Sequence[Layout],
    activations: Sequence[str],
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of the input, of the weights and of the biases.

    Args:
        grad: of the last result.
        x: as it was given, like weights, layouts and activations.
        weights: packed.
        results: of all layers.
        layouts: of the layers.
        activations: of the layers.
        needs: whether the input's is asked for, and then that of each weight and each bias in turn.
    """
    columns = x.dim() == 2 and is_column_major(x)
    flat = x if columns else dense(rows_of(x))
    layers, widest = _described(tuple(layouts), tuple(OF_RESULT.get(a, "") for a in activations))
    lowest = next((i for i in range(len(layers)) if needs[0] or needs[2 * i + 1] or needs[2 * i + 2]), 0)
    outer, *values = [_like(t, columns) for t in (grad, *results)]
    held = [dense(w) for w in weights]
    dx = empty(flat.shape, _COLUMNS if columns else None) if needs[0] else None
    dw = [torch.empty_like(w) if need else None for w, need in zip(held, needs[1::2])]
    db = [flat.new_empty(a.channels) if need else None for a, need in zip(layouts, needs[2::2])]
    lines, threads = _panels(flat, widest)
    tensors = [_pointers(each) for each in (held, values, dw, db)]
    call_with(
        "stack_backward", layers, len(layers), *tensors, outer.data_ptr(), flat.data_ptr(),
        None if dx is None else dx.data_ptr(), len(flat), columns, lines, threads, lowest,
    )  # fmt: skip
    return None if dx is None else shaped(dx, x, MATRIX), dw, db


def _panels(flat: Tensor, widest: int) -> tuple[int, int]:
    """Rows of a panel, and threads."""
    threads = torch.get_num_threads()
    return panel_lines(len(flat), 1, widest, _PANEL, threads), threads


def _like(t: Tensor, columns: bool) -> Tensor:
    """A result or its gradient as rows, or channel after channel."""
    flat = rows_of(t)
    return flat.t().contiguous().t() if columns else flat.contiguous()


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])

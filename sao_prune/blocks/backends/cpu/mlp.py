"""Two linear layers and the activation between them in one kernel, which keeps nothing of what is between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...functional import MATRIX
from ...layout import Layout
from ...permutation import dense
from ..torch import is_transposed
from .few import are_few, few_forward
from .launch import ACTS, call, panel_lines
from .linear import shaped
from .memory import empty, empty_like

# Floats of a panel, and the fewest and most lines of one: measured.
_ROWS = 5 << 16, 32, 96
_PLANES = 3 << 18, 32, 512


def mlp_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    layout1: Layout,
    w2: Tensor,
    b2: Tensor | None,
    layout2: Layout,
    activation: str,
) -> Tensor:
    """``(..., n)`` to ``(..., m)``; the weights are packed."""
    w1, b1, w2, b2 = [t if t is None else dense(t) for t in (w1, b1, w2, b2)]  # type: ignore[assignment]
    if are_few(x, layout1):
        return few_forward(few_forward(x, w1, b1, layout1, activation), w2, b2, layout2, "")
    flat = _flat(x, x)
    y = empty((len(flat), layout2.channels, *flat.shape[2:]))
    call("mlp_forward", flat, w1, b1, w2, b2, y, *_arguments(flat, w1, layout1, w2, layout2, activation))
    return shaped(y, x, MATRIX)


def mlp_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    layout1: Layout,
    w2: Tensor,
    layout2: Layout,
    activation: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x, w1, b1, w2, b2``, as far as they are needed; what is between is computed again."""
    flat, outer = _flat(x, x), _flat(grad, x)
    w1, w2 = dense(w1), dense(w2)
    b1 = None if b1 is None else dense(b1)
    found = (
        empty_like(flat) if needs[0] else None,
        torch.empty_like(w1) if needs[1] else None,
        flat.new_empty(layout1.channels) if needs[2] else None,
        torch.empty_like(w2) if needs[3] else None,
        flat.new_empty(layout2.channels) if needs[4] else None,
    )
    call("mlp_backward", outer, flat, w1, b1, w2, *found, *_arguments(flat, w1, layout1, w2, layout2, activation))
    return None if found[0] is None else shaped(found[0], x, MATRIX), *found[1:]


def _arguments(
    flat: Tensor, w1: Tensor, layout1: Layout, w2: Tensor, layout2: Layout, activation: str
) -> tuple[Any, ...]:
    planes = flat.dim() == 3
    batch, height = (flat.shape[0], flat.shape[2]) if planes else (1, flat.shape[0])
    channels = flat.shape[1], layout1.channels, layout2.channels
    threads = torch.get_num_threads()
    lines = panel_lines(height, batch, sum(channels), _PLANES if planes else _ROWS, threads)
    one, two = (*w1.shape, *layout1.addresses), (*w2.shape, *layout2.addresses)
    return batch, height, *channels, *one, *two, planes, lines, threads, ACTS[activation]


def _flat(t: Tensor, x: Tensor) -> Tensor:
    """Rows of shape ``(N, channels)`` or, where tokens lie transposed, planes ``(batch, channels, length)``."""
    if is_transposed(x):
        return dense(t.mT).flatten(0, -3)
    return dense(t.reshape(-1, t.shape[-1]))

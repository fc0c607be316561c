"""A product with its epilogue and the gradients of both, of rows or of images alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Epilogue, Source, Window, launch_product, launch_weight_gradient
from .rest import bias_gradient, fill_missing
from .tables import Side


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ins: Side,
    outs: Side,
    window: Window,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Fill ``y``; with ``keep`` the derivative of GELU or SiLU is returned beside it."""
    saved = torch.empty_like(y) if keep and activation in ("gelu", "silu") else None
    if y.numel():
        launch_product(Source(x), weight, y, ins, outs, window, Epilogue(bias, activation, saved))
        fill_missing(y, saved, bias, outs.missing, activation)
    return y, saved


def backward(
    grad: Source,
    x: Tensor,
    weight: Tensor,
    ins: Side,
    outs: Side,
    window: Window,
    needs: tuple[bool, bool, bool],
    empty: Callable[[Tensor], Tensor],
    laid: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x``, ``weight`` and the bias, as far as ``needs`` asks for them.

    Args:
        grad: of the result, with what its activation left.
        x: the input, laid out in any way.
        weight: the blocks.
        ins: where inputs are in the blocks.
        outs: where outputs are.
        window: of a convolution.
        needs: which of the three.
        empty: memory for the gradient of ``x``.
        laid: ``x`` as the kernels read it.
    """
    dx = dw = db = None
    rows, channels = grad.values.shape[:2]
    if needs[0]:
        dx = empty(x)
        if ins.missing is not None:
            dx.zero_()
        if dx.numel():
            launch_product(grad, weight, dx, outs, ins, window, Epilogue(), transposed=True)
    if needs[1]:
        dw = torch.empty_like(weight) if rows else torch.zeros_like(weight)
    if needs[2]:
        db = grad.values.new_zeros(channels)
    if dw is not None and rows:
        launch_weight_gradient(Source(laid(x)), grad, dw, db, ins, outs, window)
    if db is not None and rows:
        bias_gradient(db, grad, outs.missing if dw is not None else None, everything=dw is None)
    return dx, dw, db

"""A block layer, the batch norm behind it and the activation behind that, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional import Geometry
from ...layout import Layout
from ...permutation import dense, is_column_major
from .launch import ACTS, Derivative, Forward, call
from .linear import as_operand, call_for, shaped
from .memory import empty_like

Normed = tuple[Tensor, Tensor, Tensor, Tensor]


def affine(
    gain: Tensor | None, offset: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift of every channel, and the inverse of its deviation."""
    inverse = (variance + eps).rsqrt()
    scale = inverse if gain is None else inverse * gain
    shift = -mean * scale if offset is None else offset - mean * scale
    return scale, shift, inverse


def conv_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    eps: float,
    activation: str,
) -> Normed:
    """The result, what is normed, and the mean and biased variance it is normed by."""
    operand, flat, kernel = call_for(x, weight, layout, geometry)
    bias = None if bias is None else dense(bias)
    z, _, moments = kernel.forward(operand, dense(flat), bias, Forward(moments=mean is None))
    if moments is not None:
        mean, variance = moments
    assert mean is not None
    assert variance is not None
    scale, shift, _ = affine(gain, offset, mean, variance, eps)
    y = empty_like(z)
    call("norm_forward", z, y, scale, shift, ACTS[activation], *_lines(z), torch.get_num_threads())
    if moments is None:
        mean, variance = mean.clone(), variance.clone()
    return shaped(y, x, geometry), shaped(z, x, geometry), mean, variance


def conv_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    layout: Layout,
    geometry: Geometry,
    eps: float,
    activation: str,
    training: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, packed weight, bias, gain and offset, as far as they are needed."""
    operand, flat, kernel = call_for(x, weight, layout, geometry)
    z = as_operand(z, x, geometry, kernel)
    scale, shift, inverse = affine(gain, offset, mean, variance, eps)
    grad = _like(as_operand(grad, x, geometry, kernel), z)
    totals = z.new_empty(2, z.shape[1], dtype=torch.float64)
    threads = torch.get_num_threads()
    call("norm_sums", grad, z, scale, shift, mean, ACTS[activation], totals, *_lines(z), threads)
    through, moment = totals.to(z.dtype)
    inner = constant = torch.zeros_like(scale)
    if training:
        values = z.numel() // z.shape[1]
        inner = -scale * inverse * inverse * moment / values
        constant = -scale * through / values
    derivative = Derivative(activation, z, torch.stack([scale, shift, scale, inner, constant, mean]))
    dx, dw, db = kernel.backward(grad, operand, dense(flat), needs[:3], derivative)
    dx = None if dx is None else shaped(dx, x, geometry)
    dw = None if dw is None else dw.view(weight.shape)
    return dx, dw, db, moment * inverse if needs[3] else None, through if needs[4] else None


def _lines(z: Tensor) -> tuple[int, int, int, int]:
    """Batch, channels and positions of a result, and whether channels are innermost."""
    if z.dim() == 2:
        return (1, z.shape[1], z.shape[0], 0) if is_column_major(z) else (z.shape[0], z.shape[1], 1, 1)
    return z.shape[0], z.shape[1], z[0, 0].numel(), int(z.stride(1) == 1 and not z.is_contiguous())


def _like(grad: Tensor, z: Tensor) -> Tensor:
    """A gradient that lies in memory as its tensor does."""
    return grad if grad.stride() == z.stride() else empty_like(z).copy_(grad)

"""A batch norm and the activation behind it by the compiled kernels, with the block layer before it or alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional import Geometry
from ...layout import Layout
from ...permutation import dense, is_column_major
from .launch import ACTS, PLANS, Derivative, Forward, Norm, call
from .linear import as_operand, call_for, shaped, shaped_as
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


def conv_normed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    layout: Layout,
    geometry: Geometry,
    eps: float,
    activation: str,
) -> Tensor:
    """The result with a norm by averages, which is one more factor of the weight as the kernels lay that out."""
    operand, flat, kernel = call_for(x, weight, layout, geometry)
    norm = Norm(*(None if t is None else dense(t) for t in (gain, offset, mean, variance)), float(eps))  # type: ignore[arg-type,call-arg]
    bias = None if bias is None else dense(bias)
    return shaped(kernel.forward(operand, dense(flat), bias, PLANS[activation, False], norm)[0], x, geometry)


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
    y = _activated(z, gain, offset, mean, variance, eps, activation)
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
    grad = _like(as_operand(grad, x, geometry, kernel), z)
    numbers, dgain, doffset = _numbers(grad, z, gain, offset, mean, variance, eps, activation, training)
    derivative = Derivative(activation, z, numbers)
    dx, dw, db = kernel.backward(grad, operand, dense(flat), needs[:3], derivative)
    dx = None if dx is None else shaped_as(dx, x, geometry)
    dw = None if dw is None else dw.view(weight.shape)
    return dx, dw, db, dgain if needs[3] else None, doffset if needs[4] else None


def norm_forward(
    z: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and biased variance it is normed by, of planes, pixels or columns."""
    if mean is None or variance is None:
        mean, variance = z.new_empty(z.shape[1]), z.new_empty(z.shape[1])
        call("norm_moments", z, mean, variance, *_lines(z), torch.get_num_threads())
    else:
        mean, variance = mean.clone(), variance.clone()
    return _activated(z, gain, offset, mean, variance, eps, activation), mean, variance


def norm_backward(
    grad: Tensor,
    z: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``z``, gain and offset."""
    grad = _like(grad, z)
    numbers, dgain, doffset = _numbers(grad, z, gain, offset, mean, variance, eps, activation, training)
    dz = empty_like(z)
    call("norm_backward", grad, z, dz, numbers, ACTS[activation], *_lines(z), torch.get_num_threads())
    return dz, dgain, doffset


def _activated(
    z: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
) -> Tensor:
    scale, shift, _ = affine(gain, offset, mean, variance, eps)
    y = empty_like(z)
    call("norm_forward", z, y, scale, shift, ACTS[activation], *_lines(z), torch.get_num_threads())
    return y


def _numbers(
    grad: Tensor,
    z: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Derivative` needs to know of the channels, and the gradients of gain and offset."""
    scale, shift, inverse = affine(gain, offset, mean, variance, eps)
    totals = z.new_empty(2, z.shape[1], dtype=torch.float64)
    call("norm_sums", grad, z, scale, shift, mean, ACTS[activation], totals, *_lines(z), torch.get_num_threads())
    through, moment = totals.to(z.dtype)
    inner = constant = torch.zeros_like(scale)
    if training:
        values = z.numel() // z.shape[1]
        inner = -scale * inverse * inverse * moment / values
        constant = -scale * through / values
    return torch.stack([scale, shift, scale, inner, constant, mean]), moment * inverse, through


def _lines(z: Tensor) -> tuple[int, int, int, int]:
    """Batch, channels and positions of a result, and whether channels are innermost."""
    if z.dim() == 2:
        return (1, z.shape[1], z.shape[0], 0) if is_column_major(z) else (z.shape[0], z.shape[1], 1, 1)
    return z.shape[0], z.shape[1], z[0, 0].numel(), int(z.stride(1) == 1 and not z.is_contiguous())


def _like(grad: Tensor, z: Tensor) -> Tensor:
    """A gradient that lies in memory as its tensor does."""
    return grad if grad.stride() == z.stride() else empty_like(z).copy_(grad)

"""Block products by the compiled kernels: linear layers and convolutions, with the activation behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...functional import Geometry
from ...layout import Layout
from ...permutation import dense, is_channels_last, is_column_major
from ..torch import Gradients, is_transposed
from .launch import PLAIN, Call, Derivative, Forward, Pixels, Planes, Rows

# Activations whose derivative is known from their result, and under which name: of others the derivative is kept.
OF_RESULT = {"relu": "relu", "tanh": "tanh of result"}


def derivative_of(activation: str, values: Tensor | None) -> Derivative | None:
    """How gradients pass an activation, given its result or its derivative."""
    if not activation or values is None:
        return None
    return Derivative(OF_RESULT.get(activation, "known derivative"), values)


def forward_of(activation: str, keep: bool) -> Forward:
    """The product and an activation."""
    return Forward(activation, keep) if activation or keep else PLAIN


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As `backends.torch.linear_forward`."""
    operand, call = _linear_call(x, layout)
    y, kept, _ = call.forward(operand, *_contiguous(weight, bias), forward_of(activation, keep))
    return _shaped(y, x, layout.channels), None if kept is None else _shaped(kept, x, layout.channels)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    needs: tuple[bool, ...],
    activation: str,
    values: Tensor | None,
) -> Gradients:
    """As `backends.torch.linear_backward`."""
    operand, call = _linear_call(x, layout)
    outer = _flat(grad, x)
    kept = None if values is None else _flat(values, x)
    dx, dw, db = call.backward(outer, operand, dense(weight), needs, derivative_of(activation, kept))
    return None if dx is None else _shaped(dx, x, x.shape[-1]), dw, db


def _linear_call(x: Tensor, layout: Layout) -> tuple[Tensor, Call]:
    if is_transposed(x):
        return x.mT.flatten(0, -3), Planes(layout, (1,), (1,))
    flat = _rows(x)
    return flat, Rows(layout, is_column_major(flat))


def _flat(t: Tensor, x: Tensor) -> Tensor:
    """A tensor like the input or the result of a linear layer as the kernels take it, by how the input lies."""
    return dense(t.mT).flatten(0, -3) if is_transposed(x) else _rows(t)


def _rows(t: Tensor) -> Tensor:
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return flat if flat.is_contiguous() or is_column_major(flat) else flat.contiguous()


def _shaped(flat: Tensor, x: Tensor, features: int) -> Tensor:
    if is_transposed(x):
        return flat.view(*x.shape[:-2], features, x.shape[-2]).mT
    return flat if x.dim() == 2 else flat.view(*x.shape[:-1], features)


def suits_conv(kernel: Sequence[int], geometry: Geometry) -> bool:
    """Whether a convolution has stride 1, outputs as large as its inputs, and at most two dimensions of space."""
    if len(kernel) > 2 or any(s != 1 for s in geometry.stride) or any(k % 2 == 0 for k in kernel):
        return False
    needed = tuple(d * (k - 1) // 2 for k, d in zip(kernel, geometry.dilation))
    return geometry.padding == needed


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `backends.torch.conv_forward`, of convolutions that `suits_conv`."""
    operand, weight, call = conv_call(x, weight, layout, geometry)
    y, kept, _ = call.forward(operand, *_contiguous(weight, bias), forward_of(activation, keep))
    return as_image(y, x), None if kept is None else as_image(kept, x)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    geometry: Geometry,
    needs: tuple[bool, ...],
    activation: str,
    values: Tensor | None,
) -> Gradients:
    """As `backends.torch.conv_backward`."""
    operand, flat, call = conv_call(x, weight, layout, geometry)
    outer, kept = as_operand(grad, x, call), None if values is None else as_operand(values, x, call)
    dx, dw, db = call.backward(outer, operand, dense(flat), needs, derivative_of(activation, kept))
    return None if dx is None else as_image(dx, x), None if dw is None else dw.view(weight.shape), db


def conv_call(x: Tensor, weight: Tensor, layout: Layout, geometry: Geometry) -> tuple[Tensor, Tensor, Call]:
    """The operand, the weight and the kernel for an input's memory format; matrices are images of no dimension."""
    kernel = tuple(weight.shape[3:])
    if x.dim() == 2:
        operand, call = _linear_call(x, layout)
        return operand, weight, call
    if x.dim() != 4 or not is_channels_last(x):
        return dense(x), weight, Planes(layout, kernel, geometry.dilation)
    x = x.contiguous(memory_format=torch.channels_last)
    if any(k > 1 for k in kernel):
        return x, weight, Pixels(layout, kernel, geometry.dilation)
    return x.movedim(1, -1).flatten(0, -2), weight.flatten(2), Rows(layout, False)


def as_operand(t: Tensor, x: Tensor, call: Call) -> Tensor:
    """A tensor like the result, as the kernel takes it."""
    if x.dim() == 2:
        return _flat(t, x)
    if isinstance(call, Rows):
        return dense(t.movedim(1, -1)).flatten(0, -2)
    if isinstance(call, Pixels):
        return t.contiguous(memory_format=torch.channels_last)
    return dense(t)


def as_image(t: Tensor, x: Tensor) -> Tensor:
    """What a kernel gave, as an image like ``x``."""
    if x.dim() == 4 and t.dim() == 2:
        return t.view(x.shape[0], *x.shape[2:], t.shape[1]).movedim(-1, 1)
    return t


def _contiguous(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return dense(weight), None if bias is None else dense(bias)

"""Block products by the compiled kernels: linear layers and convolutions, with the activation behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ...functional import MATRIX, Geometry
from ...layout import Layout
from ...permutation import Permutation, dense, is_channels_last, is_column_major
from .. import torch as plain
from ..torch import Gradients, is_transposed
from .few import FEW, LARGE, are_few, few_forward
from .launch import LINE, PLANS, Call, Derivative, Planes, Rows

# Activations whose derivative is known from their result, and under which name: of others the derivative is kept.
OF_RESULT = {"relu": "relu", "tanh": "tanh of result"}
_WIDEST = 4  # stride, as in geometry.h


def suits(kernel: Sequence[int], geometry: Geometry, channels_last: bool) -> bool:
    """Whether a convolution has at most two dimensions of space and, unless its inputs are images in channels-last
    format and no stride is wider than 4, stride 1 and outputs as large as its inputs."""
    if len(kernel) == 2 and channels_last:
        return max(geometry.stride) <= _WIDEST
    if len(kernel) > 2 or any(s != 1 for s in geometry.stride) or any(k % 2 == 0 for k in kernel):
        return False
    return geometry.padding == tuple(d * (k - 1) // 2 for k, d in zip(kernel, geometry.dilation))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, geometry: Geometry, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As `backends.torch.forward`, of convolutions that `suits`."""
    bias = None if bias is None else dense(bias)
    # The common case of the one below, without views: to make them takes longer than the product.
    if not geometry.stride and not keep and are_few(x, layout):
        return few_forward(x, dense(weight), bias, layout, activation), None
    operand, flat, call = call_for(x, weight, layout, geometry)
    kept = None
    if not keep and isinstance(call, Rows) and not call.kernel and are_few(operand, call.layout):
        y = few_forward(operand, dense(flat), bias, call.layout, activation)
    else:
        y, kept, _ = call.forward(operand, dense(flat), bias, PLANS[activation, keep])
    return shaped(y, x, geometry), None if kept is None else shaped(kept, x, geometry)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    geometry: Geometry,
    needs: tuple[bool, ...],
    activation: str,
    values: Tensor | None,
) -> Gradients:
    """As `backends.torch.backward`."""
    operand, flat, call = call_for(x, weight, layout, geometry)
    grad = as_operand(grad, x, geometry, call)
    kept = None if values is None else as_operand(values, x, geometry, call)
    if _by_blas(operand, flat, call):
        dx, dw, db = plain.backward(grad, operand, flat, call.layout, MATRIX, needs, activation, kept)
    else:
        act = OF_RESULT.get(activation, "known derivative")
        derivative = Derivative(act, kept) if activation and kept is not None else None
        dx, dw, db = call.backward(grad, operand, dense(flat), needs, derivative)
    dw = dw if dw is None or flat is weight else dw.view(weight.shape)
    return None if dx is None else shaped_as(dx, x, geometry), dw, db


def call_for(x: Tensor, weight: Tensor, layout: Layout, geometry: Geometry) -> tuple[Tensor, Tensor, Call]:
    """The operand, the weight and the kernel for an input's shape and memory format."""
    if not geometry.stride:
        if is_transposed(x):
            return x.mT.flatten(0, -3), weight, Planes(layout, (1,), LINE)
        # A batch of rows of tokens that lies in columns, as an image with its channels moved last, gives rows as well.
        return rows_of(x), weight, Rows(layout, x.dim() == 2 and is_column_major(x))
    kernel = tuple(weight.shape[3:])
    if kernel == x.shape[2:] and not any(geometry.padding):
        last = is_channels_last(x)
        flat = (x.movedim(1, -1) if last else x).flatten(1)
        return dense(flat), weight.flatten(2), Rows(_of_window(layout, math.prod(kernel), last), False)
    if x.dim() != 4 or not is_channels_last(x):
        return dense(x), weight, Planes(layout, kernel, geometry)
    if max(*kernel, *geometry.stride) > 1 or any(geometry.padding):
        return x.contiguous(memory_format=torch.channels_last), weight, Rows(layout, False, kernel, geometry)
    return rows_of(x.movedim(1, -1)), weight.flatten(2), Rows(layout, False)


def _by_blas(rows: Tensor, weight: Tensor, call: Call) -> bool:
    """Whether rows are so few, and blocks so large, that BLAS has gradients before the kernels have laid them out."""
    large = weight.shape[1] * weight.shape[2] >= LARGE
    return large and isinstance(call, Rows) and not call.kernel and len(rows) <= FEW


@lru_cache(maxsize=256)
def _of_window(layout: Layout, places: int, last: bool) -> Layout:
    """The layout of a convolution of images that are a single window: of a linear layer whose inputs are all pixels,
    channels innermost or, if not ``last``, outermost."""
    first = layout.inputs.inverse * places
    place = torch.arange(places, device=first.device)
    position = (first + place[:, None] if last else first[:, None] + place).flatten()
    index = position.new_zeros(layout.groups * layout.cols * places)
    index[position] = torch.arange(len(position), device=position.device)
    return replace(layout, cols=layout.cols * places, inputs=Permutation.of(index, position), _on={})


def as_operand(t: Tensor, x: Tensor, geometry: Geometry, call: Call) -> Tensor:
    """A tensor like the result, as the kernel takes it."""
    if not geometry.stride:
        return dense(t.mT).flatten(0, -3) if is_transposed(x) else rows_of(t)
    if isinstance(call, Rows):
        return t.contiguous(memory_format=torch.channels_last) if call.kernel else rows_of(dense(t.movedim(1, -1)))
    return dense(t)


def shaped(flat: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """What a kernel gave, as a result for ``x``."""
    if geometry.stride:
        if flat.dim() > 2:
            return flat
        if len(flat) == len(x):
            return flat.view(*flat.shape, *[1] * (x.dim() - 2))
        images = flat.view(x.shape[0], *x.shape[2:], flat.shape[1]).movedim(-1, 1)
        return images if flat.shape[1] > 1 else flat.view(images.shape)
    if is_transposed(x):
        return flat.view(*x.shape[:-2], flat.shape[1], x.shape[-2]).mT
    return flat if x.dim() == 2 else flat.view(*x.shape[:-1], flat.shape[1])


def shaped_as(flat: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """A gradient that a kernel gave, as one of its input ``x``."""
    if not geometry.stride or flat.dim() > 2 or len(flat) != len(x):
        return shaped(flat, x, geometry)
    return flat.view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1) if is_channels_last(x) else flat.view(x.shape)


def rows_of(t: Tensor) -> Tensor:
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return flat if flat.is_contiguous() or is_column_major(flat) else flat.contiguous()

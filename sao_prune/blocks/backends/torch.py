"""Block products from torch's own operations, forwards and backwards, without a wasted copy; not differentiable.

A batch ``(N, n)`` may lie in memory row after row or column after column. BLAS takes both, and in the second a strided
permutation is a mere view; a transposition costs as much as the product, so none is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import ACTIVATIONS, Geometry, derivative, through
from ..layout import Layout
from ..permutation import Kind, Permutation, is_channels_last, is_column_major

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def room_for(x: Tensor, channels: int, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Room for a result, which lies in memory as its input does."""
    if geometry.stride:
        y = x.new_empty(x.shape[0], channels, *geometry.output(x.shape[2:], kernel))
        return y.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and is_channels_last(x) else y
    if x.dim() == 2 and is_column_major(x):
        return x.new_empty_strided((x.shape[0], channels), (1, x.shape[0]))
    if is_transposed(x):
        return x.new_empty(*x.shape[:-2], channels, x.shape[-2]).mT
    return x.new_empty(*x.shape[:-1], channels)


def is_transposed(x: Tensor) -> bool:
    """Whether tokens ``(..., length, n)`` lie as ``(..., n, length)``, as in a network that mixes tokens."""
    return x.dim() > 2 and x.stride(-1) != 1 and x.stride(-2) == 1 and x.mT.is_contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The result and, if it is to be kept, the derivative of the activation.

    Args:
        x: ``(batch, n, *space)``; of a linear layer ``(..., n)``.
        weight: ``(groups, rows, cols, *kernel)``.
        bias: ``(m,)``, or ``None``.
        layout: where the blocks' channels are.
        geometry: of the convolution; without dimensions it is a linear layer.
        activation: ``""`` for none.
        keep: whether the backward pass will need the derivative.
    """
    y = _convolve(x, weight, bias, layout, geometry) if geometry.stride else _multiply(x, weight, bias, layout)
    return activated(y, activation, keep)


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
    """Gradients of input, packed weight and bias, as far as they are needed.

    Args:
        grad: of the result.
        x: as for `forward`, like the others.
        weight: likewise.
        layout: likewise.
        geometry: likewise.
        needs: whether each of the three is needed.
        activation: likewise.
        values: the derivative that was kept, or the result where that tells it.
    """
    grad = through(grad, values, activation)
    db = None
    if needs[2]:
        db = grad.sum([0, *range(2, grad.dim())]) if geometry.stride else _rows(grad).sum(0)
    if not (needs[0] or needs[1]):
        return None, None, db
    if geometry.stride:
        return *_convolve_backward(grad, x, weight, layout, geometry, needs), db
    if is_transposed(x):
        return *_planes_backward(grad, x, weight, layout, needs), db
    dx, dw = _matmul_backward(_rows(grad), _rows(x), weight, layout, needs)
    return None if dx is None else dx.view(x.shape), dw, db


def norm_forward(
    z: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm and an activation; by which mean and biased variance, those of the batch if none are given."""
    if mean is None or variance is None:
        variance, mean = torch.var_mean(z, [d for d in range(z.dim()) if d != 1], correction=0)
    else:
        mean, variance = mean.clone(), variance.clone()
    y = torch.nn.functional.batch_norm(z, mean, variance, gain, offset, False, 0.0, eps)
    y = y if y.stride() == z.stride() else torch.empty_like(z).copy_(y)
    return ACTIVATIONS[activation](y), mean, variance


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
) -> Gradients:
    """Gradients of what a batch norm and an activation were given, of gain and of offset.

    By formulas: under a dispatch mode there is no autograd within an operator.
    """
    if activation:
        y = torch.nn.functional.batch_norm(z, mean, variance, gain, offset, False, 0.0, eps)
        grad = grad * derivative(activation, y)
    inverse = (variance + eps).rsqrt()
    averages = (None, None) if training else (mean, variance)
    dz, dgain, doffset = torch.ops.aten.native_batch_norm_backward(
        grad, z, gain, *averages, mean, inverse, training, eps, [True, True, True]
    )
    return dz, dgain, doffset


def activated(y: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor | None]:
    """A product with its activation and, if it is to be kept, the derivative there."""
    if not activation:
        return y, None
    return ACTIVATIONS[activation](y), derivative(activation, y) if keep else None


def _padded(grad: Tensor, layout: Layout) -> Tensor:
    """A gradient of the result by positions, zeros where there is padding."""
    if layout.channels == len(layout.outputs.inverse):
        return layout.outputs.reverse.channels(grad)
    padded = grad.new_zeros(grad.shape[0], layout.groups * layout.rows, *grad.shape[2:])
    return padded.index_copy_(1, layout.outputs.index, grad)


# ---- Convolutions -------------------------------------------------------------------------------------------------


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, geometry: Geometry) -> Tensor:
    """By torch's grouped convolution."""
    bias = None if bias is None else layout.bias(bias)
    channels_last = x.dim() == 4 and is_channels_last(x)
    if _is_covered(x, weight, geometry):
        rows = layout.inputs.channels(x).reshape(len(x), layout.groups, -1).transpose(0, 1)
        y = torch.bmm(rows, weight.flatten(2).mT).transpose(0, 1).reshape(len(x), -1)
        y = (y if bias is None else y + bias).view(*y.shape, *[1] * (x.dim() - 2))
    else:
        flat = weight.flatten(0, 1)
        flat = flat.contiguous(memory_format=torch.channels_last) if channels_last else flat
        y = torch.convolution(layout.inputs.channels(x), flat, bias, *_options(geometry, layout))
    y = layout.outputs.channels(y)
    if channels_last and (y.shape[1] == 1 or y.shape[2:].numel() == 1):
        # One channel or one pixel lies both ways: strides as `room_for` has them, which compilers are told.
        return y.reshape(-1).view(y.shape)
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, layout: Layout, geometry: Geometry, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    inner, outer, flat = layout.inputs.channels(x), _padded(grad, layout), weight.flatten(0, 1)
    if x.dim() == 4 and is_channels_last(x):
        outer, flat = (t.contiguous(memory_format=torch.channels_last) for t in (outer, flat))
    options, mask = _options(geometry, layout), [needs[0], needs[1], False]
    dx, dw, _ = torch.ops.aten.convolution_backward(outer, inner, flat, None, *options, mask)
    dx = layout.inputs.reverse.channels(dx) if needs[0] else None
    return dx, dw.view(weight.shape) if needs[1] else None


def _options(geometry: Geometry, layout: Layout) -> tuple[Any, ...]:
    dims = len(geometry.stride)
    return geometry.stride, geometry.padding, geometry.dilation, False, (0,) * dims, layout.groups


def _is_covered(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the kernel is as large as the image, so that there is one output, a product of matrices."""
    kernel = tuple(weight.shape[3:])
    undilated = all(k == 1 or d == 1 for k, d in zip(kernel, geometry.dilation))
    several = any(k > 1 for k in kernel) and len(x) > 0
    return several and not any(geometry.padding) and undilated and tuple(x.shape[2:]) == kernel


# ---- Linear layers ------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    if not is_transposed(x):
        rows = x if x.dim() == 2 else _rows(x).contiguous()
        return _matmul(rows, weight, bias, layout).view(*x.shape[:-1], layout.channels)
    y = layout.outputs.channels(_planes(layout.inputs.channels(x.mT.flatten(0, -3)), weight))
    y = y.view(*x.shape[:-2], y.shape[1], x.shape[-2]).mT
    return y if bias is None else y + bias


def _planes(x: Tensor, weight: Tensor) -> Tensor:
    """The product for each ``(groups * cols, length)`` of a batch."""
    groups, rows, cols = weight.shape
    batch, _, length = x.shape
    repeated = weight.expand(batch, *weight.shape).flatten(0, 1)
    return torch.bmm(repeated, x.reshape(batch * groups, cols, length)).view(batch, groups * rows, length)


def _planes_backward(
    grad: Tensor, x: Tensor, weight: Tensor, layout: Layout, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    outer = _padded(grad.mT.flatten(0, -3).contiguous(), layout)
    dx = dw = None
    if needs[0]:
        dx = layout.inputs.reverse.channels(_planes(outer, weight.mT)).view(x.mT.shape).mT
    if needs[1]:
        inner = layout.inputs.channels(x.mT.flatten(0, -3))
        batch, length = len(inner), inner.shape[2]
        inner = inner.view(batch * layout.groups, layout.cols, length)
        outer = outer.view(batch * layout.groups, layout.rows, length)
        dw = torch.bmm(outer, inner.mT).view(batch, *weight.shape).sum(0)
    return dx, dw


def _is_view(order: Permutation, dims: tuple[int, int], column_major: bool) -> bool:
    """Whether BLAS can read or write permuted channels as they lie, given the dims of a strided permutation."""
    strided = order.kind is Kind.STRIDED and order.dims == (*dims, 1)
    return order.kind is Kind.IDENTITY or (column_major and strided)


def _split(x: Tensor, groups: int, strided: bool) -> Tensor:
    """``(N, groups * width)`` as ``(groups, width, N)``: a view."""
    batch, width = x.shape[0], x.shape[1] // groups
    if is_column_major(x):
        columns = x.t()
        return columns.view(width, groups, batch).transpose(0, 1) if strided else columns.view(groups, width, batch)
    return x.view(batch, groups, width).permute(1, 2, 0)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, strided: bool, column_major: bool) -> Tensor:
    """``a @ b`` of shape ``(groups, width, N)``, written as ``(N, groups * width)``, and the bias added."""
    groups, width, batch = a.shape[0], a.shape[1], b.shape[2]
    channels = groups * width
    y = b.new_empty_strided((batch, channels), (1, batch) if column_major else (channels, 1))
    if not column_major and not strided and b.stride(2) == 1 and groups > 1:
        # Columns in, rows out: BLAS is twice as fast into a result of its own, copied over with the bias.
        product = torch.bmm(b.mT, a.mT).transpose(0, 1)
        if bias is None:
            y.view(batch, groups, width).copy_(product)
        else:
            torch.add(product, bias.view(groups, width), out=y.view(batch, groups, width))
        return y
    if strided:
        torch.bmm(a, b, out=y.t().view(width, groups, batch).transpose(0, 1))
    elif column_major:
        torch.bmm(a, b, out=y.t().view(groups, width, batch))
    else:
        torch.bmm(b.mT, a.mT, out=y.view(batch, groups, width).transpose(0, 1))
    if bias is not None:
        y += bias
    return y


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """``x @ W^T + bias`` of shape ``(N, m)``, in the memory order of ``x``."""
    column_major = is_column_major(x)
    x = x if column_major else x.contiguous()
    inputs, outputs = layout.inputs, layout.outputs
    in_view = _is_view(inputs, (layout.cols, layout.groups), column_major)
    out_view = _is_view(outputs, (layout.groups, layout.rows), column_major)
    operand = _split(x if in_view else inputs.channels(x), layout.groups, in_view and inputs.kind is Kind.STRIDED)
    if out_view:
        return _product(weight, operand, bias, outputs.kind is Kind.STRIDED, column_major)
    bias = None if bias is None else layout.bias(bias)
    return outputs.channels(_product(weight, operand, bias, False, column_major))


def _matmul_backward(
    grad: Tensor, x: Tensor, weight: Tensor, layout: Layout, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    column_major = is_column_major(x)
    x = x if column_major else x.contiguous()
    inputs, outputs, groups = layout.inputs, layout.outputs, layout.groups
    grad = grad.t().contiguous().t() if column_major else grad.contiguous()
    column_major = is_column_major(grad)  # a batch of one lies both ways
    out_view = _is_view(outputs, (groups, layout.rows), column_major)
    outer = _split(grad if out_view else _padded(grad, layout), groups, out_view and outputs.kind is Kind.STRIDED)
    in_view = _is_view(inputs, (layout.cols, groups), is_column_major(x))
    strided = in_view and inputs.kind is Kind.STRIDED
    dx = dw = None
    if needs[0]:
        dx = _product(weight.mT, outer, None, strided, is_column_major(x))
        dx = dx if in_view else inputs.reverse.channels(dx)
    if needs[1]:
        inner = _split(x if in_view else inputs.channels(x), groups, strided)
        dw = torch.bmm(outer, inner.mT)
    return dx, dw

"""Block products by the Triton kernels, in the terms of `backends.torch`."""

from __future__ import annotations

from torch import Tensor

from ..functional import Geometry
from ..layout import Layout
from ..permutation import is_channels_last, is_column_major
from . import triton
from .torch import Gradients, is_transposed


def suits(x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> bool:
    """Whether the kernels can take these operands: images in channels-last format."""
    if not x.numel() or not all(t is None or (t.dtype is x.dtype and t.device == x.device) for t in others):
        return False
    if geometry.stride:
        return x.dim() == 4 and is_channels_last(x) and triton.suits_conv(x, weight)
    # The kernels give rows, and a single channel lies in both orders.
    columns = x.dim() == 2 and is_column_major(x)
    return not is_transposed(x) and not columns and triton.suits_linear(_rows(x), weight)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, geometry: Geometry, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As `backends.torch.forward`."""
    if geometry.stride:
        where = _pairs(geometry)
        return triton.conv_forward(x, weight, bias, *layout.tables, layout.channels, *where, activation, keep)
    shape = *x.shape[:-1], layout.channels
    y, kept = triton.linear_forward(_rows(x), weight, bias, *layout.tables, layout.channels, activation, keep)
    return y.view(shape), None if kept is None else kept.view(shape)


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
    wanted = needs[0], needs[1], needs[2]
    if geometry.stride:
        where = _pairs(geometry)
        return triton.conv_backward(grad, x, weight, *layout.tables, wanted, *where, activation, values)
    kept = None if values is None else _rows(values)
    dx, dw, db = triton.linear_backward(_rows(grad), _rows(x), weight, *layout.tables, wanted, activation, kept)
    return None if dx is None else dx.view(x.shape), dw, db


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _pairs(geometry: Geometry) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    stride, padding, dilation = ((n[0], n[1]) for n in (geometry.stride, geometry.padding, geometry.dilation))
    return stride, padding, dilation

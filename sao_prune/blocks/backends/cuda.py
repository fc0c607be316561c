"""Block products by the Triton kernels, in the terms of `backends.torch`."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..functional import Geometry
from ..layout import Layout
from ..permutation import is_channels_last
from . import triton
from .torch import Gradients, is_transposed


def suits_linear(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can take a linear layer's operands."""
    if is_transposed(x) or not all(t is None or (t.dtype is x.dtype and t.device == x.device) for t in others):
        return False
    return x.numel() > 0 and triton.suits_linear(_rows(x), weight)


def suits_conv(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can take a convolution's operands: images in channels-last format."""
    if x.dim() == 2:
        return suits_linear(x, weight, *others)
    same = all(t is None or (t.dtype is x.dtype and t.device == x.device) for t in others)
    return same and x.dim() == 4 and prod(x.shape) > 0 and is_channels_last(x) and triton.suits_conv(x, weight)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As `backends.torch.linear_forward`."""
    shape = *x.shape[:-1], layout.channels
    y, kept = triton.linear_forward(_rows(x), weight, bias, *layout.tables, layout.channels, activation, keep)
    return y.view(shape), None if kept is None else kept.view(shape)


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
    wanted = needs[0], needs[1], needs[2]
    kept = None if values is None else _rows(values)
    found = triton.linear_backward(_rows(grad), _rows(x), weight, *layout.tables, wanted, activation, kept)
    return None if found[0] is None else found[0].view(x.shape), *found[1:]


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, geometry: Geometry, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As `backends.torch.conv_forward`."""
    if x.dim() == 2:
        return linear_forward(x, weight, bias, layout, activation, keep)
    where = _pair(geometry.stride), _pair(geometry.padding), _pair(geometry.dilation)
    return triton.conv_forward(x, weight, bias, *layout.tables, layout.channels, *where, activation, keep)


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
    if x.dim() == 2:
        return linear_backward(grad, x, weight, layout, needs, activation, values)
    where = _pair(geometry.stride), _pair(geometry.padding), _pair(geometry.dilation)
    wanted = needs[0], needs[1], needs[2]
    return triton.conv_backward(grad, x, weight, *layout.tables, wanted, *where, activation, values)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]

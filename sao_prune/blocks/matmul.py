"""Block-diagonal matrix products between two channel orders, forwards and backwards, without a wasted copy.

A batch ``(N, n)`` may lie in memory row after row or column after column ("features first"). BLAS takes both, and in
the second a strided channel order is a mere view; a transposition costs as much as the product, so none is made.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .order import Kind, Order, is_features_first, take
from .packing import Packing


def _is_view(order: Order, dims: tuple[int, int], features_first: bool) -> bool:
    """Whether BLAS can read or write the channels in this order as they lie, given the dims of a strided one."""
    strided = order.kind is Kind.STRIDED and order.dims == (*dims, 1)
    return order.kind is Kind.IDENTITY or (features_first and strided)


def _split(x: Tensor, groups: int, strided: bool) -> Tensor:
    """``(N, groups * width)`` as ``(groups, width, N)``: a view."""
    batch, width = x.shape[0], x.shape[1] // groups
    if is_features_first(x):
        columns = x.t()
        return columns.view(width, groups, batch).transpose(0, 1) if strided else columns.view(groups, width, batch)
    return x.view(batch, groups, width).permute(1, 2, 0)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, strided: bool, features_first: bool) -> Tensor:
    """``a @ b`` of shape ``(groups, width, N)``, written as ``(N, groups * width)``, and the bias added."""
    groups, width, batch = a.shape[0], a.shape[1], b.shape[2]
    channels = groups * width
    y = b.new_empty_strided((batch, channels), (1, batch) if features_first else (channels, 1))
    if not features_first and not strided and b.stride(2) == 1 and groups > 1:
        # Columns in, rows out: BLAS is twice as fast into a result of its own, copied over with the bias.
        product = torch.bmm(b.mT, a.mT).transpose(0, 1)
        if bias is None:
            y.view(batch, groups, width).copy_(product)
        else:
            torch.add(product, bias.view(groups, width), out=y.view(batch, groups, width))
        return y
    if strided:
        torch.bmm(a, b, out=y.t().view(width, groups, batch).transpose(0, 1))
    elif features_first:
        torch.bmm(a, b, out=y.t().view(groups, width, batch))
    else:
        torch.bmm(b.mT, a.mT, out=y.view(batch, groups, width).transpose(0, 1))
    if bias is not None:
        y += bias
    return y


class _BlockProduct(torch.autograd.Function):
    """The product alone; ``strided`` tells of input and output channels whether set ``i`` is ``i, i+g, i+2g, ..``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        strided: tuple[bool, bool],
        features_first: bool,
    ) -> Tensor:
        y = _product(weight, _split(x, weight.shape[0], strided[0]), bias, strided[1], features_first)
        ctx.save_for_backward(x, weight)
        ctx.strided = strided  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        strided: tuple[bool, bool] = ctx.strided  # type: ignore[attr-defined]
        if torch.is_grad_enabled():
            return _differentiable_backward(x, weight, grad, strided, needs)
        groups = weight.shape[0]
        # A strided set is a view of a features-first gradient only; that of a sum, for one, is expanded.
        if not is_features_first(grad):
            grad = grad.t().contiguous().t() if strided[1] else grad.contiguous()
        outer = _split(grad, groups, strided[1])
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = _product(weight.mT, outer, None, strided[0], is_features_first(x))
        if needs[1]:
            grad_weight = torch.bmm(outer, _split(x, groups, strided[0]).mT)
        if needs[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


def _differentiable_backward(
    x: Tensor, weight: Tensor, grad: Tensor, strided: tuple[bool, bool], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients from operations that can be differentiated again."""
    groups = weight.shape[0]
    outer, inner = _split(grad.contiguous(), groups, strided[1]), _split(x, groups, strided[0])
    grad_x = torch.bmm(weight.mT, outer)
    grad_x = grad_x.permute(2, 1, 0) if strided[0] else grad_x.permute(2, 0, 1)
    grads = grad_x.reshape(x.shape), torch.bmm(outer, inner.mT), grad.sum(0)
    return *(g if n else None for g, n in zip(grads, needs)), None, None


def block_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing, features_first: bool | None = None
) -> Tensor:
    """``x @ W^T + bias`` for the block matrix ``W`` that ``packing`` lays out.

    Args:
        x: shape ``(N, n)``, in either memory order.
        weight: the packed matrices, shape ``(groups, rows, cols)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.
        features_first: memory order of the result; ``None``: that of ``x``.

    Returns:
        Shape ``(N, m)``.
    """
    inputs, outputs = packing.inputs, packing.outputs
    came_features_first = is_features_first(x)
    features_first = came_features_first if features_first is None else features_first and x.shape[0] > 1
    if not came_features_first and not x.is_contiguous():
        x = x.contiguous()
    in_view = _is_view(inputs, (packing.cols, packing.groups), came_features_first)
    out_view = packing.raw or _is_view(outputs, (packing.groups, packing.rows), features_first)
    if not in_view:
        x = take(x, inputs)
    natural = out_view and not packing.raw
    if not natural:
        bias = packing.bias(bias)
    strided = in_view and inputs.kind is Kind.STRIDED, natural and outputs.kind is Kind.STRIDED
    if torch.is_grad_enabled():
        y: Tensor = _BlockProduct.apply(x, weight, bias, strided, features_first)
    else:
        y = _product(weight, _split(x, weight.shape[0], strided[0]), bias, strided[1], features_first)
    return y if out_view else take(y, outputs)


def _plane_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    groups, rows, cols = weight.shape
    batch, _, length = x.shape
    y = torch.bmm(_repeat(weight, batch), x.view(batch * groups, cols, length))
    if bias is not None:
        y.view(batch, groups * rows, length).add_(bias[:, None])
    return y


class _PlaneProduct(torch.autograd.Function):
    """The product for inputs ``(batch, groups * cols, length)`` whose last dimension is contiguous."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _plane_product(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        groups, rows, cols = weight.shape
        batch, _, length = x.shape
        outer = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = torch.bmm(_repeat(weight.mT, batch), outer).view(x.shape)
        if needs[1]:
            inner = x.view(batch * groups, cols, length)
            grad_weight = torch.bmm(outer, inner.mT).view(batch, *weight.shape).sum(0)
        if needs[2]:
            grad_bias = outer.view(batch, groups * rows, length).sum((0, 2))
        return grad_x, grad_weight, grad_bias


def _repeat(weight: Tensor, batch: int) -> Tensor:
    return weight.expand(batch, *weight.shape).flatten(0, 1)


def plane_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """`block_matmul` along dimension 1 of ``(batch, n, length)``, as token mixing has it: no transposition is made.

    Args:
        x: shape ``(batch, n, length)``, contiguous.
        weight: the packed matrices, shape ``(groups, rows, cols)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.

    Returns:
        Shape ``(batch, m, length)``, contiguous.
    """
    product = _PlaneProduct.apply if torch.is_grad_enabled() else _plane_product
    y: Tensor = product(take(x, packing.inputs), weight, packing.bias(bias))
    y = y.view(len(x), packing.groups * packing.rows, x.shape[2])
    return y if packing.raw else take(y, packing.outputs)


def plain_block_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """`block_matmul` in ordinary operations, for compilers, exporters and function transforms; ``x`` is ``(.., n)``."""
    operand = packing.inputs.last(x).unflatten(-1, (packing.groups, packing.cols))
    y = torch.einsum("...gc,grc->...gr", operand, weight).flatten(-2)
    bias = packing.bias(bias, plain=True)
    y = y if bias is None else y + bias
    return y if packing.raw else packing.outputs.last(y)

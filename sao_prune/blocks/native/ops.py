"""Block layers by the native kernels, as differentiable operations on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..matmul import plain_block_matmul
from ..order import is_channels_last, is_features_first
from ..packing import Packing
from .after import After, Differentiable, run
from .launch import Pixels, Planes, Rows

NOTHING = After()


def suits_conv(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
) -> bool:
    """Whether a convolution has stride 1, outputs as large as its inputs, and one or two dimensions of space."""
    if len(kernel) > 2 or any(s != 1 for s in stride) or any(k % 2 == 0 for k in kernel) or padding == "valid":
        return False
    needed = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation))
    return (padding == "same" or tuple(padding) == needed) and (padding_mode == "zeros" or not any(needed))


def native_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packing: Packing,
    features_first: bool | None = None,
    after: After = NOTHING,
) -> Tensor:
    """`block_matmul` by the native kernels.

    Args:
        x: shape ``(N, n)``, in either memory order.
        weight: the packed matrices, shape ``(groups, rows, cols)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.
        features_first: memory order of the result; ``None``: that of ``x``.
        after: what to make of the result.

    Returns:
        Shape ``(N, m)``.

    Raises:
        MemoryError: if there is none for the kernels' buffers.
    """
    columns = is_features_first(x)
    if not columns:
        x = x.contiguous()
    features_first = columns if features_first is None else features_first and len(x) > 1

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return plain_matmul(x, weight, bias, packing)

    return run(Rows(packing, features_first), plain, x, weight, bias, after)


def native_plane_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing, after: After = NOTHING
) -> Tensor:
    """`plane_matmul` by the native kernels: ``(batch, n, length)`` to ``(batch, m, length)``, contiguous.

    Args:
        x: shape ``(batch, n, length)``, contiguous.
        weight: the packed matrices, shape ``(groups, rows, cols)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.
        after: what to make of the result; no norm.

    Raises:
        MemoryError: if there is none for the kernels' buffers.
    """

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return plain_matmul(x.mT, weight, bias, packing).mT

    return run(Planes(packing, (1,), (1,)), plain, x, weight, bias, after)


def native_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packing: Packing,
    dilation: tuple[int, ...],
    plain: Differentiable,
    after: After = NOTHING,
) -> Tensor:
    """A block convolution that `suits_conv`, by the native kernels.

    Args:
        x: shape ``(batch, n, *space)``, in either memory format.
        weight: the packed matrices, shape ``(groups, rows, cols, *kernel)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.
        dilation: of the kernel.
        plain: the same from operations that can be differentiated twice, of input, weight and the result's bias.
        after: what to make of the result.

    Returns:
        Shape ``(batch, m, *space)``, in the same format.

    Raises:
        MemoryError: if there is none for the kernels' buffers.
    """
    kernel = tuple(weight.shape[3:])
    if x.dim() != 4 or not is_channels_last(x):
        return run(Planes(packing, kernel, dilation), plain, x.contiguous(), weight, bias, after)
    x = x.contiguous(memory_format=torch.channels_last)
    if any(k > 1 for k in kernel):
        return run(Pixels(packing, kernel, dilation), plain, x, weight, bias, after)
    pixels = x.movedim(1, -1)

    def plain_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return plain_matmul(x, weight.flatten(2), bias, packing)

    y = run(Rows(packing, False), plain_rows, pixels.flatten(0, -2), weight.flatten(2), bias, after)
    return y.view(*pixels.shape[:-1], -1).movedim(-1, 1)


def plain_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """The product of ``(.., n)`` in ordinary operations; the bias is the result's."""
    y = plain_block_matmul(x, weight, None, replace(packing, raw=True))
    y = y if packing.raw else packing.outputs.last(y)
    return y if bias is None else y + bias

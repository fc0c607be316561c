"""Two linear layers and the activation between them in one kernel, which keeps nothing of what is between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..packing import Packing
from .after import After, again
from .launch import ACTS, call, panel_lines, ready
from .memory import empty, empty_like
from .ops import plain_matmul

# Floats of a panel, and the least and most lines of one: measured.
_ROWS = 5 << 16, 32, 96
_PLANES = 3 << 18, 32, 512


@dataclass(frozen=True, eq=False)
class Half:
    """One of the two layers.

    Attributes:
        weight: the packed matrices, shape ``(groups, rows, cols)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.
    """

    weight: Tensor
    bias: Tensor | None
    packing: Packing

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the kernel takes them."""
        bias = self.packing.bias(self.bias) if self.packing.raw else self.bias
        return self.weight.contiguous(), None if bias is None else bias.contiguous()


def suit_pair(x: Tensor, first: Half, second: Half) -> bool:
    """Whether the kernel can take these."""
    return (
        first.packing.out_channels == len(second.packing.inputs.inverse)
        and x.shape[0] > 0
        and ready(x, first.weight, first.bias, second.weight, second.bias)
    )


def native_pair(x: Tensor, first: Half, second: Half, act: str, planes: bool) -> Tensor:
    """``second(act(first(x)))``; what is between is computed again for the gradients, to the same bits.

    Args:
        x: contiguous; rows of shape ``(N, n)`` or, if ``planes``, ``(batch, n, length)``.
        first: the layer that sees ``x``.
        second: the other.
        act: one of ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``.
        planes: whether channels are dimension 1 of three.

    Returns:
        Shape ``(N, m)`` or ``(batch, m, length)``, contiguous.

    Raises:
        MemoryError: if there is none for the kernel's buffers.
    """
    kernel = _Kernel(first.packing, second.packing, act, planes)
    tensors = x, *first.tensors(), *second.tensors()
    if not torch.is_grad_enabled():
        return kernel.forward(*tensors)

    def plain(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        rows = x.mT if planes else x
        y = plain_matmul(After(act=act).plain(plain_matmul(rows, w1, b1, first.packing)), w2, b2, second.packing)
        return y.mT if planes else y

    y: Tensor = _Pair.apply(*tensors, kernel, plain)
    return y


@dataclass(frozen=True, eq=False)
class _Kernel:
    first: Packing
    second: Packing
    act: str
    planes: bool

    def forward(self, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        y = empty((len(x), self.second.out_channels, *x.shape[2:]))
        call("pair_forward", x, w1, b1, w2, b2, y, *self._arguments(x, w1, w2))
        return y

    def backward(
        self, grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        found = (
            empty_like(x) if needs[0] else None,
            torch.empty_like(w1) if needs[1] else None,
            x.new_empty(self.first.out_channels) if needs[2] else None,
            torch.empty_like(w2) if needs[3] else None,
            x.new_empty(self.second.out_channels) if needs[4] else None,
        )
        call("pair_backward", grad, x, w1, b1, w2, *found, *self._arguments(x, w1, w2))
        return found

    def _arguments(self, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Any, ...]:
        batch, height = (x.shape[0], x.shape[2]) if self.planes else (1, x.shape[0])
        channels = x.shape[1], self.first.out_channels, self.second.out_channels
        threads = torch.get_num_threads()
        lines = panel_lines(height, batch, sum(channels), _PLANES if self.planes else _ROWS, threads)
        one, two = (*w1.shape, *self.first.channel_tables), (*w2.shape, *self.second.channel_tables)
        return batch, height, *channels, *one, *two, self.planes, lines, threads, ACTS[self.act]


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        kernel: _Kernel,
        plain: Callable[..., Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2, b2)  # type: ignore[arg-type]
        ctx.kernel, ctx.plain = kernel, plain  # type: ignore[attr-defined]
        return kernel.forward(x, w1, b1, w2, b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w1, b1, w2, b2 = ctx.saved_tensors
        needs: tuple[bool, ...] = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() or not ready(grad, w1):
            found = again(ctx.plain, (x, w1, b1, w2, b2), needs, grad)
        else:
            found = ctx.kernel.backward(grad.contiguous(), x, w1, b1, w2, needs)
        return *found, None, None

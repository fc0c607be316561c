"""The native kernels as differentiable operations on tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ..matmul import plain_block_matmul
from ..order import is_channels_last, is_features_first
from ..packing import Packing
from .build import library

# Floats of a panel of rows and its results that a core keeps at hand, and the least and most rows of one: measured.
_FORWARD = 1 << 17, 32, 96
_BACKWARD = 5 << 15, 80, 256
_IMAGE = 1 << 18
_LANES = 16
# A matrix is an image of one pixel a line: its width, kernel and dilation.
_POINT = (1, 1, 1, 1, 1)

_Argument = Tensor | int | None
_Differentiable = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def ready(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: single precision, on the CPU, real tensors that nobody watches or traces."""
    return (
        all(
            type(t) in (Tensor, nn.Parameter)
            and t.dtype is torch.float32
            and t.device.type == "cpu"
            and t.numel() > 0
            and not t.is_neg()
            for t in tensors
            if t is not None
        )
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


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


class _Native(torch.autograd.Function):
    """``call`` runs forwards and backwards; ``plain`` is the same in operations that can be differentiated twice."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, plain: _Differentiable
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)  # type: ignore[arg-type]
        ctx.call, ctx.plain = call, plain  # type: ignore[attr-defined]
        return call.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors  # type: ignore[attr-defined]
        needs: tuple[bool, ...] = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        if torch.is_grad_enabled() or not ready(grad, weight):
            with torch.enable_grad():
                inputs = [t if t is None or t.requires_grad else t.detach() for t in (x, weight, bias)]
                y = ctx.plain(*inputs)  # type: ignore[attr-defined]
            wanted = [t for t, need in zip(inputs, needs) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))
            return *(next(found) if need else None for need in needs), None, None
        return *ctx.call.backward(grad, x, weight, needs), None, None  # type: ignore[attr-defined]


class _Call:
    """The arguments of one call of the kernels that are not tensors to differentiate by."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        raise NotImplementedError

    def _parts(self, weight: Tensor, needs: tuple[bool, ...], threads: int) -> tuple[Tensor | None, Tensor | None]:
        """Zeros to which each thread adds its share of the gradients of weight and bias."""
        packing = self.packing
        dw = weight.new_zeros(threads, *weight.shape) if needs[1] else None
        db = weight.new_zeros(threads, packing.groups * packing.rows) if needs[2] else None
        return dw, db


def _call(name: str, *arguments: _Argument) -> None:
    kernels = library()
    assert kernels is not None
    if getattr(kernels, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)):
        raise MemoryError(f"{name}: no memory for its buffers")


def _sum(parts: Tensor | None) -> Tensor | None:
    return None if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)


def _run(call: _Call, plain: _Differentiable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = weight.contiguous(), call.packing.bias(bias)
    if torch.is_grad_enabled():
        y: Tensor = _Native.apply(x, weight, bias, call, plain)
        return y
    return call.forward(x, weight, bias)


class _Rows(_Call):
    def __init__(self, packing: Packing, features_first: bool) -> None:
        super().__init__(packing)
        self.features_first = features_first

    def _length(self, batch: int, widths: int, limits: tuple[int, int, int], threads: int) -> int:
        """Rows of a panel: as many as a core's cache holds, and as many panels for every thread."""
        floats, least, most = limits
        wanted = min(max(floats // widths, least), most)
        panels = -(-batch // (wanted * threads)) * threads
        return -(-batch // (panels * _LANES)) * _LANES

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, n = x.shape
        m, threads = self.packing.out_channels, torch.get_num_threads()
        y = _empty(x, batch, m, self.features_first)
        length = self._length(batch, n + m, _FORWARD, threads)
        arguments = 1, n, m, batch, *_POINT, *weight.shape, *self.packing.channel_tables
        _call(
            "rows_forward", x, weight, bias, y, *arguments, is_features_first(x), self.features_first, length, threads
        )
        return y

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (batch, n), m, threads = x.shape, grad.shape[1], torch.get_num_threads()
        columns = is_features_first(x)
        if not is_features_first(grad):
            grad = grad.contiguous()
        dx = _empty(x, batch, n, columns) if needs[0] else None
        dw, db = self._parts(weight, needs, threads)
        length = self._length(batch, n + m, _BACKWARD, threads)
        layouts = is_features_first(grad), columns, columns
        arguments = 1, n, m, batch, *_POINT, *weight.shape, *self.packing.channel_tables
        _call("rows_backward", grad, x, weight, dx, dw, db, *arguments, *layouts, length, threads)
        return dx, _sum(dw), _sum(db)


def _empty(like: Tensor, batch: int, channels: int, features_first: bool) -> Tensor:
    return like.new_empty_strided((batch, channels), (1, batch) if features_first else (channels, 1))


class _Planes(_Call):
    """Channels as planes ``(batch, n, *space)``: convolutions, tokens to mix."""

    def __init__(self, packing: Packing, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__(packing)
        self.kernel, self.dilation = (1, *kernel)[-2:], (1, *dilation)[-2:]

    def _geometry(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        space = (1, *x.shape[2:])[-2:]
        channels = x.shape[1], self.packing.out_channels
        return len(x), *channels, *space, *self.kernel, *self.dilation, *weight.shape[:3]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(len(x), self.packing.out_channels, *x.shape[2:])
        tables, threads = self.packing.channel_tables, torch.get_num_threads()
        _call("planes_forward", x, weight, bias, y, *self._geometry(x, weight), *tables, threads)
        return y

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tables, threads = self.packing.channel_tables, torch.get_num_threads()
        dx = torch.empty_like(x) if needs[0] else None
        dw, db = self._parts(weight, needs, threads)
        tensors = grad.contiguous(), x, weight, dx, dw, db
        _call("planes_backward", *tensors, *self._geometry(x, weight), *tables, threads)
        return dx, _sum(dw), _sum(db)


class _Pixels(_Planes):
    """Images in channels-last format."""

    def _lines(self, x: Tensor) -> int:
        """Lines of a panel: as many as a core's cache holds, at least as many as the kernel is high."""
        pitch = x.shape[-1] + self.dilation[-1] * (self.kernel[-1] - 1)
        return max(_IMAGE // ((x.shape[1] + self.packing.out_channels) * pitch), self.kernel[0])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = len(x), self.packing.out_channels, *x.shape[2:]
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        arguments: tuple[_Argument, ...] = *self._geometry(x, weight), *self.packing.channel_tables
        _call("rows_forward", x, weight, bias, y, *arguments, 0, 0, self._lines(x), torch.get_num_threads())
        return y

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        threads = torch.get_num_threads()
        dx = torch.empty_like(x) if needs[0] else None
        dw, db = self._parts(weight, needs, threads)
        arguments: tuple[_Argument, ...] = *self._geometry(x, weight), *self.packing.channel_tables
        grad = grad.contiguous(memory_format=torch.channels_last)
        _call("rows_backward", grad, x, weight, dx, dw, db, *arguments, 0, 0, 0, self._lines(x), threads)
        return dx, _sum(dw), _sum(db)


def native_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing, features_first: bool | None = None
) -> Tensor:
    """`block_matmul` by the native kernels.

    Args:
        x: shape ``(N, n)``, in either memory order.
        weight: the packed matrices, shape ``(groups, rows, cols)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.
        features_first: memory order of the result; ``None``: that of ``x``.

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
        return _plain(x, weight, bias, packing)

    return _run(_Rows(packing, features_first), plain, x, weight, bias)


def native_plane_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """`plane_matmul` by the native kernels: ``(batch, n, length)`` to ``(batch, m, length)``, contiguous.

    Args:
        x: shape ``(batch, n, length)``, contiguous.
        weight: the packed matrices, shape ``(groups, rows, cols)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.

    Raises:
        MemoryError: if there is none for the kernels' buffers.
    """

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _plain(x.mT, weight, bias, packing).mT

    return _run(_Planes(packing, (1,), (1,)), plain, x, weight, bias)


def native_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing, dilation: tuple[int, ...], plain: _Differentiable
) -> Tensor:
    """A block convolution that `suits_conv`, by the native kernels.

    Args:
        x: shape ``(batch, n, *space)``, in either memory format.
        weight: the packed matrices, shape ``(groups, rows, cols, *kernel)``.
        bias: shape ``(m,)`` or ``None``.
        packing: channel orders.
        dilation: of the kernel.
        plain: the same from operations that can be differentiated twice, of input, weight and the bias by position.

    Returns:
        Shape ``(batch, m, *space)``, in the same format.

    Raises:
        MemoryError: if there is none for the kernels' buffers.
    """
    kernel = tuple(weight.shape[3:])
    if not is_channels_last(x):
        return _run(_Planes(packing, kernel, dilation), plain, x.contiguous(), weight, bias)
    x = x.contiguous(memory_format=torch.channels_last)
    if any(k > 1 for k in kernel):
        return _run(_Pixels(packing, kernel, dilation), plain, x, weight, bias)
    pixels = x.movedim(1, -1)

    def plain_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _plain(x, weight.flatten(2), bias, packing)

    y = _run(_Rows(packing, False), plain_rows, pixels.flatten(0, -2), weight.flatten(2), bias)
    return y.view(*pixels.shape[:-1], -1).movedim(-1, 1)


def _plain(x: Tensor, weight: Tensor, by_position: Tensor | None, packing: Packing) -> Tensor:
    y = plain_block_matmul(x, weight, None, replace(packing, raw=True))
    y = y if by_position is None else y + by_position
    return y if packing.raw else packing.outputs.last(y)

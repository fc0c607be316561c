"""Convolutions that hold and compute only their blocks: grouped convolutions between two channel orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from ..topology import BlockTopology
from ..weights import orthogonal_blocks
from .base import BlockModule, Execution, stack_blocks
from .deferred import Deferred, strides_of
from .native import NOTHING, After, native_conv, ready, suits_conv
from .order import is_channels_last, is_plain, take


class _BlockConv(BlockModule):
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    execution = Execution()
    transposed = False

    dense_class: ClassVar[type[nn.modules.conv._ConvNd]]
    convolve: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        topology: BlockTopology,
        kernel_size: int | tuple[int, ...],
        *,
        bias: bool = True,
        seed: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if options.get("groups", 1) != 1:
            raise ValueError("a block convolution's groups are its topology's blocks: leave groups at 1")
        outputs, inputs = topology.shape
        dense = self.dense_class(inputs, outputs, kernel_size, bias=bias, device="meta", **options)  # type: ignore[arg-type]
        own = {k: v for k, v in dense.__dict__.items() if k not in self.__dict__}
        self.__dict__.update(own)
        generator = seed or torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        centre: Any = (..., *(k // 2 for k in self.kernel_size))
        values = []
        for block in orthogonal_blocks([topology], [generator])[0]:
            values.append(block.new_zeros(*block.shape, *self.kernel_size))
            values[-1][centre] = block
        self.set_topology(topology, nn.Parameter(stack_blocks(topology, values)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(m, n / groups, *kernel)``."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def parts(self) -> int:
        """Groups of the dense convolution."""
        return self.groups

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, n, *space)``, or without the batch, to ``(batch, m, *space)``."""
        if not isinstance(x, Proxy) and x.dim() == len(self.kernel_size) + 1:
            return self._run(x.unsqueeze(0)).squeeze(0)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        run = self.execution
        if type(x) is Deferred:
            x = x.value()
        if run.channels_last and not isinstance(x, Proxy):
            x = x.contiguous(memory_format=torch.channels_last)
        if run.dense:
            return self._convolve(x, self.weight, self.bias, self.groups)
        packing = self.packing
        if run.native and not is_plain() and ready(x, self.blocks, self.bias) and self._suits(x):
            return self._native(x)
        if not isinstance(x, Proxy) and not is_plain() and self._is_covered(x):
            return self._product(x)
        weight = self.packed_weight().flatten(0, 1)
        if run.channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        bias = packing.bias(self.bias, is_plain())
        y = self._convolve(take(x, packing.inputs), weight, bias, packing.groups)
        return y if packing.raw else take(y, packing.outputs)

    def _is_covered(self, x: Tensor) -> bool:
        """Whether the kernel is as large as the image, so that there is one output, a product of matrices."""
        unpadded = self.padding == "valid" or (not isinstance(self.padding, str) and not any(self.padding))
        undilated = all(k == 1 or d == 1 for k, d in zip(self.kernel_size, self.dilation))
        several = any(k > 1 for k in self.kernel_size)
        return several and unpadded and undilated and tuple(x.shape[2:]) == tuple(self.kernel_size) and len(x) > 0

    def _product(self, x: Tensor) -> Tensor:
        """Of the blocks as they lie: a convolution in channels-last format would turn them around at each call."""
        packing = self.packing
        weight = self.packed_weight().flatten(2)
        rows = take(x, packing.inputs).reshape(len(x), packing.groups, -1).transpose(0, 1)
        y = torch.bmm(rows, weight.mT).transpose(0, 1).reshape(len(x), -1)
        bias = packing.bias(self.bias)
        y = (y if bias is None else y + bias).view(*y.shape, *[1] * len(self.kernel_size))
        return y if packing.raw else take(y, packing.outputs)

    def _native(self, x: Tensor) -> Tensor:
        packing, weight, bias = self.packing, self.packed_weight(), self.bias

        def compute(after: After) -> Tensor:
            return native_conv(x, weight, bias, packing, self.dilation, self._plain, after)

        fused = self.fused()
        if not fused:
            return compute(NOTHING)
        shape = len(x), packing.out_channels, *x.shape[2:]
        innermost = 1 if x.dim() == 4 and is_channels_last(x) else x.dim() - 1
        sources = (x, weight) if bias is None else (x, weight, bias)
        return Deferred.of(compute, fused, shape, strides_of(shape, innermost), sources, 0 if packing.raw else 1)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packing = self.packing
        y = self._convolve(packing.inputs.planes(x), weight.flatten(0, 1), None, packing.groups)
        y = y if packing.raw else packing.outputs.planes(y)
        return y if bias is None else y + bias.view(-1, *[1] * len(self.kernel_size))

    def _suits(self, x: Tensor) -> bool:
        return self.suits_native and x.dim() == len(self.kernel_size) + 2 and x.shape[1] == self.in_channels

    @property
    def suits_native(self) -> bool:
        """Whether the native kernels know this geometry."""
        return suits_conv(self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return type(self).convolve(x, weight, bias, self.stride, padding, self.dilation, groups)

    def extra_repr(self) -> str:
        """Shape, geometry, blocks and execution."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode}, "
            f"blocks={self.topology.groups}, execution={self.execution}"
        )


class BlockConv1d(_BlockConv):
    """`torch.nn.Conv1d` with a block weight; see `BlockConv2d`."""

    dense_class = nn.Conv1d
    convolve = staticmethod(F.conv1d)


class BlockConv2d(_BlockConv):
    """`torch.nn.Conv2d` with a block weight: a grouped convolution between two channel orders.

    Sparsity is at kernel level: a block keeps whole kernels. The channel orders are views or gathers whose backward
    is the inverse gather; ``merge`` blocks may run as one wider group (see `Execution`).

    Args:
        topology: which output channels see which input channels, shape ``(m, n)``.
        kernel_size: as for the dense layer, like all further options (stride, padding, dilation, padding_mode).
        bias: whether to add one.
        seed: a generator for the orthogonal initial values of the centre tap.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> layer = BlockConv2d(interleaved(8, 12, 4), 3, padding=1)
        >>> layer(torch.ones(2, 12, 5, 5)).shape, tuple(layer.blocks.shape), tuple(layer.weight.shape)
        (torch.Size([2, 8, 5, 5]), (4, 2, 3, 3, 3), (8, 12, 3, 3))
    """

    dense_class = nn.Conv2d
    convolve = staticmethod(F.conv2d)


class BlockConv3d(_BlockConv):
    """`torch.nn.Conv3d` with a block weight; see `BlockConv2d`."""

    dense_class = nn.Conv3d
    convolve = staticmethod(F.conv3d)

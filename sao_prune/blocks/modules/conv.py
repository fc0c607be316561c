"""Convolutions that hold and compute only their blocks: grouped convolutions between two channel permutations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy, wrap
from torch.nn import functional as F

from ..._torch import ConvNd, transforms_active
from ...topology import BlockTopology
from ...weights import orthogonal_blocks
from .. import functional, operators
from ..backends import cpu
from ..epilogue import Epilogue
from ..functional import each
from .base import BlockModule, Execution, cast, is_batched, is_plain, normed, stack_blocks


@wrap
def run_conv(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    row_set: Tensor,
    col_set: Tensor,
    backend: str,
    channels_last: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    merge: int,
) -> Tensor:
    """The layer's operator, a single step of a traced graph, so that the graph follows what is loaded into it."""
    x, blocks, bias = cast(x, blocks, bias)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    options = "", backend, stride, padding, dilation, merge
    if x.dim() == len(stride) + 1:
        return operators.block_conv(x.unsqueeze(0), blocks, bias, row_set, col_set, *options)[0].squeeze(0)
    y: Tensor = operators.block_conv(x, blocks, bias, row_set, col_set, *options)[0]
    return y


class BlockConvNd(BlockModule):
    """Base of the block convolutions and the transposed ones.

    Raises:
        ValueError: for groups besides those of the topology.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    execution = Execution()

    dense_class: ClassVar[type[ConvNd]]
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
        self.register_parameter("bias", nn.Parameter(self.blocks.detach().new_zeros(outputs)) if bias else None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(m, n / groups, *kernel)``."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def parts(self) -> int:
        """Groups of the dense convolution."""
        return self.groups

    def _in_format(self, x: Tensor) -> Tensor:
        """The input in the memory format of the execution."""
        if self.execution.channels_last and not isinstance(x, Proxy) and not transforms_active():
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def extra_repr(self) -> str:
        """Shape, geometry, blocks and execution."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, blocks={self.topology.groups}, execution={self.execution}"
        )


class BlockConv(BlockConvNd):
    """Base of the block convolutions; see `BlockConv2d`."""

    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    transposed = False

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would compute with a dense weight, without its bias."""
        geometry = self.geometry
        options = geometry.stride, geometry.padding, geometry.dilation, self.groups
        return type(self).convolve(self._formatted(x), weight, None, *options)

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(batch, n, *space)``, or without the batch, to ``(batch, m, *space)``."""
        x, plain = input, is_plain(input)
        if not isinstance(x, Proxy) and x.dim() == len(self.kernel_size) + 1:
            if self.epilogue is not None:
                self.epilogue.begin(x, True)
            return self._run(x.unsqueeze(0), plain).squeeze(0)
        epilogue = self.epilogue
        if epilogue is not None and epilogue.begin(x, plain):
            return epilogue.done(self._fused(self._formatted(x), epilogue))
        return self._run(x, plain)

    def _formatted(self, x: Tensor) -> Tensor:
        """The input in the memory format of the execution, with a padding that zeros on both sides are not."""
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        elif self.padding == "same" and any(n % 2 for n in self._missing()):
            x = F.pad(x, [side for n in reversed(self._missing()) for side in (n // 2, n - n // 2)])
        return self._in_format(x)

    def _missing(self) -> list[int]:
        """How many places fewer than the image a result without padding has."""
        dilation = each(self.dilation, len(self.kernel_size))
        return [d * (k - 1) for d, k in zip(dilation, self.kernel_size)]

    @property
    def geometry(self) -> functional.Geometry:
        """Stride, padding and dilation of the convolution itself, after `_formatted`.

        As the attributes are now: libraries of segmentation set them after the layer was made.
        """
        dims = len(self.kernel_size)
        padding = (0,) * dims
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            padding = each(self.padding, dims)
        elif self.padding_mode == "zeros" and self.padding == "same" and not any(n % 2 for n in self._missing()):
            padding = tuple(n // 2 for n in self._missing())
        return functional.Geometry(each(self.stride, dims), padding, each(self.dilation, dims))

    def _run(self, x: Tensor, plain: bool) -> Tensor:
        run, geometry = self.execution, self.geometry
        blocks = self.values()
        bias: Tensor | None = self.bias
        x = self._formatted(x)
        if run.dense and not isinstance(x, Proxy):
            options = geometry.stride, geometry.padding, geometry.dilation, self.groups
            return type(self).convolve(x, self.dense(blocks), bias, *options)
        if plain and not isinstance(x, Proxy):
            if is_batched(self.row_set) and blocks.dim() == 3 + len(self.kernel_size):
                return functional.block_conv_by_sets(x, blocks, bias, self.row_set, self.col_set, geometry)
            return functional.block_conv(x, blocks, bias, self.captured_layout, geometry)
        stride, padding, dilation, merge = self._options(geometry)
        sets = self.row_set, self.col_set
        return run_conv(x, blocks, bias, *sets, run.backend, run.channels_last, stride, padding, dilation, merge)

    def _options(self, geometry: functional.Geometry) -> tuple[list[int], list[int], list[int], int]:
        return list(geometry.stride), list(geometry.padding), list(geometry.dilation), self.execution.merge

    def _fused(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        own, sets = (x, self.values(), self.bias), (self.row_set, self.col_set)
        norm, activation, _ = epilogue.parts()
        options = self._options(self.geometry)
        if norm is not None:
            return normed(norm, own, sets, activation, self.execution.backend, options)
        y: Tensor = operators.block_conv(*own, *sets, activation, self.execution.backend, *options)[0]
        return y

    def suits_native(self, channels_last: bool) -> bool:
        """Whether the native kernels know this geometry, for images in a memory format."""
        return cpu.suits(self.kernel_size, self.geometry, channels_last)

    def extra_repr(self) -> str:
        """Shape, geometry, blocks and execution."""
        return f"{super().extra_repr()}, padding_mode={self.padding_mode}"


class BlockConv1d(BlockConv):
    """`torch.nn.Conv1d` with a block weight; see `BlockConv2d`."""

    dense_class = nn.Conv1d
    convolve = staticmethod(F.conv1d)


class BlockConv2d(BlockConv):
    """`torch.nn.Conv2d` with a block weight: a grouped convolution between two channel permutations.

    Sparsity is at kernel level: a block keeps whole kernels. ``merge`` blocks may run as one wider group (see
    `Execution`).

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


class BlockConv3d(BlockConv):
    """`torch.nn.Conv3d` with a block weight; see `BlockConv2d`."""

    dense_class = nn.Conv3d
    convolve = staticmethod(F.conv3d)

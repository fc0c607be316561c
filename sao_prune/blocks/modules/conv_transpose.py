"""Transposed convolutions that hold and compute only their blocks, by torch's grouped ones between two permutations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.fx import Proxy, wrap
from torch.nn import functional as F

from ...topology import unwrapped
from ..functional import Geometry, block_conv_transpose, block_conv_transpose_by_sets, each
from ..layout import layout_of
from .base import cast, is_batched
from .conv import BlockConvNd


@wrap
def run_conv_transpose(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    row_set: Tensor,
    col_set: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    output_padding: tuple[int, ...],
    output_size: Sequence[int] | None,
) -> Tensor:
    """The layer, a single step of a traced graph, so that the graph follows what is loaded into it."""
    layout, where = layout_of(unwrapped(row_set), unwrapped(col_set)), Geometry(stride, padding, dilation)
    if output_size is not None:
        output_padding = _padding_for(output_size, x.shape[2:], blocks.shape[-len(stride) :], where)
    return block_conv_transpose(x, blocks, bias, layout, where, output_padding)


class BlockConvTranspose(BlockConvNd):
    """Base of the transposed block convolutions; see `BlockConvTranspose2d`."""

    output_padding: tuple[int, ...]
    transposed = True
    has_kernels = False

    @property
    def geometry(self) -> Geometry:
        """Stride, padding and dilation, as the attributes are now."""
        assert not isinstance(self.padding, str)
        return Geometry(*(each(option, len(self.kernel_size)) for option in (self.stride, self.padding, self.dilation)))

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would compute with a dense weight ``(m, n / groups, *kernel)``, without its bias."""
        return self._convolve(x, weight, None, each(self.output_padding, len(self.kernel_size)))

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Shape ``(batch, n, *space)``, or without the batch, to ``(batch, m, *space)``.

        Raises:
            ValueError: for an output size that this geometry cannot have.
        """
        x, bias = input, self.bias
        where, sets, dims = self.geometry, (self.row_set, self.col_set), len(self.kernel_size)
        blocks, padding = self.values(), each(self.output_padding, dims)
        if isinstance(x, Proxy):
            options = where.stride, where.padding, where.dilation, padding, output_size
            return run_conv_transpose(x, blocks, bias, *sets, *options)
        if output_size is not None:
            size = output_size[-dims:] if len(output_size) == x.dim() else output_size
            padding = _padding_for(size, x.shape[-dims:], self.kernel_size, where)
        if x.dim() == dims + 1:
            return self._run(x.unsqueeze(0), blocks, bias, where, padding).squeeze(0)
        return self._run(x, blocks, bias, where, padding)

    def _run(self, x: Tensor, blocks: Tensor, bias: Tensor | None, where: Geometry, padding: tuple[int, ...]) -> Tensor:
        x = self._in_format(x)
        if self.execution.dense:
            return self._convolve(x, self.dense(blocks), bias, padding)
        x, blocks, bias = cast(x, blocks, bias)
        if is_batched(self.row_set) and blocks.dim() == 3 + len(self.kernel_size):
            return block_conv_transpose_by_sets(x, blocks, bias, self.row_set, self.col_set, where, padding)
        y = block_conv_transpose(x, blocks, bias, self.captured_layout, where, padding)
        return self._in_format(y)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
        where = self.geometry
        options = where.stride, where.padding, padding, self.groups, where.dilation
        return type(self).convolve(self._in_format(x), turned(weight, self.groups), bias, *options)

    def extra_repr(self) -> str:
        """Shape, geometry, blocks and execution."""
        return f"{super().extra_repr()}, output_padding={self.output_padding}"


def _padding_for(
    size: Sequence[int], space: Sequence[int], kernel: Sequence[int], geometry: Geometry
) -> tuple[int, ...]:
    """The output padding with which images of size ``space`` become as large as is asked for."""
    sizes = zip(space, kernel, geometry.stride, geometry.padding, geometry.dilation)
    least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sizes]
    more = tuple(asked - low for asked, low in zip(size, least))
    if len(size) != len(least) or any(not 0 <= m < s for m, s in zip(more, geometry.stride)):
        most = [low + s - 1 for low, s in zip(least, geometry.stride)]
        raise ValueError(f"output_size must be from {least} to {most}, got {list(size)}")
    return more


def turned(weight: Tensor, parts: int) -> Tensor:
    """A dense weight ``(m, n / parts, *kernel)`` as torch stores that of a transposed convolution.

    Args:
        weight: one matrix a group of the convolution, one above the other.
        parts: how many.

    Returns:
        Shape ``(n, m / parts, *kernel)``.

    Example:
        >>> import torch
        >>> turned(torch.zeros(6, 2, 3, 3), 2).shape
        torch.Size([4, 3, 3, 3])
    """
    return weight.unflatten(0, (parts, -1)).transpose(1, 2).flatten(0, 1)


class BlockConvTranspose1d(BlockConvTranspose):
    """`torch.nn.ConvTranspose1d` with a block weight; see `BlockConvTranspose2d`."""

    dense_class = nn.ConvTranspose1d
    convolve = staticmethod(F.conv_transpose1d)


class BlockConvTranspose2d(BlockConvTranspose):
    """`torch.nn.ConvTranspose2d` with a block weight: a grouped one between two channel permutations.

    Sparsity is at kernel level: a block keeps whole kernels.

    Args:
        topology: which output channels see which input channels, shape ``(m, n)``.
        kernel_size: as for the dense layer, like all further options (stride, padding, output_padding, dilation).
        bias: whether to add one.
        seed: a generator for the orthogonal initial values of the centre tap.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> layer = BlockConvTranspose2d(interleaved(8, 12, 4), 2, stride=2)
        >>> layer(torch.ones(2, 12, 5, 5)).shape, tuple(layer.blocks.shape), tuple(layer.weight.shape)
        (torch.Size([2, 8, 10, 10]), (4, 2, 3, 2, 2), (8, 12, 2, 2))
    """

    dense_class = nn.ConvTranspose2d
    convolve = staticmethod(F.conv_transpose2d)


class BlockConvTranspose3d(BlockConvTranspose):
    """`torch.nn.ConvTranspose3d` with a block weight; see `BlockConvTranspose2d`."""

    dense_class = nn.ConvTranspose3d
    convolve = staticmethod(F.conv_transpose3d)

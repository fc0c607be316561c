"""Block layers in ordinary torch operations: the reference, the form that is exported, and the formula of the
derivatives of the operators' derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from .layout import Layout
from .permutation import Kind

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Geometry:
    """Of a convolution; without dimensions, of a linear layer.

    Attributes:
        stride: one number a dimension of space, like the others.
        padding: zeros added on both sides.
        dilation: of the kernel.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
        """From lists, as operators are given them."""
        return cls(tuple(stride), tuple(padding), tuple(dilation))

    def output(self, space: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Size of the result of an image of size ``space``."""
        sizes = zip(space, kernel, self.stride, self.padding, self.dilation)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


def each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An option of a convolution for every dimension, however it was set: torch takes one number for all of them."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


#: Of a linear layer, whose inputs ``(..., n)`` have any number of dimensions.
MATRIX = Geometry()


def block_linear(x: Tensor, blocks: Tensor, bias: Tensor | None, layout: Layout, activation: str = "") -> Tensor:
    """``activation(x W^T + b)`` for the block matrix ``W``.

    Args:
        x: shape ``(..., n)``.
        blocks: shape ``(g, m/g, n/g)``, or ``(edges, 1)`` where the blocks are of several shapes.
        bias: shape ``(m,)`` or ``None``.
        layout: of the blocks.
        activation: ``""``, ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.

    Returns:
        Shape ``(..., m)``.

    Example:
        >>> from sao_prune.blocks.layout import layout_of_topology
        >>> from sao_prune.topology import interleaved
        >>> blocks = torch.ones(2, 2, 2)
        >>> block_linear(torch.tensor([1.0, 2.0, 3.0, 4.0]), blocks, None, layout_of_topology(interleaved(4, 4, 2)))
        tensor([4., 4., 6., 6.])
    """
    weight = layout.pack(blocks)
    lead = x.shape[:-1]
    if _is_column_major(x):
        operand = _split(x.mT.reshape(-1, layout.sources, lead[-1]), 1, layout)
        y = _join(torch.matmul(weight, operand), 1, 2, layout)
        y = y if bias is None else y + bias[:, None]
        return ACTIVATIONS[activation](y).reshape(*lead[:-1], layout.channels, lead[-1]).mT
    operand = _split(x.reshape(-1, layout.sources), 1, layout).transpose(0, 1)
    y = _join(torch.matmul(operand, weight.transpose(-1, -2)), 0, 2, layout).reshape(*lead, layout.channels)
    return ACTIVATIONS[activation](y if bias is None else y + bias)


def _is_column_major(x: Tensor) -> bool:
    """Whether each matrix ``(tokens, channels)`` of a batch lies in memory channel after channel, as that of a mixer's
    token layer does: the permutations then move whole rows of tokens, and the result lies so again."""
    return not isinstance(x, Proxy) and x.dim() > 2 and x.stride(-2) == 1 and x.stride(-1) != 1


def _split(x: Tensor, dim: int, layout: Layout) -> Tensor:
    """The channels, dimension ``dim``, as two: the matrix, and the position in it."""
    groups, cols, strided = layout.groups, layout.cols, layout.inputs.kind is Kind.STRIDED
    if layout.is_dealt and layout.sources < groups * cols:
        fill = [0, 0] * (x.dim() - dim - 1) + [0, groups * cols - layout.sources]
        x, strided = F.pad(x, fill), True
    elif not (strided and layout.is_dealt):
        return layout.inputs.plain(x, dim).unflatten(dim, (groups, cols))
    return x.unflatten(dim, (cols, groups)).transpose(dim, dim + 1)


def _join(product: Tensor, group: int, row: int, layout: Layout) -> Tensor:
    """The channels of a product: from dimensions ``group`` and ``row`` into the later one of three or more."""
    groups, rows = layout.groups, layout.rows
    if layout.outputs.kind is Kind.STRIDED and layout.outputs.dims == (groups, rows, 1):
        # Channels are dealt to the matrices in turn.
        return product.permute(1, 2, 0).flatten(1) if group == 0 else product.transpose(1, 2).flatten(1, 2)
    product = product.transpose(0, 1) if group == 0 else product
    if layout.runs:
        first, parts = 0, []
        for count, width in layout.runs:
            part = product.narrow(1, first, count).narrow(2, 0, width)
            parts.append(part.flatten(1, 2))
            first += count
        return torch.cat(parts, 1)
    return layout.outputs.plain(product.flatten(1, 2), 1)


def block_conv(
    x: Tensor, blocks: Tensor, bias: Tensor | None, layout: Layout, geometry: Geometry, activation: str = ""
) -> Tensor:
    """``activation`` of a convolution with block weights; with no dimension of space, of a product.

    Args:
        x: shape ``(batch, n, *space)``, as many dimensions of space as the geometry has; without any ``(..., n)``.
        blocks: shape ``(g, m/g, n/g, *kernel)``, or ``(edges, 1, *kernel)`` where the blocks are of several shapes.
        bias: shape ``(m,)`` or ``None``.
        layout: of the blocks.
        geometry: stride, padding, dilation.
        activation: as for `block_linear`.

    Returns:
        Shape ``(batch, m, *space)``.
    """
    if not geometry.stride:
        return block_linear(x, blocks, bias, layout, activation)
    weight = layout.pack(blocks).flatten(0, 1)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    options = geometry.stride, geometry.padding, geometry.dilation, layout.groups
    y = convolve(layout.inputs.plain(x, 1), weight, layout.inner_bias(bias), *options)
    return ACTIVATIONS[activation](layout.outputs.plain(y, 1))


def block_conv_by_sets(
    x: Tensor, blocks: Tensor, bias: Tensor | None, row_set: Tensor, col_set: Tensor, geometry: Geometry = MATRIX
) -> Tensor:
    """`block_conv` for even sets that are known as tensors only, as under `torch.vmap` over several topologies."""
    index, place = _places_of_sets(row_set, col_set)
    if not geometry.stride:
        groups, rows, cols = blocks.shape
        operand = x[..., index].reshape(-1, groups, cols).transpose(0, 1)
        y = torch.matmul(operand, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], groups * rows)[..., place]
        return y if bias is None else y + bias
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.stride) - 1]
    options = geometry.stride, geometry.padding, geometry.dilation, blocks.shape[0]
    y = convolve(x[:, index], blocks.flatten(0, 1), None, *options)[:, place]
    return y if bias is None else y + bias.view(-1, *[1] * len(geometry.stride))


def _places_of_sets(row_set: Tensor, col_set: Tensor) -> tuple[Tensor, Tensor]:
    """The input channel of every position, and the position of every output channel."""
    return torch.argsort(col_set, stable=True), torch.argsort(torch.argsort(row_set, stable=True))


def block_conv_transpose(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    output_padding: Sequence[int],
) -> Tensor:
    """A transposed convolution with block weights.

    Args:
        x: shape ``(batch, n, *space)``.
        blocks: shape ``(g, m/g, n/g, *kernel)``, or ``(edges, 1, *kernel)`` where the blocks are of several shapes.
        bias: shape ``(m,)`` or ``None``.
        layout: of the blocks.
        geometry: stride, padding, dilation.
        output_padding: as for the dense layer.

    Returns:
        Shape ``(batch, m, *space)``.

    Raises:
        RuntimeError: for an input or a bias of another number of channels.
    """
    layout.check(x, 1, bias)
    x, weight = layout.inputs.plain(x, 1), layout.pack(blocks)
    return layout.outputs.plain(_convolve_transposed(x, weight, layout.inner_bias(bias), geometry, output_padding), 1)


def block_conv_transpose_by_sets(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    row_set: Tensor,
    col_set: Tensor,
    geometry: Geometry,
    output_padding: Sequence[int],
) -> Tensor:
    """The same for even sets that are known as tensors only; see `block_conv_by_sets`."""
    index, place = _places_of_sets(row_set, col_set)
    y = _convolve_transposed(x[:, index], blocks, None, geometry, output_padding)[:, place]
    return y if bias is None else y + bias.view(-1, *[1] * len(geometry.stride))


def _convolve_transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_padding: Sequence[int]
) -> Tensor:
    """By torch, of matrices ``(groups, rows, cols, *kernel)``."""
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(geometry.stride) - 1]
    stored, groups = weight.transpose(1, 2).flatten(0, 1), weight.shape[0]
    return convolve(x, stored, bias, geometry.stride, geometry.padding, output_padding, groups, geometry.dilation)  # type: ignore[arg-type]


def block_conv_norm(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    layout: Layout,
    geometry: Geometry,
    eps: float,
    activation: str = "",
) -> Tensor:
    """``activation(batch_norm(block_conv(..)))``; with ``mean`` and ``variance`` ``None`` by those of the batch."""
    z = block_conv(x, blocks, bias, layout, geometry)
    return ACTIVATIONS[activation](F.batch_norm(z, mean, variance, gain, offset, mean is None, 0.0, eps))


def block_mlp(
    x: Tensor,
    blocks1: Tensor,
    bias1: Tensor | None,
    layout1: Layout,
    blocks2: Tensor,
    bias2: Tensor | None,
    layout2: Layout,
    activation: str,
) -> Tensor:
    """Two linear layers and the activation between them."""
    return block_linear(block_linear(x, blocks1, bias1, layout1, activation), blocks2, bias2, layout2)


def derivative(activation: str, z: Tensor) -> Tensor:
    """The derivative of an activation at ``z``.

    Example:
        >>> derivative("tanh", torch.zeros(1)).item()
        1.0
    """
    if activation == "relu":
        return (z <= 0).logical_not().to(z.dtype)
    if activation == "gelu":
        density = torch.exp(z * z * -0.5) * 0.3989422804014327
        return torch.erf(z * 0.7071067811865476) * 0.5 + 0.5 + z * density
    if activation == "silu":
        share = torch.sigmoid(z)
        return share * (1 + z * (1 - share))
    if activation == "tanh":
        return 1 - torch.tanh(z).square()
    return torch.ones_like(z)


def through(grad: Tensor, values: Tensor | None, activation: str) -> Tensor:
    """The gradient before an activation from that behind it.

    Args:
        grad: of the result.
        values: the result of ``"relu"`` and ``"tanh"``, the derivative of ``"gelu"`` and ``"silu"``.
        activation: its name.
    """
    if not activation or values is None:
        return grad
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, values, 0)  # type: ignore[no-any-return]
    if activation == "tanh":
        return grad * (1 - values * values)
    return grad * values


def keeps_derivative(activation: str) -> bool:
    """Whether the derivative of an activation has to be kept for the backward pass, as its result does not tell it."""
    return activation in ("gelu", "silu")

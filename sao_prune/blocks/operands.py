"""What the operators refuse: operands that are not those of one layer, and memory that is not there."""

from __future__ import annotations

from torch import Tensor

from .backends import cpu
from .functional import ACTIVATIONS, MATRIX, Geometry
from .layout import Layout


def check_memory(*tensors: Tensor | None) -> None:
    """Refuse tensors whose memory has been freed, as that of sharded parameters is: torch itself would read it.

    Raises:
        RuntimeError: naming the shape.
    """
    for t in tensors:
        if t is not None and t.numel():
            last = t.numel() - 1 if t.is_contiguous() else sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
            if t.untyped_storage().nbytes() < (t.storage_offset() + last + 1) * t.element_size():
                raise RuntimeError(f"the memory of an operand of shape {tuple(t.shape)} has been freed")


def check_averages(mean: Tensor | None, variance: Tensor | None) -> None:
    """Refuse one of a norm's averages without the other.

    Raises:
        RuntimeError: telling which is missing.
    """
    if (mean is None) != (variance is None):
        raise RuntimeError(
            f"expected mean and variance of a norm, or none, got no {'mean' if mean is None else 'variance'}"
        )


def check_activation(name: str) -> None:
    """Refuse an activation that operators do not have.

    Raises:
        RuntimeError: telling which there are.
    """
    if name not in ACTIVATIONS:
        raise RuntimeError(f"expected one of the activations {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")


def packed(layout: Layout, x: Tensor, blocks: Tensor, bias: Tensor | None, where: Geometry) -> Tensor:
    """The blocks as matrices, once it is sure that the operands are those of one layer.

    Raises:
        RuntimeError: telling what was given.
    """
    check_memory(x, blocks, bias)
    weight = layout.pack(blocks)
    space = weight.dim() - 3
    if where is MATRIX:
        fits = space == 0
    else:
        fits = {len(where.stride), len(where.padding), len(where.dilation), x.dim() - 2} == {space}
    if not fits:
        given = f"an input of shape {tuple(x.shape)}, blocks of shape {tuple(blocks.shape)}, {where}"
        raise RuntimeError(f"expected as many dimensions of space everywhere, got {given}")
    _check_types(x, blocks, bias)
    layout.check(x, 1 if where.stride else -1, bias)
    if where.stride:
        _check_kernel(x, weight, where)
    return weight


def _check_kernel(x: Tensor, weight: Tensor, where: Geometry) -> None:
    if min(*where.stride, *where.dilation) < 1 or min(where.padding) < 0:
        raise RuntimeError(f"expected strides and dilations of at least 1 and no negative padding, got {where}")
    for size, kernel, padding, dilation in zip(x.shape[2:], weight.shape[3:], where.padding, where.dilation):
        if size + 2 * padding < dilation * (kernel - 1) + 1:
            given = f"a kernel of {tuple(weight.shape[3:])} on an image of {tuple(x.shape[2:])}"
            raise RuntimeError(f"expected no kernel larger than its image with padding, got {given}, {where}")


def packed_behind(before: Layout, layout: Layout, x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """The same of a linear layer behind another one, whose input is ``x``.

    Raises:
        RuntimeError: telling what was given.
    """
    if before.channels != layout.sources:
        raise RuntimeError(f"{layout.topology} does not take the {before.channels} results of {before.topology}")
    check_memory(blocks, bias)
    layout.check_bias(bias)
    weight = layout.pack(blocks)
    if weight.dim() != 3:
        raise RuntimeError(f"expected blocks of a linear layer, got shape {tuple(blocks.shape)}")
    _check_types(x, blocks, bias)
    return weight


def _check_types(x: Tensor, blocks: Tensor, bias: Tensor | None) -> None:
    if blocks.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        types = [str(t.dtype) for t in (x, blocks, bias) if t is not None]
        raise RuntimeError(f"expected operands of one type, got {', '.join(types)}")


def check_results(x: Tensor, layout: Layout, weight: Tensor, where: Geometry, *like: Tensor | None) -> None:
    """Refuse gradients, and tensors kept for the backward pass, that are not like the result.

    Raises:
        RuntimeError: telling what was given and what is expected.
    """
    shape: tuple[int, ...] = *x.shape[:-1], layout.channels
    if where.stride:
        shape = x.shape[0], layout.channels, *where.output(x.shape[2:], weight.shape[3:])
    for t in like:
        if t is None:
            continue
        if t.shape != shape:
            raise RuntimeError(f"expected a gradient of the result's shape {tuple(shape)}, got {tuple(t.shape)}")
        if not cpu.is_there(t):
            raise RuntimeError(f"the memory of a gradient of shape {tuple(t.shape)} has been freed")


def unpacked(layout: Layout, dw: Tensor | None, blocks: Tensor) -> Tensor | None:
    """A gradient of matrices as one of the blocks."""
    return None if dw is None else layout.unpack(dw, blocks.shape)

"""The steps of a kernel: channels of positions, tiles turned round, activations, pixels of a convolution."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_of(table, group, item, mask, GROUPS: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr):
    if KIND == "identity":
        channel = group * SIZE + item
    elif KIND == "strided":
        channel = item * GROUPS + group
    else:
        channel = tl.load(table + group * SIZE + item, mask=mask, other=-1)
    return channel


@triton.jit
def split(position, B: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr):
    """Group and item, within a tile of ``N`` groups with ``B`` items each, of a position in the order of memory."""
    if KIND == "strided":
        group, item = position % N, position // N
    else:
        group, item = position // B, position % B
    return group, item


@triton.jit
def gather(tile, M: tl.constexpr, B: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr):
    """``(M, Q * P * B)`` in the order of memory to ``(Q, M, P * B)``; ``(M, P * B)`` if ``Q`` is 1."""
    if Q == 1:
        turned = tile
    elif KIND == "strided":
        turned = tl.reshape(tl.permute(tl.reshape(tile, (M, B, Q, P)), (2, 0, 1, 3)), (Q, M, B * P))
    else:
        turned = tl.permute(tl.reshape(tile, (M, Q, P * B)), (1, 0, 2))
    return turned


@triton.jit
def scatter(tile, M: tl.constexpr, B: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr):
    """What undoes `gather`."""
    if Q == 1:
        turned = tile
    elif KIND == "strided":
        turned = tl.reshape(tl.permute(tl.reshape(tile, (Q, M, B, P)), (1, 2, 0, 3)), (M, B * Q * P))
    else:
        turned = tl.reshape(tl.permute(tile, (1, 0, 2)), (M, Q * P * B))
    return turned


@triton.jit
def tanh(x):
    # exp(-2|x|) leaves no digits of a small x.
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    z = x * x
    small = x * (1.0 - z * (1 / 3 - z * (2 / 15 - z * (17 / 315 - z * (62 / 2835)))))
    return tl.where(z < 0.0625, small, tl.where(x < 0, -large, large))


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """The activation and, for GELU and SiLU, its derivative."""
    if ACTIVATION == "relu":
        # Not maximum: NaN must stay NaN.
        value, derivative = tl.where(h < 0, 0.0, h), h
    elif ACTIVATION == "tanh":
        value, derivative = tanh(h), h
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        value, derivative = h * cdf, cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-h))
        value, derivative = h * sigmoid, sigmoid * (1.0 + h * (1.0 - sigmoid))
    else:
        value, derivative = h, h
    return value, derivative


@triton.jit
def load(x, saved, offsets, saved_offsets, mask, DERIVATIVE: tl.constexpr):
    """Values, or with ``DERIVATIVE`` gradients times the derivative of the activation that follows them."""
    tile = tl.load(x + offsets, mask=mask, other=0.0)
    if DERIVATIVE != "":
        kept = tl.load(saved + saved_offsets, mask=mask, other=0.0).to(tl.float32)
        if DERIVATIVE == "relu":
            tile = tl.where(kept > 0, tile, tl.zeros_like(tile))
        elif DERIVATIVE == "tanh":
            tile = (tile.to(tl.float32) * (1.0 - kept * kept)).to(tile.dtype)
        else:
            tile = (tile.to(tl.float32) * kept).to(tile.dtype)
    return tile


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def image_of(pixel, height, width):
    """Image, row and column of a pixel."""
    column = pixel % width
    rest = pixel // width
    return rest // height, rest % height, column


@triton.jit
def source(
    row,
    column,
    tap,
    height,
    width,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Where a tap of a convolution reads, or with ``TRANSPOSED`` which result a tap went to; and whether it exists."""
    if TRANSPOSED:
        up = row + PH - (tap // KW) * DH
        left = column + PW - (tap % KW) * DW
        h, w = up // SH, left // SW
        exists = (up >= 0) & (left >= 0) & (up % SH == 0) & (left % SW == 0) & (h < height) & (w < width)
    else:
        h = row * SH - PH + (tap // KW) * DH
        w = column * SW - PW + (tap % KW) * DW
        exists = (h >= 0) & (w >= 0) & (h < height) & (w < width)
    return h, w, exists

"""The kernels: a block product, the same transposed, and the gradient of its weight.

A tile belongs to ``Q * P`` neighbouring groups. ``Q`` of them are a batch of small products; each of these holds ``P``
groups on the diagonal of one operand, which is built in registers, so that blocks narrower than a tensor-core tile
share one. Channels are permuted in the loads and stores. A side is

- ``identity``: position ``p`` is channel ``p``;
- ``strided``: item ``i`` of group ``g`` is channel ``i * groups + g``. Neighbouring channels belong to neighbouring
  groups, so a tile reads and writes its groups side by side and turns them round in registers;
- ``index``: a table says which channel each position is, -1 where it is padding.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .steps import activate, channel_of, dot, gather, image_of, load, scatter, source, split


@triton.jit
def product(
    x,
    x_saved,
    weight,
    bias,
    y,
    y_saved,
    inputs,
    outputs,
    rows,
    y_channels,
    x_height,
    x_width,
    y_height,
    y_width,
    x_image,
    x_row,
    x_column,
    s_channels,
    w_group,
    w_out,
    w_in,
    w_tap,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CONV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """``y[p, outputs[g, i]] = act(bias + sum of weight[g, i, j, tap] * x[source(p, tap), inputs[g, j]])``.

    ``y`` has dense rows; those of ``x`` may lie anywhere. ``TRANSPOSED`` and swapped tables and strides give the
    gradient of the input.
    """
    QP: tl.constexpr = Q * P
    chunks: tl.constexpr = (R + BR - 1) // BR
    columns: tl.constexpr = ((GROUPS + QP - 1) // QP) * chunks
    sweeps: tl.constexpr = (columns + SWEEP - 1) // SWEEP
    steps: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    # Neighbours in the grid share rows of x: all but the first find them in the cache.
    pixel = (pid // sweeps) * BM + tl.arange(0, BM)
    there = pixel < rows
    wide = pixel.to(tl.int64)
    if CONV:
        image, row, column = image_of(pixel, y_height, y_width)
        base = image.to(tl.int64) * x_image
    in_group, in_item = split(tl.arange(0, QP * BC), BC, QP, IN)
    out_group, out_item = split(tl.arange(0, QP * BR), BR, QP, OUT)
    in_pack, in_slot = split(tl.arange(0, P * BC), BC, P, IN)
    out_pack, out_slot = split(tl.arange(0, P * BR), BR, P, OUT)
    for sweep in range(SWEEP):
        tile = (pid % sweeps) * SWEEP + sweep
        group = (tile // chunks) * QP
        first = (tile % chunks) * BR
        if Q == 1:
            acc = tl.zeros((BM, P * BR), tl.float32)
        else:
            acc = tl.zeros((Q, BM, P * BR), tl.float32)
        for step in range(TAPS * steps):
            tap = step // steps if TAPS > 1 else 0
            item = (step % steps) * BC + in_item
            real = (item < C) & (group + in_group < GROUPS)
            channel = channel_of(inputs, group + in_group, item, real, GROUPS, C, IN)
            if IN == "index":
                real = real & (channel >= 0)
            if CONV:
                h, w, exists = source(row, column, tap, x_height, x_width, KW, SH, SW, PH, PW, DH, DW, TRANSPOSED)
                exists = exists & there
                place = base + h * x_row + w * x_column
                saved_place = ((image * x_height + h).to(tl.int64) * x_width + w) * s_channels
            else:
                exists = there
                place = wide * x_row
                saved_place = wide * s_channels
            a = load(
                x,
                x_saved,
                place[:, None] + channel[None, :],
                saved_place[:, None] + channel[None, :],
                exists[:, None] & real[None, :],
                DERIVATIVE,
            )
            a = gather(a, BM, BC, Q, P, IN)
            slot = (step % steps) * BC + in_slot
            if Q == 1:
                g = group + in_pack[:, None]
                i = first + out_slot[None, :]
                offsets = g * w_group + i * w_out + slot[:, None] * w_in
                mask = (slot[:, None] < C) & (i < R) & (g < GROUPS) & (in_pack[:, None] == out_pack[None, :])
            else:
                g = group + tl.arange(0, Q)[:, None, None] * P + in_pack[None, :, None]
                i = first + out_slot[None, None, :]
                offsets = g * w_group + i * w_out + slot[None, :, None] * w_in
                mask = (slot[None, :, None] < C) & (i < R) & (g < GROUPS)
                mask = mask & (in_pack[None, :, None] == out_pack[None, None, :])
            b = tl.load(weight + tap * w_tap + offsets, mask=mask, other=0.0)
            acc = dot(a, b, acc, PRECISION)
        h = scatter(acc, BM, BR, Q, P, OUT)
        item = first + out_item
        real = (item < R) & (group + out_group < GROUPS)
        channel = channel_of(outputs, group + out_group, item, real, GROUPS, R, OUT)
        if OUT == "index":
            real = real & (channel >= 0)
        if BIAS:
            h += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        value, derivative = activate(h, ACTIVATION)
        to = wide[:, None] * y_channels + channel[None, :]
        mask = there[:, None] & real[None, :]
        tl.store(y + to, value.to(y.dtype.element_ty), mask=mask)
        if KEEP:
            tl.store(y_saved + to, derivative.to(y_saved.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    x,
    grad,
    saved,
    weight,
    bias,
    inputs,
    outputs,
    rows,
    rows_each,
    x_height,
    x_width,
    y_height,
    y_width,
    x_image,
    x_row,
    x_column,
    g_image,
    g_row,
    g_column,
    s_channels,
    w_part,
    b_part,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CONV: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
):
    """``weight[part, g, i, j, tap] = sum of grad[p, outputs[g, i]] * x[source(p, tap), inputs[g, j]]`` over pixels.

    Each part is a range of ``rows_each`` of them; the caller adds them up, so that no order of execution shows. The
    sums of the gradients are the parts of the bias's.
    """
    QP: tl.constexpr = Q * P
    r_chunks: tl.constexpr = (R + BR - 1) // BR
    c_chunks: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    tap = pid % TAPS if TAPS > 1 else 0
    c_first = (pid // TAPS) % c_chunks * BC
    r_first = (pid // TAPS // c_chunks) % r_chunks * BR
    group = (pid // TAPS // c_chunks // r_chunks) * QP
    in_group, in_item = split(tl.arange(0, QP * BC), BC, QP, IN)
    out_group, out_item = split(tl.arange(0, QP * BR), BR, QP, OUT)
    in_item += c_first
    out_item += r_first
    in_real = (in_item < C) & (group + in_group < GROUPS)
    out_real = (out_item < R) & (group + out_group < GROUPS)
    in_channel = channel_of(inputs, group + in_group, in_item, in_real, GROUPS, C, IN)
    out_channel = channel_of(outputs, group + out_group, out_item, out_real, GROUPS, R, OUT)
    if IN == "index":
        in_real = in_real & (in_channel >= 0)
    if OUT == "index":
        out_real = out_real & (out_channel >= 0)
    if Q == 1:
        acc = tl.zeros((P * BR, P * BC), tl.float32)
    else:
        acc = tl.zeros((Q, P * BR, P * BC), tl.float32)
    total = tl.zeros((QP * BR,), tl.float32)
    begin = tl.program_id(1) * rows_each
    end = tl.minimum(begin + rows_each, rows)
    for start in range(begin, end, BM):
        pixel = start + tl.arange(0, BM)
        there = pixel < end
        wide = pixel.to(tl.int64)
        if CONV:
            image, row, column = image_of(pixel, y_height, y_width)
            h, w, exists = source(row, column, tap, x_height, x_width, KW, SH, SW, PH, PW, DH, DW, False)
            exists = exists & there
            place = image.to(tl.int64) * x_image + h * x_row + w * x_column
            g_place = image.to(tl.int64) * g_image + row * g_row + column * g_column
        else:
            exists = there
            place = wide * x_row
            g_place = wide * g_row
        a = load(
            grad,
            saved,
            g_place[:, None] + out_channel[None, :],
            (wide * s_channels)[:, None] + out_channel[None, :],
            there[:, None] & out_real[None, :],
            DERIVATIVE,
        )
        b = tl.load(x + place[:, None] + in_channel[None, :], mask=exists[:, None] & in_real[None, :], other=0.0)
        if BIAS:
            total += tl.sum(a.to(tl.float32), 0)
        a = gather(a, BM, BR, Q, P, OUT)
        b = gather(b, BM, BC, Q, P, IN)
        if Q == 1:
            acc = dot(tl.trans(a), b, acc, PRECISION)
        else:
            acc = dot(tl.permute(a, (0, 2, 1)), b, acc, PRECISION)
    in_pack, in_slot = split(tl.arange(0, P * BC), BC, P, IN)
    out_pack, out_slot = split(tl.arange(0, P * BR), BR, P, OUT)
    i, j = r_first + out_slot, c_first + in_slot
    if Q == 1:
        g = group + out_pack[:, None]
        to = ((g * R + i[:, None]) * C + j[None, :]) * TAPS + tap
        mask = (g < GROUPS) & (i[:, None] < R) & (j[None, :] < C) & (out_pack[:, None] == in_pack[None, :])
    else:
        g = group + tl.arange(0, Q)[:, None, None] * P + out_pack[None, :, None]
        to = ((g * R + i[None, :, None]) * C + j[None, None, :]) * TAPS + tap
        mask = (g < GROUPS) & (i[None, :, None] < R) & (j[None, None, :] < C)
        mask = mask & (out_pack[None, :, None] == in_pack[None, None, :])
    tl.store(weight + part * w_part + to, acc.to(weight.dtype.element_ty), mask=mask)
    if BIAS and (tap == 0) & (c_first == 0):
        tl.store(bias + part * b_part + out_channel, total.to(bias.dtype.element_ty), mask=out_real)

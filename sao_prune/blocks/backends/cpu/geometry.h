/* Where the sources of a convolution's outputs lie: strides, borders of zeros, tables of taps. */

#pragma once

#include "vector.h"

#define WIDEST 4 /* stride */

/* One dimension of space: output `i` reads with tap `k` the pixel i * stride + k * dilation - padding. */
typedef struct {
    long size, kernel, dilation, stride, padding;
} axis;

typedef struct {
    long batch;
    axis y, x;
} geometry;

#define AXIS(a) long a##_size, long a##_kernel, long a##_dilation, long a##_stride, long a##_padding
#define GEOMETRY(batch) {batch, AXIS_OF(y), AXIS_OF(x)}
#define AXIS_OF(a) {a##_size, a##_kernel, a##_dilation, a##_stride, a##_padding}
/* Rows of a batch are an image of one pixel a line. */
#define ROWS(batch, height) {batch, {height, 1, 1, 1, 0}, {1, 1, 1, 1, 0}}

typedef struct {
    long batch, height, width;
} extent;

static long output_size(axis a) {
    long room = a.size + 2 * a.padding - a.dilation * (a.kernel - 1) - 1;
    return room < 0 ? 0 : room / a.stride + 1;
}
static extent inner_extent(geometry f) { return (extent){f.batch, f.y.size, f.x.size}; }
static extent outer_extent(geometry f) { return (extent){f.batch, output_size(f.y), output_size(f.x)}; }
/* Pixels up to the last that an output meets. */
static long reach(axis a) {
    return MIN(a.size, (output_size(a) - 1) * a.stride + a.dilation * (a.kernel - 1) - a.padding + 1);
}
/* As many as there are outputs and pixels of a phase. */
static long span(axis a) { return MAX(output_size(a), (a.size + a.stride - 1) / a.stride); }

/* Output `i` meets with a tap the pixel (i + shift) * stride + phase. */
static long tap_phase(axis a, long tap) {
    long rest = (tap * a.dilation - a.padding) % a.stride;
    return rest < 0 ? rest + a.stride : rest;
}
static long tap_shift(axis a, long tap) { return (tap * a.dilation - a.padding - tap_phase(a, tap)) / a.stride; }

/* Of zeros around a plane; a row of outputs is then a row of `pitch`, with as many positions to drop. */
typedef struct {
    long above, below, left, right, pitch;
} border;

/* Around sources whose outputs are `width` wide. */
static border make_border(geometry f, long width) {
    border b = {-tap_shift(f.y, 0), MAX(tap_shift(f.y, f.y.kernel - 1), 0), -tap_shift(f.x, 0),
                MAX(tap_shift(f.x, f.x.kernel - 1), 0), 0};
    b.pitch = width + b.left + b.right;
    return b;
}
/* Around outputs whose sources have the border `b`, and around what needs none. */
static border turned(border b) { return (border){b.below, b.above, b.right, b.left, b.pitch}; }
static border bare(border b) { return (border){.pitch = b.pitch}; }
static long first_of(border b) { return b.above * b.pitch + b.left; }
/* Positions of some lines with their border, and behind them zeros that the outermost taps of positions to drop meet. */
static long region_of(border b, long lines) {
    return ROUND((lines + b.above + b.below) * b.pitch + b.left + b.right);
}

/* A plane is one for each remainder of its pixels' places by the strides. */
typedef struct {
    long count, stride_y, stride_x, y[WIDEST * WIDEST], x[WIDEST * WIDEST], number[WIDEST][WIDEST];
} phases;

static const phases whole = {1, 1, 1, {0}, {0}, {{0}}};

/* Those that a tap meets, or all. */
static phases phases_of(geometry f, int all) {
    phases p = {0, f.y.stride, f.x.stride, {0}, {0}, {{0}}};
    int met_y[WIDEST] = {0}, met_x[WIDEST] = {0};
    for (long k = 0; k < f.y.kernel; k++) met_y[tap_phase(f.y, k)] = 1;
    for (long k = 0; k < f.x.kernel; k++) met_x[tap_phase(f.x, k)] = 1;
    for (long y = 0; y < f.y.stride; y++)
        for (long x = 0; x < f.x.stride; x++)
            if (all || (met_y[y] && met_x[x])) p.y[p.count] = y, p.x[p.count] = x, p.number[y][x] = p.count++;
    return p;
}

/* How far behind a plane's start every tap of its first output is; phases lie `region` apart. */
static void tap_offsets(geometry f, border b, const phases *p, long region, long *offsets) {
    for (long ky = 0; ky < f.y.kernel; ky++)
        for (long kx = 0; kx < f.x.kernel; kx++)
            *offsets++ = p->number[tap_phase(f.y, ky)][tap_phase(f.x, kx)] * region +
                         (b.above + tap_shift(f.y, ky)) * b.pitch + b.left + tap_shift(f.x, kx);
}

/* The taps that meet each phase, the last first, from `start` on, and how far behind the start of a plane of gradients with
 * border `g` those of the phase's first pixel are. */
static void back_taps(geometry f, border g, const phases *p, int *taps, long *offsets, long *start) {
    long found = 0;
    for (long phase = 0; phase < p->count; phase++) {
        start[phase] = found;
        for (long k = f.y.kernel * f.x.kernel - 1; k >= 0; k--) {
            long ky = k / f.x.kernel, kx = k % f.x.kernel;
            if (p->number[tap_phase(f.y, ky)][tap_phase(f.x, kx)] != phase) continue;
            taps[found] = (int)k;
            offsets[found++] = (g.above - tap_shift(f.y, ky)) * g.pitch + g.left - tap_shift(f.x, kx);
        }
    }
    start[p->count] = found;
}

/* The sources of every tap of some planes. */
static void tap_table(float *const *planes, long count, const long *offsets, long taps, const float **table) {
    for (long j = 0; j < count; j++)
        for (long k = 0; k < taps; k++) *table++ = planes[j] + offsets[k];
}

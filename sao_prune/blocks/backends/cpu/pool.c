/* The greatest of every window of an image in channels-last format. */

#include <string.h>

#include "act.h"

typedef unsigned char bytes __attribute__((vector_size(V)));

typedef struct {
    long size, results, kernel, stride, padding;
} side;

typedef struct {
    long first, end;
} range;

#define POOL                                                                                                          \
    long batch, long channels, long high, long wide, long out_high, long out_wide, long kernel_y, long kernel_x,      \
        long stride_y, long stride_x, long padding_y, long padding_x
#define SIDES                                                                                                         \
    side v = {high, out_high, kernel_y, stride_y, padding_y}, h = {wide, out_wide, kernel_x, stride_x, padding_x}

/* What of a window lies in the image. */
static range inside(side s, long window) {
    long start = window * s.stride - s.padding;
    return (range){MAX(start, 0), MIN(start + s.kernel, s.size)};
}

/* The windows that a position lies in. */
static range windows(side s, long position) {
    long padded = position + s.padding;
    return (range){MAX((padded - s.kernel + s.stride) / s.stride, 0), MIN(padded / s.stride + 1, s.results)};
}

/* Of `count` channels, at most V: the greatest and, if `places` is not NULL, where in its window the first of it is. */
INLINE void greatest(const float *x, long pitch, long channels, range rows, range columns, long first, long width,
                     float *y, unsigned char *places, long count) {
    vec best = (vec){0} - __builtin_inff();
    bits place = (bits){0} + (int)first;
    for (long r = rows.first; r < rows.end; r++, first += width)
        for (long c = columns.first; c < columns.end; c++) {
            const float *from = x + r * pitch + c * channels;
            vec value = count == V ? LOAD(from) : part(from, count);
            bits more = (value > best) | (value != value);
            best = choose(more, value, best);
            if (places) place = (more & ((bits){0} + (int)(first + c - columns.first))) | (~more & place);
        }
    if (count == V) {
        STORE(y, best);
        if (places) {
            bytes small = __builtin_convertvector(place, bytes);
            memcpy(places, &small, V);
        }
    } else {
        keep_part(y, best, count);
        for (long k = 0; places && k < count; k++) places[k] = (unsigned char)place[k];
    }
}

/* y: the greatest of every window; of several, and of NaN, the one that torch takes. `places`, its place, may be NULL. */
int pool_forward(const float *x, float *y, unsigned char *places, POOL, int threads) {
    SIDES;
#pragma omp parallel for num_threads(threads)
    for (long line = 0; line < batch * out_high; line++) {
        range rows = inside(v, line % out_high);
        const float *image = x + line / out_high * high * wide * channels;
        for (long window = 0; window < out_wide; window++) {
            range columns = inside(h, window);
            long at = (line * out_wide + window) * channels;
            long first = (rows.first - (line % out_high * stride_y - padding_y)) * kernel_x + columns.first -
                         (window * stride_x - padding_x);
            for (long c = 0; c < channels; c += V) {
                unsigned char *to = places ? places + at + c : NULL;
                if (c + V <= channels)
                    greatest(image + c, wide * channels, channels, rows, columns, first, kernel_x, y + at + c, to, V);
                else
                    greatest(image + c, wide * channels, channels, rows, columns, first, kernel_x, y + at + c, to,
                             channels - c);
            }
        }
    }
    return 0;
}

/* Gradients of `count` channels of a window, at most V, to those places of one line that they came from; the first is `here`. */
INLINE void spread(const float *g, const unsigned char *places, float *dx, long columns, long channels, long here, long count) {
    bytes small = {0};
    memcpy(&small, places, count);
    bits place = __builtin_convertvector(small, bits);
    vec gradient = count == V ? LOAD(g) : part(g, count);
    for (long c = 0; c < columns; c++, dx += channels) {
        vec mine = (vec)((place == (bits){0} + (int)(here + c)) & (bits)gradient);
        if (count == V)
            STORE(dx, LOAD(dx) + mine);
        else
            keep_part(dx, part(dx, count) + mine, count);
    }
}

/* Every gradient to where its value came from. */
int pool_backward(const float *g, const unsigned char *places, float *dx, POOL, int threads) {
    SIDES;
#pragma omp parallel for num_threads(threads)
    for (long line = 0; line < batch * high; line++) {
        range rows = windows(v, line % high);
        float *to = dx + line * wide * channels;
        memset(to, 0, wide * channels * sizeof *to);
        for (long r = rows.first; r < rows.end; r++)
            for (long window = 0; window < out_wide; window++) {
                range columns = inside(h, window);
                long at = ((line / high * out_high + r) * out_wide + window) * channels, count = columns.end - columns.first;
                long here = (line % high + padding_y - r * stride_y) * kernel_x + columns.first + padding_x - window * stride_x;
                float *start = to + columns.first * channels;
                long c = 0;
                for (; c + V <= channels; c += V) spread(g + at + c, places + at + c, start + c, count, channels, here, V);
                if (c < channels) spread(g + at + c, places + at + c, start + c, count, channels, here, channels - c);
            }
    }
    return 0;
}

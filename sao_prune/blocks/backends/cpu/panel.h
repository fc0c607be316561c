/* Some lines of an image, or rows of a batch, as planes in the cache. */

#pragma once

#include "inner.h"

#define LARGE (1L << 22) /* floats of a result that no cache keeps until it is read */

/* Past the caches, to an aligned address: what is written need not be read first. */
#if defined(__AVX512F__)
#define STREAM(p, v) _mm512_stream_ps(p, (__m512)(v))
#elif defined(__AVX__)
#define STREAM(p, v) _mm256_stream_ps(p, (__m256)(v))
#else
#define STREAM STORE
#endif
#if defined(__AVX__)
#define STREAMED() _mm_sfence()
#else
#define STREAMED()
#endif

/* Row `i` of a square of V to column `i` of another, activated, and if BOTH its derivatives to one more: their rows start at
 * t[0], t[1], .. and u[0], u[1], .. plus `shift`. */
#define DEFINE_SQUARE(NAME, STORE, ACT, BOTH)                                                                         \
    static void NAME(float *const *x, long x_shift, float *const *t, float *const *u, long shift) {                   \
        vec r[V];                                                                                                     \
        UNROLL for (int i = 0; i < V; i++) r[i] = LOAD(x[i] + x_shift);                                               \
        STAGES                                                                                                        \
        UNROLL for (int i = 0; i < V; i++) {                                                                          \
            activated both = activate(ACT, r[i]);                                                                     \
            STORE(t[i] + shift, both.value);                                                                          \
            if (BOTH) STORE(u[i] + shift, both.derivative);                                                           \
        }                                                                                                             \
    }

typedef void square_fn(float *const *, long, float *const *, float *const *, long);

#define DEFINE_SQUARES(ACT, lower)                                                                                    \
    DEFINE_SQUARE(lower##_square, STORE, ACT, 0)                                                                      \
    DEFINE_SQUARE(lower##_streamed, STREAM, ACT, 0)                                                                   \
    DEFINE_SQUARE(lower##_both, STORE, ACT, 1)                                                                        \
    DEFINE_SQUARE(lower##_both_streamed, STREAM, ACT, 1)
#define SQUARES(lower) {{lower##_square, lower##_streamed}, {lower##_both, lower##_both_streamed}}
DEFINE_SQUARES(NOTHING, plain)
DEFINE_SQUARES(RELU, relu)
DEFINE_SQUARES(GELU, gelu)
DEFINE_SQUARES(SILU, silu)
DEFINE_SQUARES(TANH, tanh)
/* By activation, whether with derivatives, and whether streamed. */
static square_fn *const squares[][2][2] = {SQUARES(plain), SQUARES(relu), SQUARES(gelu), SQUARES(silu), SQUARES(tanh)};

/* planes[c][i + ..] = pixels[..][c] for up to V pixels from `i` on. */
static void gather_some(float *const *pixels, long count, long channels, float *const *planes, long i) {
    for (long c = 0; c < channels; c += V) {
        if (count == V && c + V <= channels)
            plain_square(pixels, c, planes + c, NULL, i);
        else
            for (long a = 0; a < count; a++)
                for (long b = c; b < MIN(c + V, channels); b++) planes[b][i + a] = pixels[a][b];
    }
}

/* A few pixels at a time, all channels of them: long runs of memory, few at once. */
static void gather(float *const *pixels, long count, long channels, float *const *planes) {
    for (long i = 0; i < count; i += V) gather_some(pixels + i, MIN(V, count - i), channels, planes, i);
}

#define AHEAD 32 /* floats of a row that are asked for before they are written */

/* pixels[i][c] = act(planes[c][i]), and derivatives[i][c] its derivative, if `derivatives` is not NULL. */
static void scatter(float *const *planes, long channels, float *const *pixels, float *const *derivatives, long count,
                    int stream, int act) {
    square_fn *whole = squares[act][derivatives != NULL][stream != 0];
    for (long i = 0; i < count; i += V)
        for (long c = 0; c < channels; c += V) {
            if (!stream && i + V <= count && c + AHEAD < channels)
                UNROLL for (int k = 0; k < V; k++) __builtin_prefetch(pixels[i + k] + c + AHEAD, 1, 2);
            if (i + V <= count && c + V <= channels)
                whole(planes + c, i, pixels + i, derivatives ? derivatives + i : NULL, c);
            else
                for (long a = i; a < MIN(i + V, count); a++) {
                    float *to = pixels[a] + c;
                    for (long b = c; b < MIN(c + V, channels); b++) to[b - c] = planes[b][a];
                    activate_run(act, to, derivatives ? derivatives[a] + c : NULL, to, MIN(V, channels - c));
                }
        }
}

typedef struct {
    float *data;
    long channels;
    int columns;      /* channel after channel: of an image of one pixel a line */
    const int *order; /* the channel of each position, or -1 */
    long positions;
} matrix;

/* Some lines of an image as planes, one for each position of a channel. Columns are used where they lie. */
typedef struct {
    matrix of;
    extent image_size;
    border b;
    phases parts; /* of every plane, `region` apart */
    long lines, image, first, count, region, filled, size;
    long high, wide;         /* of the image, what is read */
    int own, direct, stream; /* own: never used where they lie */
    float *buffer, *spare, **planes, **by_channel, **pixels;
} panel;

static int open_panel(panel *p, int slot, matrix of, extent size, border b, const phases *parts, long lines) {
    *p = (panel){.of = of, .image_size = size, .b = b, .parts = *parts, .lines = lines, .high = size.height, .wide = size.width};
    long pixels = parts->count * region_of(b, lines);
    p->size = pixels + V;
    size_t pointers = of.positions + of.channels + pixels, room = of.positions * p->size + of.channels;
    p->buffer = scratch(slot, room);
    p->planes = malloc(pointers * sizeof(float *));
    if (!p->buffer || !p->planes) return 1;
    p->spare = p->buffer + of.positions * p->size;
    p->stream = size.batch * size.height * size.width * of.channels >= LARGE && of.channels % V == 0 &&
                (size_t)of.data % (4 * V) == 0 && (size_t)p->spare % (4 * V) == 0;
    memset(p->spare, 0, of.channels * sizeof(float));
    for (long i = 0; i < of.positions; i++)
        if (of.order[i] < 0) memset(p->buffer + i * p->size, 0, p->size * sizeof(float));
    p->by_channel = p->planes + of.positions;
    p->pixels = p->by_channel + of.channels;
    return 0;
}

static void close_panel(panel *p) { free(p->planes); }

static float *in_columns(const panel *p, long channel) {
    return p->of.data + (p->image * p->of.channels + channel) * p->image_size.height + p->first;
}

/* Set the panel on `count` lines of an image from `first` on; all pixels outside it are the spare one. */
static void move_panel(panel *p, long image, long first, long count) {
    matrix m = p->of;
    border b = p->b;
    p->image = image, p->first = first, p->count = count;
    p->direct = m.columns && !p->own && p->count == p->lines;
    for (long i = 0; i < m.positions; i++) {
        long channel = m.order[i];
        p->planes[i] = p->direct && channel >= 0 ? in_columns(p, channel) : p->buffer + i * p->size;
        if (channel >= 0) p->by_channel[channel] = p->planes[i];
    }
    if (m.columns) return;
    float **pixel = p->pixels;
    p->region = region_of(b, count);
    for (long part = 0; part < p->parts.count; part++) {
        for (long line = first - b.above; line < first + count + b.below; line++) {
            long y = line * p->parts.stride_y + p->parts.y[part];
            int there = y >= 0 && y < p->high;
            float *start = there ? m.data + (image * p->image_size.height + y) * p->image_size.width * m.channels : NULL;
            for (long column = -b.left; column < b.pitch - b.left; column++) {
                long x = column * p->parts.stride_x + p->parts.x[part];
                *pixel++ = there && x >= 0 && x < p->wide ? start + x * m.channels : p->spare;
            }
        }
        while (pixel < p->pixels + (part + 1) * p->region) *pixel++ = p->spare;
    }
    p->filled = pixel - p->pixels;
}

static void read_panel(panel *p) {
    matrix m = p->of;
    if (p->direct) return;
    if (m.columns)
        for (long c = 0; c < m.channels; c++)
            memcpy(p->by_channel[c], in_columns(p, c), p->count * sizeof(float));
    else
        gather(p->pixels, p->filled, m.channels, p->by_channel);
}

/* Columns as they are; pixels activated, with their derivatives in a panel of the same form, if it is not NULL. */
static void write_panel(panel *p, int act, const panel *derivatives) {
    matrix m = p->of;
    if (p->direct) return;
    if (m.columns)
        for (long c = 0; c < m.channels; c++)
            memcpy(in_columns(p, c), p->by_channel[c], p->count * sizeof(float));
    else
        scatter(p->by_channel, m.channels, p->pixels, derivatives ? derivatives->pixels : NULL, p->filled,
                p->stream && (!derivatives || derivatives->stream), act);
}

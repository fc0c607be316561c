/* Products of blocks with channels that lie as planes: y[i] = bias[i] + sum over j of w[i][j] x[j], where x[j] and y[i]
 * are runs of floats (pixels, tokens, rows of a batch). Vectors run along the plane, so that blocks of any size fill
 * them, and the order of channels is nothing but a table of pointers. */

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "act.h"
#include "geometry.h"

/* ---- The two inner loops ------------------------------------------------------------------------------------- */

/* `T` outputs at `W` vectors of positions from `p` on. Weights lie source after source, `T` at a time. */
#define DEFINE_PRODUCT(T, W)                                                                                          \
    static void product_##T##_##W(const float *const *x, long count, const float *w, const float *bias,                \
                                  float *const *y, long p) {                                                          \
        vec sum[T][W];                                                                                                \
        UNROLL for (int i = 0; i < T; i++) UNROLL for (int k = 0; k < W; k++) sum[i][k] = bias[i] - (vec){0};          \
        for (long j = 0; j < count; j++, w += T) {                                                                    \
            const float *from = x[j] + p;                                                                             \
            vec value[W];                                                                                             \
            UNROLL for (int k = 0; k < W; k++) value[k] = LOAD(from + k * V);                                         \
            UNROLL for (int i = 0; i < T; i++) UNROLL for (int k = 0; k < W; k++) sum[i][k] += w[i] * value[k];        \
        }                                                                                                             \
        UNROLL for (int i = 0; i < T; i++) UNROLL for (int k = 0; k < W; k++) STORE(y[i] + p + k * V, sum[i][k]);      \
    }

typedef void product_fn(const float *const *, long, const float *, const float *, float *const *, long);

#if defined(__AVX512F__) || defined(__aarch64__) /* 32 registers */
#define TILE 12
#define FOR_TILES(D) D(1, 6) D(2, 6) D(3, 6) D(4, 6) D(5, 4) D(6, 4) D(7, 3) D(8, 3) D(9, 2) D(10, 2) D(11, 2) D(12, 2)
#define FOR_ONES(D) D(1, 1) D(2, 1) D(3, 1) D(4, 1) D(5, 1) D(6, 1) D(7, 1) D(8, 1) D(9, 1) D(10, 1) D(11, 1) D(12, 1)
#else
#define TILE 6
#define FOR_TILES(D) D(1, 6) D(2, 4) D(3, 3) D(4, 2) D(5, 2) D(6, 2)
#define FOR_ONES(D) D(1, 1) D(2, 1) D(3, 1) D(4, 1) D(5, 1) D(6, 1)
#endif

FOR_TILES(DEFINE_PRODUCT)
FOR_ONES(DEFINE_PRODUCT)

#define NAME(T, W) product_##T##_##W,
#define WIDTH(T, W) W,
static product_fn *const wide[] = {NULL, FOR_TILES(NAME)};
static product_fn *const one[] = {NULL, FOR_ONES(NAME)};
static const int widths[] = {0, FOR_TILES(WIDTH)};

/* The positions from `p` to `end`, at least V of them: where they are no multiple of V, the last vector overlaps. */
static void product(int tile, const float *const *x, long count, const float *w, const float *bias, float *const *y,
                    long p, long end) {
    long step = (long)widths[tile] * V;
    for (; p + step <= end; p += step) wide[tile](x, count, w, bias, y, p);
    for (; p + V <= end; p += V) one[tile](x, count, w, bias, y, p);
    if (p < end) one[tile](x, count, w, bias, y, end - V);
}

/* ---- Transposition ------------------------------------------------------------------------------------------- */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (bits){__VA_ARGS__})
#endif

/* Lanes of two vectors, counted one after the other, whose runs of `h` lanes change places. */
#define FIRST_LANE(k, h) ((k) & (h) ? (k) - (h) + V : (k))
#define SECOND_LANE(k, h) ((k) & (h) ? (k) + V : (k) + (h))
#define FOUR_LANES(F, k, h) F(k, h), F(k + 1, h), F(k + 2, h), F(k + 3, h)
/* STAGES turn a square of V vectors `r`. */
#if V == 16
#define LANES(F, h) FOUR_LANES(F, 0, h), FOUR_LANES(F, 4, h), FOUR_LANES(F, 8, h), FOUR_LANES(F, 12, h)
#define STAGES STAGE(8) STAGE(4) STAGE(2) STAGE(1)
#elif V == 8
#define LANES(F, h) FOUR_LANES(F, 0, h), FOUR_LANES(F, 4, h)
#define STAGES STAGE(4) STAGE(2) STAGE(1)
#else
#define LANES(F, h) FOUR_LANES(F, 0, h)
#define STAGES STAGE(2) STAGE(1)
#endif
#define SWAP(a, b, h)                                                                                                 \
    {                                                                                                                 \
        vec first = a, second = b;                                                                                    \
        a = SHUFFLE(first, second, LANES(FIRST_LANE, h));                                                             \
        b = SHUFFLE(first, second, LANES(SECOND_LANE, h));                                                            \
    }

#define STAGE(h) UNROLL for (int i = 0; i < V; i++) if (!(i & h)) SWAP(r[i], r[i + h], h)

#define HALVE(h)                                                                                                      \
    UNROLL for (int i = 0; i < h; i++) {                                                                              \
        SWAP(r[i], r[i + h], h)                                                                                       \
        r[i] += r[i + h];                                                                                             \
    }

/* Lane by lane the totals of V vectors. */
static inline vec totals(const vec *partial) {
    vec r[V];
    UNROLL for (int i = 0; i < V; i++) r[i] = partial[i];
#if V >= 16
    HALVE(8)
#endif
#if V >= 8
    HALVE(4)
#endif
    HALVE(2)
    HALVE(1)
    return r[0];
}

#define DOT_STEP(T, S, KEEP)                                                                                          \
    {                                                                                                                 \
        vec left[T];                                                                                                  \
        UNROLL for (int i = 0; i < T; i++) left[i] = KEEP(LOAD(outer[i] + p));                                        \
        UNROLL for (int j = 0; j < S; j++) {                                                                          \
            vec right = KEEP(LOAD(inner[j] + p));                                                                     \
            UNROLL for (int i = 0; i < T; i++) sum[i * S + j] += left[i] * right;                                     \
        }                                                                                                             \
    }
#define WHOLE(v) v
#define MASKED(v) (vec)((bits)v & mask)

/* Sums over runs of positions of `T` gradients times `S` sources, added to a part of dw. Of a last vector that is not
 * full only what `mask` keeps counts, on both sides: behind a run lies anything, NaN too. */
#define DEFINE_DOT(T, S)                                                                                              \
    static void dot_##T(const float *const *g, const float *const *x, long runs, long g_run, long x_run, long length, \
                        bits mask, float *dw, long pitch, long columns) {                                             \
        vec sum[T * S];                                                                                               \
        UNROLL for (int k = 0; k < T * S; k++) sum[k] = (vec){0};                                                     \
        for (long run = 0; run < runs; run++) {                                                                       \
            const float *outer[T], *inner[S];                                                                         \
            UNROLL for (int i = 0; i < T; i++) outer[i] = g[i] + run * g_run;                                         \
            UNROLL for (int j = 0; j < S; j++) inner[j] = x[j] + run * x_run;                                         \
            long p = 0;                                                                                               \
            for (; p + V <= length; p += V) DOT_STEP(T, S, WHOLE)                                                     \
            if (p < length) DOT_STEP(T, S, MASKED)                                                                    \
        }                                                                                                             \
        float sums[T * S];                                                                                            \
        UNROLL for (int k = 0; k < T * S; k += V) STORE(sums + k, totals(sum + k));                                   \
        UNROLL for (int i = 0; i < T; i++)                                                                            \
            if (columns >= S) UNROLL for (int j = 0; j < S; j++) dw[i * pitch + j] += sums[i * S + j];                 \
            else for (long j = 0; j < columns; j++) dw[i * pitch + j] += sums[i * S + j];                              \
    }

DEFINE_DOT(1, 16)
DEFINE_DOT(2, 8)
DEFINE_DOT(4, 4)

/* ---- Blocks --------------------------------------------------------------------------------------------------- */

typedef struct {
    long groups, rows, cols, taps;
} shape;

static int tiles(long rows) { return (int)((rows + TILE - 1) / TILE); }
static int tile_size(long rows, int t) {
    int n = tiles(rows);
    return (int)(rows / n) + (t < rows % n);
}

/* `size` rows of a matrix turned around: packed[j * size + i] = w[i * columns + j]. */
static void turn(const float *w, int size, long columns, float *packed) {
    long j = 0;
    /* Every store but the last of a square is overwritten in part by the next: none may reach beyond the matrix. */
    for (; size <= V && (columns - j) * size >= (long)V * size + V - size && j + V <= columns; j += V) {
        vec r[V];
        UNROLL for (int i = 0; i < V; i++) r[i] = LOAD(w + MIN(i, size - 1) * columns + j);
        STAGES
        UNROLL for (int i = 0; i < V; i++) STORE(packed + (j + i) * size, r[i]);
    }
    for (; j < columns; j++)
        for (int i = 0; i < size; i++) packed[j * size + i] = w[i * columns + j];
}

/* The weight of one group, (rows, cols, taps), as tiles of sources. */
static void lay_out(const float *w, shape s, float *packed) {
    long first = 0;
    for (int t = 0; t < tiles(s.rows); t++) {
        int size = tile_size(s.rows, t);
        turn(w + first * s.cols * s.taps, size, s.cols * s.taps, packed);
        packed += size * s.cols * s.taps, first += size;
    }
}

/* The same with its two sides swapped, and of its taps only some. */
static void lay_out_back(const float *w, shape s, const int *taps, long count, float *packed) {
    long first = 0;
    for (int t = 0; t < tiles(s.cols); t++) {
        int size = tile_size(s.cols, t);
        for (long j = 0; j < s.rows; j++)
            for (long k = 0; k < count; k++)
                for (int i = 0; i < size; i++) *packed++ = w[(j * s.cols + first + i) * s.taps + taps[k]];
        first += size;
    }
}

static const int one_tap[] = {0};

/* One group's product from `count` sources to `rows` outputs. */
static void group_product(long rows, const float *const *x, long count, const float *packed, const float *bias,
                          float *const *y, long length) {
    static const float zeros[TILE];
    for (int t = 0; t < tiles(rows); t++) {
        int size = tile_size(rows, t);
        product(size, x, count, packed, bias ? bias : zeros, y, 0, length);
        packed += size * count, y += size;
        if (bias) bias += size;
    }
}

/* Numbers of channels as those of positions. */
static void by_position(const float *of_channel, const int *order, long count, float *of_position) {
    for (long i = 0; i < count; i++) of_position[i] = order[i] < 0 ? 0 : of_channel[order[i]];
}

/* A batch norm by running averages, of every channel; no norm if there is no mean. Gain and offset may be NULL. */
typedef struct {
    const float *gain, *offset, *mean, *variance;
    float eps;
} norm;

#define NORM const float *gain, const float *offset, const float *average, const float *spread, float eps
#define NORM_OF {gain, offset, average, spread, eps}

/* What is added to the product at every position, and with a norm what it is multiplied by. */
static void by_norm(norm n, const float *bias, const int *order, long count, float *factors, float *added) {
    if (!n.mean) {
        if (bias) by_position(bias, order, count, added);
        return;
    }
    for (long i = 0; i < count; i++) {
        long c = order[i];
        factors[i] = added[i] = 0;
        if (c < 0) continue;
        float factor = (n.gain ? n.gain[c] : 1.0f) / __builtin_sqrtf(n.variance[c] + n.eps);
        factors[i] = factor;
        added[i] = ((bias ? bias[c] : 0.0f) - n.mean[c]) * factor + (n.offset ? n.offset[c] : 0.0f);
    }
}

/* Tiles of `lay_out`, every output's weights multiplied by its factor. */
static void multiply_tiles(float *packed, shape s, const float *factors) {
    long sources = s.cols * s.taps;
    for (int t = 0; t < tiles(s.rows); t++) {
        int size = tile_size(s.rows, t);
        for (long j = 0; j < sources; j++)
            for (int i = 0; i < size; i++) packed[j * size + i] *= factors[i];
        packed += size * sources, factors += size;
    }
}

static bits first_lanes(long count) {
    bits mask = {0};
    for (int k = 0; k < count; k++) mask[k] = -1;
    return mask;
}

/* One group's weight gradient: dw[i][j] += sum of g[i] x[j]. */
static void group_dot(long rows, const float *const *g, long count, const float *const *x, long runs, long g_run,
                      long x_run, long length, float *dw) {
    bits mask = first_lanes(length % V);
    for (long i = 0; i < rows;) {
        int high = rows - i >= 4 ? 4 : rows - i >= 2 ? 2 : 1, wide = 16 / high;
        for (long j = 0; j < count; j += wide) {
            const float *last[16], *const *inner = x + j;
            if (j + wide > count) {
                for (int k = 0; k < wide; k++) last[k] = x[MIN(j + k, count - 1)];
                inner = last;
            }
            (high == 4 ? dot_4 : high == 2 ? dot_2 : dot_1)(g + i, inner, runs, g_run, x_run, length, mask,
                                                            dw + i * count + j, count, count - j);
        }
        i += high;
    }
}

static float plane_sum(const float *g, long length) {
    vec sum = {0};
    long p = 0;
    for (; p + V <= length; p += V) sum += LOAD(g + p);
    float result = 0;
    for (int k = 0; k < V; k++) result += sum[k];
    for (; p < length; p++) result += g[p];
    return result;
}

/* ---- Memory --------------------------------------------------------------------------------------------------- */

enum { PACKED, FIRST, SECOND, THIRD, FOURTH, FIFTH, PARTS, MORE_PARTS, SLOTS };

/* Each thread keeps its buffers: pages that are new at each call cost as much as the work. They hold numbers, if old. */
static float *scratch(int slot, size_t count) {
    static _Thread_local struct {
        float *data;
        size_t count;
    } kept[SLOTS];
    if (kept[slot].count < count || !kept[slot].data) {
        void *data = NULL;
        size_t bytes = (count + 8 * V) * sizeof(float);
        free(kept[slot].data);
        kept[slot].data = NULL;
        if (posix_memalign(&data, 64, bytes)) return NULL;
        kept[slot].data = memset(data, 0, bytes), kept[slot].count = count;
    }
    return kept[slot].data;
}

/* Gradients of weights and biases, to which every thread adds what it finds: the first where they belong, the others in
 * buffers that are added up at the end. `dw` and `db` may be NULL. */
typedef struct {
    float *dw, *db, *parts;
    long weights, biases;
} shares;

static shares make_shares(int slot, float *dw, float *db, long weights, long biases, int threads) {
    shares s = {dw, db, NULL, dw ? weights : 0, db ? biases : 0};
    s.parts = scratch(slot, (threads - 1) * (s.weights + s.biases));
    return s;
}

static float *own_share(shares s, int of_bias) {
    int thread = omp_get_thread_num();
    float *share = of_bias ? s.db : s.dw;
    if (share && thread) share = s.parts + (thread - 1) * (s.weights + s.biases) + (of_bias ? s.weights : 0);
    if (share) memset(share, 0, (of_bias ? s.biases : s.weights) * sizeof(float));
    return share;
}

/* By all threads of a region, when all are done. */
static void add_shares(shares s) {
    int threads = omp_get_num_threads();
#pragma omp for schedule(static)
    for (long i = 0; i < s.weights + s.biases; i++) {
        float sum = 0;
        for (int t = 1; t < threads; t++) sum += s.parts[(t - 1) * (s.weights + s.biases) + i];
        *(i < s.weights ? s.dw + i : s.db + i - s.weights) += sum;
    }
}

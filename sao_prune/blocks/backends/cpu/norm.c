/* Batch norm and activation in one pass over a result, and the sums that its gradients need in another. */

#include <omp.h>
#include <stdlib.h>

#include "moments.h"

#define CHUNK 64 /* rows whose sums stay in single precision */
#define MANY 256 /* rows whose moments do */

/* y = act(scale z + shift), channel by channel. `last`: channels are innermost. */
int norm_forward(const float *z, float *y, const float *scale, const float *shift, int act, long batch, long channels,
                 long area, int last, int threads) {
    if (last) {
        coefficients c = {scale, shift, NULL, NULL, NULL, NULL};
#pragma omp parallel for num_threads(threads)
        for (long row = 0; row < batch * area; row++) {
#define DO(A) forward_run(A, 1, 1, y + row * channels, z + row * channels, channels, c)
            FOR_ACTS(DO)
#undef DO
        }
    } else {
#pragma omp parallel for num_threads(threads)
        for (long plane = 0; plane < batch * channels; plane++) {
            coefficients c = {scale + plane % channels, shift + plane % channels, NULL, NULL, NULL, NULL};
#define DO(A) forward_run(A, 1, 0, y + plane * area, z + plane * area, area, c)
            FOR_ACTS(DO)
#undef DO
        }
    }
    return 0;
}

/* Moments of `rows` rows of `count` neighbouring channels, at most V. */
static void rows_moments(const float *z, long rows, long pitch, long count, moments *by_channel) {
    vec sum = {0}, squares = {0};
    if (count == V) {
        for (long r = 0; r < rows; r++) sum += LOAD(z + r * pitch);
        vec mean = sum / (float)rows;
        for (long r = 0; r < rows; r++) {
            vec d = LOAD(z + r * pitch) - mean;
            squares += d * d;
        }
    } else {
        for (long r = 0; r < rows; r++) sum += part(z + r * pitch, count);
        vec mean = sum / (float)rows;
        for (long r = 0; r < rows; r++) {
            vec d = part(z + r * pitch, count) - mean;
            squares += d * d;
        }
    }
    for (long k = 0; k < count; k++)
        merge_moments(by_channel + k, (moments){(double)rows, sum[k] / (float)rows, squares[k]});
}

/* Mean and biased variance of every channel. */
int norm_moments(const float *z, float *mean, float *variance, long batch, long channels, long area, int last,
                 int threads) {
    moments *parts = calloc((size_t)threads * channels, sizeof *parts);
    if (!parts) return 1;
#pragma omp parallel num_threads(threads)
    {
        moments *mine = parts + (size_t)omp_get_thread_num() * channels;
        if (last) {
#pragma omp for schedule(static)
            for (long chunk = 0; chunk < (batch * area + MANY - 1) / MANY; chunk++) {
                long first = chunk * MANY, rows = MIN(MANY, batch * area - first);
                for (long c = 0; c < channels; c += V)
                    rows_moments(z + first * channels + c, rows, channels, MIN(V, channels - c), mine + c);
            }
        } else {
#pragma omp for schedule(static)
            for (long plane = 0; plane < batch * channels; plane++)
                merge_moments(mine + plane % channels, run_moments(z + plane * area, 1, area, area));
        }
    }
    finish_moments(parts, threads, channels, mean, variance);
    free(parts);
    return 0;
}

typedef struct {
    vec through, moment;
} sums;

INLINE void add_step(int act, sums *s, vec g, vec z, vec scale, vec shift, vec mean) {
    vec through = g * activate(act, z * scale + shift).derivative;
    s->through += through;
    s->moment += through * (z - mean);
}

/* Sums of one vector of channels over rows. */
INLINE sums rows_sums(int act, const float *g, const float *z, long rows, long pitch, const float *scale,
                      const float *shift, const float *mean, long count) {
    sums s = {{0}, {0}};
    if (count == V) {
        vec a = LOAD(scale), b = LOAD(shift), m = LOAD(mean);
        for (long r = 0; r < rows; r++) add_step(act, &s, LOAD(g + r * pitch), LOAD(z + r * pitch), a, b, m);
    } else {
        vec a = part(scale, count), b = part(shift, count), m = part(mean, count);
        for (long r = 0; r < rows; r++)
            add_step(act, &s, part(g + r * pitch, count), part(z + r * pitch, count), a, b, m);
    }
    return s;
}

INLINE sums plane_sums(int act, const float *g, const float *z, long area, float scale, float shift, float mean) {
    sums s = {{0}, {0}};
    vec zero = {0}, a = zero + scale, b = zero + shift, m = zero + mean;
    long p = 0;
    for (; p + V <= area; p += V) add_step(act, &s, LOAD(g + p), LOAD(z + p), a, b, m);
    if (p < area) add_step(act, &s, part(g + p, area - p), part(z + p, area - p), a, b, m);
    return s;
}

/* For every channel the sum of g' = g act'(scale z + shift), and after those the sums of g' (z - mean). */
int norm_sums(const float *g, const float *z, const float *scale, const float *shift, const float *mean, int act,
              double *totals, long batch, long channels, long area, int last, int threads) {
    double *parts = calloc((size_t)threads * 2 * channels, sizeof *parts);
    if (!parts) return 1;
#pragma omp parallel num_threads(threads)
    {
        double *mine = parts + (size_t)omp_get_thread_num() * 2 * channels;
        if (last) {
#pragma omp for
            for (long chunk = 0; chunk < (batch * area + CHUNK - 1) / CHUNK; chunk++) {
                long first = chunk * CHUNK, rows = MIN(CHUNK, batch * area - first);
                for (long c = 0; c < channels; c += V) {
                    long at = first * channels + c, count = MIN(V, channels - c);
                    sums s;
#define DO(A) s = rows_sums(A, g + at, z + at, rows, channels, scale + c, shift + c, mean + c, count)
                    FOR_ACTS(DO)
#undef DO
                    for (long k = 0; k < count; k++)
                        mine[c + k] += s.through[k], mine[channels + c + k] += s.moment[k];
                }
            }
        } else {
#pragma omp for
            for (long plane = 0; plane < batch * channels; plane++) {
                long c = plane % channels, at = plane * area;
                sums s;
#define DO(A) s = plane_sums(A, g + at, z + at, area, scale[c], shift[c], mean[c])
                FOR_ACTS(DO)
#undef DO
                mine[c] += lanes_sum(s.through), mine[channels + c] += lanes_sum(s.moment);
            }
        }
    }
    for (long i = 0; i < 2 * channels; i++) {
        totals[i] = 0;
        for (int t = 0; t < threads; t++) totals[i] += parts[(size_t)t * 2 * channels + i];
    }
    free(parts);
    return 0;
}

/* Gradients of z from those of act(scale z + shift), with the numbers of every channel. */
int norm_backward(const float *g, const float *z, float *dz, const float *numbers, int act, long batch, long channels,
                  long area, int last, int threads) {
    coefficients all = channel_numbers(numbers, channels, 0);
    if (last) {
#pragma omp parallel for num_threads(threads)
        for (long row = 0; row < batch * area; row++) {
            long at = row * channels;
#define DO(A) backward_run(A, 1, 1, dz + at, g + at, z + at, channels, all)
            FOR_ACTS(DO)
#undef DO
        }
    } else {
#pragma omp parallel for num_threads(threads)
        for (long plane = 0; plane < batch * channels; plane++) {
            coefficients c = channel_numbers(numbers, channels, plane % channels);
            long at = plane * area;
#define DO(A) backward_run(A, 1, 0, dz + at, g + at, z + at, area, c)
            FOR_ACTS(DO)
#undef DO
        }
    }
    return 0;
}

/* Mean and variance of what a product gave, taken while it is still in the cache. */

#pragma once

#include "act.h"

typedef struct {
    double count, mean, squares; /* of distances to the mean */
} moments;

static float lanes_sum(vec v) {
    float sum = 0;
    for (int k = 0; k < V; k++) sum += v[k];
    return sum;
}

static void merge_moments(moments *into, moments add) {
    double count = into->count + add.count, apart = add.mean - into->mean;
    if (add.count == 0) return;
    into->squares += add.squares + apart * apart * into->count * add.count / count;
    into->mean += apart * add.count / count;
    into->count = count;
}

#define TOGETHER 4096 /* floats whose sums stay in single precision */

/* Of lines of floats that start `pitch` apart; twice over them, so that nothing cancels. */
static moments few_moments(const float *z, long lines, long width, long pitch) {
    vec sum = {0}, squares = {0};
    for (long line = 0; line < lines; line++) {
        const float *run = z + line * pitch;
        long p = 0;
        for (; p + V <= width; p += V) sum += LOAD(run + p);
        if (p < width) sum += part(run + p, width - p);
    }
    float mean = lanes_sum(sum) / (float)(lines * width);
    for (long line = 0; line < lines; line++) {
        const float *run = z + line * pitch;
        long p = 0;
        for (; p + V <= width; p += V) {
            vec d = LOAD(run + p) - mean;
            squares += d * d;
        }
        for (; p < width; p++) squares[0] += (run[p] - mean) * (run[p] - mean);
    }
    return (moments){(double)(lines * width), mean, lanes_sum(squares)};
}

static moments run_moments(const float *z, long lines, long width, long pitch) {
    moments all = {0, 0, 0};
    long high = MAX(TOGETHER / width, 1);
    for (long line = 0; line < lines; line += high)
        for (long p = 0; p < width; p += TOGETHER)
            merge_moments(&all, few_moments(z + line * pitch + p, MIN(high, lines - line), MIN(TOGETHER, width - p), pitch));
    return all;
}

/* Every thread's moments of `channels` channels, one thread after the other, to mean and biased variance. */
static void finish_moments(moments *parts, int threads, long channels, float *mean, float *variance) {
    for (long c = 0; c < channels; c++) {
        for (int t = 1; t < threads; t++) merge_moments(parts + c, parts[t * channels + c]);
        mean[c] = (float)parts[c].mean;
        variance[c] = (float)(parts[c].squares / parts[c].count);
    }
}

/* Rows of a batch so few that to lay out a weight takes longer than to use it: every output is the dot product of a line of
 * its block, as it lies, with the inputs of the block. */

#include "inner.h"

/* `V` outputs, or as many as there are, of one block for one row of the batch. */
static vec dots(const float *const *lines, const float *x, long cols) {
    vec sum[V] = {0};
    long p = 0;
    for (; p + V <= cols; p += V) {
        vec value = LOAD(x + p);
        UNROLL for (int i = 0; i < V; i++) sum[i] += LOAD(lines[i] + p) * value;
    }
    if (p < cols) {
        vec value = LOAD(x + p);
        UNROLL for (int i = 0; i < V; i++) sum[i] += part(lines[i] + p, cols - p) * value;
    }
    return totals(sum);
}

int few_forward(const float *x, const float *w, const float *bias, float *y, long batch, long n, long m, long groups,
                long rows, long cols, const int *in, const int *out, int threads, int act) {
    long wide = ROUND(cols), tiles = (rows + V - 1) / V;
    float *gathered = scratch(PACKED, batch * groups * wide);
    if (!gathered) return 1;
    for (long g = 0; g < groups; g++)
        for (long b = 0; b < batch; b++) {
            float *to = gathered + (g * batch + b) * wide;
            for (long j = 0; j < cols; j++) to[j] = in[g * cols + j] < 0 ? 0 : x[b * n + in[g * cols + j]];
            for (long j = cols; j < wide; j++) to[j] = 0;
        }
#pragma omp parallel for num_threads(threads)
    for (long unit = 0; unit < groups * tiles; unit++) {
        long g = unit / tiles, first = unit % tiles * V, count = MIN(V, rows - first);
        const int *channels = out + g * rows + first;
        const float *lines[V];
        for (long i = 0; i < V; i++) lines[i] = w + (g * rows + first + MIN(i, count - 1)) * cols;
        for (long b = 0; b < batch; b++) {
            vec found = dots(lines, gathered + (g * batch + b) * wide, cols);
            for (long i = 0; i < count; i++)
                if (channels[i] >= 0) y[b * m + channels[i]] = found[i] + (bias ? bias[channels[i]] : 0);
        }
    }
    if (act) activate_run(act, y, NULL, y, batch * m);
    return 0;
}

/* Inputs whose channels are planes already: images, tokens to mix. A unit of work is a group of one image. */

#include "inner.h"
#include "moments.h"

#define BAND 2048    /* positions of a convolution's outputs at a time */
#define CHUNK 262144 /* floats of padded planes at a time */

/* `count` planes that lie `apart`. */
static void plane_list(float *planes, long count, long apart, float **list) {
    for (long j = 0; j < count; j++) list[j] = planes + j * apart;
}

typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

static inline void copy_run(float *to, const float *from, long count) {
    if (count >= V) {
        long p = 0;
        for (; p + V <= count; p += V) STORE(to + p, LOAD(from + p));
        STORE(to + count - V, LOAD(from + count - V));
    } else if (count >= 8) {
        *(vec8 *)to = *(const vec8 *)from;
        *(vec8 *)(to + count - 8) = *(const vec8 *)(from + count - 8);
    } else if (count >= 4) {
        *(vec4 *)to = *(const vec4 *)from;
        *(vec4 *)(to + count - 4) = *(const vec4 *)(from + count - 4);
    } else
        for (long p = 0; p < count; p++) to[p] = from[p];
}

static void pad_plane(const float *x, geometry f, border b, float *plane) {
    for (long i = 0; i < f.height; i++)
        copy_run(plane + (b.top + i) * b.pitch + b.left, x + i * f.width, f.width);
}

/* Outputs in bands of rows that stay in the nearest cache: `y` are planes without border. */
static void convolve(long rows, const float *const *x, long count, const float *packed, const float *bias,
                     float *const *y, geometry f, border b, float *band) {
    static const float zeros[TILE];
    long height = BAND / b.pitch > 0 ? BAND / b.pitch : 1, apart = ROUND(height * b.pitch) + V;
    for (long top = 0; top < f.height; top += height) {
        long lines = MIN(height, f.height - top), first = top * b.pitch;
        const float *w = packed;
        long row = 0;
        for (int t = 0; t < tiles(rows); t++) {
            int size = tile_size(rows, t);
            float *to[TILE];
            for (int i = 0; i < size; i++) to[i] = band + i * apart - first;
            product(size, x, count, w, bias ? bias + row : zeros, to, first, first + ROUND(lines * b.pitch));
            for (int i = 0; i < size; i++)
                for (long line = 0; line < lines; line++)
                    copy_run(y[row + i] + (top + line) * f.width, band + i * apart + line * b.pitch, f.width);
            w += size * count, row += size;
        }
    }
}

static long band_size(border b) { return TILE * (ROUND((BAND / b.pitch > 0 ? BAND / b.pitch : 1) * b.pitch) + V); }

/* y = act(product); `derivatives`, if not NULL, become those of `act`, `mean` and `variance` those of the product's channels. */
int planes_forward(const float *x, const float *w, const float *bias, float *y, long batch, long n, long m, long height,
                   long width, long kernel_height, long kernel_width, long dilation_height, long dilation_width,
                   long groups, long rows, long cols, const int *in, const int *out, int threads, int act, float *derivatives,
                   float *mean, float *variance) {
    geometry f = {batch, height, width, kernel_height, kernel_width, dilation_height, dilation_width};
    border b = make_border(f);
    shape s = {groups, rows, cols, kernel_height * kernel_width};
    long count = cols * s.taps, size = rows * count, area = height * width;
    int direct = s.taps == 1 && area >= V;
    float *packed = scratch(PACKED, groups * (size + rows)), *offsets = packed + groups * size;
    moments *noted = mean ? calloc(threads * m, sizeof *noted) : NULL;
    int failed = !packed || (mean && !noted);
    if (failed) return free(noted), 1;
    if (bias) by_position(bias, out, groups * rows, offsets);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *planes = scratch(FIRST, direct ? 1 : cols * b.size), *band = scratch(SECOND, band_size(b));
        float *spare = scratch(THIRD, 2 * area);
        const float **from = malloc(count * sizeof *from);
        float **to = malloc((rows + cols) * sizeof *to);
        failed = !planes || !band || !spare || !from || !to;
        if (!failed) {
            memset(planes, 0, (direct ? 1 : cols * b.size) * sizeof(float));
            memset(spare, 0, area * sizeof(float));
            plane_list(planes, cols, b.size, to);
            tap_table(to, cols, f, b, from);
        }
#pragma omp for
        for (long g = 0; g < groups; g++) lay_out(w + g * size, s, 0, packed + g * size);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * groups; unit++) {
            if (failed) continue;
            long image = unit / groups, g = unit % groups;
            for (long i = 0; i < rows; i++) {
                int channel = out[g * rows + i];
                to[i] = channel < 0 ? spare + area : y + (image * m + channel) * area;
            }
            for (long j = 0; j < cols; j++) {
                int channel = in[g * cols + j];
                const float *plane = x + (image * n + channel) * area;
                if (direct)
                    from[j] = channel < 0 ? spare : plane;
                else if (channel >= 0)
                    pad_plane(plane, f, b, planes + j * b.size);
                else
                    memset(planes + j * b.size, 0, b.size * sizeof(float));
            }
            const float *own = bias ? offsets + g * rows : NULL;
            if (direct)
                group_product(rows, from, count, packed + g * size, own, to, area);
            else
                convolve(rows, from, count, packed + g * size, own, to, f, b, band);
            for (long i = 0; (act || mean) && i < rows; i++) {
                int channel = out[g * rows + i];
                if (channel < 0) continue;
                if (mean)
                    merge_moments(noted + omp_get_thread_num() * m + channel, run_moments(to[i], 1, area, area));
                if (act) activate_run(act, to[i], derivatives ? derivatives + (image * m + channel) * area : NULL, to[i], area);
            }
        }
        free(from), free(to);
    }
    if (mean && !failed) finish_moments(noted, threads, m, mean, variance);
    free(noted);
    return failed;
}

/* Gradients; `dx`, `dw` and `db` may be NULL. If `z` is not NULL, `g` is the gradient of act(..) and is taken through it first, with the `numbers` of every channel if there are any. */
int planes_backward(const float *g, const float *x, const float *w, float *dx, float *dw, float *db, long batch, long n,
                    long m, long height, long width, long kernel_height, long kernel_width, long dilation_height,
                    long dilation_width, long groups, long rows, long cols, const int *in, const int *out,
                    int threads, const float *z, int act, const float *numbers) {
    geometry f = {batch, height, width, kernel_height, kernel_width, dilation_height, dilation_width};
    if (kernel_height * kernel_width == 1) f.height = 1, f.width = height * width;
    border b = make_border(f);
    shape s = {groups, rows, cols, kernel_height * kernel_width};
    long size = rows * cols * s.taps, area = height * width, shift = b.top * b.pitch + b.left;
    long chunk = CHUNK / ((rows + cols) * b.size), chunks;
    chunk = chunk < 1 ? 1 : MIN(chunk, batch);
    chunks = (batch + chunk - 1) / chunk;
    float *packed = scratch(PACKED, groups * size);
    shares all = make_shares(PARTS, dw, db, groups * size, m, threads);
    int failed = !packed || !all.parts;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        size_t inner_size = cols * chunk * b.size, outer_size = rows * chunk * b.size;
        float *inner = scratch(FIRST, inner_size + outer_size), *outer = inner + inner_size;
        float *band = scratch(SECOND, band_size(b)), *spare = scratch(THIRD, area);
        const float **from = malloc(cols * s.taps * sizeof *from), **top = malloc(rows * s.taps * sizeof *top);
        const float **centre = malloc(rows * sizeof *centre);
        float **to = malloc((rows + cols) * sizeof *to);
        failed = !inner || !band || !spare || !from || !top || !centre || !to;
        if (!failed) {
            memset(inner, 0, (inner_size + outer_size) * sizeof(float));
            plane_list(inner, cols, chunk * b.size, to);
            tap_table(to, cols, f, b, from);
            for (long i = 0; i < rows; i++) centre[i] = outer + i * chunk * b.size + shift;
        }
#pragma omp for
        for (long k = 0; k < groups; k++)
            if (dx) lay_out(w + k * size, s, 1, packed + k * size);
        float *my_dw = own_share(all, 0), *my_db = own_share(all, 1);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < chunks * groups; unit++) {
            if (failed) continue;
            long k = unit % groups, first = unit / groups * chunk, images = MIN(chunk, batch - first);
            for (long i = 0; i < rows; i++)
                for (long image = 0; image < images; image++) {
                    int channel = out[k * rows + i];
                    float *plane = outer + (i * chunk + image) * b.size;
                    if (channel < 0)
                        memset(plane, 0, b.size * sizeof(float));
                    else
                        pad_plane(g + ((first + image) * m + channel) * area, f, b, plane);
                    if (z && channel >= 0) {
                        coefficients c = channel_numbers(numbers, m, channel);
                        const float *values = z + ((first + image) * m + channel) * area;
                        for (long line = 0; line < f.height; line++)
                            derivative_run(act, plane + (b.top + line) * b.pitch + b.left, values + line * f.width, f.width,
                                      numbers ? &c : NULL);
                    }
                    if (db && channel >= 0) my_db[channel] += plane_sum(plane, b.size);
                }
            if (dw) {
                for (long j = 0; j < cols; j++)
                    for (long image = 0; image < images; image++) {
                        int channel = in[k * cols + j];
                        if (channel >= 0)
                            pad_plane(x + ((first + image) * n + channel) * area, f, b,
                                      inner + (j * chunk + image) * b.size);
                    }
                group_dot(rows, centre, cols * s.taps, from, images, b.size, b.size, f.height * b.pitch,
                          my_dw + k * size);
            }
            for (long image = 0; dx && image < images; image++) {
                for (long j = 0; j < cols; j++) {
                    int channel = in[k * cols + j];
                    to[j] = channel < 0 ? spare : dx + ((first + image) * n + channel) * area;
                }
                plane_list(outer + image * b.size, rows, chunk * b.size, to + cols);
                tap_table(to + cols, rows, f, b, top);
                convolve(cols, top, rows * s.taps, packed + k * size, NULL, to, f, b, band);
            }
        }
        add_shares(all);
        free(from), free(top), free(centre), free(to);
    }
    return failed;
}

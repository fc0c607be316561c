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

static long padded_size(geometry f, border b) {
    return ROUND((f.y.size + 2 * b.above) * b.pitch + 2 * b.left + 2 * V);
}

static void pad_plane(const float *x, geometry f, border b, float *plane) {
    for (long i = 0; i < f.y.size; i++)
        copy_run(plane + (b.above + i) * b.pitch + b.left, x + i * f.x.size, f.x.size);
}

/* Outputs in bands of rows that stay in the nearest cache: `y` are planes without border. */
static void convolve(long rows, const float *const *x, long count, const float *packed, const float *bias,
                     float *const *y, geometry f, border b, float *band) {
    static const float zeros[TILE];
    long height = BAND / b.pitch > 0 ? BAND / b.pitch : 1, apart = ROUND(height * b.pitch) + V;
    for (long top = 0; top < f.y.size; top += height) {
        long lines = MIN(height, f.y.size - top), first = top * b.pitch;
        const float *w = packed;
        long row = 0;
        for (int t = 0; t < tiles(rows); t++) {
            int size = tile_size(rows, t);
            float *to[TILE];
            for (int i = 0; i < size; i++) to[i] = band + i * apart - first;
            product(size, x, count, w, bias ? bias + row : zeros, to, first, first + ROUND(lines * b.pitch));
            for (int i = 0; i < size; i++)
                for (long line = 0; line < lines; line++)
                    copy_run(y[row + i] + (top + line) * f.x.size, band + i * apart + line * b.pitch, f.x.size);
            w += size * count, row += size;
        }
    }
}

static long band_size(border b) { return TILE * (ROUND((BAND / b.pitch > 0 ? BAND / b.pitch : 1) * b.pitch) + V); }

/* y = act(product); `derivatives`, if not NULL, become those of `act`, `mean` and `variance` those of the product's channels.
 * A norm by averages comes before `act`. */
int planes_forward(const float *x, const float *w, const float *bias, float *y, long batch, long n, long m, AXIS(y),
                   AXIS(x), long groups, long rows, long cols, const int *in, const int *out, int threads, int act,
                   float *derivatives, float *mean, float *variance, NORM) {
    geometry f = GEOMETRY(batch);
    border b = make_border(f, f.x.size);
    shape s = {groups, rows, cols, f.y.kernel * f.x.kernel};
    long count = cols * s.taps, size = rows * count, area = f.y.size * f.x.size, plane_size = padded_size(f, b);
    int direct = s.taps == 1 && area >= V;
    float *packed = scratch(PACKED, groups * (size + 2 * rows)), *offsets = packed + groups * size;
    float *factors = offsets + groups * rows;
    norm behind = NORM_OF;
    int shifted = bias || average;
    moments *noted = mean ? calloc(threads * m, sizeof *noted) : NULL;
    int failed = !packed || (mean && !noted);
    if (failed) return free(noted), 1;
    by_norm(behind, bias, out, groups * rows, factors, offsets);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *planes = scratch(FIRST, direct ? 1 : cols * plane_size), *band = scratch(SECOND, band_size(b));
        float *spare = scratch(THIRD, 2 * area);
        const float **from = malloc(count * sizeof *from);
        float **to = malloc((rows + cols) * sizeof *to);
        long *shifts = malloc(s.taps * sizeof *shifts);
        failed = !planes || !band || !spare || !from || !to || !shifts;
        if (!failed) {
            memset(planes, 0, (direct ? 1 : cols * plane_size) * sizeof(float));
            memset(spare, 0, area * sizeof(float));
            plane_list(planes, cols, plane_size, to);
            tap_offsets(f, b, &whole, 0, shifts);
            tap_table(to, cols, shifts, s.taps, from);
        }
#pragma omp for
        for (long g = 0; g < groups; g++) {
            lay_out(w + g * size, s, packed + g * size);
            if (average) multiply_tiles(packed + g * size, s, factors + g * rows);
        }
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
                    pad_plane(plane, f, b, planes + j * plane_size);
                else
                    memset(planes + j * plane_size, 0, plane_size * sizeof(float));
            }
            const float *own = shifted ? offsets + g * rows : NULL;
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
        free(from), free(to), free(shifts);
    }
    if (mean && !failed) finish_moments(noted, threads, m, mean, variance);
    free(noted);
    return failed;
}

/* Gradients; `dx`, `dw` and `db` may be NULL. If `z` is not NULL, `g` is the gradient of act(..) and is taken through it first, with the `numbers` of every channel if there are any. */
int planes_backward(const float *g, const float *x, const float *w, float *dx, float *dw, float *db, long batch, long n,
                    long m, AXIS(y), AXIS(x), long groups, long rows, long cols, const int *in, const int *out,
                    int threads, const float *z, int act, const float *numbers) {
    geometry f = GEOMETRY(batch);
    long area = f.y.size * f.x.size;
    if (f.y.kernel * f.x.kernel == 1) f.y.size = 1, f.x.size = area;
    border b = make_border(f, f.x.size);
    shape s = {groups, rows, cols, f.y.kernel * f.x.kernel};
    long size = rows * cols * s.taps, plane_size = padded_size(f, b);
    long chunk = CHUNK / ((rows + cols) * plane_size), chunks;
    chunk = chunk < 1 ? 1 : MIN(chunk, batch);
    chunks = (batch + chunk - 1) / chunk;
    float *packed = scratch(PACKED, groups * size);
    shares all = make_shares(PARTS, dw, db, groups * size, m, threads);
    int failed = !packed || !all.parts;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        size_t inner_size = cols * chunk * plane_size, outer_size = rows * chunk * plane_size;
        float *inner = scratch(FIRST, inner_size + outer_size), *outer = inner + inner_size;
        float *band = scratch(SECOND, band_size(b)), *spare = scratch(THIRD, area);
        const float **from = malloc(cols * s.taps * sizeof *from), **top = malloc(rows * s.taps * sizeof *top);
        const float **centre = malloc(rows * sizeof *centre);
        float **to = malloc((rows + cols) * sizeof *to);
        int *order = malloc(s.taps * sizeof *order);
        long *shifts = malloc(2 * s.taps * sizeof *shifts), *inner_shifts = shifts + s.taps, start[2];
        failed = !inner || !band || !spare || !from || !top || !centre || !to || !order || !shifts;
        if (!failed) {
            memset(inner, 0, (inner_size + outer_size) * sizeof(float));
            plane_list(inner, cols, chunk * plane_size, to);
            tap_offsets(f, b, &whole, 0, inner_shifts);
            tap_table(to, cols, inner_shifts, s.taps, from);
            back_taps(f, b, &whole, order, shifts, start);
            for (long i = 0; i < rows; i++) centre[i] = outer + i * chunk * plane_size + first_of(b);
        }
#pragma omp for
        for (long k = 0; k < groups; k++)
            if (dx && !failed) lay_out_back(w + k * size, s, order, s.taps, packed + k * size);
        float *my_dw = own_share(all, 0), *my_db = own_share(all, 1);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < chunks * groups; unit++) {
            if (failed) continue;
            long k = unit % groups, first = unit / groups * chunk, images = MIN(chunk, batch - first);
            for (long i = 0; i < rows; i++)
                for (long image = 0; image < images; image++) {
                    int channel = out[k * rows + i];
                    float *plane = outer + (i * chunk + image) * plane_size;
                    if (channel < 0)
                        memset(plane, 0, plane_size * sizeof(float));
                    else
                        pad_plane(g + ((first + image) * m + channel) * area, f, b, plane);
                    if (z && channel >= 0) {
                        coefficients c = channel_numbers(numbers, m, channel);
                        const float *values = z + ((first + image) * m + channel) * area;
                        for (long line = 0; line < f.y.size; line++)
                            derivative_run(act, plane + (b.above + line) * b.pitch + b.left, values + line * f.x.size, f.x.size,
                                      numbers ? &c : NULL);
                    }
                    if (db && channel >= 0) my_db[channel] += plane_sum(plane, plane_size);
                }
            if (dw) {
                for (long j = 0; j < cols; j++)
                    for (long image = 0; image < images; image++) {
                        int channel = in[k * cols + j];
                        if (channel >= 0)
                            pad_plane(x + ((first + image) * n + channel) * area, f, b,
                                      inner + (j * chunk + image) * plane_size);
                    }
                group_dot(rows, centre, cols * s.taps, from, images, plane_size, plane_size, f.y.size * b.pitch,
                          my_dw + k * size);
            }
            for (long image = 0; dx && image < images; image++) {
                for (long j = 0; j < cols; j++) {
                    int channel = in[k * cols + j];
                    to[j] = channel < 0 ? spare : dx + ((first + image) * n + channel) * area;
                }
                plane_list(outer + image * plane_size, rows, chunk * plane_size, to + cols);
                tap_table(to + cols, rows, shifts, s.taps, top);
                convolve(cols, top, rows * s.taps, packed + k * size, NULL, to, f, b, band);
            }
        }
        add_shares(all);
        free(from), free(top), free(centre), free(to), free(order), free(shifts);
    }
    return failed;
}

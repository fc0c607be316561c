/* Linear layers one behind the other with the activations behind them, panel by panel: some rows of the batch go through
 * all layers in one thread, and nothing is waited for between two of them. */

#include "panel.h"

typedef struct {
    const int *in, *out;
    long n, m, groups, rows, cols;
    int act;
} layer;

static long inputs(layer a) { return a.groups * a.cols; }
static long outputs(layer a) { return a.groups * a.rows; }
static long weights(layer a) { return outputs(a) * a.cols; }
static shape shape_of(layer a) { return (shape){a.groups, a.rows, a.cols, 1}; }

/* A batch: rows, or channel after channel if `columns`. */
typedef struct {
    long size;
    int columns;
} batch_of;

/* What a thread needs for a panel: planes in the order of a layer's inputs (x), of its outputs (y) and of its inputs again
 * (dx), and where those of every channel are. */
typedef struct {
    long pitch;
    float **x, **y, **dx, **pixels, *spare;
    float ***x_of, ***y_of, ***dx_of; /* by layer */
    void *pointers;
} room;

static float **planes_in(int slot, long count, long pitch, float **list) {
    float *data = scratch(slot, count * pitch);
    for (long i = 0; data && i < count; i++) list[i] = data + i * pitch;
    return data ? list : NULL;
}

static float **by_channel(const int *order, long positions, float **planes, float **list) {
    for (long i = 0; i < positions; i++)
        if (order[i] >= 0) list[order[i]] = planes[i];
    return list;
}

static int open_room(room *r, const layer *layers, long count, long lines) {
    long most = 0, channels = 0, widest = 0;
    for (long i = 0; i < count; i++) {
        layer a = layers[i];
        most = MAX(most, MAX(inputs(a), outputs(a)));
        channels += 2 * a.n + a.m, widest = MAX(widest, MAX(a.n, a.m));
    }
    *r = (room){.pitch = ROUND(lines) + V};
    float **next = r->pointers = malloc((3 * most + channels + ROUND(lines) + 3 * count) * sizeof *next);
    r->spare = scratch(FOURTH, widest);
    if (!next || !r->spare) return 1;
    memset(r->spare, 0, widest * sizeof(float));
    r->x = planes_in(FIRST, most, r->pitch, next), next += most;
    r->y = planes_in(SECOND, most, r->pitch, next), next += most;
    r->dx = planes_in(THIRD, most, r->pitch, next), next += most;
    if (!r->x || !r->y || !r->dx) return 1;
    r->pixels = next, next += ROUND(lines);
    r->x_of = (float ***)next, r->y_of = r->x_of + count, r->dx_of = r->y_of + count, next += 3 * count;
    for (long i = 0; i < count; i++) {
        layer a = layers[i];
        r->x_of[i] = by_channel(a.in, inputs(a), r->x, next), next += a.n;
        r->y_of[i] = by_channel(a.out, outputs(a), r->y, next), next += a.m;
        r->dx_of[i] = by_channel(a.in, inputs(a), r->dx, next), next += a.n;
    }
    return 0;
}

/* Positions of no channel hold zeros. */
static void clear_padding(const int *order, long positions, float *const *planes, long length) {
    for (long i = 0; i < positions; i++)
        if (order[i] < 0) memset(planes[i], 0, length * sizeof(float));
}

static void take(const float *data, long channels, batch_of b, long first, long count, float *const *planes, room *r) {
    if (b.columns) {
        for (long c = 0; c < channels; c++) memcpy(planes[c], data + c * b.size + first, count * sizeof(float));
        return;
    }
    for (long i = 0; i < ROUND(count); i++)
        r->pixels[i] = i < count ? (float *)data + (first + i) * channels : r->spare;
    gather(r->pixels, ROUND(count), channels, planes);
}

static void give(float *data, long channels, batch_of b, long first, long count, float *const *planes, int act, room *r) {
    if (b.columns) {
        for (long c = 0; c < channels; c++) activate_run(act, data + c * b.size + first, NULL, planes[c], count);
        return;
    }
    for (long i = 0; i < count; i++) r->pixels[i] = data + (first + i) * channels;
    scatter(planes, channels, r->pixels, NULL, count, 0, act);
}

/* y = act(.. act(w[0] x + bias[0]) ..): y[i] are the results of the layers, those of all but the last may be NULL. */
int stack_forward(const layer *layers, long count, const float *const *w, const float *const *bias, float *const *y,
                  const float *x, long size, int columns, long lines, int threads) {
    batch_of b = {size, columns};
    long panels = (size + lines - 1) / lines, total = 0, packed_at[count], bias_at[count];
    for (long i = 0; i < count; i++) {
        packed_at[i] = total, total += weights(layers[i]);
        bias_at[i] = total, total += outputs(layers[i]);
    }
    float *packed = scratch(PACKED, total);
    int failed = !packed;
    if (failed) return 1;
    for (long i = 0; i < count; i++)
        if (bias[i]) by_position(bias[i], layers[i].out, outputs(layers[i]), packed + bias_at[i]);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        room r;
        failed = open_room(&r, layers, count, lines);
        for (long i = 0; i < count; i++) {
            layer a = layers[i];
#pragma omp for nowait schedule(static)
            for (long k = 0; k < a.groups; k++)
                lay_out(w[i] + k * a.rows * a.cols, shape_of(a), packed + packed_at[i] + k * a.rows * a.cols);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long unit = 0; unit < panels; unit++) {
            if (failed) continue;
            long first = unit * lines, rows = MIN(lines, size - first), length = ROUND(rows);
            take(x, layers[0].n, b, first, rows, r.x_of[0], &r);
            for (long i = 0; i < count; i++) {
                layer a = layers[i];
                const float *offsets = bias[i] ? packed + bias_at[i] : NULL;
                clear_padding(a.in, inputs(a), r.x, length);
                for (long k = 0; k < a.groups; k++)
                    group_product(a.rows, (const float *const *)r.x + k * a.cols, a.cols,
                                  packed + packed_at[i] + k * a.rows * a.cols, offsets ? offsets + k * a.rows : NULL,
                                  r.y + k * a.rows, length);
                if (i == count - 1) {
                    give(y[i], a.m, b, first, rows, r.y_of[i], a.act, &r);
                    break;
                }
                for (long c = 0; c < a.m; c++) activate_run(a.act, r.x_of[i + 1][c], NULL, r.y_of[i][c], length);
                if (y[i]) give(y[i], a.m, b, first, rows, r.x_of[i + 1], NOTHING, &r);
            }
        }
        free(r.pointers);
    }
    return failed;
}

/* Gradients from `g`, that of the last result, down to the layer `lowest`, whose input's is dx; NULL where not wanted.
 * y[i] are the results of the layers, of which the activations are to tell their derivatives. */
int stack_backward(const layer *layers, long count, const float *const *w, const float *const *y, float *const *dw,
                   float *const *db, const float *g, const float *x, float *dx, long size, int columns, long lines,
                   int threads, long lowest) {
    batch_of b = {size, columns};
    long panels = (size + lines - 1) / lines, total = 0, wanted = 0, packed_at[count];
    shares all[count];
    for (long i = lowest; i < count; i++) {
        packed_at[i] = total, total += weights(layers[i]);
        all[i] = (shares){dw[i], db[i], NULL, dw[i] ? weights(layers[i]) : 0, db[i] ? layers[i].m : 0};
        wanted += all[i].weights + all[i].biases;
    }
    float *packed = scratch(PACKED, total), *parts = scratch(PARTS, (threads - 1) * wanted);
    int failed = !packed || !parts;
    if (failed) return 1;
    for (long i = lowest; i < count; i++) all[i].parts = parts, parts += (threads - 1) * (all[i].weights + all[i].biases);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        room r;
        float *my_dw[count], *my_db[count];
        failed = open_room(&r, layers, count, lines);
        for (long i = lowest; i < count; i++) {
            layer a = layers[i];
            my_dw[i] = own_share(all[i], 0), my_db[i] = own_share(all[i], 1);
            if (i == lowest && !dx) continue;
#pragma omp for nowait schedule(static)
            for (long k = 0; k < a.groups; k++)
                lay_out_back(w[i] + k * a.rows * a.cols, shape_of(a), one_tap, 1,
                             packed + packed_at[i] + k * a.rows * a.cols);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long unit = 0; unit < panels; unit++) {
            if (failed) continue;
            long first = unit * lines, rows = MIN(lines, size - first), length = ROUND(rows), last = count - 1;
            layer top = layers[last];
            take(g, top.m, b, first, rows, r.y_of[last], &r);
            if (top.act != NOTHING) {
                take(y[last], top.m, b, first, rows, r.dx, &r); /* free yet */
                for (long c = 0; c < top.m; c++) derivative_run(top.act, r.y_of[last][c], r.dx[c], length, NULL);
            }
            for (long i = last; i >= lowest; i--) {
                layer a = layers[i];
                const float *const *gs = (const float *const *)r.y, *const *xs = (const float *const *)r.x;
                int below = i > lowest;
                clear_padding(a.out, outputs(a), r.y, length);
                if (my_dw[i] || below) take(i ? y[i - 1] : x, a.n, b, first, rows, r.x_of[i], &r);
                if (my_dw[i]) clear_padding(a.in, inputs(a), r.x, length);
                for (long k = 0; k < a.groups; k++) {
                    if (my_dw[i])
                        group_dot(a.rows, gs + k * a.rows, a.cols, xs + k * a.cols, 1, 0, 0, rows,
                                  my_dw[i] + k * a.rows * a.cols);
                    if (below || dx)
                        group_product(a.cols, gs + k * a.rows, a.rows, packed + packed_at[i] + k * a.rows * a.cols, NULL,
                                      r.dx + k * a.cols, length);
                }
                for (long c = 0; my_db[i] && c < a.m; c++) my_db[i][c] += plane_sum(r.y_of[i][c], rows);
                if (below)
                    for (long c = 0; c < a.n; c++)
                        derivative_row(layers[i - 1].act, r.y_of[i - 1][c], r.dx_of[i][c], r.x_of[i][c], length, NULL);
            }
            if (dx) give(dx, layers[lowest].n, b, first, rows, r.dx_of[lowest], NOTHING, &r);
        }
        for (long i = lowest; i < count; i++) add_shares(all[i]);
        free(r.pointers);
    }
    return failed;
}

/* Inputs whose channels are innermost: rows of a batch, pixels of an image in channels-last format. They are turned into
 * planes panel by panel, as many lines of positions as a core's cache holds, all channels of them. */

#include "moments.h"
#include "panel.h"

/* Mean and squares of the positions of a panel that count. */
static void note_moments(const panel *p, moments *by_channel) {
    long width = p->image_size.width, joined = width == p->b.pitch; /* lines without a gap */
    for (long i = 0; i < p->of.positions; i++)
        if (p->of.order[i] >= 0)
            merge_moments(by_channel + p->of.order[i],
                          run_moments(p->planes[i], joined ? 1 : p->count, joined ? p->count * width : width, p->b.pitch));
}

/* y = act(product); `derivatives`, if not NULL, become those of `act`, `mean` and `variance` those of the product's channels.
 * A norm by averages comes before `act`. */
int rows_forward(const float *x, const float *w, const float *bias, float *y, long batch, long n, long m, AXIS(y), AXIS(x),
                 long groups, long rows, long cols, const int *in, const int *out, int x_columns, int y_columns,
                 long lines, int threads, int act, float *derivatives, float *mean, float *variance, NORM) {
    geometry f = GEOMETRY(batch);
    extent inner = inner_extent(f), outer = outer_extent(f);
    border b = make_border(f, outer.width);
    phases parts = phases_of(f, 0);
    shape s = {groups, rows, cols, f.y.kernel * f.x.kernel};
    matrix source = {(float *)x, n, x_columns, in, groups * cols}, result = {y, m, y_columns, out, groups * rows};
    long bands = (outer.height + lines - 1) / lines, count = cols * s.taps, size = rows * count;
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
        panel from, to, kept;
        matrix beside = {derivatives, m, y_columns, out, groups * rows};
        const float **taps = malloc(groups * count * sizeof *taps);
        long *shifts = malloc(s.taps * sizeof *shifts);
        failed = open_panel(&from, FIRST, source, inner, b, &parts, lines) |
                 open_panel(&to, THIRD, result, outer, bare(b), &whole, lines) |
                 open_panel(&kept, SECOND, beside, outer, bare(b), &whole, derivatives ? lines : 0) | !taps | !shifts;
#pragma omp for
        for (long g = 0; g < groups; g++) {
            lay_out(w + g * size, s, packed + g * size);
            if (average) multiply_tiles(packed + g * size, s, factors + g * rows);
        }
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            long image = unit / bands, first = unit % bands * lines, high = MIN(lines, outer.height - first);
            move_panel(&from, image, first, high), move_panel(&to, image, first, high);
            read_panel(&from);
            tap_offsets(f, b, &parts, from.region, shifts);
            tap_table(from.planes, groups * cols, shifts, s.taps, taps);
            long length = high * b.pitch;
            for (long g = 0; g < groups; g++)
                group_product(rows, taps + g * count, count, packed + g * size, shifted ? offsets + g * rows : NULL,
                              to.planes + g * rows, ROUND(length));
            if (mean) note_moments(&to, noted + omp_get_thread_num() * m);
            if (derivatives) move_panel(&kept, image, first, high);
            for (long i = 0; y_columns && act && i < groups * rows; i++)
                activate_run(act, to.planes[i], derivatives ? kept.planes[i] : NULL, to.planes[i], length);
            write_panel(&to, act, derivatives ? &kept : NULL);
            if (derivatives && y_columns) write_panel(&kept, NOTHING, NULL);
        }
        STREAMED();
        close_panel(&from), close_panel(&to), close_panel(&kept), free(taps), free(shifts);
    }
    if (mean && !failed) finish_moments(noted, threads, m, mean, variance);
    free(noted);
    return failed;
}

/* Read gradients of the result, turned into those of the product `z` while they are rows. */
static void read_derivatives(panel *p, const float *z, int act, const float *numbers, float *rows) {
    long channels = p->of.channels;
    for (long i = 0; i < p->filled; i += V) {
        float *pixels[V];
        for (long a = 0; a < V; a++) {
            float *pixel = p->pixels[i + a];
            pixels[a] = pixel;
            if (pixel == p->spare) continue;
            pixels[a] = rows + a * channels;
            derivative_row(act, pixels[a], pixel, z + (pixel - p->of.data), channels, numbers);
        }
        gather_some(pixels, V, channels, p->by_channel, i);
    }
}

/* Gradients of the result, rows of a batch, in place, to those of the product that `values` holds. */
static void derivative_panel(panel *p, const panel *values, int act, const float *numbers) {
    for (long i = 0; i < p->of.positions; i++) {
        long channel = p->of.order[i];
        if (channel < 0) continue;
        coefficients c = channel_numbers(numbers, p->of.channels, channel);
        derivative_run(act, p->planes[i], values->planes[i], p->count, numbers ? &c : NULL);
    }
}

/* Gradients; `dx`, `dw` and `db` may be NULL. If `z` is not NULL, `g` is the gradient of act(..) and is taken through it first, with the `numbers` of every channel if there are any. */
int rows_backward(const float *g, const float *x, const float *w, float *dx, float *dw, float *db, long batch, long n,
                  long m, AXIS(y), AXIS(x), long groups, long rows, long cols, const int *in, const int *out,
                  int g_columns, int x_columns, int dx_columns, long lines, int threads, const float *z, int z_columns,
                  int act, const float *numbers) {
    geometry f = GEOMETRY(batch);
    extent inner = inner_extent(f), outer = outer_extent(f);
    border b = make_border(f, span(f.x)), around = turned(b);
    phases met = phases_of(f, 0), all = phases_of(f, 1);
    shape s = {groups, rows, cols, f.y.kernel * f.x.kernel};
    matrix source = {(float *)x, n, x_columns, in, groups * cols}, top_of = {(float *)g, m, g_columns, out, groups * rows};
    matrix result = {dx, n, dx_columns, in, groups * cols};
    long height = span(f.y), bands = (height + lines - 1) / lines, size = rows * cols * s.taps, positions = groups * cols;
    float *packed = scratch(PACKED, groups * size);
    shares shared = make_shares(PARTS, dw, db, groups * size, m, threads);
    int failed = !packed || !shared.parts;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int apart = z && (g_columns || z_columns); /* not both rows */
        panel from, top, to, values;
        matrix before = {(float *)z, m, z_columns, out, groups * rows};
        const float **taps = malloc((positions + rows) * s.taps * sizeof *taps), **back = taps + positions * s.taps;
        float **centre = malloc((groups * rows + cols) * sizeof *centre), **written = centre + groups * rows;
        float *derivatives = scratch(FIFTH, V * m);
        int *order = malloc(s.taps * sizeof *order);
        long *shifts = malloc(2 * s.taps * sizeof *shifts), *inner_shifts = shifts + s.taps, start[WIDEST * WIDEST + 1];
        failed = open_panel(&from, FIRST, source, inner, b, &met, lines) |
                 open_panel(&top, SECOND, top_of, outer, around, &whole, lines) |
                 open_panel(&to, THIRD, result, inner, bare(b), &all, lines) |
                 open_panel(&values, FOURTH, before, outer, around, &whole, apart ? lines : 0) | !taps | !centre |
                 !derivatives | !order | !shifts;
        top.own = apart;
        /* What no output has seen may be anything, and would meet gradients that are zero. */
        from.high = reach(f.y), from.wide = reach(f.x);
        if (!failed) back_taps(f, around, &all, order, shifts, start);
#pragma omp for
        for (long k = 0; k < groups; k++)
            for (long part = 0; dx && !failed && part < all.count; part++)
                lay_out_back(w + k * size, s, order + start[part], start[part + 1] - start[part],
                             packed + k * size + start[part] * rows * cols);
        float *my_dw = own_share(shared, 0), *my_db = own_share(shared, 1);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            long image = unit / bands, first = unit % bands * lines, high = MIN(lines, height - first);
            move_panel(&from, image, first, high), move_panel(&top, image, first, high);
            if (apart)
                read_panel(&top), move_panel(&values, image, first, high), read_panel(&values),
                    derivative_panel(&top, &values, act, numbers);
            else if (z)
                read_derivatives(&top, z, act, numbers, derivatives);
            else
                read_panel(&top);
            long length = high * b.pitch;
            for (long i = 0; i < groups * rows; i++) centre[i] = top.planes[i] + first_of(around);
            if (dw) {
                read_panel(&from);
                tap_offsets(f, b, &met, from.region, inner_shifts);
                tap_table(from.planes, positions, inner_shifts, s.taps, taps);
            }
            if (dx) move_panel(&to, image, first, high);
            for (long k = 0; k < groups; k++) {
                const float *const *gs = (const float *const *)centre + k * rows;
                for (long part = 0; dx && part < all.count; part++) {
                    long count = start[part + 1] - start[part];
                    tap_table(top.planes + k * rows, rows, shifts + start[part], count, back);
                    for (long j = 0; j < cols; j++) written[j] = to.planes[k * cols + j] + part * to.region;
                    group_product(cols, back, rows * count, packed + k * size + start[part] * rows * cols, NULL, written,
                                  ROUND(length));
                }
                if (dw)
                    group_dot(rows, gs, cols * s.taps, taps + k * cols * s.taps, 1, 0, 0, length, my_dw + k * size);
                if (db)
                    for (long i = 0; i < rows; i++) if (out[k * rows + i] >= 0) my_db[out[k * rows + i]] += plane_sum(gs[i], length);
            }
            if (dx) write_panel(&to, NOTHING, NULL);
        }
        STREAMED();
        add_shares(shared);
        close_panel(&from), close_panel(&top), close_panel(&to), close_panel(&values);
        free(taps), free(centre), free(order), free(shifts);
    }
    return failed;
}

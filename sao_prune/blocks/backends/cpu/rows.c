/* Inputs whose channels are innermost: rows of a batch, pixels of an image in channels-last format. They are turned into
 * planes panel by panel, as many lines of positions as a core's cache holds, all channels of them. */

#include "moments.h"
#include "panel.h"

/* Mean and squares of the positions of a panel that count. */
static void note_moments(const panel *p, moments *by_channel) {
    long width = p->f.width, joined = width == p->pitch; /* lines without a gap */
    for (long i = 0; i < p->of.positions; i++)
        if (p->of.order[i] >= 0)
            merge_moments(by_channel + p->of.order[i],
                          run_moments(p->planes[i], joined ? 1 : p->count, joined ? p->count * width : width, p->pitch));
}

/* y = act(product); `derivatives`, if not NULL, become those of `act`, `mean` and `variance` those of the product's channels. */
int rows_forward(const float *x, const float *w, const float *bias, float *y, long batch, long n, long m, long height,
                 long width, long kernel_height, long kernel_width, long dilation_height, long dilation_width,
                 long groups, long rows, long cols, const int *in, const int *out, int x_columns, int y_columns,
                 long lines, int threads, int act, float *derivatives, float *mean, float *variance) {
    geometry f = {batch, height, width, kernel_height, kernel_width, dilation_height, dilation_width};
    border b = make_border(f);
    shape s = {groups, rows, cols, kernel_height * kernel_width};
    matrix source = {(float *)x, n, x_columns, in, groups * cols}, result = {y, m, y_columns, out, groups * rows};
    long bands = (height + lines - 1) / lines, count = cols * s.taps, size = rows * count;
    float *packed = scratch(PACKED, groups * (size + rows)), *offsets = packed + groups * size;
    moments *noted = mean ? calloc(threads * m, sizeof *noted) : NULL;
    int failed = !packed || (mean && !noted);
    if (failed) return free(noted), 1;
    if (bias) by_position(bias, out, groups * rows, offsets);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        panel from, to, kept;
        matrix beside = {derivatives, m, y_columns, out, groups * rows};
        const float **taps = malloc(groups * count * sizeof *taps);
        failed = open_panel(&from, FIRST, source, f, b, 1, lines) | open_panel(&to, THIRD, result, f, b, 0, lines) |
                 open_panel(&kept, SECOND, beside, f, b, 0, derivatives ? lines : 0) | !taps;
#pragma omp for
        for (long g = 0; g < groups; g++) lay_out(w + g * size, s, 0, packed + g * size);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            long image = unit / bands, first = unit % bands * lines;
            move_panel(&from, image, first), move_panel(&to, image, first);
            read_panel(&from);
            tap_table(from.planes, groups * cols, f, b, taps);
            long length = from.count * b.pitch;
            for (long g = 0; g < groups; g++)
                group_product(rows, taps + g * count, count, packed + g * size, bias ? offsets + g * rows : NULL,
                              to.planes + g * rows, ROUND(length));
            if (mean) note_moments(&to, noted + omp_get_thread_num() * m);
            if (derivatives) move_panel(&kept, image, first);
            for (long i = 0; y_columns && act && i < groups * rows; i++)
                activate_run(act, to.planes[i], derivatives ? kept.planes[i] : NULL, to.planes[i], length);
            write_panel(&to, act, derivatives ? &kept : NULL);
            if (derivatives && y_columns) write_panel(&kept, NOTHING, NULL);
        }
        STREAMED();
        close_panel(&from), close_panel(&to), close_panel(&kept), free(taps);
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

/* Gradients of the result, in place, to those of the product that `values` holds. */
static void derivative_panel(panel *p, const panel *values, int act, const float *numbers) {
    geometry f = p->f;
    long start = MAX(p->first - p->top, 0), stop = MIN(p->first + p->count + p->top, f.height);
    long lines = stop - start, width = f.width, offset = (start - p->first + p->top) * p->pitch + p->left;
    if (width == p->pitch) width *= lines, lines = 1;
    for (long i = 0; i < p->of.positions; i++) {
        long channel = p->of.order[i];
        if (channel < 0) continue;
        coefficients c = channel_numbers(numbers, p->of.channels, channel);
        for (long line = 0; line < lines; line++) {
            long at = offset + line * p->pitch;
            derivative_run(act, p->planes[i] + at, values->planes[i] + at, width, numbers ? &c : NULL);
        }
    }
}

/* Gradients; `dx`, `dw` and `db` may be NULL. If `z` is not NULL, `g` is the gradient of act(..) and is taken through it first, with the `numbers` of every channel if there are any. */
int rows_backward(const float *g, const float *x, const float *w, float *dx, float *dw, float *db, long batch, long n,
                  long m, long height, long width, long kernel_height, long kernel_width, long dilation_height,
                  long dilation_width, long groups, long rows, long cols, const int *in, const int *out, int g_columns,
                  int x_columns, int dx_columns, long lines, int threads, const float *z, int z_columns, int act,
                  const float *numbers) {
    geometry f = {batch, height, width, kernel_height, kernel_width, dilation_height, dilation_width};
    border b = make_border(f);
    shape s = {groups, rows, cols, kernel_height * kernel_width};
    matrix source = {(float *)x, n, x_columns, in, groups * cols}, outer = {(float *)g, m, g_columns, out, groups * rows};
    matrix result = {dx, n, dx_columns, in, groups * cols};
    long bands = (height + lines - 1) / lines, size = rows * cols * s.taps, shift = b.top * b.pitch + b.left;
    float *packed = scratch(PACKED, groups * size);
    shares all = make_shares(PARTS, dw, db, groups * size, m, threads);
    int failed = !packed || !all.parts;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int apart = z && (g_columns || z_columns); /* not both rows */
        panel from, top, to, values;
        matrix before = {(float *)z, m, z_columns, out, groups * rows};
        const float **taps = malloc(groups * (rows + cols) * s.taps * sizeof *taps), **back = taps + groups * cols * s.taps;
        float **centre = malloc(groups * rows * sizeof *centre), *derivatives = scratch(FIFTH, V * m);
        failed = open_panel(&from, FIRST, source, f, b, 1, lines) | open_panel(&top, SECOND, outer, f, b, 1, lines) |
                 open_panel(&to, THIRD, result, f, b, 0, lines) |
                 open_panel(&values, FOURTH, before, f, b, 1, apart ? lines : 0) | !taps | !centre | !derivatives;
        top.own = apart;
#pragma omp for
        for (long k = 0; k < groups; k++)
            if (dx) lay_out(w + k * size, s, 1, packed + k * size);
        float *my_dw = own_share(all, 0), *my_db = own_share(all, 1);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            long image = unit / bands, first = unit % bands * lines;
            move_panel(&from, image, first), move_panel(&top, image, first), move_panel(&to, image, first);
            if (apart)
                read_panel(&top), move_panel(&values, image, first), read_panel(&values),
                    derivative_panel(&top, &values, act, numbers);
            else if (z)
                read_derivatives(&top, z, act, numbers, derivatives);
            else
                read_panel(&top);
            tap_table(top.planes, groups * rows, f, b, back);
            for (long i = 0; i < groups * rows; i++) centre[i] = top.planes[i] + shift;
            if (dw) read_panel(&from), tap_table(from.planes, groups * cols, f, b, taps);
            long length = from.count * b.pitch;
            for (long k = 0; k < groups; k++) {
                const float *const *gs = (const float *const *)centre + k * rows;
                if (dx)
                    group_product(cols, back + k * rows * s.taps, rows * s.taps, packed + k * size, NULL,
                                  to.planes + k * cols, ROUND(length));
                if (dw)
                    group_dot(rows, gs, cols * s.taps, taps + k * cols * s.taps, 1, 0, 0, length, my_dw + k * size);
                if (db)
                    for (long i = 0; i < rows; i++) if (out[k * rows + i] >= 0) my_db[out[k * rows + i]] += plane_sum(gs[i], length);
            }
            if (dx) write_panel(&to, NOTHING, NULL);
        }
        STREAMED();
        add_shares(all);
        close_panel(&from), close_panel(&top), close_panel(&to), close_panel(&values), free(taps), free(centre);
    }
    return failed;
}

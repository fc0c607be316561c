/* Two linear layers and the activation between them, panel by panel: what is between never leaves the cache, and the
 * backward pass computes it again. */

#include "panel.h"

/* The hidden channels of a panel, one plane after the other, and behind them one of zeros and one that nobody reads. */
typedef struct {
    float *planes, *derivatives;
    long channels, pitch;
} hidden;

static int open_hidden(hidden *h, long channels, long lines, int with_derivatives) {
    *h = (hidden){.channels = channels, .pitch = ROUND(lines) + V};
    h->planes = scratch(FOURTH, (channels * (1 + with_derivatives) + 2) * h->pitch);
    if (!h->planes) return 1;
    h->derivatives = h->planes + (channels + 2) * h->pitch;
    memset(h->planes + channels * h->pitch, 0, 2 * h->pitch * sizeof(float));
    return 0;
}

/* The plane of every position whose channel `order` tells; those of none read zeros, and what is written is lost. */
static void hidden_table(hidden h, const int *order, long positions, int written, float **table) {
    for (long i = 0; i < positions; i++)
        table[i] = h.planes + (order[i] < 0 ? h.channels + written : order[i]) * h.pitch;
}

/* One of the two layers. */
typedef struct {
    shape s;
    const int *in, *out;
    long sources, results, size; /* positions of its inputs and of its outputs; weights of a group */
} half;

static half make_half(long groups, long rows, long cols, const int *in, const int *out) {
    return (half){{groups, rows, cols, 1}, in, out, groups * cols, groups * rows, rows * cols};
}

static void lay_out_half(half a, const float *w, int back, float *packed) {
#pragma omp for
    for (long k = 0; k < a.s.groups; k++)
        if (back)
            lay_out_back(w + k * a.size, a.s, one_tap, 1, packed + k * a.size);
        else
            lay_out(w + k * a.size, a.s, packed + k * a.size);
}

static void half_product(half a, float *const *x, const float *packed, const float *bias, float *const *y, long length) {
    for (long k = 0; k < a.s.groups; k++)
        group_product(a.s.rows, (const float *const *)x + k * a.s.cols, a.s.cols, packed + k * a.size,
                      bias ? bias + k * a.s.rows : NULL, y + k * a.s.rows, length);
}

static void half_back(half a, float *const *g, const float *packed, float *const *dx, long length) {
    for (long k = 0; k < a.s.groups; k++)
        group_product(a.s.cols, (const float *const *)g + k * a.s.rows, a.s.rows, packed + k * a.size, NULL,
                      dx + k * a.s.cols, length);
}

static void half_sums(half a, float *const *g, float *const *x, long length, float *dw, float *db) {
    for (long k = 0; dw && k < a.s.groups; k++)
        group_dot(a.s.rows, (const float *const *)g + k * a.s.rows, a.s.cols, (const float *const *)x + k * a.s.cols, 1,
                  0, 0, length, dw + k * a.size);
    for (long i = 0; db && i < a.results; i++)
        if (a.out[i] >= 0) db[a.out[i]] += plane_sum(g[i], length);
}

/* y = w2 act(w1 x + b1) + b2 for images of `height` positions that lie as rows or, `columns`, as planes. */
int mlp_forward(const float *x, const float *w1, const float *b1, const float *w2, const float *b2, float *y,
                 long batch, long height, long n, long middle, long m, long groups1, long rows1, long cols1,
                 const int *in1, const int *out1, long groups2, long rows2, long cols2, const int *in2, const int *out2,
                 int columns, long lines, int threads, int act) {
    geometry f = ROWS(batch, height);
    extent size = inner_extent(f);
    border b = make_border(f, 1);
    half one = make_half(groups1, rows1, cols1, in1, out1), two = make_half(groups2, rows2, cols2, in2, out2);
    matrix source = {(float *)x, n, columns, in1, one.sources}, result = {y, m, columns, out2, two.results};
    long bands = (height + lines - 1) / lines, size1 = groups1 * one.size, size2 = groups2 * two.size;
    float *packed1 = scratch(PACKED, size1 + size2 + one.results + two.results), *packed2 = packed1 + size1;
    float *bias1 = packed2 + size2, *bias2 = bias1 + one.results;
    int failed = !packed1;
    if (failed) return 1;
    if (b1) by_position(b1, out1, one.results, bias1);
    if (b2) by_position(b2, out2, two.results, bias2);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        panel from, to;
        hidden h;
        float **write = malloc((one.results + two.sources) * sizeof *write), **read = write + one.results;
        failed = open_panel(&from, FIRST, source, size, b, &whole, lines) | open_panel(&to, THIRD, result, size, b, &whole, lines) |
                 open_hidden(&h, middle, lines, 0) | !write;
        if (!failed) hidden_table(h, out1, one.results, 1, write), hidden_table(h, in2, two.sources, 0, read);
        lay_out_half(one, w1, 0, packed1), lay_out_half(two, w2, 0, packed2);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            long image = unit / bands, line = unit % bands * lines, high = MIN(lines, height - line);
            move_panel(&from, image, line, high), move_panel(&to, image, line, high);
            read_panel(&from);
            long length = ROUND(from.count);
            half_product(one, from.planes, packed1, b1 ? bias1 : NULL, write, length);
            for (long c = 0; c < middle; c++)
                activate_run(act, h.planes + c * h.pitch, NULL, h.planes + c * h.pitch, length);
            half_product(two, read, packed2, b2 ? bias2 : NULL, to.planes, length);
            write_panel(&to, NOTHING, NULL);
        }
        STREAMED();
        close_panel(&from), close_panel(&to), free(write);
    }
    return failed;
}

/* Gradients; all but `g`, `x`, the weights and `b1` are written, or NULL. */
int mlp_backward(const float *g, const float *x, const float *w1, const float *b1, const float *w2, float *dx,
                  float *dw1, float *db1, float *dw2, float *db2, long batch, long height, long n, long middle, long m,
                  long groups1, long rows1, long cols1, const int *in1, const int *out1, long groups2, long rows2,
                  long cols2, const int *in2, const int *out2, int columns, long lines, int threads, int act) {
    geometry f = ROWS(batch, height);
    extent size = inner_extent(f);
    border b = make_border(f, 1);
    half one = make_half(groups1, rows1, cols1, in1, out1), two = make_half(groups2, rows2, cols2, in2, out2);
    matrix source = {(float *)x, n, columns, in1, one.sources}, outer = {(float *)g, m, columns, out2, two.results};
    matrix result = {dx, n, columns, in1, one.sources};
    long bands = (height + lines - 1) / lines, size1 = groups1 * one.size, size2 = groups2 * two.size;
    float *packed1 = scratch(PACKED, 2 * size1 + size2 + one.results), *back1 = packed1 + size1;
    float *back2 = back1 + size1, *bias1 = back2 + size2;
    shares first = make_shares(PARTS, dw1, db1, size1, middle, threads);
    shares second = make_shares(MORE_PARTS, dw2, db2, size2, m, threads);
    int failed = !packed1 || !first.parts || !second.parts;
    if (failed) return 1;
    if (b1) by_position(b1, out1, one.results, bias1);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        panel from, top, to;
        hidden h;
        float **write = malloc((2 * one.results + 2 * two.sources) * sizeof *write), **grads = write + one.results;
        float **read = grads + one.results, **down = read + two.sources;
        failed = open_panel(&from, FIRST, source, size, b, &whole, lines) | open_panel(&top, SECOND, outer, size, b, &whole, lines) |
                 open_panel(&to, THIRD, result, size, b, &whole, lines) | open_hidden(&h, middle, lines, 1) | !write;
        if (!failed) {
            hidden_table(h, out1, one.results, 1, write), hidden_table(h, out1, one.results, 0, grads);
            hidden_table(h, in2, two.sources, 0, read), hidden_table(h, in2, two.sources, 1, down);
        }
        lay_out_half(one, w1, 0, packed1), lay_out_half(one, w1, 1, back1), lay_out_half(two, w2, 1, back2);
        float *my_dw1 = own_share(first, 0), *my_db1 = own_share(first, 1);
        float *my_dw2 = own_share(second, 0), *my_db2 = own_share(second, 1);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            long image = unit / bands, line = unit % bands * lines, high = MIN(lines, height - line);
            move_panel(&from, image, line, high), move_panel(&top, image, line, high);
            read_panel(&from), read_panel(&top);
            long count = from.count, length = ROUND(count);
            half_product(one, from.planes, packed1, b1 ? bias1 : NULL, write, length);
            for (long c = 0; c < middle; c++)
                activate_run(act, h.planes + c * h.pitch, h.derivatives + c * h.pitch, h.planes + c * h.pitch, length);
            half_sums(two, top.planes, read, count, my_dw2, my_db2);
            half_back(two, top.planes, back2, down, length);
            for (long c = 0; c < middle; c++)
                derivative_run(KNOWN, h.planes + c * h.pitch, h.derivatives + c * h.pitch, length, NULL);
            half_sums(one, grads, from.planes, count, my_dw1, my_db1);
            if (!dx) continue;
            move_panel(&to, image, line, high);
            half_back(one, grads, back1, to.planes, length);
            write_panel(&to, NOTHING, NULL);
        }
        STREAMED();
        add_shares(first), add_shares(second);
        close_panel(&from), close_panel(&top), close_panel(&to), free(write);
    }
    return failed;
}

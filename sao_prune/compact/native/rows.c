/* Inputs whose channels are innermost: rows of a batch, pixels of an image in channels-last format. They are turned into
 * planes panel by panel, as many lines of positions as a core's cache holds, all channels of them. */

#include "inner.h"
#include "moments.h"

#define LARGE (1L << 19) /* floats of a result that no cache keeps until it is read */

/* Past the caches, to an aligned address: what is written need not be read first. */
#if defined(__AVX512F__)
#define STREAM(p, v) _mm512_stream_ps(p, (__m512)(v))
#elif defined(__AVX__)
#define STREAM(p, v) _mm256_stream_ps(p, (__m256)(v))
#else
#define STREAM STORE
#endif
#if defined(__AVX__)
#define STREAMED() _mm_sfence()
#else
#define STREAMED()
#endif

#define STAGE(h) UNROLL for (int i = 0; i < V; i++) if (!(i & h)) SWAP(r[i], r[i + h], h)

#if V == 16
#define STAGES STAGE(8) STAGE(4) STAGE(2) STAGE(1)
#elif V == 8
#define STAGES STAGE(4) STAGE(2) STAGE(1)
#else
#define STAGES STAGE(2) STAGE(1)
#endif

/* Row `i` of a square of V to column `i` of another, activated, and if BOTH its slopes to one more: their rows start at
 * t[0], t[1], .. and u[0], u[1], .. plus `shift`. */
#define DEFINE_SQUARE(NAME, STORE, ACT, BOTH)                                                                         \
    static void NAME(float *const *x, long x_shift, float *const *t, float *const *u, long shift) {                   \
        vec r[V];                                                                                                     \
        UNROLL for (int i = 0; i < V; i++) r[i] = LOAD(x[i] + x_shift);                                               \
        STAGES                                                                                                        \
        UNROLL for (int i = 0; i < V; i++) {                                                                          \
            activated both = activate(ACT, r[i]);                                                                     \
            STORE(t[i] + shift, both.value);                                                                          \
            if (BOTH) STORE(u[i] + shift, both.slope);                                                                \
        }                                                                                                             \
    }

typedef void square_fn(float *const *, long, float *const *, float *const *, long);

#define DEFINE_SQUARES(ACT, lower)                                                                                    \
    DEFINE_SQUARE(lower##_square, STORE, ACT, 0)                                                                      \
    DEFINE_SQUARE(lower##_streamed, STREAM, ACT, 0)                                                                   \
    DEFINE_SQUARE(lower##_both, STORE, ACT, 1)                                                                        \
    DEFINE_SQUARE(lower##_both_streamed, STREAM, ACT, 1)
#define SQUARES(lower) {{lower##_square, lower##_streamed}, {lower##_both, lower##_both_streamed}}
DEFINE_SQUARES(NOTHING, plain)
DEFINE_SQUARES(RELU, relu)
DEFINE_SQUARES(GELU, gelu)
DEFINE_SQUARES(SILU, silu)
DEFINE_SQUARES(TANH, tanh)
/* By activation, whether with slopes, and whether streamed. */
static square_fn *const squares[][2][2] = {SQUARES(plain), SQUARES(relu), SQUARES(gelu), SQUARES(silu), SQUARES(tanh)};

/* planes[c][i + ..] = pixels[..][c] for up to V pixels from `i` on. */
static void gather_some(float *const *pixels, long count, long channels, float *const *planes, long i) {
    for (long c = 0; c < channels; c += V) {
        if (count == V && c + V <= channels)
            plain_square(pixels, c, planes + c, NULL, i);
        else
            for (long a = 0; a < count; a++)
                for (long b = c; b < MIN(c + V, channels); b++) planes[b][i + a] = pixels[a][b];
    }
}

/* A few pixels at a time, all channels of them: long runs of memory, few at once. */
static void gather(float *const *pixels, long count, long channels, float *const *planes) {
    for (long i = 0; i < count; i += V) gather_some(pixels + i, MIN(V, count - i), channels, planes, i);
}

/* pixels[i][c] = act(planes[c][i]), and slopes[i][c] its slope, if `slopes` is not NULL. */
static void scatter(float *const *planes, long channels, float *const *pixels, float *const *slopes, long count,
                    int stream, int act) {
    square_fn *whole = squares[act][slopes != NULL][stream != 0];
    for (long i = 0; i < count; i += V)
        for (long c = 0; c < channels; c += V) {
            if (i + V <= count && c + V <= channels)
                whole(planes + c, i, pixels + i, slopes ? slopes + i : NULL, c);
            else
                for (long a = i; a < MIN(i + V, count); a++) {
                    float *to = pixels[a] + c;
                    for (long b = c; b < MIN(c + V, channels); b++) to[b - c] = planes[b][a];
                    activate_run(act, to, slopes ? slopes[a] + c : NULL, to, MIN(V, channels - c));
                }
        }
}

typedef struct {
    float *data;
    long channels;
    int columns;      /* a matrix that lies column after column: a batch of one image of one pixel a line */
    const int *order; /* the channel of each position, or -1 */
    long positions;
} matrix;

/* Some lines of an image as planes, one for each position of a channel. Columns are used where they lie. */
typedef struct {
    matrix of;
    geometry f;
    long lines, top, left, pitch; /* with a border or, for results, room for lines of the sources' pitch */
    long first, count, filled, size;
    int own, direct, stream; /* own: never used where they lie */
    float *buffer, *spare, **planes, **by_channel, **pixels;
} panel;

static int open_panel(panel *p, int slot, matrix of, geometry f, border b, int bordered, long lines) {
    *p = (panel){.of = of, .f = f, .lines = lines, .pitch = b.pitch};
    if (bordered) p->top = b.top, p->left = b.left;
    long pixels = ROUND((lines + 2 * p->top) * p->pitch + 2 * p->left);
    p->size = pixels + V;
    size_t pointers = of.positions + of.channels + pixels, room = of.positions * p->size + of.channels;
    p->buffer = scratch(slot, room);
    p->planes = malloc(pointers * sizeof(float *));
    if (!p->buffer || !p->planes) return 1;
    p->spare = p->buffer + of.positions * p->size;
    p->stream = f.batch * f.height * f.width * of.channels >= LARGE && of.channels % V == 0 &&
                (size_t)of.data % (4 * V) == 0 && (size_t)p->spare % (4 * V) == 0;
    memset(p->spare, 0, of.channels * sizeof(float));
    for (long i = 0; i < of.positions; i++)
        if (of.order[i] < 0) memset(p->buffer + i * p->size, 0, p->size * sizeof(float));
    p->by_channel = p->planes + of.positions;
    p->pixels = p->by_channel + of.channels;
    return 0;
}

static void close_panel(panel *p) { free(p->planes); }

/* Set the panel on lines of an image; all pixels outside it are the spare one. */
static void move_panel(panel *p, long image, long first) {
    matrix m = p->of;
    geometry f = p->f;
    p->first = first;
    p->count = MIN(p->lines, f.height - first);
    p->direct = m.columns && !p->own && p->count == p->lines;
    for (long i = 0; i < m.positions; i++) {
        long channel = m.order[i];
        p->planes[i] = p->direct && channel >= 0 ? m.data + channel * f.height + first : p->buffer + i * p->size;
        if (channel >= 0) p->by_channel[channel] = p->planes[i];
    }
    if (m.columns) return;
    float **pixel = p->pixels;
    for (long line = first - p->top; line < first + p->count + p->top; line++)
        for (long column = -p->left; column < p->pitch - p->left; column++) {
            int inside = line >= 0 && line < f.height && column >= 0 && column < f.width;
            *pixel++ = inside ? m.data + ((image * f.height + line) * f.width + column) * m.channels : p->spare;
        }
    /* Zeros behind the last line too, which the outermost taps of its positions to drop meet. */
    p->filled = ROUND(pixel - p->pixels + 2 * p->left);
    while (pixel < p->pixels + p->filled) *pixel++ = p->spare;
}

static void read_panel(panel *p) {
    matrix m = p->of;
    if (p->direct) return;
    if (m.columns)
        for (long c = 0; c < m.channels; c++)
            memcpy(p->by_channel[c], m.data + c * p->f.height + p->first, p->count * sizeof(float));
    else
        gather(p->pixels, p->filled, m.channels, p->by_channel);
}

/* Columns as they are; pixels activated, with their slopes in a panel of the same form, if it is not NULL. */
static void write_panel(panel *p, int act, const panel *slopes) {
    matrix m = p->of;
    if (p->direct) return;
    if (m.columns)
        for (long c = 0; c < m.channels; c++)
            memcpy(m.data + c * p->f.height + p->first, p->by_channel[c], p->count * sizeof(float));
    else
        scatter(p->by_channel, m.channels, p->pixels, slopes ? slopes->pixels : NULL, p->filled,
                p->stream && (!slopes || slopes->stream), act);
}

/* Mean and squares of the positions of a panel that count. */
static void note_moments(const panel *p, moments *by_channel) {
    long width = p->f.width, joined = width == p->pitch; /* lines without a gap */
    for (long i = 0; i < p->of.positions; i++)
        if (p->of.order[i] >= 0)
            merge_moments(by_channel + p->of.order[i],
                          run_moments(p->planes[i], joined ? 1 : p->count, joined ? p->count * width : width, p->pitch));
}

/* y = act(product); `slopes`, if not NULL, become those of `act`, `mean` and `variance` those of the product's channels. */
int rows_forward(const float *x, const float *w, const float *bias, float *y, long batch, long n, long m, long height,
                 long width, long kernel_height, long kernel_width, long dilation_height, long dilation_width,
                 long groups, long rows, long cols, const int *in, const int *out, int x_columns, int y_columns,
                 long lines, int threads, int act, float *slopes, float *mean, float *variance) {
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
        matrix beside = {slopes, m, y_columns, out, groups * rows};
        const float **taps = malloc(groups * count * sizeof *taps);
        failed = open_panel(&from, FIRST, source, f, b, 1, lines) | open_panel(&to, THIRD, result, f, b, 0, lines) |
                 open_panel(&kept, SECOND, beside, f, b, 0, slopes ? lines : 0) | !taps;
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
            if (slopes) move_panel(&kept, image, first);
            for (long i = 0; y_columns && act && i < groups * rows; i++)
                activate_run(act, to.planes[i], slopes ? kept.planes[i] : NULL, to.planes[i], length);
            write_panel(&to, act, slopes ? &kept : NULL);
            if (slopes && y_columns) write_panel(&kept, NOTHING, NULL);
        }
        STREAMED();
        close_panel(&from), close_panel(&to), close_panel(&kept), free(taps);
    }
    if (mean && !failed) finish_moments(noted, threads, m, mean, variance);
    free(noted);
    return failed;
}

/* Read gradients of the result, turned into those of the product `z` while they are rows. */
static void read_slopes(panel *p, const float *z, int act, const float *numbers, float *rows) {
    long channels = p->of.channels;
    for (long i = 0; i < p->filled; i += V) {
        float *pixels[V];
        for (long a = 0; a < V; a++) {
            float *pixel = p->pixels[i + a];
            pixels[a] = pixel;
            if (pixel == p->spare) continue;
            pixels[a] = rows + a * channels;
            slope_row(act, pixels[a], pixel, z + (pixel - p->of.data), channels, numbers);
        }
        gather_some(pixels, V, channels, p->by_channel, i);
    }
}

/* Gradients of the result, in place, to those of the product that `values` holds. */
static void slope_panel(panel *p, const panel *values, int act, const float *numbers) {
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
            slope_run(act, p->planes[i] + at, values->planes[i] + at, width, numbers ? &c : NULL);
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
    shares all = make_shares(dw, db, groups * size, m, threads);
    int failed = !packed || !all.parts;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int apart = z && (g_columns || z_columns); /* not both rows */
        panel from, top, to, values;
        matrix before = {(float *)z, m, z_columns, out, groups * rows};
        const float **taps = malloc(groups * (rows + cols) * s.taps * sizeof *taps), **back = taps + groups * cols * s.taps;
        float **centre = malloc(groups * rows * sizeof *centre), *slopes = scratch(FIFTH, V * m);
        failed = open_panel(&from, FIRST, source, f, b, 1, lines) | open_panel(&top, SECOND, outer, f, b, 1, lines) |
                 open_panel(&to, THIRD, result, f, b, 0, lines) |
                 open_panel(&values, FOURTH, before, f, b, 1, apart ? lines : 0) | !taps | !centre | !slopes;
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
                    slope_panel(&top, &values, act, numbers);
            else if (z)
                read_slopes(&top, z, act, numbers, slopes);
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

/* Inputs whose channels are innermost: rows of a batch, pixels of an image in channels-last format. They are turned into
 * planes panel by panel, as many lines of positions as a core's cache holds, all channels of them. */

#include "inner.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

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

/* Row `i` of a square of V to column `i` of another, whose rows start at t[0], t[1], .. plus `shift`. */
#define DEFINE_SQUARE(NAME, STORE)                                                                                    \
    static inline void NAME(float *const *x, long x_shift, float *const *t, long shift) {                             \
        vec r[V];                                                                                                     \
        UNROLL for (int i = 0; i < V; i++) r[i] = LOAD(x[i] + x_shift);                                               \
        STAGES                                                                                                        \
        UNROLL for (int i = 0; i < V; i++) STORE(t[i] + shift, r[i]);                                                 \
    }

DEFINE_SQUARE(square, STORE)
DEFINE_SQUARE(streamed_square, STREAM)

/* planes[c][i] = pixels[i][c]. A few pixels at a time, all channels of them: long runs of memory, few at once. */
static void gather(float *const *pixels, long count, long channels, float *const *planes) {
    for (long i = 0; i < count; i += V)
        for (long c = 0; c < channels; c += V) {
            if (i + V <= count && c + V <= channels)
                square(pixels + i, c, planes + c, i);
            else
                for (long a = i; a < MIN(i + V, count); a++)
                    for (long b = c; b < MIN(c + V, channels); b++) planes[b][a] = pixels[a][b];
        }
}

/* pixels[i][c] = planes[c][i]. */
static void scatter(float *const *planes, long channels, float *const *pixels, long count, int stream) {
    for (long i = 0; i < count; i += V)
        for (long c = 0; c < channels; c += V) {
            if (i + V <= count && c + V <= channels)
                (stream ? streamed_square : square)(planes + c, i, pixels + i, c);
            else
                for (long a = i; a < MIN(i + V, count); a++)
                    for (long b = c; b < MIN(c + V, channels); b++) pixels[a][b] = planes[b][a];
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
    int direct, stream;
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
    p->direct = m.columns && p->count == p->lines;
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

static void write_panel(panel *p) {
    matrix m = p->of;
    if (p->direct) return;
    if (m.columns)
        for (long c = 0; c < m.channels; c++)
            memcpy(m.data + c * p->f.height + p->first, p->by_channel[c], p->count * sizeof(float));
    else
        scatter(p->by_channel, m.channels, p->pixels, p->filled, p->stream);
}

int rows_forward(const float *x, const float *w, const float *bias, float *y, long batch, long n, long m, long height,
                 long width, long kernel_height, long kernel_width, long dilation_height, long dilation_width,
                 long groups, long rows, long cols, const int *in, const int *out, int x_columns, int y_columns,
                 long lines, int threads) {
    geometry f = {batch, height, width, kernel_height, kernel_width, dilation_height, dilation_width};
    border b = make_border(f);
    shape s = {groups, rows, cols, kernel_height * kernel_width};
    matrix source = {(float *)x, n, x_columns, in, groups * cols}, result = {y, m, y_columns, out, groups * rows};
    long bands = (height + lines - 1) / lines, count = cols * s.taps, size = rows * count;
    float *packed = scratch(PACKED, groups * size);
    int failed = !packed;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        panel from, to;
        const float **taps = malloc(groups * count * sizeof *taps);
        failed = open_panel(&from, FIRST, source, f, b, 1, lines) | open_panel(&to, THIRD, result, f, b, 0, lines) | !taps;
#pragma omp for
        for (long g = 0; g < groups; g++) lay_out(w + g * size, s, 0, packed + g * size);
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            move_panel(&from, unit / bands, unit % bands * lines);
            move_panel(&to, unit / bands, unit % bands * lines);
            read_panel(&from);
            tap_table(from.planes, groups * cols, f, b, taps);
            for (long g = 0; g < groups; g++)
                group_product(rows, taps + g * count, count, packed + g * size, bias ? bias + g * rows : NULL,
                              to.planes + g * rows, ROUND(from.count * b.pitch));
            write_panel(&to);
        }
        STREAMED();
        close_panel(&from), close_panel(&to), free(taps);
    }
    return failed;
}

/* Gradients; `dx`, `dw` and `db` may be NULL. `dw` and `db` hold one part a thread, all zero before. */
int rows_backward(const float *g, const float *x, const float *w, float *dx, float *dw, float *db, long batch, long n,
                  long m, long height, long width, long kernel_height, long kernel_width, long dilation_height,
                  long dilation_width, long groups, long rows, long cols, const int *in, const int *out, int g_columns,
                  int x_columns, int dx_columns, long lines, int threads) {
    geometry f = {batch, height, width, kernel_height, kernel_width, dilation_height, dilation_width};
    border b = make_border(f);
    shape s = {groups, rows, cols, kernel_height * kernel_width};
    matrix source = {(float *)x, n, x_columns, in, groups * cols}, outer = {(float *)g, m, g_columns, out, groups * rows};
    matrix result = {dx, n, dx_columns, in, groups * cols};
    long bands = (height + lines - 1) / lines, size = rows * cols * s.taps, shift = b.top * b.pitch + b.left;
    float *packed = scratch(PACKED, groups * size);
    int failed = !packed;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        panel from, top, to;
        const float **taps = malloc(groups * (rows + cols) * s.taps * sizeof *taps), **back = taps + groups * cols * s.taps;
        float **centre = malloc(groups * rows * sizeof *centre);
        failed = open_panel(&from, FIRST, source, f, b, 1, lines) | open_panel(&top, SECOND, outer, f, b, 1, lines) |
                 open_panel(&to, THIRD, result, f, b, 0, lines) | !taps | !centre;
#pragma omp for
        for (long k = 0; k < groups; k++)
            if (dx) lay_out(w + k * size, s, 1, packed + k * size);
        float *my_dw = dw + omp_get_thread_num() * groups * size, *my_db = db + omp_get_thread_num() * groups * rows;
#pragma omp for schedule(dynamic)
        for (long unit = 0; unit < batch * bands; unit++) {
            if (failed) continue;
            long image = unit / bands, first = unit % bands * lines;
            move_panel(&from, image, first), move_panel(&top, image, first), move_panel(&to, image, first);
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
                    for (long i = 0; i < rows; i++) my_db[k * rows + i] += plane_sum(gs[i], length);
            }
            if (dx) write_panel(&to);
        }
        STREAMED();
        close_panel(&from), close_panel(&top), close_panel(&to), free(taps), free(centre);
    }
    return failed;
}

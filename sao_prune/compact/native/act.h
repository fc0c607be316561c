/* Activations and their slopes. The polynomials were fitted at Chebyshev nodes; errors are a few units in the last place
 * of a float, those of erf and of what is made of it relative to 1. NaN stays NaN. */

#pragma once

#include "vector.h"

#define INLINE static inline __attribute__((always_inline))

/* What becomes of u: an activation, or the slope of one. Slopes are taken from what was activated; from what an activation
 * gave with TANH_OF_RESULT; KNOWN ones have been kept. */
enum { NOTHING, RELU, GELU, SILU, TANH, GELU_SLOPE, SILU_SLOPE, TANH_OF_RESULT, KNOWN, ACTS };

INLINE vec choose(bits mask, vec yes, vec no) { return (vec)((mask & (bits)yes) | (~mask & (bits)no)); }
INLINE vec least(vec x, float bound) { return choose(x > bound, (vec){0} + bound, x); }
INLINE vec most(vec x, float bound) { return choose(x < bound, (vec){0} + bound, x); }

INLINE vec exponential(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    bits large = x > 88.3f, small = x < -87.3f;
    x = most(least(x, 88.3f), -87.3f);
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec q = r * 0.00139337f + 0.00836318f;
    q = q * r + 0.04166646f;
    q = q * r + 0.16666577f;
    q = q * r + 0.5f;
    vec fraction = q * (r * r) + r + 1.0f;
    bits power = (((bits)shifted - (bits)((vec){0} + magic)) + 127) << 23;
    return choose(large, (vec){0} + __builtin_inff(), choose(small, (vec){0}, fraction * (vec)power));
}

INLINE vec error_function(vec x) {
    static const float c[] = {-0.176576909f,  0.13167272f,   -0.107682786f, 0.0902449134f,  -0.0750496388f,
                              0.0597102192f,  -0.0441427961f, 0.0333419713f, -0.0265857303f, 0.0145694679f,
                              -0.00320005682f, 0.00373149194f, -0.00595134417f, 0.00238748319f};
    vec bounded = most(least(x, 4.0f), -4.0f), t = bounded * bounded * 0.125f - 1.0f, sum = (vec){0} + c[13];
    UNROLL for (int i = 12; i >= 0; i--) sum = sum * t + c[i];
    vec inside = bounded * (sum * t + 0.35353102f);
    return choose(x >= 4.0f, (vec){0} + 1.0f, choose(x <= -4.0f, (vec){0} - 1.0f, inside));
}

INLINE vec hyperbolic_tangent(vec x) {
    vec square = x * x, p = square * -0.00592775f + 0.02087635f;
    p = p * square - 0.05382427f;
    p = p * square + 0.13332583f;
    p = p * square - 0.33333327f;
    vec near = p * (square * x) + x;
    bits minus = (bits){0} + (int)0x80000000, sign = (bits)x & minus;
    vec size = (vec)((bits)x & ~minus);
    vec far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    return choose(size < 0.625f, near, (vec)((bits)far | sign));
}

INLINE vec slope(int act, vec u) {
    switch (act) {
    case RELU: return choose(u <= 0.0f, (vec){0}, (vec){0} + 1.0f);
    case GELU: return error_function(u * 0.707106781f) * 0.5f + 0.5f + u * exponential(u * u * -0.5f) * 0.398942280f;
    case SILU: {
        vec s = 1.0f / (exponential(-u) + 1.0f);
        return s * (u * (1.0f - s) + 1.0f);
    }
    case TANH: u = hyperbolic_tangent(u); /* fall through */
    case TANH_OF_RESULT: return 1.0f - u * u;
    case KNOWN: return u;
    default: return (vec){0} + 1.0f;
    }
}

INLINE vec activate(int act, vec u) {
    switch (act) {
    case RELU: return choose(u < 0.0f, (vec){0}, u);
    case GELU: return u * (error_function(u * 0.707106781f) * 0.5f + 0.5f);
    case SILU: return u / (exponential(-u) + 1.0f);
    case TANH: return hyperbolic_tangent(u);
    case GELU_SLOPE: return slope(GELU, u);
    case SILU_SLOPE: return slope(SILU, u);
    default: return u;
    }
}

/* ---- Runs of floats ------------------------------------------------------------------------------------------- */

/* Numbers that every channel has of its own: what is activated is scale z + shift, and the gradient of z is
 * outer (gradient) (slope) + inner (z - mean) + constant. */
typedef struct {
    const float *scale, *shift, *outer, *inner, *constant, *mean;
} coefficients;

/* Of one channel of `channels`; scales of all come first, then shifts, and so on. */
static coefficients channel_numbers(const float *all, long channels, long channel) {
    if (!all) return (coefficients){0};
    const float *own = all + channel;
    return (coefficients){own, own + channels, own + 2 * channels, own + 3 * channels, own + 4 * channels,
                          own + 5 * channels};
}

INLINE vec part(const float *p, long count) {
    vec r = {0};
    for (long i = 0; i < count; i++) r[i] = p[i];
    return r;
}
INLINE void keep_part(float *p, vec v, long count) {
    for (long i = 0; i < count; i++) p[i] = v[i];
}

/* A coefficient for position `p`: one for the whole run, or as many as the run has floats. */
#define COEFFICIENT(name) (vary ? (count == V ? LOAD(c.name + p) : part(c.name + p, count)) : (vec){0} + *c.name)

INLINE vec forward_step(int act, int affine, int vary, vec z, coefficients c, long p, long count) {
    return activate(act, affine ? z * COEFFICIENT(scale) + COEFFICIENT(shift) : z);
}

INLINE vec backward_step(int act, int affine, int vary, vec g, vec z, coefficients c, long p, long count) {
    if (!affine) return g * slope(act, z);
    vec through = g * slope(act, z * COEFFICIENT(scale) + COEFFICIENT(shift));
    return through * COEFFICIENT(outer) + ((z - COEFFICIENT(mean)) * COEFFICIENT(inner) + COEFFICIENT(constant));
}

INLINE void forward_run(int act, int affine, int vary, float *y, const float *z, long n, coefficients c) {
    long p = 0;
    for (; p + V <= n; p += V) STORE(y + p, forward_step(act, affine, vary, LOAD(z + p), c, p, V));
    if (p < n) keep_part(y + p, forward_step(act, affine, vary, part(z + p, n - p), c, p, n - p), n - p);
}

INLINE void backward_run(int act, int affine, int vary, float *to, const float *g, const float *z, long n,
                         coefficients c) {
    long p = 0;
    for (; p + V <= n; p += V) STORE(to + p, backward_step(act, affine, vary, LOAD(g + p), LOAD(z + p), c, p, V));
    if (p < n)
        keep_part(to + p, backward_step(act, affine, vary, part(g + p, n - p), part(z + p, n - p), c, p, n - p), n - p);
}

#define FOR_ACTS(DO)                                                                                                  \
    switch (act) {                                                                                                    \
    case RELU: DO(RELU); break;                                                                                       \
    case GELU: DO(GELU); break;                                                                                       \
    case SILU: DO(SILU); break;                                                                                       \
    case TANH: DO(TANH); break;                                                                                       \
    case GELU_SLOPE: DO(GELU_SLOPE); break;                                                                           \
    case SILU_SLOPE: DO(SILU_SLOPE); break;                                                                           \
    case TANH_OF_RESULT: DO(TANH_OF_RESULT); break;                                                                   \
    case KNOWN: DO(KNOWN); break;                                                                                     \
    default: DO(NOTHING);                                                                                             \
    }

/* The slope of an activation that is not known from its result. */
static int slope_of(int act) { return act == GELU ? GELU_SLOPE : act == SILU ? SILU_SLOPE : NOTHING; }

/* y = act(z), in place too. */
static void activate_run(int act, float *y, const float *z, long n) {
    coefficients none = {0};
#define DO(A) forward_run(A, 0, 0, y, z, n, none)
    FOR_ACTS(DO)
#undef DO
}

/* Gradients of `y` in place to those of `z`; `c` of one channel, or NULL. */
static void slope_run(int act, float *g, const float *z, long n, const coefficients *c) {
    coefficients none = {0};
    if (c) {
#define DO(A) backward_run(A, 1, 0, g, g, z, n, *c)
        FOR_ACTS(DO)
#undef DO
    } else {
#define DO(A) backward_run(A, 0, 0, g, g, z, n, none)
        FOR_ACTS(DO)
#undef DO
    }
}

/* The same for one position of all channels, to a place of its own; `numbers` of all channels, or NULL. */
static void slope_row(int act, float *to, const float *g, const float *z, long channels, const float *numbers) {
    coefficients c = channel_numbers(numbers, channels, 0);
    if (numbers) {
#define DO(A) backward_run(A, 1, 1, to, g, z, channels, c)
        FOR_ACTS(DO)
#undef DO
    } else {
#define DO(A) backward_run(A, 0, 0, to, g, z, channels, c)
        FOR_ACTS(DO)
#undef DO
    }
}

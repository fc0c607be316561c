/* Activations and their derivatives. The polynomials were fitted at Chebyshev nodes; errors are a few units in the last place
 * of a float, those of erf and of what is made of it relative to 1. NaN stays NaN. */

#pragma once

#include "vector.h"

#define INLINE static inline __attribute__((always_inline))

/* What becomes of u. Of TANH_OF_RESULT and KNOWN there is only the derivative: from what tanh gave, and one that was kept. */
enum { NOTHING, RELU, GELU, SILU, TANH, TANH_OF_RESULT, KNOWN };

INLINE vec choose(bits mask, vec yes, vec no) { return (vec)((mask & (bits)yes) | (~mask & (bits)no)); }
#if defined(__AVX512F__)
#define MIN_PS(a, b) (vec)_mm512_min_ps((__m512)(a), (__m512)(b))
#define MAX_PS(a, b) (vec)_mm512_max_ps((__m512)(a), (__m512)(b))
#elif defined(__AVX__)
#define MIN_PS(a, b) (vec)_mm256_min_ps((__m256)(a), (__m256)(b))
#define MAX_PS(a, b) (vec)_mm256_max_ps((__m256)(a), (__m256)(b))
#else
#define MIN_PS(a, b) choose(a < b, a, b)
#define MAX_PS(a, b) choose(a > b, a, b)
#endif
/* Of the instructions the second operand is what a NaN gives. */
INLINE vec within(vec x, float low, float high) { return MAX_PS((vec){0} + low, MIN_PS((vec){0} + high, x)); }

INLINE vec exponential(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec bounded = within(x, -87.3f, 88.3f);
    vec shifted = bounded * 1.44269504f + magic, n = shifted - magic;
    vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    vec q = r * 0.00139337f + 0.00836318f;
    q = q * r + 0.04166646f;
    q = q * r + 0.16666577f;
    q = q * r + 0.5f;
    vec fraction = q * (r * r) + r + 1.0f;
    bits power = (((bits)shifted - (bits)((vec){0} + magic)) + 127) << 23;
    return choose(x > 88.3f, (vec){0} + __builtin_inff(), choose(x < -87.3f, (vec){0}, fraction * (vec)power));
}

INLINE vec error_function(vec x) {
    static const float c[] = {-0.176576909f,  0.13167272f,   -0.107682786f, 0.0902449134f,  -0.0750496388f,
                              0.0597102192f,  -0.0441427961f, 0.0333419713f, -0.0265857303f, 0.0145694679f,
                              -0.00320005682f, 0.00373149194f, -0.00595134417f, 0.00238748319f};
    vec bounded = within(x, -4.0f, 4.0f), t = bounded * bounded * 0.125f - 1.0f, sum = (vec){0} + c[13];
    UNROLL for (int i = 12; i >= 0; i--) sum = sum * t + c[i];
    return within(bounded * (sum * t + 0.35353102f), -1.0f, 1.0f);
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

typedef struct {
    vec value, derivative;
} activated;

/* Inlined where only one of the two is used, the other costs nothing. */
INLINE activated activate(int act, vec u) {
    vec one = (vec){0} + 1.0f;
    switch (act) {
    case RELU: return (activated){choose(u < 0.0f, (vec){0}, u), choose(u <= 0.0f, (vec){0}, one)};
    case GELU: {
        vec share = error_function(u * 0.707106781f) * 0.5f + 0.5f;
        return (activated){u * share, u * exponential(u * u * -0.5f) * 0.398942280f + share};
    }
    case SILU: {
        vec share = 1.0f / (exponential(-u) + 1.0f);
        return (activated){u * share, share * (u * (1.0f - share) + 1.0f)};
    }
    case TANH: {
        vec result = hyperbolic_tangent(u);
        return (activated){result, 1.0f - result * result};
    }
    case TANH_OF_RESULT: return (activated){u, 1.0f - u * u};
    case KNOWN: return (activated){u, u};
    default: return (activated){u, one};
    }
}

/* ---- Runs of floats ------------------------------------------------------------------------------------------- */

/* Numbers that every channel has of its own: what is activated is scale z + shift, and the gradient of z is
 * outer (gradient) (derivative) + inner (z - mean) + constant. */
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

INLINE void keep_part(float *p, vec v, long count) {
    for (long i = 0; i < count; i++) p[i] = v[i];
}

/* A coefficient for position `p`: one for the whole run, or as many as the run has floats. */
#define COEFFICIENT(name) (vary ? (count == V ? LOAD(c.name + p) : part(c.name + p, count)) : (vec){0} + *c.name)

INLINE vec forward_step(int act, int affine, int vary, vec z, coefficients c, long p, long count) {
    return activate(act, affine ? z * COEFFICIENT(scale) + COEFFICIENT(shift) : z).value;
}

INLINE vec backward_step(int act, int affine, int vary, vec g, vec z, coefficients c, long p, long count) {
    if (!affine) return g * activate(act, z).derivative;
    vec through = g * activate(act, z * COEFFICIENT(scale) + COEFFICIENT(shift)).derivative;
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
    case TANH_OF_RESULT: DO(TANH_OF_RESULT); break;                                                                   \
    case KNOWN: DO(KNOWN); break;                                                                                     \
    default: DO(NOTHING);                                                                                             \
    }

INLINE void both_run(int act, float *y, float *derivatives, const float *z, long n) {
    long p = 0;
    for (; p + V <= n; p += V) {
        activated both = activate(act, LOAD(z + p));
        STORE(y + p, both.value), STORE(derivatives + p, both.derivative);
    }
    if (p == n) return;
    activated both = activate(act, part(z + p, n - p));
    keep_part(y + p, both.value, n - p), keep_part(derivatives + p, both.derivative, n - p);
}

/* y = act(z), in place too, and the derivatives there if they are wanted. */
static void activate_run(int act, float *y, float *derivatives, const float *z, long n) {
    coefficients none = {0};
    if (derivatives) {
#define DO(A) both_run(A, y, derivatives, z, n)
        FOR_ACTS(DO)
#undef DO
    } else {
#define DO(A) forward_run(A, 0, 0, y, z, n, none)
        FOR_ACTS(DO)
#undef DO
    }
}

/* Gradients of `y` in place to those of `z`; `c` of one channel, or NULL. */
static void derivative_run(int act, float *g, const float *z, long n, const coefficients *c) {
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
static void derivative_row(int act, float *to, const float *g, const float *z, long channels, const float *numbers) {
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

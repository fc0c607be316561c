/* Vectors as wide as the processor's registers. */

#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define V 16
#elif defined(__AVX__)
#define V 8
#else
#define V 4
#endif

typedef float vec __attribute__((vector_size(4 * V)));
typedef int bits __attribute__((vector_size(4 * V)));
typedef float loose __attribute__((vector_size(4 * V), aligned(4), may_alias));

#define LOAD(p) ((vec) * (const loose *)(p))
#define STORE(p, v) (*(loose *)(p) = (loose)(v))
/* The first `count` floats of a vector, the others 0; no more is read. */
static inline vec part(const float *p, long count) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(__AVX__)
    bits lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    return (vec)_mm256_maskload_ps(p, (__m256i)(lanes < (bits){0} + (int)count));
#else
    vec r = {0};
    for (long i = 0; i < count; i++) r[i] = p[i];
    return r;
#endif
}

#define UNROLL _Pragma("GCC unroll 16")
#define ROUND(n) (((n) + V - 1) / V * V)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

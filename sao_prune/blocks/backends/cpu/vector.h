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
#define UNROLL _Pragma("GCC unroll 16")
#define ROUND(n) (((n) + V - 1) / V * V)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Transposition of HQQ_LANES vectors in registers, by recursive halving. */
#ifndef HQQ_KERNELS_CPU_TRANSPOSE_H
#define HQQ_KERNELS_CPU_TRANSPOSE_H

#include "simd.h"

/* Lane i of the two results of exchanging the off-diagonal blocks of `half` lanes of (a, b). */
#define HQQ_FIRST(i, half)   ((i) & (half) ? HQQ_LANES + ((i) ^ (half)) : (i))
#define HQQ_SECOND(i, half)  ((i) & (half) ? HQQ_LANES + (i) : ((i) ^ (half)))
#define HQQ_FOUR(F, i, half) F(i, half), F((i) + 1, half), F((i) + 2, half), F((i) + 3, half)
#if HQQ_LANES == 16
#define HQQ_INDICES(F, half) \
    HQQ_FOUR(F, 0, half), HQQ_FOUR(F, 4, half), HQQ_FOUR(F, 8, half), HQQ_FOUR(F, 12, half)
#elif HQQ_LANES == 8
#define HQQ_INDICES(F, half) HQQ_FOUR(F, 0, half), HQQ_FOUR(F, 4, half)
#else
#define HQQ_INDICES(F, half) HQQ_FOUR(F, 0, half)
#endif
#if defined(__clang__)
#define HQQ_SHUFFLE(a, b, F, half) __builtin_shufflevector(a, b, HQQ_INDICES(F, half))
#else
#define HQQ_SHUFFLE(a, b, F, half) __builtin_shuffle(a, b, (hqq_ivec){HQQ_INDICES(F, half)})
#endif
#define HQQ_EXCHANGE(v, half)                                    \
    _Pragma("GCC unroll 16") for (int i = 0; i < HQQ_LANES; i++) \
    {                                                            \
        if (i & (half)) continue;                                \
        hqq_vec a = v[i], b = v[i + (half)];                     \
        v[i] = HQQ_SHUFFLE(a, b, HQQ_FIRST, half);               \
        v[i + (half)] = HQQ_SHUFFLE(a, b, HQQ_SECOND, half);     \
    }

/* v[i][j] <-> v[j][i], by recursive halving: log2(lanes) shuffles a vector. */
HQQ_ALWAYS_INLINE void hqq_vec_transpose(hqq_vec v[HQQ_LANES])
{
#if HQQ_LANES >= 16
    HQQ_EXCHANGE(v, 8)
#endif
#if HQQ_LANES >= 8
    HQQ_EXCHANGE(v, 4)
#endif
    HQQ_EXCHANGE(v, 2)
    HQQ_EXCHANGE(v, 1)
}

#endif

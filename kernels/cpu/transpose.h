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

#if HQQ_LANES == 8 && defined(__AVX2__)
/* AVX2 has no shuffle of two registers across their halves by indices: what the compiler makes
 * of HQQ_EXCHANGE takes three instructions a result. Here each takes one: 4 x 4 within the
 * halves, then the halves change places. */
HQQ_ALWAYS_INLINE void hqq_transpose_avx2(__m256 v[8])
{
    __m256 in_halves[8];
    _Pragma("GCC unroll 2") for (int i = 0; i < 8; i += 4)
    {
        __m256 a = _mm256_unpacklo_ps(v[i], v[i + 1]);
        __m256 b = _mm256_unpackhi_ps(v[i], v[i + 1]);
        __m256 c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]);
        __m256 d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
        in_halves[i] = _mm256_shuffle_ps(a, c, 0x44);
        in_halves[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        in_halves[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        in_halves[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
    {
        v[i] = _mm256_permute2f128_ps(in_halves[i], in_halves[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(in_halves[i], in_halves[i + 4], 0x31);
    }
}
#endif

/* v[i][j] <-> v[j][i], by recursive halving: log2(lanes) shuffles a vector. */
HQQ_ALWAYS_INLINE void hqq_vec_transpose(hqq_vec v[HQQ_LANES])
{
#if HQQ_LANES == 8 && defined(__AVX2__)
    hqq_transpose_avx2((__m256 *)v);
#else
#if HQQ_LANES >= 16
    HQQ_EXCHANGE(v, 8)
#endif
#if HQQ_LANES >= 8
    HQQ_EXCHANGE(v, 4)
#endif
    HQQ_EXCHANGE(v, 2)
    HQQ_EXCHANGE(v, 1)
#endif
}

#endif

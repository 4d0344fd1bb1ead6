/* The lanes of solver.h on a CPU: HQQ_LANES groups side by side in a vector. */
#ifndef HQQ_KERNELS_CPU_LANES_H
#define HQQ_KERNELS_CPU_LANES_H

#include <math.h>

#include "simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef hqq_vec hqq_lane;
typedef hqq_ivec hqq_lane_mask;

static inline hqq_lane hqq_lane_set(float x)
{
    return hqq_vec_set1(x);
}

static inline hqq_lane hqq_lane_min(hqq_lane a, hqq_lane b)
{
#if defined(__AVX512F__)
    return (hqq_lane)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (hqq_lane)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (hqq_lane)_mm_min_ps((__m128)a, (__m128)b);
#else
    return hqq_vec_select(a < b, a, b);
#endif
}

static inline hqq_lane hqq_lane_max(hqq_lane a, hqq_lane b)
{
#if defined(__AVX512F__)
    return (hqq_lane)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (hqq_lane)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (hqq_lane)_mm_max_ps((__m128)a, (__m128)b);
#else
    return hqq_vec_select(a > b, a, b);
#endif
}

static inline hqq_lane hqq_lane_abs(hqq_lane a)
{
    return (hqq_lane)((hqq_ivec)a & 0x7fffffff);
}

static inline hqq_lane hqq_lane_select(hqq_lane_mask mask, hqq_lane a, hqq_lane b)
{
    return hqq_vec_select(mask, a, b);
}

static inline int hqq_lane_any(hqq_lane_mask mask)
{
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t any = 0;
    for (int i = 0; i < HQQ_LANES; i++) any |= mask[i];
    return any != 0;
#endif
}

static inline hqq_lane hqq_lane_round_to(hqq_lane a, hqq_dtype dtype)
{
    float stored[HQQ_LANES];
    hqq_vec_store_dtype(stored, dtype, 0, a);
    return hqq_vec_load_dtype(stored, dtype, 0);
}

/* rows[i] lane j <-> rows[j] lane i, by swapping blocks of halving size. */
#if defined(__AVX512F__)
#define HQQ_SWAP_LOW_8  0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HQQ_SWAP_HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define HQQ_SWAP_LOW_4  0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HQQ_SWAP_HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define HQQ_SWAP_LOW_2  0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HQQ_SWAP_HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define HQQ_SWAP_LOW_1  0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HQQ_SWAP_HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#elif defined(__AVX2__)
#define HQQ_SWAP_LOW_4  0, 1, 2, 3, 8, 9, 10, 11
#define HQQ_SWAP_HIGH_4 4, 5, 6, 7, 12, 13, 14, 15
#define HQQ_SWAP_LOW_2  0, 1, 8, 9, 4, 5, 12, 13
#define HQQ_SWAP_HIGH_2 2, 3, 10, 11, 6, 7, 14, 15
#define HQQ_SWAP_LOW_1  0, 8, 2, 10, 4, 12, 6, 14
#define HQQ_SWAP_HIGH_1 1, 9, 3, 11, 5, 13, 7, 15
#else
#define HQQ_SWAP_LOW_2  0, 1, 4, 5
#define HQQ_SWAP_HIGH_2 2, 3, 6, 7
#define HQQ_SWAP_LOW_1  0, 4, 2, 6
#define HQQ_SWAP_HIGH_1 1, 5, 3, 7
#endif

#define HQQ_SWAP(rows, distance)                                                              \
    for (int i = 0; i < HQQ_LANES; i++)                                                       \
        if (!(i & (distance))) {                                                              \
            hqq_lane a = (rows)[i], b = (rows)[i + (distance)];                               \
            (rows)[i] = __builtin_shufflevector(a, b, HQQ_SWAP_LOW_##distance);               \
            (rows)[i + (distance)] = __builtin_shufflevector(a, b, HQQ_SWAP_HIGH_##distance); \
        }

static inline void hqq_lanes_transpose(hqq_lane rows[HQQ_LANES])
{
#if HQQ_LANES == 16
    HQQ_SWAP(rows, 8)
#endif
#if HQQ_LANES >= 8
    HQQ_SWAP(rows, 4)
#endif
    HQQ_SWAP(rows, 2)
    HQQ_SWAP(rows, 1)
}

#endif

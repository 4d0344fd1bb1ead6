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

/* One instruction in place of two. */
#if defined(__AVX512F__)
#define HQQ_LANE_RINT(a) \
    ((hqq_lane)_mm512_roundscale_ps((__m512)(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#elif defined(__AVX2__)
#define HQQ_LANE_RINT(a) \
    ((hqq_lane)_mm256_round_ps((__m256)(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#endif
#if defined(__AVX512F__)
/* One operation in place of three: rounding is two. */
#define HQQ_LANE_OFF_INTEGER(a) \
    ((hqq_lane)_mm512_reduce_ps((__m512)(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#endif

/* Rounded once. */
#if defined(__AVX512F__)
#define HQQ_LANE_ADD_PRODUCT(sum, a, b) \
    ((hqq_lane)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(sum)))
#elif defined(__AVX2__)
#define HQQ_LANE_ADD_PRODUCT(sum, a, b) \
    ((hqq_lane)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(sum)))
#endif

/* Half to even, for 0 <= a <= 2^22. */
static inline hqq_uvec hqq_lane_to_code(hqq_lane a)
{
#if defined(__AVX512F__)
    return (hqq_uvec)_mm512_cvtps_epi32((__m512)a);
#elif defined(__AVX2__)
    return (hqq_uvec)_mm256_cvtps_epi32((__m256)a);
#elif defined(__SSE2__)
    return (hqq_uvec)_mm_cvtps_epi32((__m128)a);
#else
    return (hqq_uvec)(a + 8388608.0f) - 0x4b000000u; /* 2^23 and its bits */
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

/* hqq_lane_any(a > b), by a mask of bits where there are such. */
static inline int hqq_lane_any_above(hqq_lane a, hqq_lane b)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    return hqq_lane_any(a > b);
#endif
}

static inline hqq_lane hqq_lane_round_to(hqq_lane a, hqq_dtype dtype)
{
    float stored[HQQ_LANES];
    hqq_vec_store_dtype(stored, dtype, 0, a);
    return hqq_vec_load_dtype(stored, dtype, 0);
}

#endif

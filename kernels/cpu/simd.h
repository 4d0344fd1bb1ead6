/*
 * Vectors of floats as wide as the instruction set that this file is compiled for, by GNU
 * vector extensions: plain + - * on hqq_vec, and the loads, stores and conversions below.
 * Lanes: 16 (AVX-512), 8 (AVX2), 4 (portable: SSE2, NEON, or whatever the compiler makes).
 */
#ifndef HQQ_KERNELS_CPU_SIMD_H
#define HQQ_KERNELS_CPU_SIMD_H

#include <stdint.h>
#include <string.h>

#include "dtype.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define HQQ_LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define HQQ_LANES 8
#else
#define HQQ_LANES 4
#endif

#define HQQ_ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float hqq_vec __attribute__((vector_size(HQQ_LANES * 4)));
typedef int32_t hqq_ivec __attribute__((vector_size(HQQ_LANES * 4)));
typedef uint32_t hqq_uvec __attribute__((vector_size(HQQ_LANES * 4)));

static inline hqq_vec hqq_vec_set1(float x)
{
    return x - (hqq_vec){0};
}
static inline hqq_vec hqq_vec_zero(void)
{
    return (hqq_vec){0};
}

static inline hqq_vec hqq_vec_load(const float *p)
{
    hqq_vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void hqq_vec_store(float *p, hqq_vec v)
{
    memcpy(p, &v, sizeof v);
}

/* HQQ_LANES bytes, widened. */
static inline hqq_ivec hqq_ivec_load_u8(const uint8_t *p)
{
#if defined(__AVX512F__)
    return (hqq_ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (hqq_ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return (hqq_ivec){p[0], p[1], p[2], p[3]};
#endif
}

/* HQQ_LANES int32. */
static inline hqq_ivec hqq_ivec_load_u32(const uint32_t *p)
{
    hqq_ivec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The first n lanes, 0 <= n <= HQQ_LANES; the others are 0 and nothing behind n is read. */
static inline hqq_ivec hqq_ivec_load_u8_part(const uint8_t *p, int n)
{
#if defined(__AVX512F__)
    return (hqq_ivec)_mm512_cvtepu8_epi32(
        _mm_maskz_loadu_epi8((__mmask16)_bzhi_u32(0xffff, (unsigned)n), p));
#else
    uint8_t lanes[16] = {0};
    memcpy(lanes, p, (size_t)n);
    return hqq_ivec_load_u8(lanes);
#endif
}

static inline hqq_ivec hqq_ivec_load_u32_part(const uint32_t *p, int n)
{
#if defined(__AVX512F__)
    return (hqq_ivec)_mm512_maskz_loadu_epi32((__mmask16)_bzhi_u32(0xffff, (unsigned)n), p);
#else
    uint32_t lanes[HQQ_LANES] = {0};
    memcpy(lanes, p, (size_t)n * 4);
    return hqq_ivec_load_u32(lanes);
#endif
}

static inline hqq_vec hqq_vec_from_int(hqq_ivec v)
{
    return __builtin_convertvector(v, hqq_vec);
}

static inline hqq_vec hqq_vec_load_bf16(const uint16_t *p)
{
#if defined(__AVX512F__)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (hqq_vec)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (hqq_vec)_mm256_slli_epi32(wide, 16);
#else
    hqq_uvec wide = {p[0], p[1], p[2], p[3]};
    return (hqq_vec)(wide << 16);
#endif
}

static inline hqq_vec hqq_vec_load_f16(const uint16_t *p)
{
#if defined(__AVX512F__)
    return (hqq_vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (hqq_vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    return (hqq_vec){hqq_f16_to_float(p[0]), hqq_f16_to_float(p[1]), hqq_f16_to_float(p[2]),
                     hqq_f16_to_float(p[3])};
#endif
}

/* HQQ_LANES elements from index i of an array of dtype. */
static inline hqq_vec hqq_vec_load_dtype(const void *data, hqq_dtype dtype, int64_t i)
{
    switch (dtype) {
    case HQQ_F16: return hqq_vec_load_f16((const uint16_t *)data + i);
    case HQQ_BF16: return hqq_vec_load_bf16((const uint16_t *)data + i);
    default: return hqq_vec_load((const float *)data + i);
    }
}

/* hqq_load, by the processor's own conversion where it has one. */
static inline float hqq_load_quick(const void *data, hqq_dtype dtype, int64_t i)
{
#if defined(__F16C__)
    if (dtype == HQQ_F16) return _cvtsh_ss(((const uint16_t *)data)[i]);
#endif
    return hqq_load(data, dtype, i);
}

/* Round to nearest even, as hqq_float_to_bf16 does (NaN stays NaN). */
static inline void hqq_vec_store_bf16(uint16_t *p, hqq_vec v)
{
#if defined(__AVX512BF16__)
    /* The instruction takes subnormals for zero, so it serves where there are none. */
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1)) {
        _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
        return;
    }
#endif
    hqq_uvec u = (hqq_uvec)v;
    hqq_uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
    __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    __m512i quiet = _mm512_set1_epi32(0x40);
    __m512i bits = _mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)(u >> 16), quiet);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bits));
#else
    hqq_uvec is_nan = (hqq_uvec)(v != v);
    rounded = (is_nan & (u >> 16 | 0x40)) | (~is_nan & rounded);
#if defined(__AVX2__)
    __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
    packed = _mm256_permute4x64_epi64(packed, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
#else
    for (int i = 0; i < HQQ_LANES; i++) p[i] = (uint16_t)rounded[i];
#endif
#endif
}

static inline void hqq_vec_store_f16(uint16_t *p, hqq_vec v)
{
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < HQQ_LANES; i++) p[i] = hqq_float_to_f16(v[i]);
#endif
}

static inline void hqq_vec_store_dtype(void *data, hqq_dtype dtype, int64_t i, hqq_vec v)
{
    switch (dtype) {
    case HQQ_F16: hqq_vec_store_f16((uint16_t *)data + i, v); break;
    case HQQ_BF16: hqq_vec_store_bf16((uint16_t *)data + i, v); break;
    default: hqq_vec_store((float *)data + i, v); break;
    }
}

/* The first n elements, 0 <= n <= HQQ_LANES, from index i; the other lanes are 0 and nothing
 * behind them is read. */
static inline hqq_vec hqq_vec_load_dtype_part(const void *data, hqq_dtype dtype, int64_t i,
                                              int n)
{
#if defined(__AVX512F__)
    __mmask16 mask = (__mmask16)_bzhi_u32(0xffff, (unsigned)n);
    if (dtype == HQQ_F32) return (hqq_vec)_mm512_maskz_loadu_ps(mask, (const float *)data + i);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)data + i);
    if (dtype == HQQ_F16) return (hqq_vec)_mm512_cvtph_ps(halves);
    return (hqq_vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    _Alignas(64) char lanes[HQQ_LANES * 4] = {0};
    memcpy(lanes, hqq_at(data, dtype, i), (size_t)(n * hqq_dtype_bytes(dtype)));
    return hqq_vec_load_dtype(lanes, dtype, 0);
#endif
}

/* Writes the first n lanes, 0 <= n <= HQQ_LANES, from index i and nothing behind them. */
static inline void hqq_vec_store_dtype_part(void *data, hqq_dtype dtype, int64_t i, hqq_vec v,
                                            int n)
{
    _Alignas(64) char lanes[HQQ_LANES * 4];
    hqq_vec_store_dtype(lanes, dtype, 0, v);
#if defined(__AVX512F__)
    __mmask16 mask = (__mmask16)_bzhi_u32(0xffff, (unsigned)n);
    if (dtype == HQQ_F32)
        _mm512_mask_storeu_ps((float *)data + i, mask, (__m512)v);
    else
        _mm256_mask_storeu_epi16((uint16_t *)data + i, mask,
                                 _mm256_load_si256((const __m256i *)lanes));
#else
    memcpy(hqq_at_mut(data, dtype, i), lanes, (size_t)(n * hqq_dtype_bytes(dtype)));
#endif
}

/* out [n] = the elements from index i, in fp32. */
static inline void hqq_load_floats(float *out, const void *data, hqq_dtype dtype, int64_t i,
                                   int64_t n)
{
    int64_t at = 0;
    for (; at + HQQ_LANES <= n; at += HQQ_LANES)
        hqq_vec_store(out + at, hqq_vec_load_dtype(data, dtype, i + at));
    if (at < n) {
        hqq_vec v = hqq_vec_load_dtype_part(data, dtype, i + at, (int)(n - at));
        hqq_vec_store_dtype_part(out, HQQ_F32, at, v, (int)(n - at));
    }
}

/* Per lane: mask (all ones or all zeros) ? a : b. */
static inline hqq_vec hqq_vec_select(hqq_ivec mask, hqq_vec a, hqq_vec b)
{
    return (hqq_vec)(((hqq_ivec)a & mask) | ((hqq_ivec)b & ~mask));
}

/* Sum of the lanes: the upper half onto the lower, until one is left. */
static inline float hqq_vec_sum(hqq_vec v)
{
#if defined(__AVX512F__)
    __m256 low = _mm512_castps512_ps256((__m512)v);
    __m256 sum8 = _mm256_add_ps(low, _mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
    __m256 sum8 = (__m256)v;
#endif
#if defined(__AVX2__)
    __m128 sum4 = _mm_add_ps(_mm256_castps256_ps128(sum8), _mm256_extractf128_ps(sum8, 1));
    __m128 sum2 = _mm_add_ps(sum4, _mm_movehl_ps(sum4, sum4));
    return _mm_cvtss_f32(_mm_add_ss(sum2, _mm_movehdup_ps(sum2)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

#endif

/* Runs of codes (code_runs.h) under one zero and scale, looked up as 16-bit values: the table
 * is rounded once a run, not once a weight. Included by dequantize_block.c. */
#ifndef HQQ_KERNELS_CPU_LOOK_UP_16_H
#define HQQ_KERNELS_CPU_LOOK_UP_16_H

#include "code_runs.h"
#include "decode.h"

/* What the inner loops are compiled for: constants wherever these are passed on. */
typedef enum code_kind {
    SMALL_BYTES, /* 1, 2 or 4 bits in bytes */
    WHOLE_BYTES, /* 8 bits */
    WIDE_WORDS   /* 3 bits in int32 */
} code_kind;

/* Words i to i + HQQ_LANES of a run, one a lane, its slot shifted down; bits of the slots
 * above are left in. */
HQQ_ALWAYS_INLINE hqq_ivec load_words(const hqq_run *run, code_kind kind, int64_t i)
{
    hqq_ivec v = kind == WIDE_WORDS ? hqq_ivec_load_u32((const uint32_t *)run->words + i)
                                    : hqq_ivec_load_u8((const uint8_t *)run->words + i);
    return kind == WHOLE_BYTES ? v : v >> run->shift;
}

HQQ_ALWAYS_INLINE hqq_ivec load_words_part(const hqq_run *run, code_kind kind, int64_t i, int n)
{
    hqq_ivec v = kind == WIDE_WORDS
                     ? hqq_ivec_load_u32_part((const uint32_t *)run->words + i, n)
                     : hqq_ivec_load_u8_part((const uint8_t *)run->words + i, n);
    return kind == WHOLE_BYTES ? v : v >> run->shift;
}

#if defined(__AVX512F__)
/* The table rounded to dtype, twice. normal: none of its values is subnormal. */
HQQ_ALWAYS_INLINE __m512i table_16(hqq_dtype dtype, hqq_vec table, int normal)
{
#if defined(__AVX512BF16__)
    /* the instruction takes subnormals for zero */
    if (dtype == HQQ_BF16 && normal)
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)table, (__m512)table);
#endif
    (void)normal;
    if (dtype == HQQ_F16)
        return _mm512_broadcast_i64x4(
            _mm512_cvtps_ph((__m512)table, _MM_FROUND_TO_NEAREST_INT));
    uint16_t values[16];
    hqq_vec_store_dtype(values, dtype, 0, table);
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
}

/* The values of `length` byte words' codes. The shift is by a vector: by a register's lowest
 * element it is two instructions to the processor. */
HQQ_ALWAYS_INLINE void look_up(uint16_t *out, const uint8_t *bytes, int shift, int64_t length,
                               __m512i table)
{
    __m512i by = _mm512_set1_epi16((int16_t)shift);
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + 32 <= length; i += 32) {
        __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(bytes + i)));
        words = _mm512_srlv_epi16(words, by);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(words, table));
    }
    if (i < length) {
        __mmask32 mask = _bzhi_u32(0xffffffff, (unsigned)(length - i));
        __m512i words = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, bytes + i));
        words = _mm512_srlv_epi16(words, by);
        _mm512_mask_storeu_epi16(out + i, mask, _mm512_permutexvar_epi16(words, table));
    }
}

/* A run to 16-bit values, of which the table holds each code's twice. */
HQQ_ALWAYS_INLINE void constant_run_16(uint16_t *out, hqq_dtype dtype, const hqq_run *run,
                                       code_kind kind, const hqq_decoder *d, int normal)
{
    __m512i table = table_16(dtype, d->table, normal);
    if (kind != WIDE_WORDS) {
        look_up(out, run->words, run->shift, run->length, table);
        return;
    }
    for (int64_t i = 0, length = run->length; i < length; i += 16) {
        int n = length - i < 16 ? (int)(length - i) : 16;
        __m512i words = (__m512i)load_words_part(run, kind, i, n);
        _mm512_mask_cvtepi32_storeu_epi16(out + i, (__mmask16)_bzhi_u32(0xffff, (unsigned)n),
                                          _mm512_permutexvar_epi16(words, table));
    }
}

/* Groups of byte words that follow one another: as many instructions a weight as are needed,
 * and few for each group. G and dtype are constants. */
HQQ_ALWAYS_INLINE void constant_groups_16(uint16_t *out, hqq_dtype dtype, const hqq_run *run,
                                          int nbits, const float *zero, const float *scale,
                                          int64_t groups, const int64_t G, int normal)
{
    const uint8_t *bytes = run->words;
    hqq_vec code = hqq_code_of_lane(nbits);
    for (int64_t g = 0; g < groups; g++, out += G, bytes += G) {
        hqq_vec values = (code - hqq_vec_set1(zero[g])) * hqq_vec_set1(scale[g]);
        look_up(out, bytes, run->shift, G, table_16(dtype, values, normal));
    }
}
#elif defined(__AVX2__)
/* The values of 32 codes, from the low and the high bytes of all 16 values. */
HQQ_ALWAYS_INLINE void look_up_32(uint16_t *out, __m256i codes, __m256i low, __m256i high)
{
    __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
    __m256i even = _mm256_unpacklo_epi8(l, h), odd = _mm256_unpackhi_epi8(l, h);
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
}

/* A run of byte words to 16-bit values: made for each code once, looked up byte by byte. */
HQQ_ALWAYS_INLINE void constant_run_16(uint16_t *out, hqq_dtype dtype, const hqq_run *run,
                                       int nbits, float zero, float scale)
{
    __m128i values[2]; /* of codes 0 to 7, and 8 to 15 */
    for (int i = 0; i < 2; i++) {
        hqq_vec code = hqq_code_of_lane(4) + hqq_vec_set1((float)(8 * i));
        hqq_vec value = (code - hqq_vec_set1(zero)) * hqq_vec_set1(scale);
        hqq_vec_store_dtype(&values[i], dtype, 0, value);
    }
    __m128i byte = _mm_set1_epi16(0xff);
    __m128i low =
        _mm_packus_epi16(_mm_and_si128(values[0], byte), _mm_and_si128(values[1], byte));
    __m128i high = _mm_packus_epi16(_mm_srli_epi16(values[0], 8), _mm_srli_epi16(values[1], 8));
    __m256i lows = _mm256_broadcastsi128_si256(low), highs = _mm256_broadcastsi128_si256(high);
    __m256i mask = _mm256_set1_epi8((char)hqq_max_code(nbits));
    __m128i shift = _mm_cvtsi32_si128(run->shift);
    const uint8_t *bytes = run->words;
    for (int64_t i = 0; i < run->length; i += 32) {
        uint8_t last[32] = {0};
        uint16_t values_32[32];
        int64_t n = run->length - i;
        const uint8_t *from = bytes + i;
        if (n < 32) from = memcpy(last, from, (size_t)n);
        __m256i codes = _mm256_srl_epi16(_mm256_loadu_si256((const __m256i *)from), shift);
        codes = _mm256_and_si256(codes, mask);
        look_up_32(n < 32 ? values_32 : out + i, codes, lows, highs);
        if (n < 32) memcpy(out + i, values_32, (size_t)n * 2);
    }
}
#endif

#endif

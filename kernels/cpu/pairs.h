/* Weights as pairs of bf16, for AVX-512 BF16: included only where HQQ_HAS_PAIRS. The
 * instructions take subnormals for zero, and so does what is made here. */
#ifndef HQQ_KERNELS_CPU_PAIRS_H
#define HQQ_KERNELS_CPU_PAIRS_H

#include "decode.h"
#include "simd.h"

/* Each float of sum += the products of the two bf16 in its place. */
HQQ_ALWAYS_INLINE hqq_vec hqq_dot_pairs(hqq_vec sum, __m512i a, __m512i b)
{
    return (hqq_vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

/* 32 bf16: those of `low`, then those of `high`. */
HQQ_ALWAYS_INLINE __m512i hqq_round_to_pairs(hqq_vec low, hqq_vec high)
{
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/* Two rows of 32 bf16 across: a word a column, the bf16 of row `even` and above it that of row
 * `odd`; the first 16 words to `first`, the others to `second`. */
HQQ_ALWAYS_INLINE void hqq_interleave_pairs(void *first, void *second, __m512i even,
                                            __m512i odd)
{
    typedef uint16_t lanes __attribute__((vector_size(64)));
    const __m512i low_half =
        (__m512i)(lanes){0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i high_half = _mm512_add_epi16(low_half, _mm512_set1_epi16(16));
    _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, low_half, odd));
    _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, high_half, odd));
}

/* The same from memory. */
HQQ_ALWAYS_INLINE void hqq_pair_rows(void *first, void *second, const uint16_t *even,
                                     const uint16_t *odd)
{
    hqq_interleave_pairs(first, second, _mm512_loadu_si512(even), _mm512_loadu_si512(odd));
}

/* hqq_round_to_pairs of 32 floats, which keep what is left of them. */
HQQ_ALWAYS_INLINE __m512i hqq_take_pairs(hqq_vec floats[2])
{
    uint16_t rounded[32];
    __m512i pairs = hqq_round_to_pairs(floats[0], floats[1]);
    _mm512_storeu_si512(rounded, pairs);
    floats[0] -= hqq_vec_load_bf16(rounded);
    floats[1] -= hqq_vec_load_bf16(rounded + 16);
    return pairs;
}

/* Entry i stands for code i mod 2^nbits: a look-up takes 5 bits, of which those above nbits
 * may be anything. */
HQQ_ALWAYS_INLINE __m512i hqq_pair_table(int nbits, float zero, float scale)
{
    hqq_vec table = hqq_decoder_of(nbits, 1, zero, scale).table;
    return hqq_round_to_pairs(table, table);
}

/* 32 codes of 8 bits. */
HQQ_ALWAYS_INLINE __m512i hqq_pairs_of_bytes(const uint8_t *bytes, float zero, float scale)
{
    hqq_vec low = hqq_vec_from_int(hqq_ivec_load_u8(bytes));
    hqq_vec high = hqq_vec_from_int(hqq_ivec_load_u8(bytes + 16));
    hqq_vec z = hqq_vec_set1(zero), s = hqq_vec_set1(scale);
    return hqq_round_to_pairs((low - z) * s, (high - z) * s);
}

#endif

/*
 * 32 weights to bf16 at a time, with AVX-512 BF16: what is not looked up (look_up_16.h). Beside
 * a vector of floats at a time it spares half of the conversions and of the stores.
 *
 * Its rounding instruction takes subnormals for zero: where there is one these functions write
 * nothing and return 0. Included by dequantize_block.c.
 */
#ifndef HQQ_KERNELS_CPU_DECODE_BF16_H
#define HQQ_KERNELS_CPU_DECODE_BF16_H

#include "look_up_16.h"

#if defined(__AVX512BF16__)
HQQ_ALWAYS_INLINE int any_subnormal(hqq_vec a, hqq_vec b)
{
    return (_mm512_fpclass_ps_mask((__m512)a, 0x20) |
            _mm512_fpclass_ps_mask((__m512)b, 0x20)) != 0;
}

/* From their even and their odd elements. */
HQQ_ALWAYS_INLINE int store_even_and_odd(uint16_t *out, hqq_vec even, hqq_vec odd)
{
    typedef uint16_t lanes __attribute__((vector_size(64)));
    const __m512i in_turn =
        (__m512i)(lanes){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    if (__builtin_expect(any_subnormal(even, odd), 0)) return 0;
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(in_turn, halves));
    return 1;
}

/* Byte words with a zero and a scale each, in bf16: a register of 32 is two of floats, its odd
 * elements with the even ones cleared, and the even ones shifted up. codes: the decoder of the
 * codes themselves. */
HQQ_ALWAYS_INLINE int varying_32(uint16_t *out, const uint8_t *bytes, int shift,
                                 const uint16_t *zero, const uint16_t *scale,
                                 const hqq_decoder *codes, const int by_table)
{
    const hqq_uvec high = (hqq_uvec){0} + 0xffff0000u;
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
    if (by_table) words = _mm512_srlv_epi16(words, _mm512_set1_epi16((int16_t)shift));
    hqq_uvec z = (hqq_uvec)_mm512_loadu_si512(zero), s = (hqq_uvec)_mm512_loadu_si512(scale);
    hqq_ivec even = (hqq_ivec)((hqq_uvec)words & ~high),
             odd = (hqq_ivec)((hqq_uvec)words >> 16);
    hqq_vec q_even =
        by_table ? hqq_look_up(codes->table, (hqq_ivec)words) : hqq_vec_from_int(even);
    hqq_vec q_odd = by_table ? hqq_look_up(codes->table, odd) : hqq_vec_from_int(odd);
    return store_even_and_odd(out, (q_even - (hqq_vec)(z << 16)) * (hqq_vec)(s << 16),
                              (q_odd - (hqq_vec)(z & high)) * (hqq_vec)(s & high));
}

/* 8-bit codes under one zero and scale. normal: none of the weights is subnormal. */
HQQ_ALWAYS_INLINE int constant_32(uint16_t *out, const uint8_t *bytes, hqq_vec zero,
                                  hqq_vec scale, int normal)
{
    hqq_vec low = (hqq_vec_from_int(hqq_ivec_load_u8(bytes)) - zero) * scale;
    hqq_vec high = (hqq_vec_from_int(hqq_ivec_load_u8(bytes + 16)) - zero) * scale;
    if (!normal && __builtin_expect(any_subnormal(low, high), 0)) return 0;
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    return 1;
}
#endif

#endif

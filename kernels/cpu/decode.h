/*
 * Codes to what they stand for, a vector at a time.
 *
 * By table: the values of all codes under one zero and scale are made once, and looked up by
 * the codes. The permutation ignores index bits above its own and the table repeats every
 * 2^nbits lanes, so the bits of neighbouring slots need not be masked away. AVX-512 does this
 * for up to 4 bits, AVX2 for up to 3.
 * By arithmetic: mask, convert, subtract, multiply. The floats are the same ones.
 */
#ifndef HQQ_KERNELS_CPU_DECODE_H
#define HQQ_KERNELS_CPU_DECODE_H

#include "simd.h"

#if defined(__AVX512F__)
#define HQQ_TABLE_BITS 4
#elif defined(__AVX2__)
#define HQQ_TABLE_BITS 3
#else
#define HQQ_TABLE_BITS 0
#endif

typedef struct hqq_decoder {
    hqq_vec table;       /* by table: lane i stands for code i mod 2^nbits */
    hqq_vec zero, scale; /* by arithmetic */
    hqq_ivec mask;
} hqq_decoder;

HQQ_ALWAYS_INLINE hqq_vec hqq_look_up(hqq_vec table, hqq_ivec words)
{
#if defined(__AVX512F__)
    return (hqq_vec)_mm512_permutexvar_ps((__m512i)words, (__m512)table);
#elif defined(__AVX2__)
    return (hqq_vec)_mm256_permutevar8x32_ps((__m256)table, (__m256i)words);
#else
    (void)words;
    return table;
#endif
}

/* The code that each lane of a table stands for. */
HQQ_ALWAYS_INLINE hqq_vec hqq_code_of_lane(int nbits)
{
#if HQQ_LANES == 16
    const hqq_ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif HQQ_LANES == 8
    const hqq_ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
    const hqq_ivec lane = {0, 1, 2, 3};
#endif
    return hqq_vec_from_int(lane & hqq_max_code(nbits));
}

/* by_table: a constant, at most nbits <= HQQ_TABLE_BITS. */
HQQ_ALWAYS_INLINE hqq_decoder hqq_decoder_of(int nbits, int by_table, float zero, float scale)
{
    hqq_decoder d = {.zero = hqq_vec_set1(zero), .scale = hqq_vec_set1(scale)};
    if (by_table)
        d.table = (hqq_code_of_lane(nbits) - d.zero) * d.scale;
    else
        d.mask = (hqq_ivec){0} + hqq_max_code(nbits);
    return d;
}

/* words: one a lane, the slot shifted down to bit 0; the bits above it do not matter. */
HQQ_ALWAYS_INLINE hqq_vec hqq_decode(const hqq_decoder *d, int by_table, hqq_ivec words)
{
    if (by_table) return hqq_look_up(d->table, words);
    return (hqq_vec_from_int(words & d->mask) - d->zero) * d->scale;
}

#endif

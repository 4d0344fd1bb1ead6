/* HQQ_LANES elements of the dropout mask at once: bit for bit what dropout.h says. */
#ifndef HQQ_KERNELS_CPU_DROPOUT_VECTOR_H
#define HQQ_KERNELS_CPU_DROPOUT_VECTOR_H

#include "dropout.h"
#include "simd.h"
#if defined(__SSE2__)
#include <immintrin.h>

typedef uint64_t hqq_u64vec __attribute__((vector_size(HQQ_LANES * 4)));

/* One round of HQQ_LANES / 4 Philox states. A state is four neighbouring lanes, and so are the
 * two products (one instruction) that make the next one, words in the order of their elements:
 *
 *     state        c0                  c1          c2                  c3
 *     products     low(c0 F0)          high(c0 F0) low(c2 F1)          high(c2 F1)
 *     next state   high(c2 F1) ^c1 ^k0 low(c2 F1)  high(c0 F0) ^c3 ^k1 low(c0 F0)
 */
static inline hqq_uvec hqq_philox_round(hqq_uvec state, hqq_uvec factors, hqq_uvec key)
{
    hqq_uvec odd_words = (hqq_uvec)((hqq_u64vec)state >> 32); /* c1 0 c3 0 */
#if defined(__AVX512F__)
    __m512i products = _mm512_mul_epu32((__m512i)state, (__m512i)factors);
    hqq_uvec reversed = (hqq_uvec)_mm512_shuffle_epi32(products, _MM_PERM_ABCD);
#elif defined(__AVX2__)
    __m256i products = _mm256_mul_epu32((__m256i)state, (__m256i)factors);
    hqq_uvec reversed = (hqq_uvec)_mm256_shuffle_epi32(products, _MM_SHUFFLE(0, 1, 2, 3));
#else
    __m128i products = _mm_mul_epu32((__m128i)state, (__m128i)factors);
    hqq_uvec reversed = (hqq_uvec)_mm_shuffle_epi32(products, _MM_SHUFFLE(0, 1, 2, 3));
#endif
    return reversed ^ odd_words ^ key;
}

/* The random words of the elements 4 quad, 4 quad + 1, ... */
static inline hqq_uvec hqq_dropout_words_vector(uint64_t seed, uint64_t quad)
{
    hqq_u64vec counters = {0}, factors = {0}, key = {0}, step = {0};
    for (int i = 0; i < HQQ_LANES / 2; i += 2) {
        counters[i] = quad + (uint64_t)i / 2;
        factors[i] = HQQ_PHILOX_FACTOR_0, factors[i + 1] = HQQ_PHILOX_FACTOR_1;
        key[i] = (uint32_t)seed, key[i + 1] = seed >> 32;
        step[i] = HQQ_PHILOX_KEY_0, step[i + 1] = HQQ_PHILOX_KEY_1;
    }
    hqq_uvec words = (hqq_uvec)counters, round_key = (hqq_uvec)key;
#pragma GCC unroll 10
    for (int round = 0; round < HQQ_PHILOX_ROUNDS; round++) {
        words = hqq_philox_round(words, (hqq_uvec)factors, round_key);
        round_key += (hqq_uvec)step;
    }
    return words;
}

#else

static inline hqq_uvec hqq_dropout_words_vector(uint64_t seed, uint64_t quad)
{
    uint32_t words[HQQ_LANES];
    for (int i = 0; i < HQQ_LANES; i += 4)
        hqq_dropout_words(words + i, seed, quad + (uint64_t)i / 4);
    return (hqq_uvec)hqq_ivec_load_u32(words);
}

#endif

/* hqq_dropout_factor for the elements i, i + 1, ... Costs twice as much where i is not a
 * multiple of 4, as in every second row of an odd K. */
static inline hqq_vec hqq_dropout_factors(const hqq_dropout *d, uint64_t i)
{
    hqq_uvec words = hqq_dropout_words_vector(d->seed, i / 4);
    if (__builtin_expect(i % 4 != 0, 0)) {
        uint32_t both[2 * HQQ_LANES];
        hqq_uvec next = hqq_dropout_words_vector(d->seed, i / 4 + HQQ_LANES / 4);
        memcpy(both, &words, sizeof words);
        memcpy(both + HQQ_LANES, &next, sizeof next);
        words = (hqq_uvec)hqq_ivec_load_u32(both + i % 4);
    }
    hqq_ivec keep = (hqq_ivec)(words <= d->last);
    return (hqq_vec)((hqq_ivec)hqq_vec_set1(d->keep_scale) & keep);
}

#endif

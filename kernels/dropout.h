/*
 * Dropout without a stored mask: element i = m*K + k of x is kept where a random word w(seed,
 * i) falls below (1 - p) * 2^32, and then scaled by 1 / (1 - p). The generator is
 * counter-based, so forward and backward, any thread, block order and device see the same mask.
 *
 * Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; 2011)
 * turns a counter of four words and a key of two into four random words:
 *
 *     w(seed, i) = word i mod 4 of philox(counter = [low(i/4), high(i/4), 0, 0],
 *                                         key = [low(seed), high(seed)])
 */
#ifndef HQQ_KERNELS_DROPOUT_H
#define HQQ_KERNELS_DROPOUT_H

#include "format.h"
#include "hqqlora.h"

enum { HQQ_PHILOX_ROUNDS = 10 };
#define HQQ_PHILOX_FACTOR_0 0xd2511f53u
#define HQQ_PHILOX_FACTOR_1 0xcd9e8d57u
#define HQQ_PHILOX_KEY_0    0x9e3779b9u /* added to the key after each round */
#define HQQ_PHILOX_KEY_1    0xbb67ae85u

/* words [4] = the random words of the counter in words [4]. */
HQQ_WRAPS HQQ_INLINE void hqq_philox(uint32_t *words, uint64_t key)
{
    uint32_t key0 = (uint32_t)key, key1 = (uint32_t)(key >> 32);
    for (int round = 0; round < HQQ_PHILOX_ROUNDS; round++) {
        uint64_t product0 = (uint64_t)HQQ_PHILOX_FACTOR_0 * words[0];
        uint64_t product1 = (uint64_t)HQQ_PHILOX_FACTOR_1 * words[2];
        words[0] = (uint32_t)(product1 >> 32) ^ words[1] ^ key0;
        words[2] = (uint32_t)(product0 >> 32) ^ words[3] ^ key1;
        words[1] = (uint32_t)product1;
        words[3] = (uint32_t)product0;
        key0 += HQQ_PHILOX_KEY_0;
        key1 += HQQ_PHILOX_KEY_1;
    }
}

typedef struct hqq_dropout {
    uint32_t last;    /* keep where w <= last; all ones: keep all */
    float keep_scale; /* 1 / (1 - p) */
    uint64_t seed;
} hqq_dropout;

/* p in [0,1), a float: so at least 2^-24 is kept, and `last` is not negative. */
HQQ_INLINE hqq_dropout hqq_dropout_make(float p, uint64_t seed)
{
    hqq_dropout d;
    d.last = (uint32_t)((uint64_t)((1.0 - (double)p) * 4294967296.0 + 0.5) - 1);
    d.keep_scale = (float)(1.0 / (1.0 - (double)p));
    d.seed = seed;
    return d;
}

/* What the host knows of an adapter's dropout: all but the seed, which may be a GPU's memory.
 */
typedef struct hqq_dropout_source {
    uint32_t last;
    float keep_scale;
    const uint64_t *seed;
    uint64_t seed_offset;
} hqq_dropout_source;

HQQ_INLINE hqq_dropout_source hqq_dropout_source_of(const hqq_lora *lora)
{
    hqq_dropout d = hqq_dropout_make(lora->dropout, 0);
    hqq_dropout_source source;
    source.last = d.last;
    source.keep_scale = d.keep_scale;
    source.seed = lora->seed;
    source.seed_offset = lora->seed_offset;
    return source;
}

/* Reads the seed, so: where x is, and where something is dropped. */
HQQ_WRAPS HQQ_INLINE hqq_dropout hqq_dropout_read(const hqq_dropout_source *source)
{
    hqq_dropout d;
    d.last = source->last;
    d.keep_scale = source->keep_scale;
    d.seed = *source->seed + source->seed_offset;
    return d;
}

/* An adapter's dropout, where x is: keeps all, and reads nothing, if it drops nothing. */
HQQ_WRAPS HQQ_INLINE hqq_dropout hqq_dropout_of(const hqq_lora *lora)
{
    if (lora->dropout == 0.0f) return hqq_dropout_make(0.0f, 0);
    return hqq_dropout_make(lora->dropout, *lora->seed + lora->seed_offset);
}

/* words [4] = w(seed, 4 quad) ... w(seed, 4 quad + 3). */
HQQ_INLINE void hqq_dropout_words(uint32_t *words, uint64_t seed, uint64_t quad)
{
    words[0] = (uint32_t)quad;
    words[1] = (uint32_t)(quad >> 32);
    words[2] = words[3] = 0;
    hqq_philox(words, seed);
}

HQQ_INLINE float hqq_dropout_of_word(const hqq_dropout *d, uint32_t word)
{
    return word <= d->last ? d->keep_scale : 0.0f;
}

/* 0 or 1 / (1 - p), of element i. */
HQQ_INLINE float hqq_dropout_factor(const hqq_dropout *d, uint64_t i)
{
    uint32_t words[4];
    hqq_dropout_words(words, d->seed, i / 4);
    uint32_t pair0 = i & 1 ? words[1] : words[0], pair1 = i & 1 ? words[3] : words[2];
    return hqq_dropout_of_word(d, i & 2 ? pair1 : pair0);
}

/* factors [4] of the elements i .. i + 3, i a multiple of 4: for one element's work. */
HQQ_INLINE void hqq_dropout_quad(float *factors, const hqq_dropout *d, uint64_t i)
{
    uint32_t words[4];
    hqq_dropout_words(words, d->seed, i / 4);
    for (int j = 0; j < 4; j++) factors[j] = hqq_dropout_of_word(d, words[j]);
}

#endif

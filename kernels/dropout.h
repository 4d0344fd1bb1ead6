/*
 * Dropout without a stored mask: element i = m*K + k of x is kept where a hash of (seed, i)
 * falls below (1 - p) * 2^32, and then scaled by 1 / (1 - p). A counter-based generator, so
 * that forward and backward, any thread and any block order see the same mask.
 */
#ifndef HQQ_KERNELS_DROPOUT_H
#define HQQ_KERNELS_DROPOUT_H

#include "format.h"

typedef struct hqq_dropout {
    uint64_t threshold; /* keep where hash < threshold; 2^32: keep all */
    uint64_t seed;
    float keep_scale; /* 1 / (1 - p) */
} hqq_dropout;

HQQ_INLINE hqq_dropout hqq_dropout_make(float p, uint64_t seed)
{
    hqq_dropout d;
    d.threshold = (uint64_t)((1.0 - (double)p) * 4294967296.0 + 0.5);
    d.seed = seed;
    d.keep_scale = (float)(1.0 / (1.0 - (double)p));
    return d;
}

/* 32 random bits for counter i: the two halves of the counter are keyed with the seed and
 * mixed by a multiply-xorshift finaliser (32-bit throughout, so that 16 lanes of a vector do
 * 16 elements). */
HQQ_INLINE uint32_t hqq_dropout_bits(uint64_t seed, uint64_t i)
{
    uint32_t h = (uint32_t)i ^ (uint32_t)seed;
    h = (h ^ h >> 16) * 0x7feb352dU;
    h ^= (uint32_t)(i >> 32) * 0x9e3779b9U ^ (uint32_t)(seed >> 32);
    h = (h ^ h >> 15) * 0x846ca68bU;
    h = (h ^ h >> 16) * 0xd35a2d97U;
    return h ^ h >> 15;
}

/* 0 or 1 / (1 - p). */
HQQ_INLINE float hqq_dropout_factor(const hqq_dropout *d, uint64_t i)
{
    return hqq_dropout_bits(d->seed, i) < d->threshold ? d->keep_scale : 0.0f;
}

#endif

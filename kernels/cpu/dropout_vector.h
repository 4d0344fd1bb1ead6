/* HQQ_LANES elements of the dropout mask at once: bit for bit what dropout.h says. */
#ifndef HQQ_KERNELS_CPU_DROPOUT_VECTOR_H
#define HQQ_KERNELS_CPU_DROPOUT_VECTOR_H

#include "dropout.h"
#include "simd.h"

/* hqq_dropout_factor for the counters i, i + 1, ... */
static inline hqq_vec hqq_dropout_factors(const hqq_dropout *d, uint64_t i)
{
    hqq_vec factors;
    uint32_t low = (uint32_t)i;
    /* Lanes that differ in the upper half of their counter, or a mask that keeps all: rare. */
    if (low > UINT32_MAX - HQQ_LANES || d->threshold > UINT32_MAX) {
        for (int lane = 0; lane < HQQ_LANES; lane++)
            factors[lane] = hqq_dropout_factor(d, i + (uint64_t)lane);
        return factors;
    }
    hqq_uvec h;
    for (int lane = 0; lane < HQQ_LANES; lane++) h[lane] = (uint32_t)lane;
    h = (h + low) ^ (uint32_t)d->seed;
    h = (h ^ h >> 16) * 0x7feb352dU;
    h ^= (uint32_t)(i >> 32) * 0x9e3779b9U ^ (uint32_t)(d->seed >> 32);
    h = (h ^ h >> 15) * 0x846ca68bU;
    h = (h ^ h >> 16) * 0xd35a2d97U;
    h ^= h >> 15;
    hqq_ivec keep = (hqq_ivec)(h < (uint32_t)d->threshold);
    return (hqq_vec)((hqq_ivec)hqq_vec_set1(d->keep_scale) & keep);
}

#endif

/* The inner loops of the direct input gradient in fp32 (direct_dgrad_aligned.c). */
#ifndef HQQ_KERNELS_CPU_ADD_FLOATS_H
#define HQQ_KERNELS_CPU_ADD_FLOATS_H

#include "add_block.h"
#include "decode.h"

/* sums[:, k:k + VN vectors] += the batch. g: axis 1, the group. */
HQQ_ALWAYS_INLINE void add_vectors(const add_block *b, int64_t k, int64_t g, const int nbits,
                                   const int axis, const int MB, const int VN)
{
    const int PER = 8 / nbits, BY_TABLE = nbits <= HQQ_TABLE_BITS;
    hqq_vec acc[16], zero[4];
    for (int v = 0; v < VN; v++) {
        if (axis == 0) zero[v] = hqq_vec_load(b->zero + k + v * HQQ_LANES);
        for (int m = 0; m < MB; m++)
            acc[m * VN + v] = axis == 0 ? hqq_vec_zero()
                                        : hqq_vec_load(b->sums + m * b->ld + k + v * HQQ_LANES);
    }
    hqq_decoder d = hqq_decoder_of(nbits, BY_TABLE, 0.0f, 1.0f);
    for (int r = 0; r < b->rows; r++) {
        const uint8_t *bytes = b->words[r] + k;
        hqq_ivec words[4];
        __builtin_prefetch(bytes + b->next);
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) words[v] = hqq_ivec_load_u8(bytes + v * HQQ_LANES);
#pragma GCC unroll 8
        for (int j = 0; j < PER; j++) {
            const float *dy = b->dy[r] + j * b->dy_slot;
            if (axis == 1) {
                int64_t at = (r * PER + j) * b->groups + g;
                d = hqq_decoder_of(nbits, BY_TABLE, b->zero[at], b->scale[at]);
            }
            hqq_vec w[4];
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) {
                w[v] = hqq_decode(&d, BY_TABLE, words[v] >> (8 - nbits * (j + 1)));
                if (axis == 0) w[v] -= zero[v];
            }
#pragma GCC unroll 8
            for (int m = 0; m < MB; m++) {
                hqq_vec c = hqq_vec_set1(dy[m]);
#pragma GCC unroll 4
                for (int v = 0; v < VN; v++) acc[m * VN + v] += c * w[v];
            }
        }
    }
    for (int v = 0; v < VN; v++)
        for (int m = 0; m < MB; m++) {
            float *sums = b->sums + m * b->ld + k + v * HQQ_LANES;
            hqq_vec sum = acc[m * VN + v];
            if (axis == 0)
                sum = hqq_vec_load(sums) + sum * hqq_vec_load(b->scale + k + v * HQQ_LANES);
            hqq_vec_store(sums, sum);
        }
}

HQQ_ALWAYS_INLINE void add_batch(const add_block *b, const int nbits, const int axis,
                                 const int MB)
{
    const int VN = MAX_SUMS / MB < 4 ? MAX_SUMS / MB : 4;
    int64_t end = axis == 1 ? b->group_left : b->columns;
    for (int64_t k = 0, g = 0; k < b->columns; g++, end += b->G) {
        int64_t stop = end < b->columns ? end : b->columns;
        for (; k + VN * HQQ_LANES <= stop; k += VN * HQQ_LANES)
            add_vectors(b, k, g, nbits, axis, MB, VN);
        for (; k < stop; k += HQQ_LANES) add_vectors(b, k, g, nbits, axis, MB, 1);
    }
}

#define ADD(nbits, axis, MB)                                    \
    static void add_##nbits##_##axis##_##MB(const add_block *b) \
    {                                                           \
        add_batch(b, nbits, axis, MB);                          \
    }
#define ADDS(nbits, MB) ADD(nbits, 0, MB) ADD(nbits, 1, MB)
#define ALL_ADDS(nbits) ADDS(nbits, 1) ADDS(nbits, 2) ADDS(nbits, 4)
/* clang-format off */
ALL_ADDS(8) ALL_ADDS(4) ALL_ADDS(2) ALL_ADDS(1)
#define PAIR(nbits, MB) {add_##nbits##_0_##MB, add_##nbits##_1_##MB}
#if MAX_TOKENS == 8
ADDS(8, 8) ADDS(4, 8) ADDS(2, 8) ADDS(1, 8)
#define ROW(nbits) {PAIR(nbits, 1), PAIR(nbits, 2), PAIR(nbits, 4), PAIR(nbits, 8)}
#else
#define ROW(nbits) {PAIR(nbits, 1), PAIR(nbits, 2), PAIR(nbits, 4)}
#endif

static add_table float_adds = {ROW(8), ROW(4), ROW(2), ROW(1)};
/* clang-format on */

#endif

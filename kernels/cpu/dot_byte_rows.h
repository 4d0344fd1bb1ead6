/*
 * The inner loop of the direct forward product (direct_linear_aligned.c) for two rows of W of 8
 * bits and eight tokens at a time, where 16 sums stay in registers: x is loaded once for both
 * rows, of which codes are converted (dot_floats.h, dot_pairs.h).
 *
 * For 16 columns of both in fp32: 2 loads that widen, 2 conversions, 4 of arithmetic, 8 loads
 * of x and 16 multiplications, which a Zen 5 starts in 9 cycles; for 32 in bf16 18 and 16,
 * in 9. A row at a time takes twice the loads of x. Times as fast as that, 4096 x 4096, M = 8:
 * fp32 1.25, bf16 1.17.
 */
#ifndef HQQ_KERNELS_CPU_DOT_BYTE_ROWS_H
#define HQQ_KERNELS_CPU_DOT_BYTE_ROWS_H

#include "dot_floats.h"
#include "multiply_tile.h"
#if HQQ_HAS_PAIRS
#include "dot_pairs.h"
#endif

#define BYTE_ROWS       2
#define BYTE_ROW_TOKENS 8
#define BYTE_ROW_STEP   64

/* Whether it serves blocks of whole groups of such a weight. */
static inline int hqq_dots_byte_rows(const hqq_layout *l)
{
    return MAX_SUMS == BYTE_ROWS * BYTE_ROW_TOKENS && l->nbits == 8 &&
           l->K % BYTE_ROW_STEP == 0 && (l->axis == 0 || l->G % BYTE_ROW_STEP == 0);
}

/* A vector of columns of a row: of floats, or with pairs of bf16. */
HQQ_ALWAYS_INLINE hqq_vec decode_bytes(const uint8_t *bytes, hqq_vec zero, hqq_vec scale,
                                       const int pairs)
{
    hqq_vec low = (hqq_vec_from_int(hqq_ivec_load_u8(bytes)) - zero) * scale;
#if HQQ_HAS_PAIRS
    if (pairs) {
        hqq_vec high = hqq_vec_from_int(hqq_ivec_load_u8(bytes + HQQ_LANES));
        return (hqq_vec)hqq_round_to_pairs(low, (high - zero) * scale);
    }
#endif
    (void)pairs;
    return low;
}

/* acc[r * 8 + m] += BYTE_ROW_STEP columns of row r times token m's. */
HQQ_ALWAYS_INLINE void dot_byte_rows_step(hqq_vec *acc, const dot_block *b, int64_t k,
                                          const hqq_vec *zero, const hqq_vec *scale,
                                          const int pairs)
{
    const int ROWS = BYTE_ROWS, MB = BYTE_ROW_TOKENS;
    const int VECTOR = pairs ? 32 : HQQ_LANES, VECTORS = BYTE_ROW_STEP / VECTOR;
    const uint8_t *words = b->words + k;
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; r++) __builtin_prefetch(words + r * b->row + b->next);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        const void *x = hqq_word(b->x, (k / (pairs ? 2 : 1) + v * HQQ_LANES) * MB);
        hqq_vec w[BYTE_ROWS];
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; r++)
            w[r] = decode_bytes(words + r * b->row + v * VECTOR, zero[r], scale[r], pairs);
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) {
            hqq_vec xm = hqq_load_words(x, m * HQQ_LANES);
            HQQ_KEEP_IN_REGISTER(xm);
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++)
                acc[r * MB + m] =
                    hqq_multiply_add(acc[r * MB + m], w[r], xm, (hqq_tile_word)pairs);
        }
    }
}

/* sums [2 rows, 8 tokens] += the products of two rows. */
HQQ_ALWAYS_INLINE void dot_byte_rows(hqq_vec *sums, const dot_block *b, const int axis,
                                     const int pairs)
{
    const int SUMS = BYTE_ROWS * BYTE_ROW_TOKENS;
    hqq_vec acc[BYTE_ROWS * BYTE_ROW_TOKENS] = {{0}};
    if (axis == 0) {
        const hqq_vec one = hqq_vec_set1(1.0f), zero[BYTE_ROWS] = {{0}}, scale[] = {one, one};
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) acc[i] = b->constant[i % BYTE_ROW_TOKENS];
        for (int64_t k = 0; k < b->columns; k += BYTE_ROW_STEP)
            dot_byte_rows_step(acc, b, k, zero, scale, pairs);
    } else {
        for (int64_t g = 0, k = 0; g < b->stride; g++) {
            const hqq_vec zero[] = {hqq_vec_set1(b->zero[g]),
                                    hqq_vec_set1(b->zero[b->stride + g])};
            const hqq_vec scale[] = {hqq_vec_set1(b->scale[g]),
                                     hqq_vec_set1(b->scale[b->stride + g])};
            for (int64_t end = k + b->G; k < end; k += BYTE_ROW_STEP)
                dot_byte_rows_step(acc, b, k, zero, scale, pairs);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
        hqq_vec sum = acc[i];
        if (axis == 0 && pairs) sum += b->constant[8 + i % BYTE_ROW_TOKENS];
        sums[i] += sum;
    }
}

#define TWO_BYTE_ROWS(kind, axis, pairs)                                   \
    static void kind##_byte_rows_##axis(hqq_vec *sums, const dot_block *b) \
    {                                                                      \
        dot_byte_rows(sums, b, axis, pairs);                               \
    }
TWO_BYTE_ROWS(float, 0, 0)
TWO_BYTE_ROWS(float, 1, 0)
#if HQQ_HAS_PAIRS
TWO_BYTE_ROWS(pair, 0, 1)
TWO_BYTE_ROWS(pair, 1, 1)
#endif

static dot_fn two_byte_rows(int axis, int pairs)
{
#if HQQ_HAS_PAIRS
    if (pairs) return axis == 1 ? pair_byte_rows_1 : pair_byte_rows_0;
#endif
    (void)pairs;
    return axis == 1 ? float_byte_rows_1 : float_byte_rows_0;
}

#endif

/*
 * The inner loop of the direct forward product in fp32 (direct_linear_aligned.c) for two rows
 * of W of 8 bits and eight tokens at a time, where 16 sums stay in registers: x is loaded once
 * for both rows.
 *
 * Cycles for 16 columns of both: 2 loads that widen, 2 conversions, 4 of arithmetic, 8 loads of
 * x and 16 multiplications, which a Zen 5 starts in 9; a row at a time takes 9 loads a row, and
 * took 13 for two.
 */
#ifndef HQQ_KERNELS_CPU_DOT_BYTE_ROWS_H
#define HQQ_KERNELS_CPU_DOT_BYTE_ROWS_H

#include "dot_floats.h"

#define BYTE_ROWS       2
#define BYTE_ROW_TOKENS 8
#define BYTE_ROW_STEP   64

/* Whether it serves blocks of whole groups of such a weight. */
static inline int hqq_dots_byte_rows(const hqq_layout *l)
{
    return MAX_SUMS == BYTE_ROWS * BYTE_ROW_TOKENS && l->nbits == 8 &&
           l->K % BYTE_ROW_STEP == 0 && (l->axis == 0 || l->G % BYTE_ROW_STEP == 0);
}

/* acc[r * 8 + m] += BYTE_ROW_STEP columns of row r times token m's. */
HQQ_ALWAYS_INLINE void dot_byte_rows_step(hqq_vec *acc, const dot_block *b, int64_t k,
                                          const hqq_vec *zero, const hqq_vec *scale,
                                          const int axis)
{
    const int ROWS = BYTE_ROWS, MB = BYTE_ROW_TOKENS;
    const int VECTORS = BYTE_ROW_STEP / HQQ_LANES;
    const uint8_t *words = b->words + k;
    const float *x = (const float *)b->x + k * MB;
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; r++) __builtin_prefetch(words + r * b->row + b->next);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        hqq_vec w[BYTE_ROWS];
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; r++) {
            w[r] = hqq_vec_from_int(hqq_ivec_load_u8(words + r * b->row + v * HQQ_LANES));
            if (axis == 1) w[r] = (w[r] - zero[r]) * scale[r];
        }
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) {
            hqq_vec xm = hqq_vec_load(x + (v * MB + m) * HQQ_LANES);
            HQQ_KEEP_IN_REGISTER(xm);
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++) acc[r * MB + m] += w[r] * xm;
        }
    }
}

/* sums [2 rows, 8 tokens] += the products of two rows. */
HQQ_ALWAYS_INLINE void dot_byte_rows(hqq_vec *sums, const dot_block *b, const int axis)
{
    const int ROWS = BYTE_ROWS, SUMS = BYTE_ROWS * BYTE_ROW_TOKENS;
    hqq_vec acc[BYTE_ROWS * BYTE_ROW_TOKENS] = {{0}}, zero[BYTE_ROWS], scale[BYTE_ROWS];
    if (axis == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) acc[i] = b->constant[i % BYTE_ROW_TOKENS];
        for (int64_t k = 0; k < b->columns; k += BYTE_ROW_STEP)
            dot_byte_rows_step(acc, b, k, zero, scale, axis);
    } else {
        for (int64_t g = 0, k = 0; g < b->stride; g++) {
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++) {
                zero[r] = hqq_vec_set1(b->zero[r * b->stride + g]);
                scale[r] = hqq_vec_set1(b->scale[r * b->stride + g]);
            }
            for (int64_t end = k + b->G; k < end; k += BYTE_ROW_STEP)
                dot_byte_rows_step(acc, b, k, zero, scale, axis);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sums[i] += acc[i];
}

static void byte_rows_0(hqq_vec *sums, const dot_block *b)
{
    dot_byte_rows(sums, b, 0);
}

static void byte_rows_1(hqq_vec *sums, const dot_block *b)
{
    dot_byte_rows(sums, b, 1);
}

#endif

/*
 * The inner loop of the direct forward product (direct_linear_aligned.c) for four rows of W and
 * four tokens at a time: 4 bits, AVX-512.
 *
 *     packed rows p and q   ->   W[p], W[p + N/2], W[q], W[q + N/2]
 *
 *     acc[m][r] += W[row r, k..] * x[m, k..]      16 registers of sums
 *
 * At axis 1 q is p + 1, at axis 0 the next row of the same residue (dot_pairs.h, dot_floats.h
 * say what is multiplied there). x is loaded once for four rows, and their four tables are made
 * one group ahead.
 *
 * Cycles of a Zen 5 for 128 weights, axis 1, M = 4, in the first cache, bf16 and fp32:
 *
 *     as many as its units take for these operations     8.9   15.8
 *     two rows, tables as they are needed               13.4   25.2
 *     four rows, tables as they are needed              12.6   21.5
 *     four rows, tables one group ahead                 10.2   19.8
 *
 * For one or two tokens, where memory is waited for, two rows that are read at a time were up
 * to a tenth slower than one after the other (14336 x 4096, bf16, M = 1).
 */
#ifndef HQQ_KERNELS_CPU_DOT_ROWS_H
#define HQQ_KERNELS_CPU_DOT_ROWS_H

#include "dot_floats.h"
#include "multiply_tile.h"
#if HQQ_HAS_PAIRS
#include "dot_pairs.h"
#endif

#define DOT_ROWS       4
#define DOT_ROW_TOKENS 4
#define DOT_ROW_STEP   64

/* Whether it serves blocks of whole groups of such a weight. */
static inline int hqq_dots_four_rows(const hqq_layout *l)
{
#if HQQ_TABLE_BITS >= 4
    return l->nbits == 4 && !l->planes && l->K % DOT_ROW_STEP == 0 &&
           (l->axis == 0 || l->G % DOT_ROW_STEP == 0);
#else
    (void)l;
    return 0;
#endif
}

#if HQQ_TABLE_BITS >= 4
/* 16 floats, or with pairs 32 bf16. */
HQQ_ALWAYS_INLINE hqq_vec row_table(float zero, float scale, const int pairs)
{
#if HQQ_HAS_PAIRS
    if (pairs) return (hqq_vec)hqq_pair_table(4, zero, scale);
#endif
    (void)pairs;
    return hqq_decoder_of(4, 1, zero, scale).table;
}

/* Axis 1: what the codes of each row stand for in group g. */
HQQ_ALWAYS_INLINE void make_row_tables(hqq_vec *table, const dot_block *b, int64_t g,
                                       const int pairs)
{
#pragma GCC unroll 4
    for (int r = 0; r < DOT_ROWS; r++)
        table[r] = row_table(b->zero[r * b->stride + g], b->scale[r * b->stride + g], pairs);
}

/* Rows 2 i and 2 i + 1, a vector of columns of each. */
HQQ_ALWAYS_INLINE void decode_two_rows(hqq_vec *w, const uint8_t *bytes, const hqq_vec *table,
                                       const int pairs)
{
#if HQQ_HAS_PAIRS
    if (pairs) {
        __m512i words = load_32_bytes(bytes);
        w[0] =
            (hqq_vec)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), (__m512i)table[0]);
        w[1] = (hqq_vec)_mm512_permutexvar_epi16(words, (__m512i)table[1]);
        return;
    }
#endif
    (void)pairs;
    hqq_ivec words = hqq_ivec_load_u8(bytes);
    w[0] = hqq_look_up(table[0], words >> 4);
    w[1] = hqq_look_up(table[1], words);
}

/* acc[m * 4 + r] += 64 columns of row r times token m's. */
HQQ_ALWAYS_INLINE void dot_four_rows_step(hqq_vec *acc, const dot_block *b, int64_t k,
                                          const hqq_vec *table, const int pairs)
{
    const int VECTOR = pairs ? 32 : HQQ_LANES, MB = DOT_ROW_TOKENS;
    const uint8_t *p = b->words + k, *q = p + b->row;
    __builtin_prefetch(p + b->next);
    __builtin_prefetch(q + b->next);
#pragma GCC unroll 4
    for (int v = 0; v < DOT_ROW_STEP / VECTOR; v++) {
        hqq_vec w[DOT_ROWS];
        decode_two_rows(w, p + v * VECTOR, table, pairs);
        decode_two_rows(w + 2, q + v * VECTOR, table + 2, pairs);
        const void *x = hqq_word(b->x, (k / (pairs ? 2 : 1) + v * HQQ_LANES) * MB);
#pragma GCC unroll 4
        for (int m = 0; m < MB; m++) {
            hqq_vec xm = hqq_load_words(x, m * HQQ_LANES);
            HQQ_KEEP_IN_REGISTER(xm);
#pragma GCC unroll 4
            for (int r = 0; r < DOT_ROWS; r++)
                acc[m * DOT_ROWS + r] =
                    hqq_multiply_add(acc[m * DOT_ROWS + r], w[r], xm, (hqq_tile_word)pairs);
        }
    }
}

/* sums [2 packed rows, 4 tokens, 2 slots] += the products of four rows. */
HQQ_ALWAYS_INLINE void dot_four_rows(hqq_vec *sums, const dot_block *b, const int axis,
                                     const int pairs)
{
    hqq_vec acc[DOT_ROWS * DOT_ROW_TOKENS] = {{0}}, table[DOT_ROWS], next[DOT_ROWS];
    if (axis == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < DOT_ROWS * DOT_ROW_TOKENS; i++) acc[i] = b->constant[i / DOT_ROWS];
        for (int r = 0; r < DOT_ROWS; r++) table[r] = row_table(0.0f, 1.0f, pairs);
        for (int64_t k = 0; k < b->columns; k += DOT_ROW_STEP)
            dot_four_rows_step(acc, b, k, table, pairs);
    } else {
        make_row_tables(next, b, 0, pairs);
        for (int64_t g = 0, k = 0; g < b->stride; g++) {
#pragma GCC unroll 4
            for (int r = 0; r < DOT_ROWS; r++) table[r] = next[r];
            make_row_tables(next, b, hqq_least(g + 1, b->stride - 1), pairs);
            for (int64_t end = k + b->G; k < end; k += DOT_ROW_STEP)
                dot_four_rows_step(acc, b, k, table, pairs);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < DOT_ROWS * DOT_ROW_TOKENS; i++) {
        int m = i / DOT_ROWS, r = i % DOT_ROWS;
        hqq_vec sum = axis == 0 && pairs ? acc[i] + b->constant[8 + m] : acc[i];
        sums[(r / 2 * DOT_ROW_TOKENS + m) * 2 + r % 2] += sum;
    }
}

#define FOUR_ROWS(kind, axis, pairs)                                  \
    static void kind##_rows_##axis(hqq_vec *sums, const dot_block *b) \
    {                                                                 \
        dot_four_rows(sums, b, axis, pairs);                          \
    }
FOUR_ROWS(float, 0, 0)
FOUR_ROWS(float, 1, 0)
#if HQQ_HAS_PAIRS
FOUR_ROWS(pair, 0, 1)
FOUR_ROWS(pair, 1, 1)
#endif

static dot_fn four_rows(int axis, int pairs)
{
#if HQQ_HAS_PAIRS
    if (pairs) return axis == 1 ? pair_rows_1 : pair_rows_0;
#endif
    (void)pairs;
    return axis == 1 ? float_rows_1 : float_rows_0;
}
#else
static dot_fn four_rows(int axis, int pairs)
{
    (void)axis, (void)pairs;
    return NULL;
}
#endif

#endif

/*
 * The inner loops of the direct forward product (direct_linear_aligned.c) for whole steps of 64
 * columns of whole groups: 4 bits, AVX-512. Four rows of W meet four tokens at a time, two rows
 * one or two.
 *
 *     packed rows p and q   ->   W[p], W[p + N/2], W[q], W[q + N/2]
 *
 *     acc[m][r] += W[row r, k..] * x[m, k..]      16 registers of sums
 *
 * At axis 1 q is p + 1, at axis 0 the next row of the same residue (dot_pairs.h, dot_floats.h
 * say what is multiplied there). x is loaded once for all rows, and their tables are made one
 * group ahead. Fewer sums are kept in several sets, whose additions do not wait for each other.
 * At axis 0 in fp32 with zeros and scales in fp32, of each code its column's zero is
 * subtracted: loaded once for all rows (4096 x 4096, one thread, four tokens: 1.86 times as
 * fast as two rows at a time).
 *
 * Cycles of a Zen 5 for 128 weights, axis 1, M = 4, in the first cache, bf16 and fp32:
 *
 *     as many as its units take for these operations     8.9   15.8
 *     two rows, tables as they are needed               13.4   25.2
 *     four rows, tables as they are needed              12.6   21.5
 *     four rows, tables one group ahead                 10.2   19.8
 *
 * For one or two tokens, where memory is waited for, two packed rows that are read at a time
 * were up to a tenth slower than one after the other (14336 x 4096, bf16, M = 1). There few
 * instructions count, of which the processor takes 8 a cycle: 128 weights at M = 1 are 26 and
 * some to count (2 loads that widen, 2 shifts, 4 look-ups, 4 products, 2 of x, 6 of tables, 6
 * to count and fetch); the loop for any group took 57, in the second cache 10.3 cycles, this
 * one 8.4 with what is done once a row. From memory both read 85 % of what two threads read of
 * nothing but codes, zeros and scales.
 */
#ifndef HQQ_KERNELS_CPU_DOT_ROWS_H
#define HQQ_KERNELS_CPU_DOT_ROWS_H

#include "dot_floats.h"
#include "multiply_tile.h"
#if HQQ_HAS_PAIRS
#include "dot_pairs.h"
#endif

#define DOT_ROW_TOKENS 4
#define DOT_ROW_STEP   64

/* Whether it serves blocks of whole groups of such a weight. */
static inline int hqq_dots_rows(const hqq_layout *l)
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
                                       const int ROWS, const int pairs)
{
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
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

/* acc[m * ROWS + r] += 64 columns of row r times token m's: in CHAINS sets of sums. less_zero:
 * of floats, the columns' zeros are subtracted. */
HQQ_ALWAYS_INLINE void dot_rows_step(hqq_vec *acc, const dot_block *b, int64_t k,
                                     const hqq_vec *table, const int ROWS, const int MB,
                                     const int CHAINS, const int pairs, const int less_zero)
{
    const int VECTOR = pairs ? 32 : HQQ_LANES, VECTORS = DOT_ROW_STEP / VECTOR;
    const uint8_t *p = b->words + k, *q = p + b->row;
    __builtin_prefetch(p + b->next);
    if (ROWS == 4) __builtin_prefetch(q + b->next);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        hqq_vec w[4], *sums = acc + v % CHAINS * (ROWS * MB);
        decode_two_rows(w, p + v * VECTOR, table, pairs);
        if (ROWS == 4) decode_two_rows(w + 2, q + v * VECTOR, table + 2, pairs);
        hqq_vec zero = less_zero ? hqq_vec_load(b->zero + k + v * VECTOR) : hqq_vec_zero();
#pragma GCC unroll 4
        for (int r = 0; r < ROWS && less_zero; r++) w[r] -= zero;
        const char *x = (const char *)b->x + (k + v * VECTOR) * MB * (pairs ? 2 : 4);
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) {
            hqq_vec xm = hqq_load_words(x, m * HQQ_LANES);
            HQQ_KEEP_IN_REGISTER(xm);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                sums[m * ROWS + r] =
                    hqq_multiply_add(sums[m * ROWS + r], w[r], xm, (hqq_tile_word)pairs);
        }
    }
}

/* Axis 1. one_step: G is DOT_ROW_STEP, as a constant. */
HQQ_ALWAYS_INLINE void dot_row_groups(hqq_vec *acc, const dot_block *b, const int ROWS,
                                      const int MB, const int CHAINS, const int pairs,
                                      const int one_step)
{
    const int64_t G = one_step ? DOT_ROW_STEP : b->G;
    hqq_vec table[4], next[4];
    make_row_tables(next, b, 0, ROWS, pairs);
    for (int64_t g = 0, k = 0; g < b->stride; g++) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) table[r] = next[r];
        make_row_tables(next, b, hqq_least(g + 1, b->stride - 1), ROWS, pairs);
        for (int64_t end = k + G; k < end; k += DOT_ROW_STEP)
            dot_rows_step(acc, b, k, table, ROWS, MB, CHAINS, pairs, 0);
    }
}

/* result [ROWS / 2 packed rows, MB tokens, 2 slots] += the products of the rows. */
HQQ_ALWAYS_INLINE void dot_rows(hqq_vec *result, const dot_block *block, const int ROWS,
                                const int MB, const int axis, const int pairs,
                                const int less_zero)
{
    const int SUMS = ROWS * MB, VECTORS = DOT_ROW_STEP / (pairs ? 32 : HQQ_LANES);
    const int CHAINS = VECTORS < 16 / SUMS ? VECTORS : 16 / SUMS;
    const dot_block copy = *block, *b = &copy; /* that no store can change */
    hqq_vec acc[16] = {{0}};
    if (axis == 0) {
        hqq_vec table[4];
#pragma GCC unroll 16
        for (int i = 0; i < SUMS && !less_zero; i++) acc[i] = b->constant[i / ROWS];
        for (int r = 0; r < ROWS; r++) table[r] = row_table(0.0f, 1.0f, pairs);
        for (int64_t k = 0; k < b->columns; k += DOT_ROW_STEP)
            dot_rows_step(acc, b, k, table, ROWS, MB, CHAINS, pairs, less_zero);
    } else if (b->G == DOT_ROW_STEP) {
        dot_row_groups(acc, b, ROWS, MB, CHAINS, pairs, 1);
    } else {
        dot_row_groups(acc, b, ROWS, MB, CHAINS, pairs, 0);
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
        int m = i / ROWS, r = i % ROWS;
        hqq_vec sum = axis == 0 && pairs ? acc[i] + b->constant[8 + m] : acc[i];
#pragma GCC unroll 4
        for (int c = 1; c < CHAINS; c++) sum += acc[c * SUMS + i];
        result[(r / 2 * MB + m) * 2 + r % 2] += sum;
    }
}

#define ROW_DOT(kind, MB, axis, pairs)                                       \
    static void kind##_rows_##MB##_##axis(hqq_vec *sums, const dot_block *b) \
    {                                                                        \
        if (!(axis) && !(pairs) && b->zero)                                  \
            dot_rows(sums, b, (MB) == 4 ? 4 : 2, MB, axis, pairs, 1);        \
        else                                                                 \
            dot_rows(sums, b, (MB) == 4 ? 4 : 2, MB, axis, pairs, 0);        \
    }
#define ROW_DOTS_OF(kind, MB, pairs) ROW_DOT(kind, MB, 0, pairs) ROW_DOT(kind, MB, 1, pairs)
#define ROW_PAIR(kind, MB)           {kind##_rows_##MB##_0, kind##_rows_##MB##_1}
/* clang-format off */
/* functions by tokens (1, 2, 4), log2, and axis */
#define ROW_DOTS(kind, pairs)                                                             \
    ROW_DOTS_OF(kind, 1, pairs) ROW_DOTS_OF(kind, 2, pairs) ROW_DOTS_OF(kind, 4, pairs)   \
    static const dot_fn kind##_rows[3][2] = {ROW_PAIR(kind, 1), ROW_PAIR(kind, 2),        \
                                             ROW_PAIR(kind, 4)};
/* clang-format on */
ROW_DOTS(float, 0)
#if HQQ_HAS_PAIRS
ROW_DOTS(pair, 1)
#endif

static dot_fn row_dot(int log2_tokens, int axis, int pairs)
{
#if HQQ_HAS_PAIRS
    if (pairs) return pair_rows[log2_tokens][axis];
#endif
    (void)pairs;
    return float_rows[log2_tokens][axis];
}
#else
static dot_fn row_dot(int log2_tokens, int axis, int pairs)
{
    (void)log2_tokens, (void)axis, (void)pairs;
    return NULL;
}
#endif

#endif

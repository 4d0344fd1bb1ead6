/*
 * The inner loops of the direct forward product (direct_linear_aligned.c) for several rows of W
 * of 8 bits at a time, whose codes are converted (dot_floats.h, dot_pairs.h): two rows and
 * eight tokens, or four rows and four tokens. 16 sums stay in registers, and x is loaded once
 * for all rows.
 *
 * What a conversion waits for (load, widen, convert, subtract, multiply, round: some 25 cycles)
 * is more than the processor sees ahead while it multiplies. So two rows are converted one
 * vector ahead; four, for which registers do not suffice, one by one, each while the one before
 * is multiplied by the tokens, which stay in registers.
 *
 * Operations on a Zen 5, which starts two products a cycle, two conversions or additions, and
 * two that widen, these four in three units: bf16, 32 columns and a row, at four tokens 2 to
 * widen, 2 conversions, 2 subtractions, 2 multiplications, a rounding, 4 products: 3.5 cycles,
 * in the second cache 5.4 are taken (a row at a time: 6.9); eight tokens 5.3 and 7.6 (8.6).
 *
 * Times as fast as before, 4096 x 4096, two threads, cold, axis 1 and 0: four tokens (a row at
 * a time) bf16 1.02, 1.22, fp32 1.32, 1.36; eight (two rows, converted where they are
 * multiplied) bf16 1.14, 1.04, fp32 1.14, 1.0. At four tokens in bf16 axis 1 takes little more
 * than at one: 16 MB of codes are what it waits for.
 */
#ifndef HQQ_KERNELS_CPU_DOT_BYTE_ROWS_H
#define HQQ_KERNELS_CPU_DOT_BYTE_ROWS_H

#include "dot_floats.h"
#include "multiply_tile.h"
#if HQQ_HAS_PAIRS
#include "dot_pairs.h"
#endif

#define BYTE_ROW_SUMS 16
#define BYTE_ROW_STEP 64

/* Whether it serves blocks of whole groups of such a weight. */
static inline int hqq_dots_byte_rows(const hqq_layout *l)
{
    return MAX_SUMS == BYTE_ROW_SUMS && l->nbits == 8 && l->K % BYTE_ROW_STEP == 0 &&
           (l->axis == 0 || l->G % BYTE_ROW_STEP == 0);
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

/* A vector of columns k and on of row r, of which g is the group. Axis 0: the codes, or
 * less_zero: less the columns' zeros. */
HQQ_ALWAYS_INLINE hqq_vec decode_byte_row(const dot_block *b, int r, int64_t k, int64_t g,
                                          const int axis, const int pairs, const int less_zero)
{
    hqq_vec zero = hqq_vec_set1(axis == 1 ? b->zero[r * b->stride + g] : 0.0f);
    if (less_zero) zero = hqq_vec_load(b->zero + k);
    hqq_vec scale = hqq_vec_set1(axis == 1 ? b->scale[r * b->stride + g] : 1.0f);
    return decode_bytes(b->words + r * b->row + k, zero, scale, pairs);
}

/* acc[r * 4 + m] += a vector of columns of row r times token m's. */
HQQ_ALWAYS_INLINE void dot_four_vectors(hqq_vec *acc, const dot_block *b, int64_t k, int64_t g,
                                        const int axis, const int pairs, const int less_zero)
{
    const void *x = (const char *)b->x + k * 4 * (pairs ? 2 : 4);
    hqq_vec xm[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
        xm[m] = hqq_load_words(x, m * HQQ_LANES);
        HQQ_KEEP_IN_REGISTER(xm[m]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        hqq_vec w = decode_byte_row(b, r, k, g, axis, pairs, less_zero);
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++)
            acc[r * 4 + m] = hqq_multiply_add(acc[r * 4 + m], w, xm[m], (hqq_tile_word)pairs);
    }
}

/* acc[r * 8 + m] += w[r], a vector of columns of row r, times token m's. */
HQQ_ALWAYS_INLINE void dot_two_vectors(hqq_vec *acc, const dot_block *b, int64_t k,
                                       const hqq_vec *w, const int pairs)
{
    const void *x = (const char *)b->x + k * 8 * (pairs ? 2 : 4);
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++) {
        hqq_vec xm = hqq_load_words(x, m * HQQ_LANES);
        HQQ_KEEP_IN_REGISTER(xm);
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++)
            acc[r * 8 + m] = hqq_multiply_add(acc[r * 8 + m], w[r], xm, (hqq_tile_word)pairs);
    }
}

/* sums [ROWS, tokens] += the products of the rows. */
HQQ_ALWAYS_INLINE void dot_byte_rows(hqq_vec *sums, const dot_block *block, const int ROWS,
                                     const int axis, const int pairs, const int less_zero)
{
    const int MB = BYTE_ROW_SUMS / ROWS;
    const int VECTOR = pairs ? 32 : HQQ_LANES, VECTORS = BYTE_ROW_STEP / VECTOR;
    const dot_block copy = *block, *b = &copy; /* that no store can change */
    hqq_vec acc[BYTE_ROW_SUMS] = {{0}}, w[2] = {{0}}, next[2];
    if (axis == 0 && !less_zero) {
#pragma GCC unroll 16
        for (int i = 0; i < BYTE_ROW_SUMS; i++) acc[i] = b->constant[i % MB];
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2 && ROWS == 2; r++)
        w[r] = decode_byte_row(b, r, 0, 0, axis, pairs, less_zero);
    int64_t g = 0, group_left = b->G;
    for (int64_t k = 0; k < b->columns; k += BYTE_ROW_STEP) {
        int64_t after = hqq_least(k + BYTE_ROW_STEP, b->columns - VECTOR), group = g;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) __builtin_prefetch(b->words + r * b->row + k + b->next);
        group_left -= BYTE_ROW_STEP;
        if (group_left == 0 && axis == 1) {
            group_left = b->G;
            g = hqq_least(g + 1, b->stride - 1);
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = k + v * VECTOR;
            if (ROWS == 4) {
                dot_four_vectors(acc, b, at, group, axis, pairs, less_zero);
                continue;
            }
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++)
                next[r] =
                    v < VECTORS - 1
                        ? decode_byte_row(b, r, at + VECTOR, group, axis, pairs, less_zero)
                        : decode_byte_row(b, r, after, g, axis, pairs, less_zero);
            dot_two_vectors(acc, b, at, w, pairs);
            w[0] = next[0];
            w[1] = next[1];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < BYTE_ROW_SUMS; i++) {
        hqq_vec sum = acc[i];
        if (axis == 0 && pairs) sum += b->constant[8 + i % MB];
        sums[i] += sum;
    }
}

#define BYTE_DOT(kind, rows, axis, pairs)                                           \
    static void kind##_byte_rows_##rows##_##axis(hqq_vec *sums, const dot_block *b) \
    {                                                                               \
        if (!(axis) && !(pairs) && b->zero)                                         \
            dot_byte_rows(sums, b, rows, axis, pairs, 1);                           \
        else                                                                        \
            dot_byte_rows(sums, b, rows, axis, pairs, 0);                           \
    }
#define BYTE_DOTS(kind, pairs)  \
    BYTE_DOT(kind, 2, 0, pairs) \
    BYTE_DOT(kind, 2, 1, pairs) BYTE_DOT(kind, 4, 0, pairs) BYTE_DOT(kind, 4, 1, pairs)
BYTE_DOTS(float, 0)
#if HQQ_HAS_PAIRS
BYTE_DOTS(pair, 1)
#endif

static dot_fn byte_rows(int rows, int axis, int pairs)
{
    static const dot_fn floats[2][2] = {{float_byte_rows_2_0, float_byte_rows_2_1},
                                        {float_byte_rows_4_0, float_byte_rows_4_1}};
#if HQQ_HAS_PAIRS
    static const dot_fn in_pairs[2][2] = {{pair_byte_rows_2_0, pair_byte_rows_2_1},
                                          {pair_byte_rows_4_0, pair_byte_rows_4_1}};
    if (pairs) return in_pairs[rows == 4][axis];
#endif
    (void)pairs;
    return floats[rows == 4][axis];
}

#endif

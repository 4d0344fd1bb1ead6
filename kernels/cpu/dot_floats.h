/* The inner loops of the direct forward product in fp32 (direct_linear_aligned.c). */
#ifndef HQQ_KERNELS_CPU_DOT_FLOATS_H
#define HQQ_KERNELS_CPU_DOT_FLOATS_H

#include "decode.h"
#include "dot_block.h"

/* gcc would rather load a vector again for each use, and run out of load ports. */
#if defined(__AVX512F__) && !defined(HQQ_EMULATED_AVX512)
#define HQQ_KEEP_IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define HQQ_KEEP_IN_REGISTER(v) (void)(v)
#endif

/* words[j] = a vector of columns of row j of the PER, shifted down. */
HQQ_ALWAYS_INLINE void load_codes(hqq_ivec *words, const dot_block *b, int64_t k,
                                  const int nbits, const int PER, const int left)
{
    if (nbits != 3) {
        hqq_ivec bytes = hqq_ivec_load_u8(b->words + k);
#pragma GCC unroll 8
        for (int j = 0; j < PER; j++) words[j] = bytes >> (8 - nbits * (j + 1));
        return;
    }
    hqq_plane_vector twos[2];
    for (int t = 0; t < (PER == 8 ? 2 : 1); t++)
        twos[t] = (hqq_plane_vector)hqq_ivec_load_u8(b->planes.twos[t] + k);
    hqq_ivec ones = hqq_ivec_load_u8(b->planes.ones + k);
    if (PER < 8) ones = ones >> b->planes.right;
#pragma GCC unroll 4
    for (int i = 0; i < PER / 2; i++) {
        words[i + PER / 2] =
            (hqq_ivec)hqq_plane_codes(twos, (hqq_plane_vector)ones, PER, i, left);
        words[i] = words[i + PER / 2] >> 4;
    }
}

/* acc[m * PER + j] += the weight of slot j * x[m], for a vector of columns. less_zero: axis 0,
 * a weight is the code less the column's zero, and not the code alone. */
HQQ_ALWAYS_INLINE void dot_vector(hqq_vec *acc, const dot_block *b, int64_t k,
                                  const hqq_decoder *decoders, const int nbits, const int axis,
                                  const int MB, const int PER, const int left,
                                  const int less_zero)
{
    hqq_ivec words[8];
    load_codes(words, b, k, nbits, PER, left);
    hqq_vec x[8];
#pragma GCC unroll 8
    for (int m = 0; m < MB; m++) {
        x[m] = hqq_vec_load((const float *)b->x + k * MB + m * HQQ_LANES);
        HQQ_KEEP_IN_REGISTER(x[m]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < PER; j++) {
        hqq_vec w = hqq_decode(&decoders[axis == 1 ? j : 0], nbits <= HQQ_TABLE_BITS, words[j]);
        if (less_zero) w -= hqq_vec_load(b->zero + k);
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) acc[m * PER + j] += w * x[m];
    }
}

/* Columns [k, end), end - k a multiple of 16, in UNROLL independent sets of sums. */
HQQ_ALWAYS_INLINE void dot_columns(hqq_vec *acc, const dot_block *b, int64_t k, int64_t end,
                                   const hqq_decoder *decoders, const int nbits, const int axis,
                                   const int MB, const int PER, const int left,
                                   const int less_zero, const int UNROLL)
{
    const int SUMS = MB * PER;
    for (; k + UNROLL * HQQ_LANES <= end; k += UNROLL * HQQ_LANES) {
        if (UNROLL > 1 || k % 64 == 0) dot_prefetch(b, k, nbits, PER);
#pragma GCC unroll 4
        for (int u = 0; u < UNROLL; u++)
            dot_vector(acc + u * SUMS, b, k + u * HQQ_LANES, decoders, nbits, axis, MB, PER,
                       left, less_zero);
    }
    for (; k < end; k += HQQ_LANES)
        dot_vector(acc, b, k, decoders, nbits, axis, MB, PER, left, less_zero);
}

/* Of the rows' groups number g. */
HQQ_ALWAYS_INLINE void make_decoders(hqq_decoder *decoders, const dot_block *b, int64_t g,
                                     const int nbits, const int PER)
{
#pragma GCC unroll 8
    for (int j = 0; j < PER; j++)
        decoders[j] = hqq_decoder_of(nbits, nbits <= HQQ_TABLE_BITS, b->zero[j * b->stride + g],
                                     b->scale[j * b->stride + g]);
}

/* sums[m * PER + j] += the products of the block; lanes are summed at the very end. */
HQQ_ALWAYS_INLINE void dot_packed_row(hqq_vec *sums, const dot_block *b, const int nbits,
                                      const int axis, const int MB, const int PER,
                                      const int left, const int less_zero)
{
    const int SUMS = MB * PER;
    /* at least eight chains of additions, to hide their latency */
    const int UNROLL = SUMS >= 8 ? 1 : SUMS >= 4 ? 2 : 4;
    hqq_vec acc[16] = {{0}};
    const int AHEAD = nbits <= HQQ_TABLE_BITS && PER <= TABLES_AHEAD;
    hqq_decoder decoders[8], next[8];
    if (axis == 0) {
        decoders[0] = hqq_decoder_of(nbits, nbits <= HQQ_TABLE_BITS, 0.0f, 1.0f);
        for (int i = 0; i < SUMS && !less_zero; i++) acc[i] = b->constant[i / PER];
        dot_columns(acc, b, 0, b->columns, decoders, nbits, axis, MB, PER, left, less_zero,
                    UNROLL);
    } else {
        int64_t end = b->group_left;
        if (AHEAD) make_decoders(next, b, 0, nbits, PER);
        for (int64_t k = 0, g = 0; k < b->columns; g++, k = end, end += b->G) {
            if (AHEAD) {
#pragma GCC unroll 4
                for (int j = 0; j < PER; j++) decoders[j] = next[j];
                make_decoders(next, b, hqq_least(g + 1, b->stride - 1), nbits, PER);
            } else {
                make_decoders(decoders, b, g, nbits, PER);
            }
            dot_columns(acc, b, k, end < b->columns ? end : b->columns, decoders, nbits, axis,
                        MB, PER, left, 0, UNROLL);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
        hqq_vec sum = sums[i] + acc[i];
        for (int u = 1; u < UNROLL; u++) sum += acc[u * SUMS + i];
        sums[i] = sum;
    }
}

HQQ_ALWAYS_INLINE void dot_row(hqq_vec *sums, const dot_block *b, const int nbits,
                               const int axis, const int MB, const int PER, const int left)
{
    if (axis == 0 && b->zero)
        dot_packed_row(sums, b, nbits, axis, MB, PER, left, 1);
    else
        dot_packed_row(sums, b, nbits, axis, MB, PER, left, 0);
}

#define DOT(nbits, axis, MB)                                                   \
    static void dot_##nbits##_##axis##_##MB(hqq_vec *sums, const dot_block *b) \
    {                                                                          \
        dot_row(sums, b, nbits, axis, MB, 8 / (nbits), 0);                     \
    }
#define DOTS(nbits, MB) DOT(nbits, 0, MB) DOT(nbits, 1, MB)
/* clang-format off */
DOTS(8, 1) DOTS(8, 2) DOTS(8, 4) DOTS(8, 8)
DOTS(4, 1) DOTS(4, 2) DOTS(4, 4)
DOTS(2, 1) DOTS(2, 2)
DOTS(1, 1)
#define PAIR(nbits, MB) {dot_##nbits##_0_##MB, dot_##nbits##_1_##MB}
#if MAX_SUMS == 16
DOTS(4, 8) DOTS(2, 4) DOTS(1, 2)
#define WIDEST PAIR
#else
#define WIDEST(nbits, MB) {NULL, NULL}
#endif

static dot_table float_dots = {
    {PAIR(8, 1), PAIR(8, 2), PAIR(8, 4), PAIR(8, 8)},
    {PAIR(4, 1), PAIR(4, 2), PAIR(4, 4), WIDEST(4, 8)},
    {PAIR(2, 1), PAIR(2, 2), WIDEST(2, 4)},
    {PAIR(1, 1), WIDEST(1, 2)},
};
/* clang-format on */

/* of a weight in planes, by rows of W taken together */
PLANE_DOTS(float_planes, dot_row)

#endif

/*
 * The inner loops of the direct forward product in bf16 (direct_linear_aligned.c): 32 weights
 * a vector, and vdpbf16ps, which sums the products of two neighbours to each float.
 *
 *   axis 1, up to 4 bits   a table of (q - zero) * scale for each slot and group, rounded to
 *                          bf16: as many look-ups for 32 weights as in fp32 for 16
 *   axis 0, up to 4 bits   the codes themselves, which bf16 holds exactly; x is scaled, and
 *                          -sum x * zero is what the sums of a token begin with
 *   8 bits                 in fp32, rounded in pairs
 *
 * Napkin, 4 bits, axis 1, G = 64, on a Zen 4, which does most operations on 64 bytes in two
 * halves on four pipes, two of which multiply and two of which permute. 64 bytes of codes, 128
 * weights, two tables:
 *
 *                        fp32                          pairs
 *     widening loads     4                             2
 *     shifts             4                             2
 *     look-ups           8                             4
 *     tables             2 x 2                         2 x 3
 *     multiplications    8 M                           4 M
 *     M = 1              28 -> 16 cycles               18 -> 10
 *     M = 4              52 -> 32 (multiplying pipes)  30 -> 18
 *     M = 8              84 -> 64                      46 -> 34
 *
 * 10 cycles for 64 bytes are 23 GB/s a core at 3.65 GHz: more than memory gives. A Zen 5, which
 * starts two of any of these a cycle, takes 7.4, 9, 13.5 and 24 to 28 cycles at M = 1, 2, 4 and
 * 8 (from its caches, at 4 GHz): a sum waits 6 cycles for the one before.
 */
#ifndef HQQ_KERNELS_CPU_DOT_PAIRS_H
#define HQQ_KERNELS_CPU_DOT_PAIRS_H

#include "decode.h"
#include "dot_block.h"
#include "pairs.h"

HQQ_ALWAYS_INLINE __m512i load_32_bytes(const uint8_t *bytes)
{
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
}

/* words[j] = 32 columns of row j of the PER, shifted down. */
HQQ_ALWAYS_INLINE void load_pair_codes(__m512i *words, const dot_block *b, int64_t k,
                                       const int nbits, const int PER, const int left)
{
    if (nbits != 3) {
        __m512i bytes = load_32_bytes(b->words + k);
#pragma GCC unroll 8
        for (int j = 0; j < PER; j++) words[j] = _mm512_srli_epi16(bytes, 8 - nbits * (j + 1));
        return;
    }
    hqq_plane_vector twos[2];
    for (int t = 0; t < (PER == 8 ? 2 : 1); t++)
        twos[t] = (hqq_plane_vector)load_32_bytes(b->planes.twos[t] + k);
    __m512i ones = load_32_bytes(b->planes.ones + k);
    if (PER < 8) ones = _mm512_srlv_epi16(ones, _mm512_set1_epi16((int16_t)b->planes.right));
#pragma GCC unroll 4
    for (int i = 0; i < PER / 2; i++) {
        words[i + PER / 2] =
            (__m512i)hqq_plane_codes(twos, (hqq_plane_vector)ones, PER, i, left);
        words[i] = _mm512_srli_epi16(words[i + PER / 2], 4);
    }
}

/* 32 weights of each slot, times MB tokens: acc[m * PER + j]. */
HQQ_ALWAYS_INLINE void dot_pair_vector(hqq_vec *acc, const dot_block *b, int64_t k,
                                       const __m512i *tables, float zero, float scale,
                                       const int nbits, const int axis, const int MB,
                                       const int PER, const int left)
{
    const uint16_t *x = (const uint16_t *)b->x + k * MB;
    __m512i words[8], w[8];
    if (nbits < 8) load_pair_codes(words, b, k, nbits, PER, left);
#pragma GCC unroll 8
    for (int j = 0; j < PER; j++)
        w[j] = nbits == 8 ? hqq_pairs_of_bytes(b->words + k, zero, scale)
                          : _mm512_permutexvar_epi16(words[j], tables[axis == 1 ? j : 0]);
#pragma GCC unroll 8
    for (int m = 0; m < MB; m++) {
        __m512i xm = _mm512_loadu_si512(x + m * 32);
        HQQ_KEEP_IN_REGISTER(xm);
#pragma GCC unroll 8
        for (int j = 0; j < PER; j++)
            acc[m * PER + j] = hqq_dot_pairs(acc[m * PER + j], w[j], xm);
    }
}

HQQ_ALWAYS_INLINE void dot_pair_columns(hqq_vec *acc, const dot_block *b, int64_t k,
                                        int64_t end, const __m512i *tables, float zero,
                                        float scale, const int nbits, const int axis,
                                        const int MB, const int PER, const int left,
                                        const int UNROLL)
{
    const int SUMS = MB * PER;
    for (; k + 32 * UNROLL <= end; k += 32 * UNROLL) {
        if (UNROLL > 1 || k % 64 == 0) dot_prefetch(b, k, nbits, PER);
#pragma GCC unroll 2
        for (int u = 0; u < UNROLL; u++)
            dot_pair_vector(acc + u * SUMS, b, k + u * 32, tables, zero, scale, nbits, axis, MB,
                            PER, left);
    }
    for (; k < end; k += 32)
        dot_pair_vector(acc, b, k, tables, zero, scale, nbits, axis, MB, PER, left);
}

/* Those of the rows' groups number g, where 32 weights are looked up. */
HQQ_ALWAYS_INLINE void make_pair_tables(__m512i *tables, const dot_block *b, int64_t g,
                                        const int nbits, const int PER)
{
#pragma GCC unroll 8
    for (int j = 0; j < PER && nbits < 8; j++)
        tables[j] =
            hqq_pair_table(nbits, b->zero[j * b->stride + g], b->scale[j * b->stride + g]);
}

HQQ_ALWAYS_INLINE void dot_pair_row(hqq_vec *sums, const dot_block *b, const int nbits,
                                    const int axis, const int MB, const int PER, const int left)
{
    const int SUMS = MB * PER;
    const int UNROLL = SUMS > 8 ? 1 : 2; /* chains of additions, to hide their latency */
    hqq_vec acc[16] = {{0}};
    __m512i tables[8], next[8];
    if (axis == 0) {
        tables[0] = hqq_pair_table(nbits, 0.0f, 1.0f);
        for (int m = 0; m < MB; m++)
            for (int j = 0; j < PER; j++) acc[m * PER + j] = b->constant[m];
        dot_pair_columns(acc, b, 0, b->columns, tables, 0.0f, 1.0f, nbits, axis, MB, PER, left,
                         UNROLL);
    } else {
        int64_t end = b->group_left;
        if (PER <= TABLES_AHEAD) make_pair_tables(next, b, 0, nbits, PER);
        for (int64_t k = 0, g = 0; k < b->columns; g++, k = end, end += b->G) {
            if (PER <= TABLES_AHEAD) {
#pragma GCC unroll 4
                for (int j = 0; j < PER; j++) tables[j] = next[j];
                make_pair_tables(next, b, hqq_least(g + 1, b->stride - 1), nbits, PER);
            } else {
                make_pair_tables(tables, b, g, nbits, PER);
            }
            dot_pair_columns(acc, b, k, end < b->columns ? end : b->columns, tables, b->zero[g],
                             b->scale[g], nbits, axis, MB, PER, left, UNROLL);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
        hqq_vec sum = UNROLL > 1 ? acc[i] + acc[SUMS + i] : acc[i];
        sums[i] += axis == 0 ? sum + b->constant[8 + i / PER] : sum;
    }
}

#define PAIR_DOT(nbits, axis, MB)                                                   \
    static void pair_dot_##nbits##_##axis##_##MB(hqq_vec *sums, const dot_block *b) \
    {                                                                               \
        dot_pair_row(sums, b, nbits, axis, MB, 8 / (nbits), 0);                     \
    }
#define PAIR_DOTS(nbits, MB) PAIR_DOT(nbits, 0, MB) PAIR_DOT(nbits, 1, MB)
/* clang-format off */
PAIR_DOTS(8, 1) PAIR_DOTS(8, 2) PAIR_DOTS(8, 4) PAIR_DOTS(8, 8)
PAIR_DOTS(4, 1) PAIR_DOTS(4, 2) PAIR_DOTS(4, 4) PAIR_DOTS(4, 8)
PAIR_DOTS(2, 1) PAIR_DOTS(2, 2) PAIR_DOTS(2, 4)
PAIR_DOTS(1, 1) PAIR_DOTS(1, 2)
#define PAIR_OF(nbits, MB) {pair_dot_##nbits##_0_##MB, pair_dot_##nbits##_1_##MB}

static dot_table pair_dots = {
    {PAIR_OF(8, 1), PAIR_OF(8, 2), PAIR_OF(8, 4), PAIR_OF(8, 8)},
    {PAIR_OF(4, 1), PAIR_OF(4, 2), PAIR_OF(4, 4), PAIR_OF(4, 8)},
    {PAIR_OF(2, 1), PAIR_OF(2, 2), PAIR_OF(2, 4)},
    {PAIR_OF(1, 1), PAIR_OF(1, 2)},
};
/* clang-format on */
PLANE_DOTS(pair_planes, dot_pair_row)

#endif

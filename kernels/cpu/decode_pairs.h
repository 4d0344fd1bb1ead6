/*
 * Rows of W as the tiled input gradient multiplies them: a word a column, the bf16 of row 2 i
 * and above it that of row 2 i + 1 (multiply_tile.h), made in registers.
 *
 *     row 2 i      32 bytes -> shift, look up -> 32 bf16 |  interleaved:
 *     row 2 i + 1  32 bytes -> shift, look up -> 32 bf16 |  16 words, 16 words
 *
 * Napkin for 64 weights: 2 widening loads, 2 shifts, 2 look-ups, 2 permutations, 2 stores, and
 * 4 operations of tables for 64 columns of a row; about 6 cycles on a Zen 5. To decode rows and
 * interleave them afterwards took 13 there: 256 columns are four groups, hardly more work than
 * what comes with a row, and another store and load for each weight.
 *
 * What is subnormal in bf16 becomes zero, as the instruction that multiplies takes it.
 */
#ifndef HQQ_KERNELS_CPU_DECODE_PAIRS_H
#define HQQ_KERNELS_CPU_DECODE_PAIRS_H

#include "pairs.h"
#include "tiled.h"

/* Whether it can: bytes that hold whole rows, one group after the other, in whole vectors. */
static inline int hqq_rows_decode_in_pairs(const hqq_tiled_job *job)
{
    const hqq_layout *l = &job->layout;
    return l->axis == 1 && l->nbits <= 4 && !l->planes && hqq_rows_align(l) &&
           hqq_groups_align(l) && l->G % 32 == 0;
}

/* Where a row's codes and groups are, from some column on. */
typedef struct coded_row {
    const uint8_t *bytes;
    int64_t group;
} coded_row;

/* Columns [0, columns) of two rows under one group each. */
HQQ_ALWAYS_INLINE void pair_group(uint32_t *out, const uint8_t *even, const uint8_t *odd,
                                  __m512i even_table, __m512i odd_table, __m512i shift,
                                  int64_t columns)
{
    for (int64_t k = 0; k < columns; k += 32) {
        __m512i a = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(even + k)));
        __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(odd + k)));
        a = _mm512_permutexvar_epi16(_mm512_srlv_epi16(a, shift), even_table);
        b = _mm512_permutexvar_epi16(_mm512_srlv_epi16(b, shift), odd_table);
        hqq_interleave_pairs(out + k, out + k + 16, a, b);
    }
}

HQQ_ALWAYS_INLINE __m512i group_table(const hqq_tiled_job *job, hqq_dtype meta, int64_t group)
{
    return hqq_pair_table(job->layout.nbits, hqq_load_quick(job->weight->zero, meta, group),
                          hqq_load_quick(job->weight->scale, meta, group));
}

/* Two rows, from column `begin` of W on. */
HQQ_ALWAYS_INLINE void pair_two_rows(uint32_t *out, const hqq_tiled_job *job, hqq_dtype meta,
                                     coded_row even, coded_row odd, __m512i shift,
                                     int64_t begin, int64_t columns)
{
    int64_t G = job->layout.G, left = G - begin % G;
    for (int64_t k = 0; k < columns; k += left, left = G, even.group++, odd.group++) {
        if (left > columns - k) left = columns - k;
        pair_group(out + k, even.bytes + k, odd.bytes + k, group_table(job, meta, even.group),
                   group_table(job, meta, odd.group), shift, left);
    }
}

HQQ_ALWAYS_INLINE void pair_piece(uint32_t *out, int64_t ld, const hqq_tiled_job *job,
                                  hqq_dtype meta, hqq_row_piece piece, int slot, int64_t begin,
                                  int64_t columns)
{
    const hqq_layout *l = &job->layout;
    const uint8_t *bytes = job->weight->packed;
    __m512i shift = _mm512_set1_epi16((int16_t)hqq_slot_shift(l->nbits, slot));
    for (int64_t r = 0; r < piece.count; r += 2) {
        int64_t n = piece.first + r;
        coded_row even = {bytes + (n - slot * (l->N / l->per)) * l->K + begin,
                          (n * l->K + begin) / l->G};
        coded_row odd = {even.bytes + l->K, even.group + l->K / l->G};
        pair_two_rows(out + r / 2 * ld, job, meta, even, odd, shift, begin, columns);
    }
}

/* out [pairs of rows, columns] words, `ld` apart, of an even number of rows of one slot. */
static inline void hqq_decode_piece_in_pairs(uint32_t *out, int64_t ld,
                                             const hqq_tiled_job *job, hqq_row_piece piece,
                                             int slot, int64_t begin, int64_t columns)
{
    switch (job->weight->meta_dtype) {
    case HQQ_F32: pair_piece(out, ld, job, HQQ_F32, piece, slot, begin, columns); break;
    case HQQ_F16: pair_piece(out, ld, job, HQQ_F16, piece, slot, begin, columns); break;
    case HQQ_BF16: pair_piece(out, ld, job, HQQ_BF16, piece, slot, begin, columns); break;
    }
}

#endif

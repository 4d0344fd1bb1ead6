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
 * In planes a row takes a load, two shifts and an operation of logic more: 4096 x 4096, M = 16,
 * 0.88 of the speed of 4 bits on a Zen 5, where decoding first and interleaving made 0.67.
 *
 * 8 bits are converted, not looked up: 0.82 of the speed of 4 bits, where it was 0.42.
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
    return l->axis == 1 && hqq_rows_align(l) && hqq_groups_align(l) && l->G % 32 == 0;
}

/* Where a row's codes and groups are, from some column on. */
typedef struct coded_row {
    const uint8_t *bytes, *ones; /* ones: of planes, whose 2-bit codes the bytes then are */
    int64_t group;
    __m512i right, ones_right; /* shifts to the code; of planes after one to the left */
} coded_row;

/* Row n, of a slot, from column k on; planes is a constant. */
HQQ_ALWAYS_INLINE coded_row row_from(const hqq_tiled_job *job, int64_t n, int slot, int64_t k,
                                     const int planes)
{
    const hqq_layout *l = &job->layout;
    int64_t p = n - slot * (l->N / l->per);
    int right = hqq_slot_shift(l->nbits, slot);
    coded_row row = {.group = (n * l->K + k) / l->G};
    if (planes) {
        hqq_plane_row r = hqq_plane_row_of(job->weight->packed, l, p);
        row.bytes = r.twos + k;
        row.ones = r.ones + k;
        row.ones_right = _mm512_set1_epi16((int16_t)(right + r.ones_right));
        right += r.twos_left ? 0 : 2;
    } else {
        row.bytes = (const uint8_t *)job->weight->packed + p * l->K + k;
    }
    row.right = _mm512_set1_epi16((int16_t)right);
    return row;
}

HQQ_ALWAYS_INLINE __m512i load_wide(const uint8_t *bytes)
{
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
}

/* The values of 32 codes. */
HQQ_ALWAYS_INLINE __m512i look_up_row(const coded_row *row, int64_t k, __m512i table,
                                      const int planes)
{
    __m512i codes = load_wide(row->bytes + k);
    if (planes) {
        codes = _mm512_srlv_epi16(_mm512_add_epi16(codes, codes), row->right);
        codes = _mm512_ternarylogic_epi32(
            _mm512_set1_epi16(6), codes,
            _mm512_srlv_epi16(load_wide(row->ones + k), row->ones_right), 0xca);
    } else {
        codes = _mm512_srlv_epi16(codes, row->right);
    }
    return _mm512_permutexvar_epi16(codes, table);
}

/* 32 codes themselves, by the table of zero 0 and scale 1; 8 bits need none. nbits is a
 * constant.
 */
HQQ_ALWAYS_INLINE __m512i values_of_codes(const coded_row *row, int64_t k, __m512i table,
                                          const int nbits)
{
    if (nbits == 8) return hqq_pairs_of_bytes(row->bytes + k, 0.0f, 1.0f);
    return look_up_row(row, k, table, nbits == 3);
}

HQQ_ALWAYS_INLINE __m512i group_table(const hqq_tiled_job *job, hqq_dtype meta, int64_t group)
{
    return hqq_pair_table(job->weight->nbits, hqq_load_quick(job->weight->zero, meta, group),
                          hqq_load_quick(job->weight->scale, meta, group));
}

/* 32 codes of 8 bits under the group's zero and scale. */
HQQ_ALWAYS_INLINE __m512i convert_row(const coded_row *row, int64_t k, const hqq_tiled_job *job,
                                      hqq_dtype meta)
{
    return hqq_pairs_of_bytes(row->bytes + k,
                              hqq_load_quick(job->weight->zero, meta, row->group),
                              hqq_load_quick(job->weight->scale, meta, row->group));
}

/* Two rows, from column `begin` of W on. nbits is a constant: 8, 3 of planes, or 4 for what
 * else is looked up. */
HQQ_ALWAYS_INLINE void pair_two_rows(uint32_t *out, const hqq_tiled_job *job, hqq_dtype meta,
                                     coded_row even, coded_row odd, int64_t begin,
                                     int64_t columns, const int nbits)
{
    int64_t G = job->layout.G, left = G - begin % G;
    for (int64_t k = 0; k < columns; k += left, left = G, even.group++, odd.group++) {
        if (left > columns - k) left = columns - k;
        if (nbits == 8) {
            for (int64_t i = k; i < k + left; i += 32)
                hqq_interleave_pairs(out + i, out + i + 16, convert_row(&even, i, job, meta),
                                     convert_row(&odd, i, job, meta));
            continue;
        }
        __m512i even_table = group_table(job, meta, even.group);
        __m512i odd_table = group_table(job, meta, odd.group);
        for (int64_t i = k; i < k + left; i += 32)
            hqq_interleave_pairs(out + i, out + i + 16,
                                 look_up_row(&even, i, even_table, nbits == 3),
                                 look_up_row(&odd, i, odd_table, nbits == 3));
    }
}

HQQ_ALWAYS_INLINE void pair_piece_of(uint32_t *out, int64_t ld, const hqq_tiled_job *job,
                                     hqq_dtype meta, hqq_row_piece piece, int slot,
                                     int64_t begin, int64_t columns, const int nbits)
{
    for (int64_t n = piece.first; n < piece.first + piece.count; n += 2, out += ld)
        pair_two_rows(out, job, meta, row_from(job, n, slot, begin, nbits == 3),
                      row_from(job, n + 1, slot, begin, nbits == 3), begin, columns, nbits);
}

HQQ_ALWAYS_INLINE void pair_piece(uint32_t *out, int64_t ld, const hqq_tiled_job *job,
                                  hqq_dtype meta, hqq_row_piece piece, int slot, int64_t begin,
                                  int64_t columns)
{
    switch (job->weight->nbits) {
    case 8: pair_piece_of(out, ld, job, meta, piece, slot, begin, columns, 8); break;
    case 3: pair_piece_of(out, ld, job, meta, piece, slot, begin, columns, 3); break;
    default: pair_piece_of(out, ld, job, meta, piece, slot, begin, columns, 4); break;
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

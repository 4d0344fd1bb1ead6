/*
 * Columns of W at axis 0 as panels hold them (panels.h): a word a column, the bf16 of row n and
 * above it that of row n + 1. Every weight has a zero and a scale, which the rows n = r mod N/G
 * share, so two residues are decoded together, from top to bottom:
 *
 *     rows r, r + N/G, ...             32 bytes -> 16 + 16 codes in fp32 |  rounded together,
 *     rows r + 1, r + 1 + N/G, ...     32 bytes -> 16 + 16 codes in fp32 |  interleaved
 *
 *     zeros and scales [2 rows, 64 columns]    in the first cache, read from memory once
 *
 * Row by row, 64 columns of 64 rows of zeros and scales lie 8 KB apart, and fall out of the
 * caches before their turn comes again: a product of 160 tokens
 * then took 1.4 times as long, at 8 bits 2 to 3 times.
 *
 * Napkin for 64 weights: 2 loads that widen, 2 shifts, 2 look-ups, 4 operations that take codes
 * apart, 8 of arithmetic, 2 roundings, 2 permutations, 2 stores: about 10 cycles on a Zen 5.
 *
 * What is subnormal in bf16 becomes zero, as the instruction that multiplies takes it.
 */
#ifndef HQQ_KERNELS_CPU_DECODE_PAIRS_SCALED_H
#define HQQ_KERNELS_CPU_DECODE_PAIRS_SCALED_H

#include "decode_pairs.h"

#define SCALED_COLUMNS 64 /* at most, at a time */
/* Rows of a residue whose words are fetched ahead: they lie too far apart for the processor to
 * foresee. 14336 columns at 8 bits: 0.9 of the time of a product of 160 tokens. */
#define RESIDUE_AHEAD 4

/* Whether it can: bytes that hold whole rows, pairs of rows in one slot and in two residues, in
 * whole vectors. */
static inline int hqq_residues_decode_in_pairs(const hqq_layout *l)
{
    return l->axis == 0 && hqq_rows_align(l) && hqq_groups_align(l) && l->K % 32 == 0 &&
           l->N / l->G % 2 == 0 && l->N / l->per % 2 == 0;
}

/* Zeros and scales of a row's columns: of each 32 the even ones, then the odd ones. */
typedef struct scaled_row {
    float zero[SCALED_COLUMNS], scale[SCALED_COLUMNS];
} scaled_row;

/* out = the elements [at, at + columns) in that order. */
static inline void load_apart(float *out, const void *meta, hqq_dtype dtype, int64_t at,
                              int64_t columns)
{
    float in_turn[SCALED_COLUMNS];
    hqq_load_floats(in_turn, meta, dtype, at, columns);
    for (int64_t k = 0; k < columns; k += 32)
        for (int i = 0; i < 16; i++) {
            out[k + i] = in_turn[k + 2 * i];
            out[k + 16 + i] = in_turn[k + 2 * i + 1];
        }
}

/* 32 weights: the even columns, and the odd ones. nbits, here and below, is a constant. */
HQQ_ALWAYS_INLINE void scaled_32(hqq_vec out[2], const coded_row *row, const scaled_row *by,
                                 int64_t k, __m512i table, const int nbits)
{
    if (nbits == 8) {
        hqq_uvec codes = (hqq_uvec)load_wide(row->bytes + k);
        out[0] = hqq_vec_from_int((hqq_ivec)(codes & 0xffff));
        out[1] = hqq_vec_from_int((hqq_ivec)(codes >> 16));
    } else {
        hqq_uvec codes = (hqq_uvec)look_up_row(row, k, table, nbits == 3);
        out[0] = (hqq_vec)(codes << 16);
        out[1] = (hqq_vec)(codes & 0xffff0000u);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        out[i] = (out[i] - hqq_vec_load(by->zero + k + i * 16)) *
                 hqq_vec_load(by->scale + k + i * 16);
}

/* Rows n and n + 1 of a slot. */
HQQ_ALWAYS_INLINE void scaled_pair(uint32_t *out, const hqq_tiled_job *job, int64_t n, int slot,
                                   const scaled_row by[2], int64_t begin, int64_t columns,
                                   __m512i table, const int nbits)
{
    typedef uint16_t lanes __attribute__((vector_size(64)));
    const __m512i low_half =
        (__m512i)(lanes){0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51,
                         4, 20, 36, 52, 5, 21, 37, 53, 6, 22, 38, 54, 7, 23, 39, 55};
    const __m512i high_half = _mm512_add_epi16(low_half, _mm512_set1_epi16(8));
    coded_row rows[2] = {row_from(job, n, slot, begin, nbits == 3),
                         row_from(job, n + 1, slot, begin, nbits == 3)};
    const hqq_layout *l = &job->layout;
    int64_t ahead = RESIDUE_AHEAD * (l->N / l->G) * l->K;
    __builtin_prefetch(rows[0].bytes + ahead);
    __builtin_prefetch(rows[1].bytes + ahead);
    for (int64_t k = 0; k < columns; k += 32) {
        hqq_vec upper[2], lower[2];
        scaled_32(upper, &rows[0], &by[0], k, table, nbits);
        scaled_32(lower, &rows[1], &by[1], k, table, nbits);
        __m512i even = hqq_round_to_pairs(upper[0], lower[0]);
        __m512i odd = hqq_round_to_pairs(upper[1], lower[1]);
        _mm512_storeu_si512(out + k, _mm512_permutex2var_epi16(even, low_half, odd));
        _mm512_storeu_si512(out + k + 16, _mm512_permutex2var_epi16(even, high_half, odd));
    }
}

HQQ_ALWAYS_INLINE void scaled_residues(uint32_t *out, int64_t ld, const hqq_tiled_job *job,
                                       int64_t begin, int64_t columns, const int nbits)
{
    const hqq_layout *l = &job->layout;
    const hqq_weight *w = job->weight;
    const __m512i table = nbits < 8 ? hqq_pair_table(nbits, 0.0f, 1.0f) : (__m512i){0};
    int64_t residues = l->N / l->G, count = l->N / l->per;
    for (int64_t r = 0; r < residues; r += 2) {
        scaled_row by[2];
        for (int i = 0; i < 2; i++) {
            int64_t at = (r + i) * l->K + begin;
            load_apart(by[i].zero, w->zero, w->meta_dtype, at, columns);
            load_apart(by[i].scale, w->scale, w->meta_dtype, at, columns);
        }
        int64_t n = r;
        for (int j = 0; j < l->per; j++)
            for (; n < (j + 1) * count; n += residues)
                scaled_pair(out + n / 2 * ld, job, n, j, by, begin, columns, table, nbits);
    }
}

/* out [N / 2, columns] words, `ld` apart, of up to SCALED_COLUMNS columns. */
static __attribute__((noinline)) void hqq_decode_residues_in_pairs(uint32_t *out, int64_t ld,
                                                                   const hqq_tiled_job *job,
                                                                   int64_t begin,
                                                                   int64_t columns)
{
    switch (job->weight->nbits) {
    case 8: scaled_residues(out, ld, job, begin, columns, 8); break;
    case 4: scaled_residues(out, ld, job, begin, columns, 4); break;
    case 3: scaled_residues(out, ld, job, begin, columns, 3); break;
    case 2: scaled_residues(out, ld, job, begin, columns, 2); break;
    case 1: scaled_residues(out, ld, job, begin, columns, 1); break;
    }
}

#endif

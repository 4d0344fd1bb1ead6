/*
 * Rows of W in bf16 as tiles multiply them along k (tiled.h), for AVX-512 BF16: included only
 * where HQQ_HAS_PAIRS. A packed row is loaded once for all its slots:
 *
 *     32 bytes -> for each slot: shift, look up -> 32 bf16 of a row of W
 *
 * Forward, 4096 x 4096, a Zen 5, two threads, times as fast as with every row decoded by itself
 * (dequantize_block.c), at 8, 16, 32 tokens: 4 bits 1.07, 1.05, 1.01; 2 bits 1.13, 1.07 at
 * 8, 16; 8 bits, which are converted, 1.1 at 12 and 16. A loop over groups of any length lost
 * it again. What is subnormal in bf16 becomes
 * zero, as the instruction that multiplies takes it.
 */
#ifndef HQQ_KERNELS_CPU_DECODE_ROWS_BF16_H
#define HQQ_KERNELS_CPU_DECODE_ROWS_BF16_H

#include "code_runs.h"
#include "pairs.h"

/* Whether it can: bytes that hold whole rows, one group after the other, in two
 * vectors. 1 bit is looked up as soon row by row. */
static inline int hqq_rows_decode_in_bf16(const hqq_layout *l)
{
    return l->axis == 1 && (l->nbits == 8 || l->nbits == 4 || l->nbits == 2) && !l->planes &&
           hqq_rows_align(l) && hqq_groups_align(l) && l->G % 64 == 0;
}

/* 32 columns of each slot, by the tables of the slots, `next` from one to the next. */
HQQ_ALWAYS_INLINE void bf16_columns(uint16_t *out, int64_t slot, const uint8_t *bytes,
                                    const __m512i *table, const int next, const int nbits)
{
    const int per = 8 / nbits;
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
#pragma GCC unroll 8
    for (int j = 0; j < per; j++)
        _mm512_storeu_si512(out + j * slot, _mm512_permutexvar_epi16(
                                                _mm512_srli_epi16(words, 8 - nbits * (j + 1)),
                                                table[j * next]));
}

/* 64 columns of 8 bits. */
HQQ_ALWAYS_INLINE void bf16_columns_of_bytes(uint16_t *out, const uint8_t *bytes, float zero,
                                             float scale)
{
    _mm512_storeu_si512(out, hqq_pairs_of_bytes(bytes, zero, scale));
    _mm512_storeu_si512(out + 32, hqq_pairs_of_bytes(bytes + 32, zero, scale));
}

/* Columns [begin, end) of packed row p, those of slot j at out + j * slot. */
HQQ_ALWAYS_INLINE void bf16_rows_of(uint16_t *out, int64_t slot, const hqq_weight *w,
                                    const hqq_layout *l, int64_t p, int64_t begin, int64_t end,
                                    hqq_dtype meta, const int nbits)
{
    const int per = 8 / nbits;
    const uint8_t *bytes = (const uint8_t *)w->packed + p * l->K;
    int64_t slot_groups = l->words / l->G, group = (p * l->K + begin) / l->G;
    int64_t left = l->G - begin % l->G;
    out -= begin;
    for (int64_t k = begin; k < end; k += 64) {
        __m512i table[4];
        if (nbits == 8) {
            bf16_columns_of_bytes(out + k, bytes + k, hqq_load_quick(w->zero, meta, group),
                                  hqq_load_quick(w->scale, meta, group));
            left -= 64;
            group += left == 0;
            left = left == 0 ? l->G : left;
            continue;
        }
#pragma GCC unroll 4
        for (int j = 0; j < per; j++) {
            int64_t g = group + j * slot_groups;
            table[j] = hqq_pair_table(nbits, hqq_load_quick(w->zero, meta, g),
                                      hqq_load_quick(w->scale, meta, g));
        }
        bf16_columns(out + k, slot, bytes + k, table, 1, nbits);
        bf16_columns(out + k + 32, slot, bytes + k + 32, table, 1, nbits);
        left -= 64;
        group += left == 0;
        left = left == 0 ? l->G : left;
    }
}

HQQ_ALWAYS_INLINE void bf16_rows_of_meta(uint16_t *out, int64_t slot, const hqq_weight *w,
                                         const hqq_layout *l, int64_t p, int64_t begin,
                                         int64_t end, const int nbits)
{
    switch (w->meta_dtype) {
    case HQQ_F32: bf16_rows_of(out, slot, w, l, p, begin, end, HQQ_F32, nbits); break;
    case HQQ_F16: bf16_rows_of(out, slot, w, l, p, begin, end, HQQ_F16, nbits); break;
    case HQQ_BF16: bf16_rows_of(out, slot, w, l, p, begin, end, HQQ_BF16, nbits); break;
    }
}

/* out = columns [begin, end), multiples of 64, of the packed rows [row, row_end): rows of W
 * `ld` elements apart, those of slot j from row j * slot_rows on. */
static __attribute__((noinline)) void
hqq_decode_rows_in_bf16(uint16_t *out, int64_t ld, int64_t slot_rows, const hqq_weight *w,
                        const hqq_layout *l, int64_t row, int64_t row_end, int64_t begin,
                        int64_t end)
{
    for (int64_t p = row; p < row_end; p++, out += ld) switch (w->nbits) {
        case 8: bf16_rows_of_meta(out, slot_rows * ld, w, l, p, begin, end, 8); break;
        case 4: bf16_rows_of_meta(out, slot_rows * ld, w, l, p, begin, end, 4); break;
        case 2: bf16_rows_of_meta(out, slot_rows * ld, w, l, p, begin, end, 2); break;
        }
}

#endif

/* Rows of W in fp32 as tiles multiply them: strips of some columns, of many rows. One thread;
 * callable inside a chunk. */
#ifndef HQQ_KERNELS_CPU_DECODE_FLOATS_H
#define HQQ_KERNELS_CPU_DECODE_FLOATS_H

#include "hqqlora.h"
#include "isa.h"
#include "weight_layout.h"

/* Whether hqq_decode_strips serves: at axis 1, bytes that hold whole rows, one group after the
 * other, in whole vectors of any instruction set. The weight may be unsound: hqq_choose_kernel
 * answers all the same. */
static inline int hqq_strips_decode(const hqq_weight *w)
{
    if (w->axis != 1 || w->group_size <= 0 || w->group_size % 16 != 0) return 0;
    if (w->in_features % w->group_size != 0) return 0;
    if (w->nbits == 3) return w->packing == HQQ_PACKING_PLANES;
    int per = hqq_slots_per_word(w->nbits);
    return per > 0 && w->out_features % per == 0;
}

/* out = columns [begin, end), multiples of 16, of the packed rows [row, row_end): rows of W
 * `ld` floats apart, those of slot j from row j * slot_rows on. What hqq_dequantize_rows makes
 * of them. l: hqq_weight_layout's. ahead: how many rows ahead words are fetched; 0 where they
 * are in the second cache. */
HQQ_ISA_DECLARE(void, hqq_decode_strips,
                (float *out, int64_t ld, int64_t slot_rows, const hqq_weight *weight,
                 const hqq_layout *l, int64_t row, int64_t row_end, int64_t begin, int64_t end,
                 int64_t ahead));

/* Whether hqq_decode_residues serves: at axis 0, bytes that hold whole rows, a residue whole
 * packed rows, in whole vectors. The weight may be unsound, too. */
static inline int hqq_residues_decode(const hqq_weight *w)
{
    if (w->axis != 0 || w->group_size <= 0 || w->in_features % 16 != 0) return 0;
    if (w->out_features % w->group_size != 0) return 0;
    if (w->nbits == 3) return w->packing == HQQ_PACKING_PLANES;
    int per = hqq_slots_per_word(w->nbits);
    return per > 0 && w->group_size % per == 0;
}

/* The same columns of `rows` packed rows from `row` on that are N/G apart, and so share zeros
 * and scales: rows `ld` elements apart, those of a slot `slot` behind the one before. In fp32;
 * or in bf16, where HQQ_HAS_PAIRS, with what is subnormal as zero. */
HQQ_ISA_DECLARE(void, hqq_decode_residue,
                (void *out, int64_t ld, int64_t slot, hqq_dtype dtype, const hqq_weight *weight,
                 const hqq_layout *l, int64_t row, int64_t rows, int64_t begin, int64_t end));

#endif

/*
 * The order in which torch adds up a group of n for its mean (cascade_sum on a CPU with AVX2,
 * checked bit for bit), which hqq's solver hangs on: the codes turn on the last bit of zero,
 * and zero is a mean. Element i goes to sum i mod `width`; a sum that has added 2^p elements is
 * passed on to the next of four levels; what does not fill a row of `width` comes last. Torch's
 * eight AVX2 lanes give
 *
 *     axis 1, n >= 8    width 32 = 4 x 8; left over: whole eights, then single elements
 *     axis 1, n < 8     width 4
 *     axis 0            width 1; 4 for the groups behind the last multiple of 32
 */
#ifndef HQQ_KERNELS_MEAN_ORDER_H
#define HQQ_KERNELS_MEAN_ORDER_H

#include "format.h"

enum { HQQ_MEAN_LEVELS = 4, HQQ_MEAN_WIDEST = 32, HQQ_MEAN_EIGHT = 8 };

typedef struct hqq_mean_order {
    int width;
    int unit;           /* what is left over is added to the first `unit` sums */
    int used;           /* the first sums, which anything is added to; the others stay 0 */
    int chunk;          /* elements between checks for a full level */
    int levels;         /* that can fill up: 1 or all */
    int64_t rows_end;   /* elements in full rows */
    int64_t units_end;  /* and in full units behind them */
    int64_t level_mask; /* 2^p - 1 */
    int level_power;    /* p */
} hqq_mean_order;

HQQ_INLINE hqq_mean_order hqq_mean_order_of(const hqq_layout *l, int64_t first_group)
{
    int wide = l->axis == 1 && l->G >= HQQ_MEAN_EIGHT;
    int single = l->axis == 0 && first_group < l->groups / HQQ_MEAN_WIDEST * HQQ_MEAN_WIDEST;
    hqq_mean_order o;
    o.width = wide ? HQQ_MEAN_WIDEST : single ? 1 : 4;
    o.unit = wide ? HQQ_MEAN_EIGHT : 1;
    int64_t rows = l->G / o.width;
    int log2_rows = 0;
    while ((INT64_C(1) << log2_rows) < rows) log2_rows++;
    o.level_power = log2_rows / HQQ_MEAN_LEVELS > 4 ? log2_rows / HQQ_MEAN_LEVELS : 4;
    o.level_mask = (INT64_C(1) << o.level_power) - 1;
    o.chunk = single ? 1 << o.level_power : o.width;
    o.levels = rows > o.level_mask ? HQQ_MEAN_LEVELS : 1;
    o.used = rows > 0 ? o.width : o.unit;
    o.rows_end = rows * o.width;
    o.units_end = l->G / o.unit * o.unit;
    return o;
}

#endif

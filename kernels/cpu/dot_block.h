/* Between the driver of the direct forward product and its inner loops. */
#ifndef HQQ_KERNELS_CPU_DOT_BLOCK_H
#define HQQ_KERNELS_CPU_DOT_BLOCK_H

#include "simd.h"

/* Sums that fit the registers beside the weights and tables. */
#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_SUMS 16
#else
#define MAX_SUMS 8
#endif

/* One packed row against a block of x. Pointers are at the block's first column. */
typedef struct dot_block {
    const uint8_t *words;
    int64_t next;  /* bytes to the words that are wanted after these */
    const void *x; /* fp32, or for pairs bf16 */
    const hqq_vec
        *constant; /* pairs, axis 0: [2, 8 tokens], what every sum begins and ends with */
    const float *zero, *scale; /* axis 1: [per, stride] of the block's groups; axis 0: zero of
                                  each column */
    int64_t stride;
    int64_t columns;
    int64_t group_left; /* axis 1: columns to the end of the first group */
    int64_t G;
} dot_block;

/* sums [MB, per] += the products of a packed row with MB tokens. */
typedef void (*dot_fn)(hqq_vec *, const dot_block *);

/* Functions by slots in a word (1, 2, 4, 8), tokens (1, 2, 4, 8) and axis; log2 of both. Those
 * whose sums would not fit the registers are NULL. */
typedef const dot_fn dot_table[4][4][2];

#endif

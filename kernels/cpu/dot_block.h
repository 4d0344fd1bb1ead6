/* Between the driver of the direct forward product and its inner loops. */
#ifndef HQQ_KERNELS_CPU_DOT_BLOCK_H
#define HQQ_KERNELS_CPU_DOT_BLOCK_H

#include "integers.h"
#include "planes.h"
#include "simd.h"

/* Sums that fit the registers beside the weights and tables. */
#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_SUMS 16
#else
#define MAX_SUMS 8
#endif

/* Of up to so many rows, the tables of a group are made while the one before it is multiplied.
 * A table takes some 30 cycles from zero and scale to the first product (load, subtract,
 * multiply, round, look up), and a processor that starts two products a cycle does not see that
 * far ahead. */
#define TABLES_AHEAD 4

/* One packed row against a block of x. Pointers are at the block's first column. */
typedef struct dot_block {
    const uint8_t *words;
    hqq_plane_bytes planes; /* instead, of a weight in planes */
    int64_t row;            /* bytes to the next packed row's (dot_rows.h) */
    int64_t next;           /* bytes to the words that are wanted after these */
    const void *x;          /* fp32, or for pairs bf16 */
    /* axis 0: [8 tokens], what sums begin with; for pairs [2, 8], and what they end with */
    const hqq_vec *constant;
    /* axis 1: [per, stride] of the block's groups; axis 0: NULL, or in fp32 where there is no
     * constant, zero of each column */
    const float *zero, *scale;
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

HQQ_ALWAYS_INLINE void dot_prefetch(const dot_block *b, int64_t k, const int nbits,
                                    const int PER)
{
    if (nbits == 3)
        hqq_plane_prefetch(&b->planes, k + b->next, PER);
    else
        __builtin_prefetch(b->words + k + b->next);
}

/* A table `name` for weights in planes, of row(sums, b, 3, axis, MB, PER, left). */
#define PLANE_DOT(name, row, PER, axis, MB)                                     \
    static void name##_##PER##_##axis##_##MB(hqq_vec *sums, const dot_block *b) \
    {                                                                           \
        if ((PER) == 2 && b->planes.left)                                       \
            row(sums, b, 3, axis, MB, PER, 1);                                  \
        else                                                                    \
            row(sums, b, 3, axis, MB, PER, 0);                                  \
    }
#define PLANE_DOTS_OF(name, row, PER, MB) \
    PLANE_DOT(name, row, PER, 0, MB) PLANE_DOT(name, row, PER, 1, MB)
#define PLANE_PAIR(name, PER, MB) {name##_##PER##_0_##MB, name##_##PER##_1_##MB}
/* clang-format off */
#if MAX_SUMS == 16
#define PLANE_DOTS_OF_WIDEST(name, row)                                                \
    PLANE_DOTS_OF(name, row, 2, 8) PLANE_DOTS_OF(name, row, 4, 4) PLANE_DOTS_OF(name, row, 8, 2)
#define PLANE_WIDEST PLANE_PAIR
#else
#define PLANE_DOTS_OF_WIDEST(name, row)
#define PLANE_WIDEST(name, PER, MB) {NULL, NULL}
#endif
#define PLANE_DOTS(name, row)                                                          \
    PLANE_DOTS_OF(name, row, 2, 1) PLANE_DOTS_OF(name, row, 2, 2) PLANE_DOTS_OF(name, row, 2, 4) \
    PLANE_DOTS_OF(name, row, 4, 1) PLANE_DOTS_OF(name, row, 4, 2) PLANE_DOTS_OF(name, row, 8, 1) \
    PLANE_DOTS_OF_WIDEST(name, row)                                                    \
    static dot_table name = {                                                          \
        {{NULL}},                                                                      \
        {PLANE_PAIR(name, 2, 1), PLANE_PAIR(name, 2, 2), PLANE_PAIR(name, 2, 4),       \
         PLANE_WIDEST(name, 2, 8)},                                                    \
        {PLANE_PAIR(name, 4, 1), PLANE_PAIR(name, 4, 2), PLANE_WIDEST(name, 4, 4)},    \
        {PLANE_PAIR(name, 8, 1), PLANE_WIDEST(name, 8, 2)},                            \
    };
/* clang-format on */

#endif

/* Between the driver of the direct input gradient and its inner loops. */
#ifndef HQQ_KERNELS_CPU_ADD_BLOCK_H
#define HQQ_KERNELS_CPU_ADD_BLOCK_H

#include "planes.h"
#include "simd.h"

#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_SUMS 16
#else
#define MAX_SUMS 8
#endif
#define MAX_TOKENS (MAX_SUMS / 2)

/* Rows of W in a batch, about; packed rows are that over the slots of a word, and no more than
 * batch_packed_rows: a packed row is taken in no more than a cache line, to which the loop
 * comes back after all rows of the batch, and rows 4096 bytes apart share the 8 or 12 ways of a
 * set of the first cache, with the next batch's that are on their way.
 *
 *   8 (4096 x 4096; 8 bits, a Zen 3 with AVX2: 1.4 to 1.8 times as fast as with 32; 4 bits, a
 *   Zen 5 with AVX-512, times as fast as with 16: bf16 1.17, 1.25, 1.05 at M = 1, 2, 4; fp32
 *   1.18, 1.04 at M = 1, 4)
 *   4 where all of them share one set (the same Zen 5, 4096 x 4096, times as fast as with 8:
 *   4 bits, bf16 1.13, 1.04, 1.01 at M = 1, 2, 4, fp32 1.09, 1.06, .98; 8 bits 1.1, 1.1, .98;
 *   but 4096 x 14336, where they do not, .94 at M = 1)
 *   4 at axis 0, where rows lie far apart and zeros and scales take room too (the same Zen 5,
 *   times as fast as with 8: 4 bits, bf16 1.6, 1.1 at M = 1, 4; fp32 1.06; 2 bits 1.6, 1; 1.2)
 *   2 in planes, of which each takes three lines (than 4, M = 1: axis 0, bf16 1.1, fp32 1.36;
 *   axis 1, 1.2, 1.06)
 *
 * and 8 again at eight tokens, whose sums are loaded and stored once a batch (fp32, M = 16, 4
 * bits, axis 0, 1.1 times as fast as with 4; planes 1.07 times, with 4 rather than 2). */
#define BATCH_ROWS 32

static inline int64_t batch_packed_rows(const hqq_layout *l, int tokens)
{
    if (tokens == 8) return 8;
    if (l->planes) return 2;
    int one_set = l->K % 4096 == 0;
    return one_set || (l->axis == 0 && l->per > 1) ? 4 : 8;
}

/* A batch of packed rows against a block of columns, at whose first column the pointers are. */
typedef struct add_block {
    float *sums; /* [tokens, ld] */
    int64_t ld;
    int tokens; /* MB */
    const uint8_t *words[BATCH_ROWS];
    hqq_plane_bytes planes[BATCH_ROWS / 8]; /* instead, of a weight in planes, 8 rows each */
    const float *dy[BATCH_ROWS];            /* of slot 0: [MB]; slot j lies dy_slot behind */
    int64_t dy_slot;
    uint32_t dy_pairs[BATCH_ROWS / 2 * 8]; /* pairs: [two rows, per, MB], the first row low */
    float dy_sums[8];                      /* axis 0: of all rows and slots */
    int rows;                              /* packed ones */
    int64_t next;                          /* bytes to the words that are wanted after these */
    const float *zero, *scale; /* axis 1: [rows, per, groups]; axis 0: of each column */
    int64_t groups;
    int64_t columns;
    int64_t group_left; /* axis 1: columns to the end of the first group */
    int64_t G;
} add_block;

/* Tables of rows are made one ahead of their use, from two tokens on in bf16 (not of planes)
 * and from four in fp32: as in TABLES_AHEAD of dot_block.h, what is multiplied meanwhile hides
 * how long a table takes. (4096 x 4096, a Zen 5, times as fast as made where they are needed: 4
 * bits bf16 1.15 and 1.07 at M = 2 and 4, but .95 at M = 1; fp32 1.02 to 1.08 at M = 4, but .93
 * and .95 at 1 and 2; 2 bits bf16 1.16, 1.11, 1.05 at 2, 4, 8; planes bf16 .90 at 4, fp32 1.13
 * at 8.) */

/* The slots of a packed row are taken in this order: in planes two share a byte of codes. */
HQQ_ALWAYS_INLINE int add_slot(int turn, const int nbits, const int PER)
{
    return nbits == 3 ? turn / 2 + turn % 2 * (PER / 2) : turn;
}

HQQ_ALWAYS_INLINE void add_prefetch(const add_block *b, int r, int64_t k, const int nbits)
{
    if (nbits == 3)
        hqq_plane_prefetch(&b->planes[r], k + b->next, 8);
    else
        __builtin_prefetch(b->words[r] + k + b->next);
}

/* sums += the batch. */
typedef void (*add_fn)(const add_block *);

/* By slots in a word (1, 2, 4, 8), tokens (1, 2, 4, 8) and axis; log2 of both. Those whose sums
 * would not fit the registers are NULL. */
typedef const add_fn add_table[4][4][2];

#endif

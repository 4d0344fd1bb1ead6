/* What the direct kernels share: which weights take the aligned path, how many tokens are
 * multiplied at a time, and for any other weight the tile of decoded rows, of one or several
 * row sets, that is small enough to stay in the first cache. */
#ifndef HQQ_KERNELS_CPU_DIRECT_TILE_H
#define HQQ_KERNELS_CPU_DIRECT_TILE_H

#include "isa.h"
#include "row_sets.h"
#include "workspace.h"

/* Tokens that are multiplied at a time: 8, 4, 2 or 1, at most `limit` (which is one of these).
 * Three count as four and seven as eight: the arrays of tokens end with a row of zeros. */
static inline int hqq_tokens_at_once(int64_t left, int limit)
{
    int tokens = left >= 7 ? 8 : left >= 3 ? 4 : (int)left;
    return tokens < limit ? tokens : limit;
}

/* Tokens in such an array. */
static inline int64_t hqq_padded_tokens(int64_t M)
{
    return M + 1;
}

/* Whether the kernels for aligned weights apply: the words of a set start with its rows, and
 * no vector crosses the end of a row or a group. */
static inline int hqq_vectors_align(const hqq_layout *l)
{
    return hqq_rows_align(l) && hqq_groups_align(l) && l->K % 16 == 0 &&
           (l->axis == 0 || l->G % 16 == 0);
}

/* Whether they multiply pairs of bf16 (pairs.h), for which vectors have 32 columns. With AMX
 * came processors that start vdpbf16ps every second cycle and the FMA twice a cycle: where W is
 * decoded vector by vector it was no faster there. */
static inline int hqq_direct_in_pairs(const hqq_layout *l, hqq_dtype dtype, hqq_isa isa)
{
    return dtype == HQQ_BF16 && isa == HQQ_ISA_AVX512_BF16 && hqq_vectors_align(l) &&
           l->K % 32 == 0 && (l->axis == 0 || l->G % 32 == 0);
}

/* The same for dgrad, which takes two rows and 64 columns at a time. */
static inline int hqq_direct_dgrad_in_pairs(const hqq_layout *l, hqq_dtype dtype, hqq_isa isa)
{
    return hqq_direct_in_pairs(l, dtype, isa) && l->nbits <= 4 && l->K % 64 == 0 &&
           (l->axis == 0 || l->G % 64 == 0);
}

/* A tile takes whole sets until it has 8 rows or more: up to 10 (3 bits); 12 rounds that to
 * the four rows that are multiplied at a time. */
#define HQQ_TILE_ROWS    12
#define HQQ_TILE_COLUMNS 1024

static inline void *hqq_direct_tile_take(hqq_arena *arena)
{
    return hqq_arena_take(arena, (size_t)HQQ_TILE_ROWS * HQQ_TILE_COLUMNS * sizeof(float));
}

/* How many sets make a tile. */
static inline int64_t hqq_tile_sets(const hqq_row_sets *s)
{
    return s->slots >= 8 ? 1 : 8 / s->slots;
}

#endif

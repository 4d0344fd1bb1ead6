/* dx = dy W + addend for few rows of dy: W is decoded in registers or in the first cache, and
 * never stored. Right for any M; meant for M up to about 32. */
#ifndef HQQ_KERNELS_CPU_DIRECT_DGRAD_H
#define HQQ_KERNELS_CPU_DIRECT_DGRAD_H

#include "direct_tile.h"
#include "hqqlora.h"
#include "isa.h"
#include "row_sets.h"
#include "workspace.h"

/* Bytes of workspace for hqq_direct_dgrad. */
size_t hqq_direct_dgrad_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype);

/* dx [M,K] (contiguous, dtype) = dy [M,N] W + addend, summed in fp32 and rounded once.
 * addend: fp32 [M,K] (of the adapter), NULL: none. workspace: 64-byte aligned. */
hqq_status hqq_direct_dgrad(void *dx, const void *dy, int64_t lddy, const hqq_weight *weight,
                            const float *addend, int64_t M, hqq_dtype dtype, void *workspace,
                            hqq_isa isa, const hqq_context *context);

/* What the chunks share. */
typedef struct hqq_direct_dgrad_job {
    void *dx;
    const float *dy_t; /* [N, ld_dy]: dy transposed; columns M and on are zero */
    int64_t ld_dy;     /* M + 1 or more */
    const hqq_weight *weight;
    hqq_layout layout;
    const float *addend;
    float *partial;  /* [parts,M,K]; NULL where parts is 1 */
    int64_t parts;   /* the row sets are cut into; depends on the shape alone */
    int64_t columns; /* in a chunk, at most; a multiple of 16; likewise */
    int64_t M;
    hqq_dtype dtype;
    hqq_row_sets sets;
    int pairs; /* multiply in bf16 */
    hqq_isa isa;
} hqq_direct_dgrad_job;

static inline int64_t hqq_dgrad_part_begin(const hqq_direct_dgrad_job *job, int64_t part)
{
    return part * job->sets.sets / job->parts;
}

/* The sums of a chunk take 32 KB, many columns for few tokens: the longer the pieces in which
 * rows of W are read, the better memory keeps up (M = 1: 1.6 ms with 512 columns, 1.0 with
 * 4096). Tokens at once: at most 8 where vectors align, 16 for any weight. */
#define HQQ_DGRAD_SUMS        8192
#define HQQ_DGRAD_MAX_COLUMNS 4096
#define HQQ_DGRAD_ANY_TOKENS  16

/* The scratch of a chunk. */
typedef struct hqq_dgrad_scratch {
    float *sums;         /* [tokens, columns] */
    float *zero, *scale; /* axis 1: of 32 rows, in groups of 16 columns or more; axis 0: of
                            each column */
    float *tile;         /* decoded rows */
} hqq_dgrad_scratch;

static inline hqq_dgrad_scratch hqq_dgrad_scratch_take(hqq_arena *arena, int64_t columns)
{
    hqq_dgrad_scratch s;
    size_t meta = 32 * (size_t)(columns / 16 + 2) * sizeof(float);
    s.sums = hqq_arena_take(arena, HQQ_DGRAD_SUMS * sizeof(float));
    s.zero = hqq_arena_take(arena, meta);
    s.scale = hqq_arena_take(arena, meta);
    s.tile = hqq_direct_tile_take(arena);
    return s;
}

/* out [N, ldout] = the transpose of dy [M,N] in fp32, zero from column M to ldout. */
HQQ_ISA_DECLARE(void, hqq_transpose_rows,
                (float *out, int64_t ldout, const void *dy, int64_t lddy, hqq_dtype dtype,
                 int64_t M, int64_t N));

/* The sums of one part of the row sets for the columns [column_begin, column_end), at most
 * job->columns, to where hqq_dgrad_store puts them: for any weight, and for one whose vectors
 * align (direct_tile.h). */
HQQ_ISA_DECLARE(void, hqq_direct_dgrad_any,
                (const hqq_direct_dgrad_job *job, int64_t part, int64_t column_begin,
                 int64_t column_end, void *scratch));
HQQ_ISA_DECLARE(void, hqq_direct_dgrad_aligned,
                (const hqq_direct_dgrad_job *job, int64_t part, int64_t column_begin,
                 int64_t column_end, void *scratch));

/* sums [tokens, job->columns] of tokens m0 and on: to partial, or where there is but one
 * part, with the addend to dx. */
HQQ_ISA_DECLARE(void, hqq_dgrad_store,
                (const hqq_direct_dgrad_job *job, const float *sums, int64_t part, int64_t m0,
                 int64_t tokens, int64_t column_begin, int64_t column_end));

/* dx[:, column_begin:column_end] = round(the sum of all parts + addend). */
HQQ_ISA_DECLARE(void, hqq_dgrad_reduce,
                (const hqq_direct_dgrad_job *job, int64_t column_begin, int64_t column_end));

#endif

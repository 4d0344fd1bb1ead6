/* y = x W^T + addend for few rows of x: W is decoded in registers or in the first cache, and
 * never stored. Right for any M; meant for M up to about 32. */
#ifndef HQQ_KERNELS_CPU_DIRECT_LINEAR_H
#define HQQ_KERNELS_CPU_DIRECT_LINEAR_H

#include "hqqlora.h"
#include "isa.h"
#include "row_sets.h"
#include "workspace.h"

/* Bytes of workspace for hqq_direct_linear. */
size_t hqq_direct_linear_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype);

/* y [M,N] (contiguous, dtype) = x [M,K] W^T + addend, summed in fp32 and rounded once.
 * addend: fp32 [M,N] (bias and LoRA), NULL: none. workspace: 64-byte aligned. */
hqq_status hqq_direct_linear(void *y, const void *x, int64_t ldx, const hqq_weight *weight,
                             const float *addend, int64_t M, hqq_dtype dtype, void *workspace,
                             hqq_isa isa, const hqq_context *context);

/* Whether long rows of such a weight are multiplied four at a time (dot_rows.h, AVX-512), which
 * tiles pass at more tokens than others. Asked by hqq_choose_kernel, also of unsound weights.
 */
static inline int hqq_multiplies_four_rows(const hqq_weight *w)
{
    const int64_t long_row = 2048;
    if (w->nbits != 4 || w->out_features % 2 != 0) return 0;
    if (w->in_features < long_row || w->in_features % 64 != 0) return 0;
    if (w->axis == 0) return w->meta_dtype != HQQ_F32;
    return w->group_size > 0 && w->group_size % 64 == 0 && w->in_features % w->group_size == 0;
}

/* What the chunks share. */
typedef struct hqq_direct_linear_job {
    void *y;
    const void *x; /* as hqq_pad_rows or hqq_interleave_tokens left it */
    int64_t ldx;
    const hqq_weight *weight;
    hqq_layout layout;
    const float *addend;
    int64_t M;
    hqq_dtype dtype; /* of y */
    hqq_row_sets sets;
    int64_t sets_in_chunk;
    int pairs; /* multiply in bf16 */
    hqq_isa isa;
} hqq_direct_linear_job;

/* For any weight: x [M,K] of dtype to out [M, ldout] in fp32, padded with zeros, and the
 * columns of y that belong to the sets [set_begin, set_end). */
HQQ_ISA_DECLARE(void, hqq_pad_rows,
                (float *out, int64_t ldout, const void *x, int64_t ldx, hqq_dtype dtype,
                 int64_t M, int64_t K));
HQQ_ISA_DECLARE(void, hqq_direct_linear_any,
                (const hqq_direct_linear_job *job, int64_t set_begin, int64_t set_end,
                 void *scratch));

/* The same for a weight whose vectors align (direct_tile.h); out holds M + 1 rows, in fp32 or
 * for pairs in bf16, which x then is. */
HQQ_ISA_DECLARE(void, hqq_interleave_tokens,
                (void *out, const void *x, int64_t ldx, hqq_dtype dtype, int64_t M,
                 const hqq_layout *layout, int pairs));
HQQ_ISA_DECLARE(void, hqq_direct_linear_aligned,
                (const hqq_direct_linear_job *job, int64_t set_begin, int64_t set_end,
                 void *scratch));

/* The scratch of the latter. x is taken in blocks of 32 KB for pairs, 64 KB in fp32: so that
 * four tokens still see whole rows of 4096 columns. In blocks of half of that memory did not
 * follow from strip to strip of the codes (a Zen 5, two threads, M = 4: bf16 0.52 ms instead of
 * 0.32, fp32 7 % slower), though they stay in the first cache. */
#define HQQ_X_BLOCK   16384 /* numbers of x in a block */
#define HQQ_X_COLUMNS 4096  /* columns in a block, at most */

typedef struct hqq_linear_scratch {
    float *sums;         /* [sets, tokens, per] vectors: at most 16 of 16 lanes a set */
    float *row;          /* [sets], in whole vectors */
    float *zero, *scale; /* axis 1: [per, groups of the block]; axis 0: [columns] */
    float *scaled_x;     /* axis 0: [tokens, columns]; for pairs of bf16 */
    float *constant;     /* axis 0: [2, 8 tokens] vectors (dot_block.h) */
} hqq_linear_scratch;

static inline hqq_linear_scratch hqq_linear_scratch_take(hqq_arena *arena, int64_t sets)
{
    hqq_linear_scratch s;
    s.sums = hqq_arena_take(arena, (size_t)(sets * 256) * sizeof(float));
    s.row = hqq_arena_take(arena, (size_t)(sets + 15) * sizeof(float));
    s.zero = hqq_arena_take(arena, HQQ_X_COLUMNS * sizeof(float));
    s.scale = hqq_arena_take(arena, HQQ_X_COLUMNS * sizeof(float));
    s.scaled_x = hqq_arena_take(arena, HQQ_X_BLOCK * sizeof(float));
    s.constant = hqq_arena_take(arena, 2 * 8 * 16 * sizeof(float));
    return s;
}

#endif

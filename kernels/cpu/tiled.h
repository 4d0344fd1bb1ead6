/*
 * Medium M, and any M where the lent GEMM is the slower one: a block of W is decoded into a
 * buffer that stays in the second cache, and a register tile multiplies with it there. The
 * weight is read once, packed; no GEMM is called. Forward, from about 48 tokens on, is
 * turned.h's.
 *
 *   forward   a chunk is some sets of rows of W (row_sets.h), against up to 128 tokens:
 *
 *               for each block of columns: copy x [tokens, columns]           (L2)
 *                 for each 4 sets: decode [4 rows of each slot, columns]      (L1)
 *                   for each 6 tokens and 4 rows: a tile of 24 registers
 *                     of sums, over all columns of the block
 *
 *   dgrad     a chunk is some columns of W, against up to 256 tokens:
 *
 *               for each block of sets:
 *                 for each strip of columns: decode [rows of the sets, strip]
 *                   for each 6 tokens: copy dy [6, rows of the sets]
 *                     for each 4 vectors of columns: a tile of 24 registers
 *                       of sums, over all rows of the block
 *
 *             in fp32 strips of 64 columns, in the first cache; else all columns at once, in
 *             the second
 *
 * Rows of W lie along k as they are decoded, and neither pass transposes them: forward sums
 * along the lanes, dgrad across the rows (multiply_tile.h).
 *
 * In fp32, with W in fp32, for fp32 and fp16 inputs, and for bf16 ones without AVX-512 BF16.
 * With it, W is rounded to bf16, as for a GEMM in bf16, and two products are summed at a time.
 * The sums of a chunk begin with its part of the LoRA product, in fp32; y and dx are rounded
 * once. Where there is AMX its tiles take over, from some tokens on (amx.h).
 *
 * How fast: 2 M flops a weight. A core of a Zen 5 at 4 GHz starts two products of 16 lanes a
 * cycle, 260 GFLOP/s in fp32 and 520 in bf16 from registers alone. Decoding takes 25 to 50 ps a
 * weight where its bytes are in the second cache in time: what is decoded next is fetched there
 * while the tiles multiply (tiled_fetch.h), without which bf16 at M = 16 took 1.2 times as long
 * forward. Copying x, adding up lanes and waiting for the second cache take the rest. 4096 x
 * 4096, 4 bits, G = 64, cold, two threads, GFLOP/s (torch's dense product in the same dtype):
 *
 *     M              16          32          64         128         512
 *     fp32 forward  327 (73)    363 (85)       (turned.h, panels.h)
 *     fp32 dgrad    335 (74)    390 (92)   420 (117)   430 (136)       (panels.h)
 *     bf16 forward  494 (293)   621 (458)      (turned.h, panels.h)
 *     bf16 dgrad    396 (172)   565 (289)  671 (440)   764 (612)       (panels.h)
 *
 * fp16 is as fast as fp32 (torch: a seventh of that). At axis 0 rows that share zeros and
 * scales are decoded together, which then stay in registers (decode_floats.h); in bf16 at few
 * tokens x takes the scales (tiled_scaled.h), and in dgrad sums do (tiled_residues.h). Times
 * the speed of 4 bits, axis 1, here at 16 and 64 tokens (one thread):
 *
 *                    8 bits        axis 0: 8 bits        4 bits        3 bits
 *     bf16 forward   .82  .84            .85  .80       .94  .94      .81  .90
 *     fp32 forward   .94  .90            .91  .90       .99  .97      .85  .97
 */
#ifndef HQQ_KERNELS_CPU_TILED_H
#define HQQ_KERNELS_CPU_TILED_H

#include <string.h>

#include "backend.h"
#include "dtype.h"
#include "isa.h"
#include "parallel.h"
#include "row_sets.h"

/* Bytes that either pass needs (transpose: dgrad). */
size_t hqq_tiled_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                           hqq_isa isa);

/* f->y. xa [M,R] = drop(x) A^T, NULL without LoRA; f->xa is not used. The stages `before`,
 * which compute xa and whatever else, are run first, in the same loop where that is possible.
 */
hqq_status hqq_tiled_linear(const hqq_forward *f, const float *xa, hqq_stages *before,
                            void *workspace, const hqq_context *context);

/* b->dx alone. dyb [M,R] = dy B, NULL without LoRA. */
hqq_status hqq_tiled_dgrad(const hqq_backward *b, const float *dyb, hqq_stages *before,
                           void *workspace, const hqq_context *context);

/* ---- between the driver and the kernels --------------------------------------------- */

/* Of a register tile, at most. */
#define HQQ_TILED_TOKENS 6
/* Sets decoded together in a forward pass: of each slot, the rows of a tile. (At 8 bits eight
 * do not stay in the first cache beside x: 0.9 of the speed at 16 and 24 tokens.) */
#define HQQ_TILED_SETS 4

/* Words (multiply_tile.h) between rows in scratch that hold up to `words` of them: an odd
 * number of cache lines, so that the rows do not fall into one set of L1. */
static inline int64_t hqq_tiled_stride(int64_t words)
{
    return ((words + 15) / 16 | 1) * 16;
}

/* Whether pairs of bf16 are multiplied (multiply_tile.h), and not floats. */
static inline int hqq_multiplies_pairs(hqq_dtype dtype, hqq_isa isa)
{
    return dtype == HQQ_BF16 && isa >= HQQ_ISA_AVX512_BF16;
}

/* What the chunks share. A block is what is decoded at a time. */
typedef struct hqq_tiled_job {
    void *out; /* y or dx */
    const void *in;
    int64_t ld_in;
    hqq_dtype dtype; /* of both */
    const hqq_weight *weight;
    hqq_layout layout;
    hqq_row_sets sets;
    const void *bias; /* forward; NULL: none */
    hqq_dtype bias_dtype;
    const hqq_lora *lora; /* NULL: none */
    const float *inner;   /* xa or dyb */
    int64_t M, tokens;    /* of a chunk */
    int64_t block_sets, block_columns;
    int64_t block_rows; /* dgrad: of block_sets */
    int64_t strip;      /* dgrad: columns of the block that are decoded at a time */
    int pairs;          /* multiply in bf16 */
    int keeps_input;    /* forward: all columns of x are copied once, else block by block;
                           dgrad: all tokens of dy once a block, else tile by tile */
    int by_cycle;       /* axis 0: sets are taken cycle by cycle, as their rows share scales;
                           dgrad: in whole residues */
    int scales_input;   /* forward: then x is multiplied by the scales, W stands for its codes
                           (tiled_scaled.h) */
    void *turned; /* dgrad: then dy [M, ld_turned] as terms, [N/G, G] in place of [G, N/G] */
    int64_t ld_turned;
    float *residue_sums; /* in bf16 [M, N/G]: what dy sums to over each residue */
    hqq_isa isa;
} hqq_tiled_job;

/* One chunk: tokens [m_begin, m_end) against sets, or columns, [begin, end). */
typedef struct hqq_tiled_chunk {
    const hqq_tiled_job *job;
    int64_t m_begin, m_end, begin, end;
    float *sums; /* [tokens, ld_sums]: what the product is added to, if `add` */
    int64_t ld_sums;
    int add;
    /* scratch; strides between rows are hqq_tiled_stride of what they hold */
    void *input;         /* [HQQ_TILED_TOKENS rows of x or dy, words of a block] */
    void *weights;       /* the decoded block */
    void *rows;          /* dgrad in bf16: [block_rows, block_columns] before they are paired */
    float *zero, *scale; /* dgrad that scales sums: [residues of a block, block_columns] */
    float *bias;         /* forward: [block_rows] */
    void *lora_B;        /* forward by cycles: [cycle, rank] */
} hqq_tiled_chunk;

/* out [sets, rank] = the adapter's B in the rows of slot j of the sets [begin, end). */
static inline void hqq_take_rows_of_B(void *out, const hqq_tiled_job *job, int j, int64_t begin,
                                      int64_t end)
{
    size_t bytes = (size_t)(job->lora->rank * hqq_dtype_bytes(job->lora->dtype));
    for (int64_t set = begin; set < end; set++) {
        int64_t row = job->sets.start[j] + hqq_row_in_slot(&job->sets, set);
        memcpy((char *)out + (size_t)(set - begin) * bytes,
               (const char *)job->lora->B + (size_t)row * bytes, bytes);
    }
}

/* y [m_begin:m_end, rows of the sets], dx [m_begin:m_end, begin:end] */
HQQ_ISA_DECLARE(void, hqq_tiled_linear_chunk, (const hqq_tiled_chunk *c));
HQQ_ISA_DECLARE(void, hqq_tiled_dgrad_chunk, (const hqq_tiled_chunk *c));

/* job->turned and job->residue_sums of token m. */
HQQ_ISA_DECLARE(void, hqq_turn_residues, (const hqq_tiled_job *job, int64_t m));

#endif

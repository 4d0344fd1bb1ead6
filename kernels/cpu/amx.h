/*
 * The tiled product (tiled.h) where the processor multiplies tiles: AMX. A tile is 16 rows of
 * 64 bytes; one instruction adds the product of two tiles of bf16 to one of fp32,
 *
 *     C [16, 16] += A [16, 32] B [32, 16]      B in pairs: row i holds rows 2 i and 2 i + 1
 *
 * which is 8192 multiply-adds in 16 cycles, eight times what two FMA units do. Eight tiles:
 * four sums, two A, two B, so that each tile that is loaded is multiplied twice.
 *
 *   forward   y^T = W x^T     A: rows of W as they are decoded;  B: x, packed once
 *   dgrad     dx = dy W       A: dy, packed once;  B: two rows of W, decoded and paired
 *
 * Inputs are packed once a call into tiles, token tiles of 16, all chunks reading them:
 *
 *     [block of the reduction][token tile][step of 32][part]  1 KB each
 *
 * A chunk is some rows of W (forward) or some columns (dgrad) against all tokens of a panel:
 *
 *     for each block of the reduction (512 columns, or rows):
 *       decode it (forward: two tiles of rows at a time) into a buffer that stays in cache
 *         for each 2 x 2 tiles of sums: all steps of the block
 *
 * bf16 is multiplied as it is, with W rounded to bf16. fp16 and fp32 are cut into bf16 parts
 * whose sum is exact (two for fp16, three for fp32; W likewise, rounded to fp16 or in fp32),
 * and their products are added but for those too small to matter:
 *
 *     fp16   a0 b0 + a0 b1 + a1 b0                                       off by 2^-16 |a b|
 *     fp32   a0 b0 + (a0 b1 + a1 b0 + a1 b1 + a0 b2 + a2 b0)             off by 2^-23 |a b|
 *
 * at most, about 2^-25 on average: an fp32 product at twice the rate of FMA units and more. The
 * five small ones of a block are summed before the large one. The instruction takes subnormals
 * for zero.
 *
 * The sums of a chunk lie tile by tile in fp32; the LoRA product, bias and the one rounding
 * follow when they are stored.
 *
 * How fast: 16 cycles a product of tiles are 5.9 ns or 2.75 TFLOP/s for a core of a Xeon of the
 * fifth generation; with a load for each, from the second cache, a loop of nothing else
 * attained 1.4 to 1.6. Decoding takes about 0.15 ns a weight, as much as the products of 100
 * tokens in bf16. 4096 x 4096, 4 bits, G = 64, one thread, least ms of many calls (in brackets
 * that of the kernel which would serve without AMX):
 *
 *     M           1            16           64          128          512
 *     bf16   2.8 (1.0)    3.2 (6.0)       4.6          6.9         19.3          forward
 *     bf16   3.7          4.0                          8.0         26            dgrad
 *     fp32                13  (9.0)    18 (19)      26 (37)        98 (148)      forward
 *
 * A processor under a limit of power grants AMX to a core only after some 0.1 ms of use, and
 * may hold it back for longer while its neighbours use it: until then the core issues a quarter
 * of its instructions. On a shared machine the same calls took 1 or 2.5 times the time above,
 * for seconds each, and torch's products on the same tiles with them.
 */
#ifndef HQQ_KERNELS_CPU_AMX_H
#define HQQ_KERNELS_CPU_AMX_H

#include "backend.h"
#include "isa.h"
#include "row_sets.h"

/* Bytes for the packed input of a product; 0 where M is 0. */
size_t hqq_amx_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose);

/* As hqq_tiled_linear and hqq_tiled_dgrad. */
hqq_status hqq_amx_linear(const hqq_forward *f, const float *xa, void *workspace,
                          const hqq_context *context);
hqq_status hqq_amx_dgrad(const hqq_backward *b, const float *dyb, void *workspace,
                         const hqq_context *context);

/* ---- between the driver and the kernels --------------------------------------------- */

#define HQQ_AMX_TOKENS 16 /* rows, or columns, of a tile */
#define HQQ_AMX_STEP   32 /* of the reduction, in one instruction */
#define HQQ_AMX_BYTES  1024
#define HQQ_AMX_PARTS  3 /* at most */

typedef struct hqq_amx_job {
    void *out; /* y or dx */
    const void *in;
    int64_t ld_in;
    hqq_dtype dtype; /* of both */
    const hqq_weight *weight;
    hqq_layout layout;
    hqq_row_sets sets;
    int64_t group_sets; /* 16 or 32, so that a tile's rows lie in one slot */
    int64_t group_rows; /* of all slots: a multiple of 32 */
    const void *bias;   /* forward; NULL: none */
    hqq_dtype bias_dtype;
    const hqq_lora *lora; /* NULL: none */
    const float *inner;   /* xa or dyb */
    int parts;
    int transpose;          /* dgrad */
    int64_t reduction;      /* its length: columns of W (forward) or sets of its rows (dgrad) */
    int64_t m_begin, m_end; /* of the panel */
    int64_t block;          /* columns (forward) or sets (dgrad) of the reduction at a time */
    int64_t width;          /* of a chunk: sets (forward) or columns (dgrad) */
    char *input;            /* the packed panel */
} hqq_amx_job;

typedef struct hqq_amx_chunk {
    const hqq_amx_job *job;
    int64_t begin, end; /* sets or columns */
    /* scratch */
    float *sums;   /* tiles of [16, 16]: [row or column tile][token tile] */
    float *carry;  /* four such tiles */
    float *addend; /* the chunk's part of the LoRA product [tokens, width]; NULL: none */
    int64_t ld_addend;
    void *rows;    /* 16 rows of W as they are decoded */
    char *weights; /* in parts, in the order of the tiles */
} hqq_amx_chunk;

static inline int64_t hqq_amx_token_tiles(const hqq_amx_job *job)
{
    return (job->m_end - job->m_begin + HQQ_AMX_TOKENS - 1) / HQQ_AMX_TOKENS;
}

/* Where the tiles of a token tile begin, in the block that `steps` steps precede and that has
 * `block_steps`. */
static inline char *hqq_amx_input(const hqq_amx_job *job, int64_t steps, int64_t block_steps,
                                  int64_t token_tile)
{
    int64_t tiles = steps * hqq_amx_token_tiles(job) + token_tile * block_steps;
    return job->input + tiles * job->parts * HQQ_AMX_BYTES;
}

/* Elements between the rows of W in a forward block: an odd number of cache lines. */
static inline int64_t hqq_amx_stride(int64_t columns)
{
    return ((columns + 31) / 32 | 1) * 32;
}

/* Packs a token tile of a block of the reduction: columns [begin, end) of x, or the rows of the
 * sets [begin, end) of dy, which `steps` steps precede. */
void hqq_amx_pack_x(const hqq_amx_job *job, int64_t token_tile, int64_t begin, int64_t end);
void hqq_amx_pack_dy(const hqq_amx_job *job, int64_t token_tile, int64_t begin, int64_t end);

/* y [m_begin:m_end, rows of the sets], dx [m_begin:m_end, begin:end] */
void hqq_amx_linear_chunk(const hqq_amx_chunk *c);
void hqq_amx_dgrad_chunk(const hqq_amx_chunk *c);

#endif

/*
 * The tiled forward product for many tokens. x is turned once, by all threads, into panels of
 * 64 tokens (fewer with narrower vectors), and tokens lie across the register tile:
 *
 *     sums [rows of W, tokens] += W [6 rows, words] x^T [words, 64 tokens]
 *
 *                           a panel of x^T (L2)
 *       a row of W        tokens 0 .. 15   16 .. 31   32 .. 47   48 .. 63
 *       (L1)
 *       word 0  ----->        vector        vector     vector     vector
 *       word 1  ----->        vector        vector     vector     vector
 *
 * A word is a float, or the bf16 of two columns, which stay side by side (multiply_tile.h).
 * Nothing is added up along lanes, W is not turned, and each weight is decoded once for up to
 * 512 tokens:
 *
 *     for each 512 tokens: turn x                                          (L3)
 *       for each chunk of about 96 rows of W:
 *         for each 1024 words: decode [96 rows, words]                     (L2)
 *           for each panel, for each 6 rows: a tile of 24 registers of sums
 *
 * One core of a Zen 5 does 490 GFLOP/s of such tiles in bf16, of 520 from registers alone; of
 * dot products along the lanes, as fewer tokens are multiplied (tiled.h), 450. 4096 x 4096, 4
 * bits, G = 64, cold, two threads, GFLOP/s at 64, 128, 256 and 512 tokens: bf16 740, 835, 875,
 * 906; fp32 406, 433, 445, 456.
 */
#ifndef HQQ_KERNELS_CPU_TURNED_H
#define HQQ_KERNELS_CPU_TURNED_H

#include "tiled.h"

/* Whether so many tokens are. */
int hqq_turns_input(int64_t M);

size_t hqq_turned_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype, hqq_isa isa);

/* As hqq_tiled_linear. */
hqq_status hqq_turned_linear(const hqq_forward *f, const float *xa, void *workspace,
                             const hqq_context *context);

/* ---- between the driver and the kernels --------------------------------------------- */

/* Of a panel, at most; and a multiple of the lanes of any vector. */
#define HQQ_PANEL_TOKENS 64
#define HQQ_PANEL_UNIT   16

/* What the chunks of one part of the tokens share. */
typedef struct hqq_turned_part {
    hqq_tiled_job job; /* block_sets: of a chunk; block_columns: words that are decoded */
    void *panels;      /* [panels][words of K][tokens of a panel] */
    int64_t words;     /* of K */
    int64_t m_begin, m_end;
} hqq_turned_part;

/* Words [begin, end) of up to HQQ_PANEL_UNIT tokens of the part from m_begin on. */
HQQ_ISA_DECLARE(void, hqq_turn_tokens,
                (const hqq_turned_part *part, int64_t m_begin, int64_t begin, int64_t end));

/* y [tokens of the part, rows of the chunk's sets]; c->sums [slots * block_sets, ld_sums],
 * c->weights [slots * block_sets, hqq_tiled_stride(block_columns)]. */
HQQ_ISA_DECLARE(void, hqq_turned_linear_chunk,
                (const hqq_turned_part *part, const hqq_tiled_chunk *c));

#endif

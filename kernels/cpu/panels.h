/*
 * Many tokens: W is decoded once, into panels of 64 columns of the product that lie as a
 * register tile reads them, and all tokens are multiplied with a panel where they are.
 *
 *   forward   y [m, n]  = x [m, :] . W [n, :]      a panel is 64 rows of W, transposed
 *   dgrad     dx [m, k] = dy [m, :] . W [:, k]     a panel is 64 columns of W
 *
 *     decode:    panel [steps][64 words]           a chunk a panel; then
 *     multiply:  for each 6 tokens: a tile of 24 registers of sums, over all steps; begun with
 *                the adapter's part, in fp32, and rounded once as it is stored
 *
 * A word is a float, or with AVX-512 BF16 a pair of bf16 (multiply_tile.h). Against tiled.h:
 * W is decoded once and not once for every 256 tokens; x and dy are not copied; sums never
 * leave their registers, neither for the adapter's part nor at the end; and forward has no
 * lanes to add up, for which the panels are transposed. In exchange the panels take memory, and
 * x is read again for each panel.
 *
 * Two blocks of panels are in memory at a time, 4 MB and half of the weight at most: one is
 * multiplied while the next is decoded. All of it, and what computes the adapter's part before
 * it, are stages of one loop (parallel.h). Where columns of W are longer than a panel may be,
 * parts of them follow one another in the same way, and sums in fp32 wait in out, which is of
 * fp32 then: a product in bf16 has panels for what fits into one part alone.
 */
#ifndef HQQ_KERNELS_CPU_PANELS_H
#define HQQ_KERNELS_CPU_PANELS_H

#include <stddef.h>

#include "backend.h"
#include "isa.h"
#include "tiled.h"

/* Whether products of M tokens are for panels, and take hqq_panels_workspace bytes. */
int hqq_panels_serve(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                     hqq_isa isa);
size_t hqq_panels_workspace(const hqq_weight *weight, hqq_dtype dtype, int transpose);

/* As hqq_tiled_linear and hqq_tiled_dgrad, of what hqq_panels_serve says yes to. */
hqq_status hqq_panels_linear(const hqq_forward *f, const float *xa, hqq_stages *before,
                             void *workspace, const hqq_context *context);
hqq_status hqq_panels_dgrad(const hqq_backward *b, const float *dyb, hqq_stages *before,
                            void *workspace, const hqq_context *context);

/* ---- between the driver and the kernels --------------------------------------------- */

#define HQQ_PANEL_COLUMNS 64
/* Rows of W that are decoded before they are turned or paired. */
#define HQQ_PANEL_STRIP 16

typedef struct hqq_panels_job {
    hqq_tiled_job product; /* out, in, weight, layout, adapter, bias, M, tokens, pairs, isa */
    int transpose;         /* dgrad */
    int64_t columns;       /* of out */
    int64_t reduction;     /* columns of in */
    int64_t begin, end;    /* the block's columns of out */
    int strips;            /* dgrad: W is decoded strip by strip (decode_floats.h) */
    /* A part of the reduction: as many spans of columns of `in`, `apart` from one to the next.
     * Of strips a span a slot, of the part's packed rows. */
    int spans;
    int64_t first, count, apart; /* of a span: its first column, and how many */
    int64_t steps;               /* words of all spans */
    int64_t part_steps;          /* of the longest part: between panels */
    int is_first, is_last;
    void *panels; /* [panels of the block][part_steps][HQQ_PANEL_COLUMNS] words */
} hqq_panels_job;

/* Bytes that a chunk needs: of decoding, and of multiplying. */
size_t hqq_panels_decode_scratch(const hqq_panels_job *job);
size_t hqq_panels_multiply_scratch(const hqq_panels_job *job);

/* Panel number `panel` of the block. */
HQQ_ISA_DECLARE(void, hqq_panels_decode,
                (const hqq_panels_job *job, int64_t panel, void *scratch));
/* Rows [m_begin, m_end) of out, the columns of that panel. */
HQQ_ISA_DECLARE(void, hqq_panels_multiply,
                (const hqq_panels_job *job, int64_t panel, int64_t m_begin, int64_t m_end,
                 void *scratch));

#endif

/* dx = dy W + addend for few rows of dy: W is decoded in cache, tile by tile, and never stored.
 * Right for any M; meant for M up to about 32. */
#ifndef HQQ_KERNELS_CPU_DIRECT_DGRAD_H
#define HQQ_KERNELS_CPU_DIRECT_DGRAD_H

#include "hqqlora.h"
#include "isa.h"
#include "row_sets.h"

/* Bytes of workspace for hqq_direct_dgrad. */
size_t hqq_direct_dgrad_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype);

/* dx [M,K] (contiguous, dtype) = dy [M,N] W + addend, summed in fp32 and rounded once.
 * addend: fp32 [M,K] (of the adapter), NULL: none. workspace: 64-byte aligned. */
hqq_status hqq_direct_dgrad(void *dx, const void *dy, int64_t lddy, const hqq_weight *weight,
                            const float *addend, int64_t M, hqq_dtype dtype, void *workspace,
                            hqq_isa isa, const hqq_context *context);

/* Columns in a chunk, and rows of dy whose sums are kept at a time: 32 KB of sums. */
#define HQQ_DGRAD_COLUMNS 512
#define HQQ_DGRAD_ROWS    16

/* What the chunks share. */
typedef struct hqq_direct_dgrad_job {
    void *dx;
    const float *dy_t; /* [N,M]: dy transposed */
    const hqq_weight *weight;
    const float *addend;
    float *partial; /* [parts,M,K]; NULL where parts is 1 */
    int64_t parts;  /* the row sets are cut into; depends on the shape alone */
    int64_t M;
    hqq_dtype dtype;
    hqq_row_sets sets;
    hqq_isa isa;
} hqq_direct_dgrad_job;

/* out [N,M] = the transpose of dy [M,N] in fp32. */
HQQ_ISA_DECLARE(void, hqq_transpose_rows,
                (float *out, const void *dy, int64_t lddy, hqq_dtype dtype, int64_t M,
                 int64_t N));

/* The sums of one part of the row sets for the columns [column_begin, column_end), at most
 * HQQ_DGRAD_COLUMNS: to partial, or where there is one part, to dx. */
HQQ_ISA_DECLARE(void, hqq_direct_dgrad_columns,
                (const hqq_direct_dgrad_job *job, int64_t part, int64_t column_begin,
                 int64_t column_end, void *scratch));

/* dx[:, column_begin:column_end] = round(the sum of all parts + addend). */
HQQ_ISA_DECLARE(void, hqq_direct_dgrad_reduce,
                (const hqq_direct_dgrad_job *job, int64_t column_begin, int64_t column_end));

#endif

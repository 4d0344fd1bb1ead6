/*
 * The library's own matrix product, for the LoRA products and for callers that lend no GEMM:
 *
 *     C [m,n] = alpha * A [m,k] B [k,n] * drop' + bias + beta * C,     rounded once to C's
 * dtype
 *
 * A and B are views: any of the three dtypes, any strides (a transpose is a view too), and
 * optionally dropout on their elements. Sums are in fp32. What is computed, and in which order,
 * follows from the shape and the instruction set alone, never from the number of threads.
 */
#ifndef HQQ_KERNELS_CPU_GEMM_H
#define HQQ_KERNELS_CPU_GEMM_H

#include <stddef.h>

#include "dropout.h"
#include "hqqlora.h"

/* Element (i, j) is data[i * row_stride + j * column_stride]; with dropout it counts
 * multiplied by the factor of element i * mask_row_stride + j * mask_column_stride. */
typedef struct hqq_view {
    const void *data;
    hqq_dtype dtype;
    int64_t row_stride, column_stride;
    const hqq_dropout *dropout; /* NULL: none */
    int64_t mask_row_stride, mask_column_stride;
} hqq_view;

typedef struct hqq_gemm {
    void *C; /* [m,n], rows ldc apart */
    int64_t ldc;
    hqq_dtype C_dtype;
    hqq_view A, B;
    int64_t m, n, k;   /* any may be 0 */
    float alpha, beta; /* beta 0: C is not read */
    const void *bias;  /* [n] of bias_dtype; NULL: none */
    hqq_dtype bias_dtype;
    const hqq_dropout *dropout;      /* on A B; NULL: none */
    int64_t mask_first, mask_stride; /* (i, j) is number mask_first + i * mask_stride + j */
} hqq_gemm;

/* The rows of a row-major matrix, ld apart. */
static inline hqq_view hqq_view_rows(const void *data, hqq_dtype dtype, int64_t ld)
{
    return (hqq_view){.data = data, .dtype = dtype, .row_stride = ld, .column_stride = 1};
}

static inline hqq_view hqq_view_transposed(hqq_view v)
{
    hqq_view t = v;
    t.row_stride = v.column_stride;
    t.column_stride = v.row_stride;
    t.mask_row_stride = v.mask_column_stride;
    t.mask_column_stride = v.mask_row_stride;
    return t;
}

/* drop(x) of x [M,K], or x itself without dropout (NULL). */
static inline hqq_view hqq_view_dropped(const void *x, hqq_dtype dtype, int64_t ldx, int64_t K,
                                        const hqq_dropout *dropout)
{
    hqq_view v = hqq_view_rows(x, dtype, ldx);
    v.dropout = dropout;
    v.mask_row_stride = K;
    v.mask_column_stride = 1;
    return v;
}

hqq_status hqq_gemm_run(const hqq_gemm *g, const hqq_context *context);

/* C [m,n] = op(A) op(B) + beta * C as hqq_gemm_fn says it, by the GEMM that the context lends
 * or else by hqq_gemm_run. */
hqq_status hqq_gemm_of_context(void *C, int64_t ldc, const void *A, int64_t lda,
                               int32_t transpose_a, const void *B, int64_t ldb,
                               int32_t transpose_b, int64_t m, int64_t n, int64_t k, float beta,
                               hqq_dtype dtype, const hqq_context *context);

#endif

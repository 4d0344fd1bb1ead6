/* hqq_cuda_gemm (see gemm.h) in plain loops, for the tests: fp32 sums in the order of k. The
 * operands are a device's: nothing looks at them but the work that is enqueued. */
#include "gemm.h"

#include <stdlib.h>
#include <string.h>

#include "control.h"
#include "dtype.h"
#include "status.h"

/* data [rows, columns] of stride ld in fp32, contiguous, by rows of the product's k. */
static float *widen(const void *data, int64_t ld, int64_t rows, int64_t columns, int transpose,
                    hqq_dtype dtype)
{
    float *wide = malloc((size_t)(rows * columns) * sizeof(float));
    for (int64_t i = 0; wide && i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            wide[transpose ? j * rows + i : i * columns + j] =
                hqq_load(data, dtype, i * ld + j);
    return wide;
}

typedef struct gemm_job {
    void *C, *workspace;
    const void *A, *B;
    int64_t ldc, lda, ldb, m, n, k;
    size_t workspace_bytes;
    int transpose_b;
    float beta;
    hqq_dtype dtype;
} gemm_job;

static void multiply(void *job)
{
    const gemm_job *g = job;
    int64_t m = g->m, n = g->n, k = g->k;
    /* a real GEMM scribbles there */
    if (g->workspace_bytes) memset(g->workspace, 0xff, g->workspace_bytes);
    float *a = widen(g->A, g->lda, m, k, 0, g->dtype);                 /* [m,k] */
    float *b = g->transpose_b ? widen(g->B, g->ldb, n, k, 1, g->dtype) /* [k,n] */
                              : widen(g->B, g->ldb, k, n, 0, g->dtype);
    float *sums = malloc((size_t)n * sizeof(float));
    if (!a || !b || !sums) abort();
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) sums[j] = 0.0f;
        for (int64_t l = 0; l < k; l++)
            for (int64_t j = 0; j < n; j++) sums[j] += a[i * k + l] * b[l * n + j];
        for (int64_t j = 0; j < n; j++) {
            float before = g->beta == 0.0f ? 0.0f : hqq_load(g->C, g->dtype, i * g->ldc + j);
            hqq_store(g->C, g->dtype, i * g->ldc + j, sums[j] + before);
        }
    }
    free(a);
    free(b);
    free(sums);
}

hqq_status hqq_cuda_gemm(void *C, int64_t ldc, const void *A, int64_t lda, const void *B,
                         int64_t ldb, int transpose_b, int64_t m, int64_t n, int64_t k,
                         float beta, hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                         void *stream)
{
    (void)stream;
    if (beta != 0.0f && beta != 1.0f)
        return hqq_fail(HQQ_INVALID, "beta is %g; expected 0 or 1", (double)beta);
    if (lda < k || ldb < (transpose_b ? k : n) || ldc < n)
        return hqq_fail(HQQ_INVALID, "strides %lld, %lld, %lld of a product %lld x %lld x %lld",
                        (long long)lda, (long long)ldb, (long long)ldc, (long long)m,
                        (long long)n, (long long)k);
    gemm_job job = {.C = C,
                    .workspace = workspace,
                    .A = A,
                    .B = B,
                    .ldc = ldc,
                    .lda = lda,
                    .ldb = ldb,
                    .m = m,
                    .n = n,
                    .k = k,
                    .workspace_bytes = workspace_bytes,
                    .transpose_b = transpose_b,
                    .beta = beta,
                    .dtype = dtype};
    hqqlora_emulated_enqueue(multiply, &job, sizeof job);
    return HQQ_OK;
}

/* hqq_cuda_gemm (see gemm.h) in plain loops, for the tests: fp32 sums in the order of k. */
#include "gemm.h"

#include <stdlib.h>
#include <string.h>

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
    /* a real GEMM scribbles there */
    if (workspace_bytes) memset(workspace, 0xff, workspace_bytes);
    float *a = widen(A, lda, m, k, 0, dtype); /* [m,k] */
    float *b = transpose_b ? widen(B, ldb, n, k, 1, dtype) : widen(B, ldb, k, n, 0, dtype);
    float *sums = malloc((size_t)n * sizeof(float)); /* b is [k,n] */
    hqq_status status = HQQ_OK;
    if (!a || !b || !sums) status = hqq_fail(HQQ_NO_MEMORY, "no memory for a GEMM on the CPU");
    for (int64_t i = 0; status == HQQ_OK && i < m; i++) {
        for (int64_t j = 0; j < n; j++) sums[j] = 0.0f;
        for (int64_t l = 0; l < k; l++)
            for (int64_t j = 0; j < n; j++) sums[j] += a[i * k + l] * b[l * n + j];
        for (int64_t j = 0; j < n; j++) {
            float before = beta == 0.0f ? 0.0f : hqq_load(C, dtype, i * ldc + j);
            hqq_store(C, dtype, i * ldc + j, sums[j] + before);
        }
    }
    free(a);
    free(b);
    free(sums);
    return status;
}

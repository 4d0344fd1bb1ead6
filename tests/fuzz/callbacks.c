#include "callbacks.h"

#include <string.h>

static int32_t backwards_for(int64_t begin, int64_t end, int64_t grain,
                             void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)grain;
    /* as many parts as a few threads would be: each draws chunks until none is left */
    if (end - begin > 4) end = begin + 4;
    for (int64_t i = end - 1; i >= begin; i--) fn(i, i + 1, data);
    return 0;
}

static int32_t failing_for(int64_t begin, int64_t end, int64_t grain,
                           void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)begin, (void)end, (void)grain, (void)fn, (void)data;
    return 11;
}

/* Reads all of A and B and writes all of C, for the sanitizers; its numbers are nobody's. */
static int32_t touching_gemm(void *C, int64_t ldc, const void *A, int64_t lda,
                             int32_t transpose_a, const void *B, int64_t ldb,
                             int32_t transpose_b, int64_t m, int64_t n, int64_t k, float beta,
                             hqq_dtype dtype, void *gemm_data)
{
    size_t bytes = dtype == HQQ_F32 ? 4 : 2;
    unsigned sum = beta != 0;
    (void)gemm_data;
    int64_t rows_a = transpose_a ? k : m, columns_a = transpose_a ? m : k;
    int64_t rows_b = transpose_b ? n : k, columns_b = transpose_b ? k : n;
    for (int64_t i = 0; i < rows_a; i++)
        for (size_t j = 0; j < (size_t)columns_a * bytes; j++)
            sum += ((const uint8_t *)A)[(size_t)(i * lda) * bytes + j];
    for (int64_t i = 0; i < rows_b; i++)
        for (size_t j = 0; j < (size_t)columns_b * bytes; j++)
            sum += ((const uint8_t *)B)[(size_t)(i * ldb) * bytes + j];
    for (int64_t i = 0; i < m; i++)
        memset((uint8_t *)C + (size_t)(i * ldc) * bytes, (int)(sum & 0x3f), (size_t)n * bytes);
    return 0;
}

static int32_t failing_gemm(void *C, int64_t ldc, const void *A, int64_t lda,
                            int32_t transpose_a, const void *B, int64_t ldb,
                            int32_t transpose_b, int64_t m, int64_t n, int64_t k, float beta,
                            hqq_dtype dtype, void *gemm_data)
{
    (void)C, (void)ldc, (void)A, (void)lda, (void)transpose_a, (void)B, (void)ldb;
    (void)transpose_b, (void)m, (void)n, (void)k, (void)beta, (void)dtype, (void)gemm_data;
    return -7;
}

void lend_callbacks(hqq_context *context, uint32_t field)
{
    static const hqq_parallel_for_fn loops[] = {NULL, backwards_for, failing_for, NULL};
    static const hqq_gemm_fn gemms[] = {NULL, touching_gemm, failing_gemm, NULL};
    context->parallel_for = loops[field & 3];
    context->gemm = gemms[field >> 2 & 3];
}

/* A libcublasLt of plain loops, column-major as the real one, with the few functions that the
 * library calls. An algorithm remembers which product it was chosen for. */
#include "fake_cublaslt.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"

#define EXPORT __attribute__((visibility("default")))

static fake_cublaslt_record record;

EXPORT fake_cublaslt_record *fake_cublaslt(void);
fake_cublaslt_record *fake_cublaslt(void)
{
    return &record;
}

typedef struct fake_layout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t ld;
} fake_layout;

typedef struct fake_product {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    cublasOperation_t operation_A;
} fake_product;

EXPORT const char *cublasLtGetStatusString(cublasStatus_t status)
{
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "another";
}

EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    record.handles++;
    *handle = (cublasLtHandle_t)&record;
    return CUBLAS_STATUS_SUCCESS;
}

#define MAKE(type, pointer, ...)                      \
    do {                                              \
        type *made = malloc(sizeof *made);            \
        if (!made) return CUBLAS_STATUS_ALLOC_FAILED; \
        *made = (type)__VA_ARGS__;                    \
        memcpy(pointer, &made, sizeof made);          \
        record.living++;                              \
        return CUBLAS_STATUS_SUCCESS;                 \
    } while (0)

static cublasStatus_t destroy(void *made)
{
    record.living--;
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout,
                                                 cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t ld)
{
    if (ld < (int64_t)rows) return CUBLAS_STATUS_INVALID_VALUE;
    MAKE(fake_layout, layout, {type, rows, columns, ld});
}
EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    return destroy(layout);
}
EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *product,
                                               cublasComputeType_t compute,
                                               cudaDataType_t scale)
{
    MAKE(fake_product, product, {compute, scale, CUBLAS_OP_N});
}
EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product)
{
    return destroy(product);
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    MAKE(int, preference, 0);
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    return destroy(preference);
}

EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void *value, size_t bytes)
{
    fake_product *p = (fake_product *)(void *)product;
    if (attribute != CUBLASLT_MATMUL_DESC_TRANSA || bytes != sizeof p->operation_A)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&p->operation_A, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
    const void *value, size_t bytes)
{
    (void)preference;
    void *to =
        attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? (void *)&record.workspace_bytes
        : attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK ? (void *)&record.reductions
        : attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES ? (void *)&record.align_first
        : attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES
            ? (void *)&record.align_second
            : (void *)&record.align_result;
    size_t size = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8 : 4;
    if (bytes != size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

/* What an algorithm was chosen for, in its 64 bytes. */
static cublasLtMatmulAlgo_t algorithm_of(const fake_product *p, const fake_layout *a,
                                         const fake_layout *b, const fake_layout *c)
{
    cublasLtMatmulAlgo_t algorithm;
    memset(&algorithm, 0, sizeof algorithm);
    algorithm.data[0] = a->rows, algorithm.data[1] = b->columns, algorithm.data[2] = b->rows;
    algorithm.data[3] = (uint64_t)a->ld, algorithm.data[4] = (uint64_t)b->ld;
    algorithm.data[5] = (uint64_t)c->ld;
    algorithm.data[6] = (uint64_t)p->operation_A << 32 | (uint64_t)a->type;
    return algorithm;
}

EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t results[], int *found)
{
    (void)handle, (void)d, (void)preference;
    record.heuristics++;
    *found = 0;
    if (record.refuse || wanted < 1) return CUBLAS_STATUS_NOT_SUPPORTED;
    memset(results, 0, sizeof *results);
    results->algo = algorithm_of((fake_product *)(void *)product, (fake_layout *)(void *)a,
                                 (fake_layout *)(void *)b, (fake_layout *)(void *)c);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

static hqq_dtype dtype_of(cudaDataType type)
{
    return type == CUDA_R_16F ? HQQ_F16 : type == CUDA_R_16BF ? HQQ_BF16 : HQQ_F32;
}

EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                     const void *alpha, const void *A,
                                     cublasLtMatrixLayout_t a_, const void *B,
                                     cublasLtMatrixLayout_t b_, const void *beta, const void *C,
                                     cublasLtMatrixLayout_t c_, void *D,
                                     cublasLtMatrixLayout_t d_,
                                     const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                     size_t workspace_bytes, cudaStream_t stream)
{
    const fake_product *p = (fake_product *)(void *)product;
    const fake_layout *a = (fake_layout *)(void *)a_, *b = (fake_layout *)(void *)b_;
    const fake_layout *c = (fake_layout *)(void *)c_;
    (void)handle, (void)d_, (void)stream;
    record.products++;
    record.workspace_bytes = workspace_bytes;
    cublasLtMatmulAlgo_t expected = algorithm_of(p, a, b, c);
    record.wrong_algorithm += memcmp(algorithm, &expected, sizeof expected) != 0;
    int transposed = p->operation_A == CUBLAS_OP_T;
    uint64_t m = transposed ? a->columns : a->rows, k = transposed ? a->rows : a->columns;
    if (p->compute != CUBLAS_COMPUTE_32F || p->scale != CUDA_R_32F || b->rows != k ||
        c->rows != m || c->columns != b->columns || *(const float *)alpha != 1.0f || C != D ||
        (uintptr_t)workspace % 256 != 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (workspace_bytes) memset(workspace, 0xff, workspace_bytes);
    hqq_dtype dtype = dtype_of(a->type);
    for (int64_t j = 0; j < (int64_t)c->columns; j++)
        for (int64_t i = 0; i < (int64_t)m; i++) {
            float sum = 0.0f;
            for (int64_t l = 0; l < (int64_t)k; l++)
                sum += hqq_load(A, dtype, transposed ? i * a->ld + l : l * a->ld + i) *
                       hqq_load(B, dtype, j * b->ld + l);
            if (*(const float *)beta != 0.0f) sum += hqq_load(C, dtype, j * c->ld + i);
            hqq_store(D, dtype, j * c->ld + i, sum);
        }
    return CUBLAS_STATUS_SUCCESS;
}

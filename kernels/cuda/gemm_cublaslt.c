/*
 * C [m,n] = A [m,k] op(B) + beta C over cuBLASLt, which counts in columns: a row-major [r,c] is
 * a column-major [c,r] with the same stride, so that the very same memory is
 *
 *     C^T [n,m] = op(B)^T [n,k] A^T [k,m]
 *
 * B [k,n] is then n x k, taken as it is; B [n,k] (transpose_b) is k x n, transposed.
 *
 * Sums are fp32 (of fp32 operands too: no TF32), and sums that cuBLASLt splits are added in
 * fp32: it would otherwise be free to add them in C's dtype.
 */
#include "gemm.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <string.h>

#include "cublaslt.h"
#include "format.h"
#include "status.h"

/* All that the choice of an algorithm depends on. Compared as bytes: made with memset. */
typedef struct gemm_key {
    int64_t m, n, k, lda, ldb, ldc;
    uint64_t workspace_bytes;
    uint32_t align_A, align_B, align_C;
    int32_t device, dtype, transpose_b, adds;
} gemm_key;

/* ---- descriptors ------------------------------------------------------------------------ */

/* One product in cuBLASLt's words: first is B, second A. */
typedef struct gemm_descriptors {
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t first, second, result;
} gemm_descriptors;

static cudaDataType_t cuda_type(int32_t dtype)
{
    return dtype == HQQ_F16 ? CUDA_R_16F : dtype == HQQ_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

static void destroy_descriptors(const hqq_cublaslt *lt, gemm_descriptors *d)
{
    if (d->product) lt->MatmulDescDestroy(d->product);
    if (d->first) lt->MatrixLayoutDestroy(d->first);
    if (d->second) lt->MatrixLayoutDestroy(d->second);
    if (d->result) lt->MatrixLayoutDestroy(d->result);
}

#define LT_TRY(name, ...) \
    HQQ_TRY(hqq_cublaslt_check(lt, lt->name(__VA_ARGS__), "cublasLt" #name))

static hqq_status make_descriptors(const hqq_cublaslt *lt, gemm_descriptors *d,
                                   const gemm_key *g)
{
    cudaDataType_t type = cuda_type(g->dtype);
    cublasOperation_t operation = g->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint64_t m = (uint64_t)g->m, n = (uint64_t)g->n, k = (uint64_t)g->k;
    LT_TRY(MatmulDescCreate, &d->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    LT_TRY(MatmulDescSetAttribute, d->product, CUBLASLT_MATMUL_DESC_TRANSA, &operation,
           sizeof operation);
    LT_TRY(MatrixLayoutCreate, &d->first, type, g->transpose_b ? k : n, g->transpose_b ? n : k,
           g->ldb);
    LT_TRY(MatrixLayoutCreate, &d->second, type, k, m, g->lda);
    LT_TRY(MatrixLayoutCreate, &d->result, type, n, m, g->ldc);
    return HQQ_OK;
}

/* ---- the choice of an algorithm --------------------------------------------------------- */

static hqq_status set_preferences(const hqq_cublaslt *lt, cublasLtMatmulPreference_t wishes,
                                  const gemm_key *g)
{
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
#define PREFER(name, value)                                                             \
    LT_TRY(MatmulPreferenceSetAttribute, wishes, CUBLASLT_MATMUL_PREF_##name, &(value), \
           sizeof(value))
    PREFER(MAX_WORKSPACE_BYTES, g->workspace_bytes);
    PREFER(REDUCTION_SCHEME_MASK, reduction);
    PREFER(MIN_ALIGNMENT_A_BYTES, g->align_B);
    PREFER(MIN_ALIGNMENT_B_BYTES, g->align_A);
    PREFER(MIN_ALIGNMENT_C_BYTES, g->align_C);
    PREFER(MIN_ALIGNMENT_D_BYTES, g->align_C);
#undef PREFER
    return HQQ_OK;
}

static hqq_status ask_cublaslt(cublasLtMatmulAlgo_t *algorithm, const hqq_cublaslt *lt,
                               cublasLtHandle_t handle, const gemm_descriptors *d,
                               const gemm_key *g)
{
    cublasLtMatmulPreference_t wishes;
    LT_TRY(MatmulPreferenceCreate, &wishes);
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    hqq_status status = set_preferences(lt, wishes, g);
    if (status == HQQ_OK)
        status = hqq_cublaslt_check(lt,
                                    lt->MatmulAlgoGetHeuristic(handle, d->product, d->first,
                                                               d->second, d->result, d->result,
                                                               wishes, 1, &found, &count),
                                    "cublasLtMatmulAlgoGetHeuristic");
    lt->MatmulPreferenceDestroy(wishes);
    if (status == HQQ_OK && (count < 1 || found.state != CUBLAS_STATUS_SUCCESS))
        status = hqq_fail(HQQ_UNSUPPORTED, "cuBLASLt has no algorithm");
    if (status == HQQ_OK) *algorithm = found.algo;
    return status;
}

/* Choices that were made before, each in the place that its key hashes to; a newcomer takes
 * the place of whoever is there. */
enum { CACHE_SLOTS = 256 };
static struct {
    int used;
    gemm_key key;
    cublasLtMatmulAlgo_t algorithm;
} cache[CACHE_SLOTS];
static pthread_mutex_t cache_lock = PTHREAD_MUTEX_INITIALIZER;

HQQ_WRAPS static size_t slot_of(const gemm_key *key)
{
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < sizeof *key; i++)
        hash = (hash ^ ((const unsigned char *)key)[i]) * 16777619u;
    return hash % CACHE_SLOTS;
}

static int find_cached(cublasLtMatmulAlgo_t *algorithm, const gemm_key *key)
{
    size_t slot = slot_of(key);
    pthread_mutex_lock(&cache_lock);
    int found = cache[slot].used && memcmp(&cache[slot].key, key, sizeof *key) == 0;
    if (found) *algorithm = cache[slot].algorithm;
    pthread_mutex_unlock(&cache_lock);
    return found;
}

static void keep(const cublasLtMatmulAlgo_t *algorithm, const gemm_key *key)
{
    size_t slot = slot_of(key);
    pthread_mutex_lock(&cache_lock);
    cache[slot].used = 1;
    cache[slot].key = *key;
    cache[slot].algorithm = *algorithm;
    pthread_mutex_unlock(&cache_lock);
}

static hqq_status choose(cublasLtMatmulAlgo_t *algorithm, const hqq_cublaslt *lt,
                         cublasLtHandle_t handle, const gemm_descriptors *d, const gemm_key *g)
{
    if (find_cached(algorithm, g)) return HQQ_OK;
    HQQ_TRY(ask_cublaslt(algorithm, lt, handle, d, g));
    keep(algorithm, g);
    return HQQ_OK;
}

/* ---- the product ------------------------------------------------------------------------ */

/* The largest power of two, up to 256, that divides an address. */
static uint32_t alignment_of(const void *data)
{
    uint32_t low = (uint32_t)((uintptr_t)data & 255);
    return low == 0 ? 256 : low & (0u - low);
}

typedef struct gemm_memory {
    const void *A, *B;
    void *C, *workspace;
    void *stream;
} gemm_memory;

static hqq_status run(const hqq_cublaslt *lt, cublasLtHandle_t handle, gemm_descriptors *d,
                      const gemm_key *g, const gemm_memory *at)
{
    const float alpha = 1.0f, beta = g->adds ? 1.0f : 0.0f;
    cublasLtMatmulAlgo_t algorithm;
    HQQ_TRY(make_descriptors(lt, d, g));
    HQQ_TRY(choose(&algorithm, lt, handle, d, g));
    return hqq_cublaslt_check(lt,
                              lt->Matmul(handle, d->product, &alpha, at->B, d->first, at->A,
                                         d->second, &beta, at->C, d->result, at->C, d->result,
                                         &algorithm, at->workspace, g->workspace_bytes,
                                         (cudaStream_t)at->stream),
                              "cublasLtMatmul");
}

/* cuBLASLt wants its workspace at a multiple of 256 bytes. */
static void *align_workspace(void *workspace, size_t *bytes)
{
    size_t skip = (size_t)(0u - (uintptr_t)workspace) & 255;
    if (!workspace || *bytes <= skip) {
        *bytes = 0;
        return NULL;
    }
    *bytes -= skip;
    return (char *)workspace + skip;
}

hqq_status hqq_cuda_gemm(void *C, int64_t ldc, const void *A, int64_t lda, const void *B,
                         int64_t ldb, int transpose_b, int64_t m, int64_t n, int64_t k,
                         float beta, hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                         void *stream)
{
    gemm_memory at = {.A = A, .B = B, .C = C, .stream = stream};
    at.workspace = align_workspace(workspace, &workspace_bytes);
    gemm_key g;
    memset(&g, 0, sizeof g);
    g.m = m, g.n = n, g.k = k;
    g.lda = lda, g.ldb = ldb, g.ldc = ldc;
    g.workspace_bytes = workspace_bytes;
    g.align_A = alignment_of(A), g.align_B = alignment_of(B), g.align_C = alignment_of(C);
    g.dtype = (int32_t)dtype, g.transpose_b = transpose_b, g.adds = beta != 0.0f;
    cudaError_t error = cudaGetDevice(&g.device);
    if (error != cudaSuccess)
        return hqq_fail(HQQ_DEVICE, "CUDA: %s (cudaGetDevice)", cudaGetErrorString(error));

    hqq_cublaslt lt;
    cublasLtHandle_t handle;
    gemm_descriptors d = {0};
    HQQ_TRY(hqq_cublaslt_of_device(&lt, &handle, g.device));
    hqq_status status = run(&lt, handle, &d, &g, &at);
    destroy_descriptors(&lt, &d);
    if (status == HQQ_OK) return HQQ_OK;
    char why[256];
    strncpy(why, hqq_last_error(), sizeof why - 1);
    why[sizeof why - 1] = '\0';
    return hqq_fail(status,
                    "%s, for a product of %lld x %lld x %lld, dtype %d, strides %lld, %lld, "
                    "%lld, with %zu bytes of workspace",
                    why, (long long)m, (long long)n, (long long)k, (int)dtype, (long long)lda,
                    (long long)ldb, (long long)ldc, workspace_bytes);
}

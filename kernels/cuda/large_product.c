/*
 *                  w outputs
 *     out         [================]   addend, rounded to out's dtype: one launch
 *     W (packed)  [ . . [====] . . ]   dequantize -> block, in the workspace
 *     out         [ . . [====] . . ]   += block's product: GEMM with beta = 1
 *
 * forward   block [w,K] = rows of W        out[:, n..n+w] = in block^T
 * dgrad     block [N,w] = columns of W     out[:, k..k+w] = in block
 *
 * A block of rows reads the bytes in which other rows have their codes too: with 4 bits each
 * byte is read twice over the whole product, once for row n and once for row n + N/2; at any
 * width of codes that is one byte a weight, beside the two that are written to L2.
 */
#include "large_product.h"

#include "block_width.h"
#include "dequantize.h"
#include "dtype.h"
#include "gemm.h"
#include "lora.h"
#include "status.h"
#include "workspace.h"

typedef struct block_plan {
    int64_t outputs, length, width; /* O; what is summed over; outputs in a block */
    size_t block_bytes, gemm_bytes;
} block_plan;

/* What cuBLASLt may use: room for some fp32 parts of a block of outputs, so that it can split
 * sums; none where the caller's GEMM serves. */
static size_t gemm_workspace(int64_t M, int64_t width, const hqq_context *context)
{
    enum { PARTS_MOST = 16 };
    if (context && context->gemm) return 0;
    double wanted = (double)PARTS_MOST * (double)M * (double)width * (double)sizeof(float);
    if (wanted >= (double)HQQ_CUDA_GEMM_WORKSPACE) return HQQ_CUDA_GEMM_WORKSPACE;
    return (size_t)wanted;
}

static block_plan make_plan(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                            const hqq_cuda_device *device, const hqq_context *context)
{
    int64_t N = weight->out_features, K = weight->in_features;
    block_plan plan = {.outputs = transpose ? K : N, .length = transpose ? N : K};
    plan.width = hqq_cuda_block_width(plan.outputs, plan.length, M, dtype, device);
    plan.block_bytes =
        (size_t)plan.width * (size_t)plan.length * (size_t)hqq_dtype_bytes(dtype);
    plan.gemm_bytes = gemm_workspace(M, plan.width, context);
    return plan;
}

static void cut_workspace(hqq_arena *arena, const block_plan *plan, void **block, void **gemm)
{
    *block = hqq_arena_take(arena, plan->block_bytes);
    *gemm = hqq_arena_take(arena, plan->gemm_bytes);
}

size_t hqq_cuda_large_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                                int transpose, const hqq_cuda_device *device,
                                const hqq_context *context)
{
    block_plan plan = make_plan(weight, M, dtype, transpose, device, context);
    hqq_arena arena = {0};
    void *block, *gemm;
    cut_workspace(&arena, &plan, &block, &gemm);
    return arena.used;
}

/* C [m,n] = A [m,k] op(B) + beta C, by the caller's GEMM or by ours. */
static hqq_status gemm_of_context(void *C, int64_t ldc, const void *A, int64_t lda,
                                  const void *B, int64_t ldb, int transpose_b, int64_t m,
                                  int64_t n, int64_t k, float beta, hqq_dtype dtype,
                                  void *workspace, size_t workspace_bytes,
                                  const hqq_context *context)
{
    if (!context || !context->gemm)
        return hqq_cuda_gemm(C, ldc, A, lda, B, ldb, transpose_b, m, n, k, beta, dtype,
                             workspace, workspace_bytes, context ? context->stream : NULL);
    int32_t code = context->gemm(C, ldc, A, lda, 0, B, ldb, transpose_b, m, n, k, beta, dtype,
                                 context->gemm_data);
    if (code == 0) return HQQ_OK;
    return hqq_fail(HQQ_CALLBACK, "gemm returned %d for a product of %lld x %lld x %lld",
                    (int)code, (long long)m, (long long)n, (long long)k);
}

hqq_status hqq_cuda_large_product(void *out, const void *in, int64_t ld_in,
                                  const hqq_weight *weight, const hqq_addend *addend, int64_t M,
                                  hqq_dtype dtype, int transpose, void *workspace,
                                  const hqq_cuda_device *device, const hqq_context *context)
{
    block_plan plan = make_plan(weight, M, dtype, transpose, device, context);
    hqq_arena arena = {.base = workspace};
    void *block, *gemm_memory, *stream = context ? context->stream : NULL;
    cut_workspace(&arena, &plan, &block, &gemm_memory);
    int64_t O = plan.outputs, L = plan.length;
    int adds = addend->bias || addend->rank > 0;
    if (M == 1) ld_in = L; /* its stride is never used, and may be anything */
    if (adds) HQQ_TRY(hqq_cuda_write_addend(out, dtype, addend, M, O, stream));
    for (int64_t begin = 0; begin < O; begin += plan.width) {
        int64_t end = begin + plan.width < O ? begin + plan.width : O, width = end - begin;
        void *part = hqq_at_mut(out, dtype, begin);
        int64_t ld_block = transpose ? width : L;
        hqq_status status =
            transpose
                ? hqq_cuda_dequantize(block, ld_block, dtype, weight, 0, L, begin, end, stream)
                : hqq_cuda_dequantize(block, ld_block, dtype, weight, begin, end, 0, L, stream);
        HQQ_TRY(status);
        HQQ_TRY(gemm_of_context(part, O, in, ld_in, block, ld_block, !transpose, M, width, L,
                                adds ? 1.0f : 0.0f, dtype, gemm_memory, plan.gemm_bytes,
                                context));
    }
    return HQQ_OK;
}

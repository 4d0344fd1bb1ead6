#include "blocked.h"

#include "dtype.h"
#include "gemm.h"
#include "integers.h"
#include "lora.h"
#include "status.h"

/*
 * A block holds 2^21 elements (4 MB in bf16), at least 256 rows (columns), at most half of the
 * weight. Measured with torch.mm, one thread's CPU time, time of the dense product over that of
 * all blocks without dequantizing (the dense weight comes from memory, the block from cache):
 *
 *     bf16, 4096 x 4096         128    256    512   1024   rows (forward)
 *         M = 128              1.42   1.79   1.97   2.13
 *         M = 512              0.85   1.22   1.30   1.40
 *         M = 2048             0.83   1.00   0.96   1.14
 *     bf16, 1536 x 576, M = 512   0.77   0.92   1.07
 *
 * and the same within a tenth for columns (dgrad). Below 256 a GEMM call is too narrow to earn
 * its start; above 512 little is won, and the workspace doubles.
 */
#define HQQ_BLOCK_ELEMENTS (INT64_C(2) << 20)
#define HQQ_BLOCK_SIDE     256

/* How many of `count` rows (columns) of `length` elements make a block: as many as the budget
 * holds, in multiples of 64, at least HQQ_BLOCK_SIDE, at most half of all; and the blocks of a
 * weight about equal. */
static int64_t block_side(int64_t count, int64_t length)
{
    int64_t side = hqq_most(HQQ_BLOCK_ELEMENTS / length, HQQ_BLOCK_SIDE);
    side = hqq_least(side, hqq_ceil_div(count, 2));
    int64_t blocks = hqq_ceil_div(count, side);
    int64_t even = hqq_ceil_div(count, blocks);
    return hqq_least(hqq_ceil_div(even, 64) * 64, side);
}

size_t hqq_blocked_workspace(const hqq_weight *weight, hqq_dtype dtype)
{
    int64_t N = weight->out_features, K = weight->in_features;
    int64_t elements = hqq_most(block_side(N, K) * K, N * block_side(K, N));
    return (size_t)elements * (size_t)hqq_dtype_bytes(dtype);
}

hqq_status hqq_blocked_linear(const hqq_forward *f, const float *xa, void *workspace,
                              const hqq_context *context)
{
    int64_t M = f->M, N = f->weight->out_features, K = f->weight->in_features;
    int64_t side = block_side(N, K);
    int add = f->lora || f->bias;
    for (int64_t n = 0; n < N; n += side) {
        int64_t end = hqq_least(n + side, N);
        void *y = hqq_at_mut(f->y, f->dtype, n);
        if (add)
            HQQ_TRY(hqq_lora_addend(y, N, f->dtype, xa, f->bias, f->bias_dtype, f->lora, M, n,
                                    end, context));
        HQQ_TRY(
            hqq_backend_dequantize(workspace, K, f->dtype, f->weight, n, end, 0, K, context));
        HQQ_TRY(hqq_gemm_of_context(y, N, f->x, f->ldx, 0, workspace, K, 1, M, end - n, K,
                                    add ? 1.0f : 0.0f, f->dtype, context));
    }
    return HQQ_OK;
}

hqq_status hqq_blocked_dgrad(const hqq_backward *b, const float *dyb, void *workspace,
                             const hqq_context *context)
{
    int64_t M = b->M, N = b->weight->out_features, K = b->weight->in_features;
    int64_t side = block_side(K, N);
    for (int64_t k = 0; k < K; k += side) {
        int64_t end = hqq_least(k + side, K), columns = end - k;
        void *dx = hqq_at_mut(b->dx, b->dtype, k);
        if (b->lora)
            HQQ_TRY(hqq_lora_dx_addend(dx, K, b->dtype, dyb, b->lora, M, K, k, end, context));
        HQQ_TRY(hqq_backend_dequantize(workspace, columns, b->dtype, b->weight, 0, N, k, end,
                                       context));
        HQQ_TRY(hqq_gemm_of_context(dx, K, b->dy, b->lddy, 0, workspace, columns, 0, M, columns,
                                    N, b->lora ? 1.0f : 0.0f, b->dtype, context));
    }
    return HQQ_OK;
}

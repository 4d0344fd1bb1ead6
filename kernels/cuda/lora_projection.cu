/* xa [M,R] = drop(x) A^T and dyb [M,R] = dy B: the skinny products (lora_product.cuh) whose sum
 * runs along the rows of x and dy. */
#include "lora.h"
#include "lora_product.cuh"

static hqq_lora_product projection_of(float *out, const void *in, int64_t ld, int64_t M,
                                      int64_t width, const hqq_lora *lora)
{
    hqq_lora_product p = {};
    p.I = width;
    p.J = M;
    p.R = lora->rank;
    p.in = in;
    p.ld_in = ld;
    p.in_width = width;
    p.right_dtype = lora->dtype;
    p.out = out;
    p.out_dtype = HQQ_F32;
    p.out_j_stride = lora->rank;
    p.out_r_stride = 1;
    p.scaling = 1.0f;
    return p;
}

hqq_status hqq_cuda_lora_xa(float *xa, const void *x, int64_t ldx, hqq_dtype dtype,
                            const hqq_lora *lora, int64_t M, int64_t K, void *workspace,
                            const hqq_cuda_device *device, void *stream)
{
    hqq_lora_product p = projection_of(xa, x, ldx, M, K, lora);
    p.drops = lora->dropout > 0;
    p.dropout = hqq_dropout_source_of(lora);
    p.right = lora->A;
    p.right_i_stride = 1;
    p.right_r_stride = K;
    p.right_runs_along_i = 1;
    return run_product<true>(&p, dtype, workspace, device, stream);
}

hqq_status hqq_cuda_lora_dyb(float *dyb, const void *dy, int64_t lddy, hqq_dtype dtype,
                             const hqq_lora *lora, int64_t M, int64_t N, void *workspace,
                             const hqq_cuda_device *device, void *stream)
{
    hqq_lora_product p = projection_of(dyb, dy, lddy, M, N, lora);
    p.right = lora->B;
    p.right_i_stride = lora->rank;
    p.right_r_stride = 1;
    return run_product<true>(&p, dtype, workspace, device, stream);
}

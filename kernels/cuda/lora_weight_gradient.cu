/* dA [R,K] = scaling * dyb^T drop(x) and dB [N,R] = scaling * dy^T xa: the skinny products
 * (lora_product.cuh) whose sum runs over the tokens, down the rows of x and dy. */
#include "lora.h"
#include "lora_product.cuh"

static hqq_lora_product gradient_of(void *out, const float *left, const void *in, int64_t ld,
                                    int64_t M, int64_t width, const hqq_lora *lora)
{
    hqq_lora_product p = {};
    p.I = M;
    p.J = width;
    p.R = lora->rank;
    p.in = in;
    p.ld_in = ld;
    p.in_width = width;
    p.right = left;
    p.right_dtype = HQQ_F32;
    p.right_i_stride = lora->rank;
    p.right_r_stride = 1;
    p.out = out;
    p.out_dtype = lora->dtype;
    p.scaling = lora->scaling;
    return p;
}

hqq_status hqq_cuda_lora_dA(void *dA, const float *dyb, const void *x, int64_t ldx,
                            hqq_dtype dtype, const hqq_lora *lora, int64_t M, int64_t K,
                            void *workspace, const hqq_cuda_device *device, void *stream)
{
    hqq_lora_product p = gradient_of(dA, dyb, x, ldx, M, K, lora);
    p.drops = lora->dropout > 0;
    p.dropout = hqq_dropout_source_of(lora);
    p.out_j_stride = 1;
    p.out_r_stride = K;
    return run_product<false>(&p, dtype, workspace, device, stream);
}

hqq_status hqq_cuda_lora_dB(void *dB, const void *dy, int64_t lddy, hqq_dtype dtype,
                            const float *xa, const hqq_lora *lora, int64_t M, int64_t N,
                            void *workspace, const hqq_cuda_device *device, void *stream)
{
    hqq_lora_product p = gradient_of(dB, xa, dy, lddy, M, N, lora);
    p.out_j_stride = lora->rank;
    p.out_r_stride = 1;
    return run_product<false>(&p, dtype, workspace, device, stream);
}

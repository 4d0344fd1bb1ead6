/*
 * Products of many rows: block by block of the outputs, dequantize into the workspace, then a
 * GEMM. No whole dense weight, but where that is small (see block_width.c).
 *
 *     transpose 0   out [M,N] = in [M,K] W^T + addend
 *     transpose 1   out [M,K] = in [M,N] W + addend
 */
#ifndef HQQ_KERNELS_CUDA_LARGE_PRODUCT_H
#define HQQ_KERNELS_CUDA_LARGE_PRODUCT_H

#include "addend.h"
#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

size_t hqq_cuda_large_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                                int transpose, const hqq_cuda_device *device,
                                const hqq_context *context);

/* in has row stride ld_in; out is contiguous. workspace: 64-byte aligned. The GEMM is the
 * context's, if it lends one; it must then enqueue on the context's stream. */
hqq_status hqq_cuda_large_product(void *out, const void *in, int64_t ld_in,
                                  const hqq_weight *weight, const hqq_addend *addend, int64_t M,
                                  hqq_dtype dtype, int transpose, void *workspace,
                                  const hqq_cuda_device *device, const hqq_context *context);

#ifdef __cplusplus
}
#endif
#endif

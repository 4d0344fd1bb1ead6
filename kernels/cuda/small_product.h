/*
 * Products of few rows with the packed codes themselves, no dequantized copy:
 *
 *     transpose 0   out [M,N] = in [M,K] W^T + addend
 *     transpose 1   out [M,K] = in [M,N] W + addend
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_PRODUCT_H
#define HQQ_KERNELS_CUDA_SMALL_PRODUCT_H

#include "addend.h"
#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whether these kernels compute the product: format, alignment and dtypes suit them. A pure
 * function; M may be any. */
int hqq_cuda_small_serves(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose);

/* What it costs where it serves, in the unit of block_width.h. */
double hqq_cuda_small_cost(const hqq_weight *weight, int64_t M, int transpose,
                           const hqq_cuda_device *device);

/* Bytes of workspace, for hqq_cuda_small_product on that device. */
size_t hqq_cuda_small_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                                int transpose, const hqq_cuda_device *device);

/* in has row stride ld_in; out is contiguous. workspace: 64-byte aligned. */
hqq_status hqq_cuda_small_product(void *out, const void *in, int64_t ld_in,
                                  const hqq_weight *weight, const hqq_addend *addend, int64_t M,
                                  hqq_dtype dtype, int transpose, void *workspace,
                                  const hqq_cuda_device *device, void *stream);

#ifdef __cplusplus
}
#endif
#endif

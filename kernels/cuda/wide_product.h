/*
 * Products of many rows with the packed codes themselves, on the tensor cores of compute
 * capability 9.0: no dequantized copy, no GEMM, one launch (two, where sums are split) beside
 * the addend's.
 *
 *     transpose 0   out [M,N] = in [M,K] W^T + addend
 *     transpose 1   out [M,K] = in [M,N] W + addend
 */
#ifndef HQQ_KERNELS_CUDA_WIDE_PRODUCT_H
#define HQQ_KERNELS_CUDA_WIDE_PRODUCT_H

#include "addend.h"
#include "device.h"

typedef struct hqq_wide_grid {
    int64_t token_tiles, output_tiles, chunks;
    int64_t tokens; /* of a tile: HQQ_WIDE_FEW or HQQ_WIDE_TOKENS */
    int64_t splits, chunks_per_split;
    int cluster; /* the splits of a tile are one: no workspace */
    double cost; /* in the unit of block_width.c: operations of a multiprocessor */
} hqq_wide_grid;

#ifdef __cplusplus
extern "C" {
#endif

/* Whether this kernel computes the product: the library has it, device (NULL: none), format and
 * dtypes suit it. M may be any. */
int hqq_cuda_wide_serves(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                         const hqq_cuda_device *device);

/* Whether it is to be faster than blocks through a GEMM (block_width.h), where it serves. */
int hqq_cuda_wide_is_faster(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                            const hqq_cuda_device *device);

/* How its blocks are cut, on that device: the splits of the reduction that are to cost least,
 * none of them without a chunk. A pure function. */
hqq_wide_grid hqq_cuda_wide_grid(const hqq_weight *weight, int64_t M, int transpose,
                                 const hqq_cuda_device *device);

/* Bytes of workspace: none where nothing is split. */
size_t hqq_cuda_wide_workspace(const hqq_weight *weight, int64_t M, int transpose,
                               const hqq_cuda_device *device);

/* in has row stride ld_in; out is contiguous. workspace: 64-byte aligned. */
hqq_status hqq_cuda_wide_product(void *out, const void *in, int64_t ld_in,
                                 const hqq_weight *weight, const hqq_addend *addend, int64_t M,
                                 hqq_dtype dtype, int transpose, void *workspace,
                                 const hqq_cuda_device *device, void *stream);

#ifdef __cplusplus
}
#endif
#endif

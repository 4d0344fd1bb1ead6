/*
 * The LoRA side of a product, as skinny kernels that read x and dy once, in their own dtype.
 * Dropout follows lora->dropout and the seed, which the kernels read. Everything accumulates in
 * fp32, in an order that depends on the shapes alone: results repeat bitwise.
 *
 * Sums over K, N or M that one block cannot do alone are split; `workspace` (64-byte aligned,
 * hqq_cuda_lora_workspace bytes, which serves all four sums) holds the parts.
 */
#ifndef HQQ_KERNELS_CUDA_LORA_H
#define HQQ_KERNELS_CUDA_LORA_H

#include "addend.h"
#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

size_t hqq_cuda_lora_workspace(const hqq_lora *lora, int64_t M, int64_t N, int64_t K,
                               const hqq_cuda_device *device);

/* xa [M,R] fp32 = drop(x) A^T */
hqq_status hqq_cuda_lora_xa(float *xa, const void *x, int64_t ldx, hqq_dtype dtype,
                            const hqq_lora *lora, int64_t M, int64_t K, void *workspace,
                            const hqq_cuda_device *device, void *stream);

/* dyb [M,R] fp32 = dy B */
hqq_status hqq_cuda_lora_dyb(float *dyb, const void *dy, int64_t lddy, hqq_dtype dtype,
                             const hqq_lora *lora, int64_t M, int64_t N, void *workspace,
                             const hqq_cuda_device *device, void *stream);

/* dA [R,K] of lora->dtype = scaling * dyb^T drop(x) */
hqq_status hqq_cuda_lora_dA(void *dA, const float *dyb, const void *x, int64_t ldx,
                            hqq_dtype dtype, const hqq_lora *lora, int64_t M, int64_t K,
                            void *workspace, const hqq_cuda_device *device, void *stream);

/* dB [N,R] of lora->dtype = scaling * dy^T xa */
hqq_status hqq_cuda_lora_dB(void *dB, const void *dy, int64_t lddy, hqq_dtype dtype,
                            const float *xa, const hqq_lora *lora, int64_t M, int64_t N,
                            void *workspace, const hqq_cuda_device *device, void *stream);

/* out [M,outputs] = addend, rounded once to dtype. */
hqq_status hqq_cuda_write_addend(void *out, hqq_dtype dtype, const hqq_addend *addend,
                                 int64_t M, int64_t outputs, void *stream);

#ifdef __cplusplus
}
#endif
#endif

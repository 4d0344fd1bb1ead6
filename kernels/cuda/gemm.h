/*
 * The one seam to a dense GEMM: cuBLASLt in the library (gemm_cublaslt.c), plain loops where
 * the kernels run on the CPU.
 *
 *     C [m,n] = A [m,k] op(B) + beta * C        op(B) = B [k,n], or B^T of B [n,k]
 *
 * Row-major, one dtype, fp32 accumulation, rounded once; beta is 0 or 1. Enqueued on stream;
 * neither allocates on the device nor waits.
 */
#ifndef HQQ_KERNELS_CUDA_GEMM_H
#define HQQ_KERNELS_CUDA_GEMM_H

#include "device.h"

enum { HQQ_CUDA_GEMM_WORKSPACE = 32 << 20 }; /* bytes; what NVIDIA recommends for Hopper */

#ifdef __cplusplus
extern "C" {
#endif

hqq_status hqq_cuda_gemm(void *C, int64_t ldc, const void *A, int64_t lda, const void *B,
                         int64_t ldb, int transpose_b, int64_t m, int64_t n, int64_t k,
                         float beta, hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                         void *stream);

#ifdef __cplusplus
}
#endif
#endif

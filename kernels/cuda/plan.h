/* The kernel that serves one product on a GPU. Pure functions: tests can ask. */
#ifndef HQQ_KERNELS_CUDA_PLAN_H
#define HQQ_KERNELS_CUDA_PLAN_H

#include "hqqlora.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `forced` (a context's kernel) where it can serve: a forced DIRECT whose format, alignment or
 * dtypes it does not know becomes BLOCKED. HQQ_KERNEL_AUTO: by format and shape. */
hqq_kernel hqq_cuda_kernel_for(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                               int transpose, hqq_kernel forced);

#ifdef __cplusplus
}
#endif
#endif

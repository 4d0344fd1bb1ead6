/* The kernel that serves one product on a GPU. Pure functions: tests can ask. */
#ifndef HQQ_KERNELS_CUDA_PLAN_H
#define HQQ_KERNELS_CUDA_PLAN_H

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `forced` (a context's kernel) where it can serve: a forced DIRECT or TILED whose format,
 * alignment or dtypes it does not know becomes BLOCKED. HQQ_KERNEL_AUTO: by format, shape and
 * device. device: NULL if it is not known. */
hqq_kernel hqq_cuda_kernel_for(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                               int transpose, hqq_kernel forced, const hqq_cuda_device *device);

#ifdef __cplusplus
}
#endif
#endif

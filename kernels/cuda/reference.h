/* The yardstick of the tests on the device: reference_elements.h, one thread an output. Any
 * shape, N or K of 0 included. */
#ifndef HQQ_KERNELS_CUDA_REFERENCE_H
#define HQQ_KERNELS_CUDA_REFERENCE_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

hqq_status hqq_cuda_reference_forward(const hqq_forward *f, void *stream);
hqq_status hqq_cuda_reference_backward(const hqq_backward *b, void *stream);

#ifdef __cplusplus
}
#endif
#endif

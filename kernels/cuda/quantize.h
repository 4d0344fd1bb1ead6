/* hqq_quantize on the device: see hqqlora.h. Enqueued on stream: nothing waits, so non-finite
 * weights or importance cannot be reported; their groups get NaN as scale and zero and 0 for
 * every code, and nothing else is affected. The outputs serve as scratch before they get their
 * values. */
#ifndef HQQ_KERNELS_CUDA_QUANTIZE_H
#define HQQ_KERNELS_CUDA_QUANTIZE_H

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

hqq_status hqq_cuda_quantize(void *packed, void *scale, void *zero, const void *W,
                             hqq_dtype W_dtype, const hqq_weight *weight,
                             const hqq_quantize_options *options, void *stream);

#ifdef __cplusplus
}
#endif
#endif

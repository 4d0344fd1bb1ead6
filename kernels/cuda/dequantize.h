/* out = W[row_begin:row_end, column_begin:column_end], row i at out + i * ld_out, rounded once
 * to out_dtype. Any bits, axis, group size, alignment. */
#ifndef HQQ_KERNELS_CUDA_DEQUANTIZE_H
#define HQQ_KERNELS_CUDA_DEQUANTIZE_H

#include "hqqlora.h"

#ifdef __cplusplus
extern "C" {
#endif

hqq_status hqq_cuda_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                               const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                               int64_t column_begin, int64_t column_end, void *stream);

#ifdef __cplusplus
}
#endif
#endif

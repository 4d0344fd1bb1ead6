/* The products of up to 8 rows that the tensor-core kernels do not serve: fp32, scales of
 * another dtype, groups of less than 64. No workspace. */
#ifndef HQQ_KERNELS_CUDA_SMALL_DOT_H
#define HQQ_KERNELS_CUDA_SMALL_DOT_H

#include "addend.h"

enum { HQQ_DOT_TOKENS = 8 };

#ifdef __cplusplus
extern "C" {
#endif

int hqq_small_dot_serves(const hqq_weight *weight, int64_t M, int transpose);

hqq_status hqq_small_dot(void *out, const void *in, int64_t ld_in, const hqq_weight *weight,
                         const hqq_addend *addend, int64_t M, hqq_dtype dtype, int transpose,
                         void *stream);

#ifdef __cplusplus
}
#endif
#endif

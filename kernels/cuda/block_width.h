/* How many outputs a block of a large product has. A pure function: tests can ask. */
#ifndef HQQ_KERNELS_CUDA_BLOCK_WIDTH_H
#define HQQ_KERNELS_CUDA_BLOCK_WIDTH_H

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* For out [M,outputs] that sums over `length` (forward: N and K; dgrad: K and N). A multiple of
 * 64, or `outputs` itself. At least 1 where outputs is. */
int64_t hqq_cuda_block_width(int64_t outputs, int64_t length, int64_t M, hqq_dtype dtype,
                             const hqq_cuda_device *device);

/* What blocks of that width cost, as block_width.c reckons: operations of one multiprocessor.
 */
double hqq_cuda_blocks_cost(int64_t outputs, int64_t length, int64_t M, hqq_dtype dtype,
                            const hqq_cuda_device *device);

/* That unit in an H100's GEMM, of 790 TFLOP/s on 132 multiprocessors. */
#define HQQ_CUDA_OPERATIONS_A_MICROSECOND 6e6

/* What a launch costs in it: 2 us. */
#define HQQ_CUDA_LAUNCH_OPERATIONS (1.5 * (1 << 23))

#ifdef __cplusplus
}
#endif
#endif

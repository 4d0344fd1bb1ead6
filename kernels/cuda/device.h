/* The device that the host code plans for, and the two things it asks of the runtime. */
#ifndef HQQ_KERNELS_CUDA_DEVICE_H
#define HQQ_KERNELS_CUDA_DEVICE_H

#include "hqqlora.h"

typedef struct hqq_cuda_device {
    int multiprocessors;    /* 132 on an H100 */
    int compute_capability; /* 90 */
    int64_t l2_bytes;       /* 50 MiB */
    int64_t shared_bytes;   /* of dynamic shared memory that one block may have: 227 KiB */
    int has_clusters;       /* blocks that read each other's shared memory: from 9.0 on */
} hqq_cuda_device;

#ifdef __cplusplus
extern "C" {
#endif

/* The calling thread's current device. */
hqq_status hqq_cuda_current_device(hqq_cuda_device *device);

/* Enqueues zeros. */
hqq_status hqq_cuda_fill_zero(void *data, size_t bytes, void *stream);

#ifdef __cplusplus
}
#endif
#endif

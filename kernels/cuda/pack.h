/* Codes to words and back on the device: see hqq_pack and hqq_unpack in hqqlora.h. Enqueued on
 * stream: nothing waits, so codes above the largest one cannot be reported; their lower nbits
 * are taken. */
#ifndef HQQ_KERNELS_CUDA_PACK_H
#define HQQ_KERNELS_CUDA_PACK_H

#include "hqqlora.h"

#ifdef __cplusplus
extern "C" {
#endif

/* packed [words] = codes [N*K]; tail slots are zero. The pointers of `weight` are not read. */
hqq_status hqq_cuda_pack(void *packed, const uint8_t *codes, const hqq_weight *weight,
                         void *stream);

/* codes [N*K] = those of weight. */
hqq_status hqq_cuda_unpack(uint8_t *codes, const hqq_weight *weight, void *stream);

/* packed [words of that packing] = the codes of weight. */
hqq_status hqq_cuda_repack(void *packed, hqq_packing packing, const hqq_weight *weight,
                           void *stream);

#ifdef __cplusplus
}
#endif
#endif

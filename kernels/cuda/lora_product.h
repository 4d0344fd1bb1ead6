/* One skinny product of an adapter (see lora_product.cuh), and how it is spread over a device.
 */
#ifndef HQQ_KERNELS_CUDA_LORA_PRODUCT_H
#define HQQ_KERNELS_CUDA_LORA_PRODUCT_H

#include "device.h"
#include "dropout.h"

enum { HQQ_LORA_TILE = 64 }; /* j of a block */

/* out[j,r] = scaling * sum_i in(i,j) * right(i,r) */
typedef struct hqq_lora_product {
    int64_t I, J, R;
    const void *in; /* rows along i (a projection) or along j (a gradient), ld_in apart */
    int64_t ld_in;
    int in_aligned; /* rows begin at 16 bytes */
    int drops;      /* dropout applies to in: element row * in_width + column */
    int64_t in_width;
    hqq_dropout_source dropout;
    const void *right; /* right(i,r) at i * right_i_stride + r * right_r_stride */
    hqq_dtype right_dtype;
    int64_t right_i_stride, right_r_stride;
    int right_runs_along_i; /* else along r; that stride is 1 */
    int right_aligned;      /* runs of four begin at multiples of their size */
    void *out; /* out[j,r] at j * out_j_stride + r * out_r_stride, J * R elements */
    hqq_dtype out_dtype;
    int64_t out_j_stride, out_r_stride;
    float scaling;
    /* parts */
    int64_t part_length; /* i of a part */
    float *parts; /* [parts][J * R], as out is laid out; NULL: one part, straight to out */
} hqq_lora_product;

/* r that a block does: all of them, up to 64. */
static inline int hqq_lora_tile_ranks(int64_t R)
{
    return R <= 16 ? 16 : R <= 32 ? 32 : 64;
}

#ifdef __cplusplus
extern "C" {
#endif

/* How many parts a sum of I terms is cut into, and how long they are: enough blocks for the
 * device, from the shapes alone. */
int64_t hqq_lora_parts(int64_t *part_length, int64_t I, int64_t J, int64_t R,
                       const hqq_cuda_device *device);

/* out = scaling * the sum of the parts, in their order, rounded once. */
hqq_status hqq_lora_add_parts(const hqq_lora_product *p, int64_t parts, void *stream);

#ifdef __cplusplus
}
#endif
#endif

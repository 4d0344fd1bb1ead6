/* The products with a frozen weight, and what they are asked for. */
#ifndef HQQ_KERNELS_CPU_PRODUCTS_H
#define HQQ_KERNELS_CPU_PRODUCTS_H

#include "hqqlora.h"

/* y [M,N] = x W^T + bias + scaling (drop(x) A^T) B^T, and xa [M,R] = drop(x) A^T. */
typedef struct hqq_forward {
    void *y;
    float *xa; /* NULL: not wanted */
    const void *x;
    int64_t ldx;
    const hqq_weight *weight;
    const void *bias; /* NULL: none */
    hqq_dtype bias_dtype;
    const hqq_lora *lora; /* NULL: none; never of rank 0 */
    int64_t M;
    hqq_dtype dtype;
} hqq_forward;

/* dx [M,K] = dy W + scaling drop'((dy B) A); dA [R,K]; dB [N,R]. NULL outputs are skipped. */
typedef struct hqq_backward {
    void *dx, *dA, *dB;
    const void *dy;
    int64_t lddy;
    const void *x; /* may be NULL where dA is, and dB is or xa is given */
    int64_t ldx;
    const float *xa;
    const hqq_weight *weight;
    const hqq_lora *lora; /* NULL: none */
    int64_t M;
    hqq_dtype dtype;
} hqq_backward;

/* Bytes of workspace that hqq_cpu_forward and hqq_cpu_backward need at most. */
size_t hqq_cpu_workspace_size(const hqq_weight *weight, const hqq_lora *lora, int64_t M,
                              hqq_dtype dtype, const hqq_context *context);

/* workspace: 64-byte aligned, of the size above. Shapes are checked and none of M, N, K is 0.
 */
hqq_status hqq_cpu_forward(const hqq_forward *f, void *workspace, const hqq_context *context);
hqq_status hqq_cpu_backward(const hqq_backward *b, void *workspace, const hqq_context *context);

/* out = W[row_begin:row_end, column_begin:column_end] */
hqq_status hqq_cpu_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                              const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                              int64_t column_begin, int64_t column_end,
                              const hqq_context *context);

/* Codes to words and back. */
hqq_status hqq_cpu_pack(void *packed, const uint8_t *codes, const hqq_weight *weight,
                        const hqq_context *context);
hqq_status hqq_cpu_unpack(uint8_t *codes, const hqq_weight *weight, const hqq_context *context);

/* See hqq_quantize. */
hqq_status hqq_cpu_quantize(void *packed, void *scale, void *zero, const void *W,
                            hqq_dtype W_dtype, const hqq_weight *weight,
                            const hqq_quantize_options *options, const hqq_context *context);

#endif

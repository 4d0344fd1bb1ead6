/* What a backend does, once the arguments are checked: cpu/ and cuda/ each implement all of it,
 * and a library is the C interface over one of them. */
#ifndef HQQ_KERNELS_BACKEND_H
#define HQQ_KERNELS_BACKEND_H

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
    const float *given_xa; /* NULL: xa is computed; else it is this; lora->A is not read */
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
    const float *given_dyb; /* NULL: dy B is computed; else it is this; lora->B is not read */
} hqq_backward;

/* Bytes of workspace that hqq_backend_forward and hqq_backend_backward need at most. Fails only
 * where an accelerator cannot be asked. */
hqq_status hqq_backend_workspace_size(size_t *bytes, const hqq_weight *weight,
                                      const hqq_lora *lora, int64_t M, hqq_dtype dtype,
                                      const hqq_context *context);

/* workspace: 64-byte aligned, of the size above (none where N or K is 0). N or K may be 0;
 * M too in a backward pass, whose gradients are then zero. */
hqq_status hqq_backend_forward(const hqq_forward *f, void *workspace,
                               const hqq_context *context);
hqq_status hqq_backend_backward(const hqq_backward *b, void *workspace,
                                const hqq_context *context);

/* The sides of an adapter that layers with one input share. M, N, K and the rank are at least
 * 1; workspace: 64-byte aligned, of the size that the first tells. */
hqq_status hqq_backend_lora_workspace_size(size_t *bytes, const hqq_lora *lora, int64_t M,
                                           int64_t N, int64_t K);
/* xa [M,R] = drop(x) A^T */
hqq_status hqq_backend_lora_project(float *xa, const void *x, int64_t ldx, const hqq_lora *lora,
                                    int64_t M, int64_t K, hqq_dtype dtype, void *workspace,
                                    const hqq_context *context);
/* dyb [M,R] = dy B and dB [N,R] = scaling dy^T xa; NULL outputs are skipped. */
hqq_status hqq_backend_lora_factor_gradients(float *dyb, void *dB, const void *dy, int64_t lddy,
                                             const float *xa, const hqq_lora *lora, int64_t M,
                                             int64_t N, hqq_dtype dtype, void *workspace,
                                             const hqq_context *context);

/* The products of all experts. `f` and `b` describe all rows and the first expert's weight and
 * adapter; workspace: what the largest expert needs. */
hqq_status hqq_backend_grouped_forward(const hqq_forward *f, const hqq_routing *routing,
                                       void *workspace, const hqq_context *context);
hqq_status hqq_backend_grouped_backward(const hqq_backward *b, const hqq_routing *routing,
                                        void *workspace, const hqq_context *context);

/* out = W[row_begin:row_end, column_begin:column_end] */
hqq_status hqq_backend_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                                  const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                                  int64_t column_begin, int64_t column_end,
                                  const hqq_context *context);

/* Memory of one call whose caller brought none; NULL if there is none to be had, as always on
 * an accelerator. */
void *hqq_backend_allocate(size_t bytes);
void hqq_backend_free(void *memory);

/* Codes to words and back. */
hqq_status hqq_backend_pack(void *packed, const uint8_t *codes, const hqq_weight *weight,
                            const hqq_context *context);
hqq_status hqq_backend_unpack(uint8_t *codes, const hqq_weight *weight,
                              const hqq_context *context);
/* From one packing to another. */
hqq_status hqq_backend_repack(void *packed, hqq_packing packing, const hqq_weight *weight,
                              const hqq_context *context);

/* See hqq_quantize. */
hqq_status hqq_backend_quantize(void *packed, void *scale, void *zero, const void *W,
                                hqq_dtype W_dtype, const hqq_weight *weight,
                                const hqq_quantize_options *options,
                                const hqq_context *context);

#endif

/*
 * The LoRA side of a product. Dropout is hqq_dropout_of(lora). Everything is a skinny product
 * of gemm.h, so x and dy are read in place, in their own dtype.
 */
#ifndef HQQ_KERNELS_CPU_LORA_H
#define HQQ_KERNELS_CPU_LORA_H

#include "gemm.h"

/* The four that read x or dy, for hqq_gemm_run or, as stages beside others, hqq_gemm_prepare.
 * Dropout, if there is any, is left in *dropout, which has to live until they have run. */

/* xa [M,R] fp32 = drop(x) A^T */
hqq_gemm hqq_lora_xa(hqq_dropout *dropout, float *xa, const void *x, int64_t ldx,
                     hqq_dtype dtype, const hqq_lora *lora, int64_t M, int64_t K);

/* dyb [M,R] fp32 = dy B */
hqq_gemm hqq_lora_dyb(float *dyb, const void *dy, int64_t lddy, hqq_dtype dtype,
                      const hqq_lora *lora, int64_t M, int64_t N);

/* dA [R,K] of lora->dtype = scaling * dyb^T drop(x) */
hqq_gemm hqq_lora_dA(hqq_dropout *dropout, void *dA, const float *dyb, const void *x,
                     int64_t ldx, hqq_dtype dtype, const hqq_lora *lora, int64_t M, int64_t K);

/* dB [N,R] of lora->dtype = scaling * dy^T xa */
hqq_gemm hqq_lora_dB(void *dB, const void *dy, int64_t lddy, hqq_dtype dtype, const float *xa,
                     const hqq_lora *lora, int64_t M, int64_t N);

/* Columns n_begin to n_end of bias + scaling * xa B^T, rounded once to out_dtype, row i at
 * out + i * ld_out. bias may be NULL; with lora NULL it is the bias alone. */
hqq_status hqq_lora_addend(void *out, int64_t ld_out, hqq_dtype out_dtype, const float *xa,
                           const void *bias, hqq_dtype bias_dtype, const hqq_lora *lora,
                           int64_t M, int64_t n_begin, int64_t n_end,
                           const hqq_context *context);

/* Rows n_begin to n_end of scaling * B xa^T [N,M], in fp32, row n - n_begin at
 * out + (n - n_begin) * ld_out: hqq_lora_addend without a bias, turned. */
hqq_status hqq_lora_addend_turned(float *out, int64_t ld_out, const float *xa,
                                  const hqq_lora *lora, int64_t M, int64_t n_begin,
                                  int64_t n_end, const hqq_context *context);

/* Columns k_begin to k_end of scaling * drop'(dyb A), rounded once to out_dtype, row i at
 * out + i * ld_out. */
hqq_status hqq_lora_dx_addend(void *out, int64_t ld_out, hqq_dtype out_dtype, const float *dyb,
                              const hqq_lora *lora, int64_t M, int64_t K, int64_t k_begin,
                              int64_t k_end, const hqq_context *context);

/* The same for the rows m_begin to m_end of it alone; out and dyb begin with row m_begin. */
hqq_status hqq_lora_dx_addend_rows(void *out, int64_t ld_out, hqq_dtype out_dtype,
                                   const float *dyb, const hqq_lora *lora, int64_t m_begin,
                                   int64_t m_end, int64_t K, int64_t k_begin, int64_t k_end,
                                   const hqq_context *context);

#endif

/*
 * Large M: a block of W is dequantized to x's dtype into workspace, a GEMM multiplies with it
 * while it is in cache, and then comes the next block. The whole dense W never exists.
 *
 *   forward   blocks of rows of W:     y [:, n0:n1]  = x W[n0:n1, :]^T
 *   dgrad     blocks of columns of W:  dx [:, k0:k1] = dy W[:, k0:k1]
 *
 * With bias or LoRA the block of y is first filled with them, rounded to y's dtype, and the
 * GEMM adds to it in fp32 and rounds again: while the block is still in cache, and without a
 * second matrix of y's size. It costs half a unit in the last place of the addend.
 */
#ifndef HQQ_KERNELS_CPU_BLOCKED_H
#define HQQ_KERNELS_CPU_BLOCKED_H

#include "backend.h"

/* Bytes of workspace; one size serves both directions. */
size_t hqq_blocked_workspace(const hqq_weight *weight, hqq_dtype dtype);

/* f->y. xa [M,R] = drop(x) A^T, NULL without LoRA; f->xa is not used. */
hqq_status hqq_blocked_linear(const hqq_forward *f, const float *xa, void *workspace,
                              const hqq_context *context);

/* b->dx alone. dyb [M,R] = dy B, NULL without LoRA. */
hqq_status hqq_blocked_dgrad(const hqq_backward *b, const float *dyb, void *workspace,
                             const hqq_context *context);

#endif

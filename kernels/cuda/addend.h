/*
 * What is added to a product with the frozen weight, element by element, in fp32:
 *
 *     addend[m,o] = bias[o] + scaling * factor(m,o) * sum_r left[m,r] * right(r,o)
 *
 * forward   o = n, left = xa [M,R], right(r,n) = B[n,r]
 * dgrad     o = k, left = dyb [M,R], right(r,k) = A[r,k], factor = dropout's (element m*K + k)
 */
#ifndef HQQ_KERNELS_CUDA_ADDEND_H
#define HQQ_KERNELS_CUDA_ADDEND_H

#include "dropout.h"
#include "dtype.h"

typedef struct hqq_addend {
    const void *bias; /* [O], or NULL */
    hqq_dtype bias_dtype;
    const float *left; /* [M,R] */
    int64_t rank;      /* 0: no adapter */
    const void *right; /* right(r,o) at r * right_rank_stride + o * right_output_stride */
    hqq_dtype right_dtype;
    int64_t right_rank_stride, right_output_stride;
    float scaling;
    int drops;                  /* whether factor is dropout's, else 1 */
    hqq_dropout_source dropout; /* element m * O + o */
} hqq_addend;

/* For one output; loads go straight to memory, in the order of r. */
HQQ_INLINE float hqq_addend_at(const hqq_addend *a, int64_t m, int64_t o, int64_t outputs)
{
    float sum = 0.0f;
    for (int64_t r = 0; r < a->rank; r++)
        sum += a->left[m * a->rank + r] *
               hqq_load(a->right, a->right_dtype,
                        r * a->right_rank_stride + o * a->right_output_stride);
    sum *= a->scaling;
    if (a->drops) {
        hqq_dropout dropout = hqq_dropout_read(&a->dropout);
        sum *= hqq_dropout_factor(&dropout, (uint64_t)(m * outputs + o));
    }
    return a->bias ? sum + hqq_load(a->bias, a->bias_dtype, o) : sum;
}

#endif

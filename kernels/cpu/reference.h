/* Every product in plain loops with sums in double: the yardstick of the tests, and what serves
 * empty weights. One thread, no workspace. */
#ifndef HQQ_KERNELS_CPU_REFERENCE_H
#define HQQ_KERNELS_CPU_REFERENCE_H

#include "reference_elements.h"

void hqq_reference_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                              const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                              int64_t column_begin, int64_t column_end);
void hqq_reference_forward(const hqq_forward *f);
void hqq_reference_backward(const hqq_backward *b);

#endif

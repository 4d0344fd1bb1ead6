/* Whether elements [begin, end) of W have a NaN or an infinity among them. */
#ifndef HQQ_KERNELS_CPU_NON_FINITE_H
#define HQQ_KERNELS_CPU_NON_FINITE_H

#include "isa.h"

HQQ_ISA_DECLARE(int, hqq_any_non_finite,
                (const void *W, hqq_dtype dtype, int64_t begin, int64_t end));

#endif

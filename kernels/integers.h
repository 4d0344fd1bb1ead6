/* The arithmetic of counts and sizes that C has no operator for. */
#ifndef HQQ_KERNELS_INTEGERS_H
#define HQQ_KERNELS_INTEGERS_H

#include <stdint.h>

static inline int64_t hqq_least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t hqq_most(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* a / b, rounded up; a >= 0, b > 0. */
static inline int64_t hqq_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* The length of the parts, in multiples of `unit`, when `count` is cut into equal ones of at
 * most `limit`. */
static inline int64_t hqq_even_part(int64_t count, int64_t limit, int64_t unit)
{
    int64_t parts = hqq_ceil_div(count, limit);
    return hqq_ceil_div(hqq_ceil_div(count, parts), unit) * unit;
}

#endif

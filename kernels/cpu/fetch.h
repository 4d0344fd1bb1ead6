/* What is wanted soon, on its way to the second cache. */
#ifndef HQQ_KERNELS_CPU_FETCH_H
#define HQQ_KERNELS_CPU_FETCH_H

#include "dtype.h"
#include "hqqlora.h"

/* Bytes [at, at + bytes) of data. */
static inline __attribute__((always_inline)) void hqq_fetch_bytes(const void *data, int64_t at,
                                                                  int64_t bytes)
{
    const char *from = (const char *)data + at, *end = from + bytes;
    for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
}

/* Axis 0: of the zeros and scales of a residue at some columns of W [N, K], the parts [part,
 * part + count) of `parts`. */
static inline void hqq_fetch_residue(const hqq_weight *w, int64_t residue, int64_t column,
                                     int64_t columns, int64_t part, int64_t count,
                                     int64_t parts)
{
    int64_t bytes = hqq_dtype_bytes(w->meta_dtype), all = columns * bytes;
    int64_t first = all * part / parts, last = all * (part + count) / parts;
    int64_t at = (residue * w->in_features + column) * bytes + first;
    hqq_fetch_bytes(w->zero, at, last - first);
    hqq_fetch_bytes(w->scale, at, last - first);
}

#endif

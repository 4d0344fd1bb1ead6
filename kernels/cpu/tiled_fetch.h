/*
 * What a tiled product decodes next, on its way to the second cache while the tiles multiply:
 * of each set a strip of its words, its zeros and its scales. No prefetcher of the processor
 * follows from strip to strip. Included by ISA sources only.
 */
#ifndef HQQ_KERNELS_CPU_TILED_FETCH_H
#define HQQ_KERNELS_CPU_TILED_FETCH_H

#include "code_runs.h"
#include "fetch.h"
#include "simd.h"
#include "tiled.h"

typedef struct hqq_strips {
    const hqq_tiled_job *job;
    int64_t set, set_end; /* set: the next one to fetch */
    int64_t column, columns;
    int64_t first;
    double groups; /* in an element: a division takes longer than what it is for */
} hqq_strips;

static inline hqq_strips hqq_strips_of(const hqq_tiled_job *job, int64_t set_begin,
                                       int64_t set_end, int64_t column, int64_t end)
{
    return (hqq_strips){
        job, set_begin, set_end, column, end - column, set_begin, 1.0 / (double)job->layout.G};
}

/* Bytes [first, last) of the codes of columns from `column` on of the rows that are `row` in
 * their slots. */
HQQ_ALWAYS_INLINE void hqq_fetch_codes(const hqq_tiled_job *job, int64_t row, int64_t column,
                                       int64_t first, int64_t last)
{
    const hqq_layout *l = &job->layout;
    if (l->planes) {
        hqq_plane_row planes = hqq_plane_row_of(job->weight->packed, l, row);
        hqq_fetch_bytes(planes.twos, column + first, last - first);
        hqq_fetch_bytes(planes.ones, column + first, last - first);
    } else {
        int64_t at = (row * l->K + column) * l->word_bytes + first;
        hqq_fetch_bytes(job->weight->packed, at, last - first);
    }
}

/* Fetches until `part` of `parts` are on their way. */
HQQ_ALWAYS_INLINE void hqq_fetch_part(hqq_strips *a, int64_t part, int64_t parts)
{
    const hqq_layout *l = &a->job->layout;
    const hqq_weight *w = a->job->weight;
    int64_t end = a->first + (a->set_end - a->first) * part / parts;
    int64_t meta = (int64_t)((double)a->columns * a->groups) * hqq_dtype_bytes(w->meta_dtype);
    for (; a->set < end; a->set++) {
        const hqq_row_sets *sets = &a->job->sets;
        int64_t row = a->job->by_cycle ? hqq_row_in_slot(sets, a->set) : a->set;
        int64_t word = row * l->K + a->column, bytes = hqq_dtype_bytes(w->meta_dtype);
        hqq_fetch_codes(a->job, row, a->column, 0, a->columns * l->word_bytes);
        if (a->job->by_cycle && a->set % sets->cycle > 0 && a->set > a->first)
            continue; /* those are there */
        if (l->axis == 0) {
            int64_t at = word % l->groups * bytes;
            hqq_fetch_bytes(w->zero, at, a->columns * bytes);
            hqq_fetch_bytes(w->scale, at, a->columns * bytes);
            continue;
        }
        for (int j = 0; j < l->per; j++) {
            int64_t at = (int64_t)((double)(word + j * l->words) * a->groups) * bytes;
            hqq_fetch_bytes(w->zero, at, meta);
            hqq_fetch_bytes(w->scale, at, meta);
        }
    }
}

#endif

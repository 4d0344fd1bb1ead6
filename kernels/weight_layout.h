/* The layout of a weight as its descriptor says it. */
#ifndef HQQ_KERNELS_WEIGHT_LAYOUT_H
#define HQQ_KERNELS_WEIGHT_LAYOUT_H

#include "format.h"
#include "hqqlora.h"

/* The same weight in hqq's own words, or in planes. */
HQQ_INLINE hqq_layout hqq_layout_packed_as(const hqq_weight *w, hqq_packing packing)
{
    hqq_layout l =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    return packing == HQQ_PACKING_PLANES ? hqq_layout_in_planes(l) : l;
}

/* Of what lies at w->packed. */
HQQ_INLINE hqq_layout hqq_stored_layout(const hqq_weight *w)
{
    return hqq_layout_packed_as(w, w->packing);
}

#endif

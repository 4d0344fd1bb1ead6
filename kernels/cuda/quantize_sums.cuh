/* The sums of one step of hqq's solver in torch's order (mean_order.h), one group a lane. Those
 * that take turns lie in shared memory, four a 16-byte unit: the order then costs half an
 * instruction a weight, and one loop serves all widths. */
#ifndef HQQ_KERNELS_CUDA_QUANTIZE_SUMS_CUH
#define HQQ_KERNELS_CUDA_QUANTIZE_SUMS_CUH

#include "cuda.cuh"
#include "mean_order.h"
#include "quantize_job.h"

/* A lane's sums in shared memory: level j of sum c is component c % 4 of
 * at[(j * quads + c / 4) * 32]. */
typedef struct hqq_sums {
    float4 *at;
    int quads;   /* width / 4, at least 1 */
    float chain; /* elements that are added one by one: sum 0, or at width 32 the rest */
} hqq_sums;

HQQ_DEVICE_INLINE void hqq_add_four(float4 *to, const float4 &four)
{
    float4 sum = *to;
    sum.x = sum.x + four.x;
    sum.y = sum.y + four.y;
    sum.z = sum.z + four.z;
    sum.w = sum.w + four.w;
    *to = sum;
}

HQQ_DEVICE_INLINE float4 *hqq_sums_level(const hqq_sums *s, int level)
{
    return s->at + level * s->quads * HQQ_TILE_LANES;
}

HQQ_DEVICE_INLINE void hqq_clear_level(const hqq_sums *s, int level)
{
#pragma unroll 1
    for (int c = 0; c < s->quads; c++) hqq_sums_level(s, level)[c * HQQ_TILE_LANES] = float4{};
}

/* Sum 0 is kept in a register where the order has no rest. */
HQQ_DEVICE_INLINE void hqq_put_chain(hqq_sums *s, const hqq_mean_order *o)
{
    if (o->unit == 1) s->at->x = s->chain;
}
HQQ_DEVICE_INLINE void hqq_get_chain(hqq_sums *s, const hqq_mean_order *o)
{
    if (o->unit == 1) s->chain = s->at->x;
}

/* Passes full levels on, when `rows` rows have been added. */
HQQ_DEVICE_INLINE void hqq_pass_on(hqq_sums *s, const hqq_mean_order *o, int64_t rows)
{
    if (o->width == 1) hqq_put_chain(s, o);
    for (int j = 1; j < HQQ_MEAN_LEVELS; j++) {
#pragma unroll 1
        for (int c = 0; c < s->quads * HQQ_TILE_LANES; c += HQQ_TILE_LANES)
            hqq_add_four(hqq_sums_level(s, j) + c, hqq_sums_level(s, j - 1)[c]);
        hqq_clear_level(s, j - 1);
        if (rows & o->level_mask << j * o->level_power) break;
    }
    if (o->width == 1) hqq_get_chain(s, o);
}

HQQ_DEVICE_INLINE void hqq_join_levels(hqq_sums *s, const hqq_mean_order *o)
{
    if (o->width == 1) hqq_put_chain(s, o);
    for (int j = 1; j < o->levels; j++)
#pragma unroll 1
        for (int c = 0; c < s->quads * HQQ_TILE_LANES; c += HQQ_TILE_LANES)
            hqq_add_four(s->at + c, hqq_sums_level(s, j)[c]);
    hqq_get_chain(s, o);
}

HQQ_DEVICE_INLINE float hqq_mean_of(hqq_sums *s, const hqq_mean_order *o, int64_t n)
{
    hqq_put_chain(s, o);
    float4 first = s->at[0];
    float sum = first.x;
    if (o->width == 4) sum = sum + first.y + first.z + first.w;
    if (o->unit == HQQ_MEAN_EIGHT) {
        sum = s->chain;
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            float4 *part = s->at + half * HQQ_TILE_LANES;
#pragma unroll 1
            for (int c = 2; c < s->quads; c += 2) hqq_add_four(part, part[c * HQQ_TILE_LANES]);
            sum = sum + part->x + part->y + part->z + part->w;
        }
    }
    return sum / static_cast<float>(n);
}

/* Elements from one on that are all added in the same way. */
typedef struct hqq_stretch {
    int64_t end;
    int in_rows;
    int wide; /* four sums at a time, of the 4 (mask + 1) in turn; otherwise to the chain */
    int mask;
} hqq_stretch;

HQQ_DEVICE_INLINE hqq_stretch hqq_stretch_from(int64_t i, const hqq_mean_order *o, int64_t n)
{
    hqq_stretch s;
    s.in_rows = i < o->rows_end;
    s.wide = s.in_rows ? o->width > 1 : i < o->units_end && o->unit > 1;
    s.mask = (s.in_rows ? o->width : o->unit) / 4 - 1;
    s.end = s.in_rows ? o->rows_end : s.wide ? o->units_end : n;
    if (s.in_rows && o->levels > 1) { /* up to where a level is full */
        int64_t full = (i | ((o->width << o->level_power) - 1)) + 1;
        if (full < s.end) s.end = full;
    }
    return s;
}

#endif

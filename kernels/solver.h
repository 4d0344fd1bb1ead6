/*
 * The quantizers' steps on one group, shared by the CPU (a lane is a vector: many groups side
 * by side) and CUDA (a lane is a float). Loops, sums over threads and memory belong to the
 * includer.
 *
 *     w = (q - zero) * scale,     q in 0 .. levels,     levels = 2^bits - 1
 *
 * Before this file the includer defines, for a lane and for masks of its comparisons:
 *     hqq_lane, hqq_lane_mask          + - * / and < <= == work on lanes, & | on masks
 *     hqq_lane hqq_lane_set(float)
 *     hqq_lane hqq_lane_min(a, b), hqq_lane_max(a, b)    b where a is NaN
 *     hqq_lane hqq_lane_abs(a)
 *     hqq_lane hqq_lane_select(mask, a, b)               mask ? a : b
 *     int      hqq_lane_any(mask)
 *     hqq_lane hqq_lane_round_to(a, hqq_dtype)           through a storage type and back
 *     HQQ_LANE_RINT(a)    where an instruction rounds, half to even (the sign of 0 is free)
 *     HQQ_LANE_OFF_INTEGER(a)    where one gives a - HQQ_LANE_RINT(a), which is exact
 *     HQQ_LANE_ADD_PRODUCT(sum, a, b)    where a fused one adds: for exact products
 * and compiles without contraction (-ffp-contract=off, nvcc -fmad=false): hqq's arithmetic has
 * no fused multiply-add, and so every processor computes the same bits.
 */
#ifndef HQQ_KERNELS_SOLVER_H
#define HQQ_KERNELS_SOLVER_H

#include "dtype.h"

/* Half to even, for |t| <= 2^22: adding 1.5 * 2^23 leaves no bits behind the point. */
HQQ_INLINE hqq_lane hqq_rint_small(hqq_lane t)
{
    const float magic = 12582912.0f;
    return (t + magic) - magic;
}

HQQ_INLINE hqq_lane hqq_rint(hqq_lane t)
{
    return hqq_lane_select(hqq_lane_abs(t) <= 4194304.0f, hqq_rint_small(t), t);
}

#ifndef HQQ_LANE_RINT
#define HQQ_LANE_RINT(t) hqq_rint_small(t)
#endif
#ifdef HQQ_LANE_ADD_PRODUCT
#define HQQ_ADD_PRODUCT_IS_ONE 1
#else
#define HQQ_ADD_PRODUCT_IS_ONE          0
#define HQQ_LANE_ADD_PRODUCT(sum, a, b) ((sum) + (a) * (b))
#endif
#ifdef HQQ_LANE_OFF_INTEGER
#define HQQ_OFF_INTEGER_IS_ONE 1
#else
#define HQQ_OFF_INTEGER_IS_ONE  0
#define HQQ_LANE_OFF_INTEGER(t) ((t) - HQQ_LANE_RINT(t))
#endif

/* Clipping before rounding gives the same as clipping last. */
HQQ_INLINE hqq_lane hqq_clip_to_codes(hqq_lane t, float levels)
{
    t = hqq_lane_max(t, hqq_lane_set(0.0f));
    return hqq_lane_min(t, hqq_lane_set(levels));
}

/* The code nearest to position t. */
HQQ_INLINE hqq_lane hqq_nearest_code(hqq_lane t, float levels)
{
    return HQQ_LANE_RINT(hqq_clip_to_codes(t, levels));
}

/* ---- storage ---------------------------------------------------------------------------- */

/* The positive numbers that a scale may be stored as. Below `smallest` fp32 and bf16 leave the
 * normal range, which some processors flush to zero; fp16 goes down to its subnormals, which
 * all of them widen to normal fp32. */
HQQ_INLINE float hqq_largest_scale(hqq_dtype dtype)
{
    return dtype == HQQ_F16 ? 65504.0f : dtype == HQQ_BF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

HQQ_INLINE float hqq_smallest_scale(hqq_dtype dtype)
{
    return dtype == HQQ_F16 ? 0x1p-24f : 0x1p-126f;
}

/* A group as stored: values of the storage type, held in fp32. */
typedef struct hqq_stored {
    hqq_lane scale, zero;
} hqq_stored;

/* A group all of whose elements are near m: one code stands for m exactly, up to the rounding
 * of the storage type. |m| itself is the scale where it can be, and zero 0 or 1; for a tiny m
 * the scale is 1e-4 and zero carries m. */
HQQ_INLINE hqq_stored hqq_store_flat(hqq_lane m, hqq_dtype dtype)
{
    hqq_lane size = hqq_lane_min(hqq_lane_abs(m), hqq_lane_set(hqq_largest_scale(dtype)));
    hqq_lane_mask tiny = size < (dtype == HQQ_F16 ? 0x1p-14f : 0x1p-126f);
    hqq_stored s;
    s.scale = hqq_lane_round_to(hqq_lane_select(tiny, hqq_lane_set(1e-4f), size), dtype);
    s.zero = hqq_lane_select(hqq_lane_set(0.0f) < m, hqq_lane_set(0.0f), hqq_lane_set(1.0f));
    s.zero = hqq_lane_select(tiny, hqq_lane_round_to(hqq_lane_set(0.0f) - m / s.scale, dtype),
                             s.zero);
    return s;
}

/* Rounds scale and zero to the storage type, zero after a correction that keeps the middle code
 * in its place under the rounded scale (which matters to groups far from zero alone: at an
 * offset of 150 spreads it takes 15 % off the squared error in bf16).
 * Whatever scale and zero are, NaN included, the result is finite and the scale above 0: a
 * scale outside the type's range is clamped and the codes centred on `middle`, of the group's
 * range; where rounding zero would shift the codes by more than half their number, or
 * overflow, the group is stored flat at `middle`. */
HQQ_INLINE hqq_stored hqq_store_group(hqq_lane scale, hqq_lane zero, hqq_lane_mask flat,
                                      hqq_lane middle, float levels, hqq_dtype dtype)
{
    hqq_lane clamped = hqq_lane_max(scale, hqq_lane_set(hqq_smallest_scale(dtype)));
    clamped = hqq_lane_min(clamped, hqq_lane_set(hqq_largest_scale(dtype)));
    zero = hqq_lane_select(clamped == scale, zero, levels * 0.5f - middle / clamped);
    hqq_stored s;
    s.scale = hqq_lane_round_to(clamped, dtype);
    zero = levels * 0.5f - (levels * 0.5f - zero) * (clamped / s.scale);
    s.zero = hqq_lane_round_to(zero, dtype);
    hqq_lane_mask near = hqq_lane_abs(s.zero - zero) <= levels * 0.5f; /* false for NaN */
    hqq_lane_mask keep = near & (flat == 0);
    if (hqq_lane_any(keep == 0)) {
        hqq_stored f = hqq_store_flat(middle, dtype);
        s.scale = hqq_lane_select(keep, s.scale, f.scale);
        s.zero = hqq_lane_select(keep, s.zero, f.zero);
    }
    return s;
}

/* ---- default solver: range search, then least squares ----------------------------------- */

/* Positions under the full range of a group: u = (w * factor - low) * inverse is in
 * [0, levels]. All that follows is done on u, so that neither the size of the weights nor their
 * offset from zero matters, and the candidates of the range search are plain constants. */
typedef struct hqq_units {
    hqq_lane factor;  /* 1, or a power of two that brings the group into fp32's middle */
    hqq_lane low;     /* smallest * factor */
    hqq_lane step;    /* (largest - smallest) * factor / levels; 1 for a flat group */
    hqq_lane inverse; /* 1 / step; 0 for a flat group: u is 0 */
    hqq_lane middle;  /* of the range */
    hqq_lane_mask flat;
} hqq_units;

/* A group is flat if its range is lost beside its offset: zero would be above 2^22, where fp32
 * does not resolve half a code. */
HQQ_INLINE hqq_units hqq_units_of(hqq_lane smallest, hqq_lane largest, float levels)
{
    hqq_units u;
    hqq_lane size = hqq_lane_max(hqq_lane_abs(smallest), hqq_lane_abs(largest));
    u.factor = hqq_lane_select(hqq_lane_set(0x1p60f) < size, hqq_lane_set(0x1p-64f),
                               hqq_lane_set(1.0f));
    u.factor = hqq_lane_select(size < 0x1p-60f, hqq_lane_set(0x1p84f), u.factor);
    u.low = smallest * u.factor;
    hqq_lane range = largest * u.factor - u.low;
    u.flat = range <= size * u.factor * (levels * 0x1p-22f);
    u.step = hqq_lane_select(u.flat, hqq_lane_set(1.0f), range / levels);
    u.inverse = hqq_lane_select(u.flat, hqq_lane_set(0.0f), 1.0f / u.step);
    u.middle = smallest * 0.5f + largest * 0.5f;
    return u;
}

HQQ_INLINE hqq_lane hqq_to_units(const hqq_units *u, hqq_lane w)
{
    return (w * u->factor - u->low) * u->inverse;
}

/* Codes are the nearest ones to u * slope + offset. */
typedef struct hqq_fit {
    hqq_lane slope, offset;
} hqq_fit;

/* The recipe: 8, 4 and 2 bits search the range and do 4 rounds of least squares; 3 and 1 bit
 * start from the full range and do 8. Weighted by importance, 3 bits do as 4 do: on SmolLM2
 * that takes 4 to 11 % off the divergence from the dense model, which it would add to
 * unweighted. */
HQQ_INLINE int hqq_searches_range(int nbits, int weighted)
{
    return nbits != 1 && (nbits != 3 || weighted);
}
HQQ_INLINE int hqq_least_squares_rounds(int nbits, int weighted)
{
    return hqq_searches_range(nbits, weighted) ? 4 : 8;
}

/* Candidate (i, j) of the range search: the lower end moved up by i and the upper one down by j
 * times 0.15 of a step, so t = (u - low) * slope. The same for every group. */
enum { HQQ_SEARCH = 4 };

typedef struct hqq_candidate {
    float low, slope;
    float weight; /* of the sum of |t - q|^3, to give the error of w */
} hqq_candidate;

HQQ_INLINE hqq_candidate hqq_candidate_at(int i, int j, float levels)
{
    hqq_candidate c;
    float shrunk = 1.0f - 0.15f * (float)(i + j) / levels;
    c.low = 0.15f * (float)i;
    c.slope = 1.0f / shrunk;
    c.weight = shrunk * shrunk * shrunk;
    return c;
}

/* Where some columns of the weight matter more (hqq_quantize_options.importance), an error in
 * an element counts by its share, of importance m in a group of n elements:
 *
 *     share = max(m / largest, 0.01 * sum of (m / largest) / n)
 *
 * At least one is 1 and none above, so that no sum overflows; the floor keeps a hundredth of
 * the whole for the elements beside a single one that counts, and so a line defined. Where all
 * are equal, 0 included, each is 1, and the results are those without importance, bit for bit.
 */
typedef struct hqq_importance {
    hqq_lane largest, floor;
} hqq_importance;

HQQ_INLINE hqq_lane hqq_share(const hqq_importance *i, hqq_lane m)
{
    hqq_lane_mask unused = i->largest < 0x1p-126f;
    hqq_lane share = hqq_lane_max(m / i->largest, i->floor);
    return hqq_lane_select(unused, hqq_lane_set(1.0f), share);
}

/* The floor from the sum of all m / largest. */
HQQ_INLINE hqq_lane hqq_share_floor(hqq_lane sum, float n)
{
    return sum / n * 0.01f;
}

/* t less its nearest code, but for the sign of 0. */
HQQ_INLINE hqq_lane hqq_off_code(hqq_lane t, float levels)
{
    if (!HQQ_OFF_INTEGER_IS_ONE) return t - hqq_nearest_code(t, levels);
    hqq_lane e = hqq_lane_max(HQQ_LANE_OFF_INTEGER(t), t - levels);
    return hqq_lane_min(e, t);
}

HQQ_INLINE hqq_lane hqq_cubed_error(hqq_lane t, float levels)
{
    hqq_lane e = hqq_off_code(t, levels);
    return e * e * hqq_lane_abs(e);
}

HQQ_INLINE hqq_lane hqq_weighted_cubed_error(hqq_lane t, hqq_lane share, float levels)
{
    hqq_lane e = hqq_off_code(t, levels);
    return e * e * (hqq_lane_abs(e) * share);
}

/* Whether a candidate may leave the codes by half a step or more. Its ends are 0.45 * slope
 * outside at most, 0.479 for 15 levels and less for more: then rounding alone finds the code,
 * and t - code is HQQ_LANE_OFF_INTEGER(t). */
HQQ_INLINE int hqq_search_clips(float levels)
{
    return levels < 15.0f;
}

/* What least squares needs of a group: with v = q - levels/2 and the residual r = t - q. Both
 * are small and centred, so that the sums lose nothing to cancellation. */
typedef struct hqq_moments {
    hqq_lane v, r, vv, vr;
} hqq_moments;

HQQ_INLINE hqq_moments hqq_moments_zero(void)
{
    hqq_lane zero = hqq_lane_set(0.0f);
    hqq_moments m = {zero, zero, zero, zero};
    return m;
}

HQQ_INLINE void hqq_moments_add(hqq_moments *m, hqq_lane t, float levels)
{
    hqq_lane q = hqq_nearest_code(t, levels);
    hqq_lane v = q - levels * 0.5f, r = t - q;
    m->v = m->v + v;
    m->r = m->r + r;
    m->vv = HQQ_LANE_ADD_PRODUCT(m->vv, v, v);
    m->vr = m->vr + v * r;
}

HQQ_INLINE void hqq_moments_add_weighted(hqq_moments *m, hqq_lane t, hqq_lane share,
                                         float levels)
{
    hqq_lane q = hqq_nearest_code(t, levels);
    hqq_lane v = q - levels * 0.5f, r = t - q, shared = share * v;
    m->v = m->v + shared;
    m->r = m->r + share * r;
    m->vv = m->vv + shared * v;
    m->vr = m->vr + shared * r;
}

HQQ_INLINE void hqq_moments_join(hqq_moments *total, const hqq_moments *part)
{
    total->v = total->v + part->v;
    total->r = total->r + part->r;
    total->vv = total->vv + part->vv;
    total->vr = total->vr + part->vr;
}

/* The least-squares line t = q + a v + b through n elements, or elements whose shares add up to
 * n, becomes the new fit, unless the codes hardly vary. */
HQQ_INLINE hqq_fit hqq_refit(hqq_fit fit, const hqq_moments *m, hqq_lane n, float levels)
{
    hqq_lane variance = m->vv * n - m->v * m->v;
    hqq_lane a = (m->vr * n - m->v * m->r) / variance;
    hqq_lane b = (m->r - a * m->v) / n;
    hqq_lane_mask good = (hqq_lane_set(1e-6f) * n * n < variance) & (hqq_lane_set(-0.999f) < a);
    hqq_lane slope = 1.0f / (a + 1.0f);
    hqq_fit next;
    next.slope = hqq_lane_select(good, fit.slope * slope, fit.slope);
    next.offset =
        hqq_lane_select(good, (fit.offset + a * (levels * 0.5f) - b) * slope, fit.offset);
    return next;
}

/* The stored scale and zero of a fit. */
HQQ_INLINE hqq_stored hqq_store_fit(const hqq_fit *fit, const hqq_units *u, float levels,
                                    hqq_dtype dtype)
{
    hqq_lane scale = u->step / fit->slope; /* times factor */
    hqq_lane zero = fit->offset - u->low / scale;
    return hqq_store_group(scale / u->factor, zero, u->flat, u->middle, levels, dtype);
}

/* Where the storage type does not reach a group's range, its units are too coarse for what can
 * be stored: they become w itself. 1 if that was so in any lane. */
HQQ_INLINE int hqq_units_unsaturate(hqq_units *u, const hqq_stored *s, hqq_dtype dtype)
{
    hqq_lane_mask saturated = s->scale == hqq_largest_scale(dtype);
    if (!hqq_lane_any(saturated)) return 0;
    hqq_lane one = hqq_lane_set(1.0f);
    u->factor = hqq_lane_select(saturated, one, u->factor);
    u->low = hqq_lane_select(saturated, hqq_lane_set(0.0f), u->low);
    u->step = hqq_lane_select(saturated, one, u->step);
    u->inverse = hqq_lane_select(saturated, one, u->inverse);
    return 1;
}

/* The fit that chooses the nearest codes of a stored scale and zero. */
HQQ_INLINE hqq_fit hqq_fit_of(const hqq_stored *s, const hqq_units *u)
{
    hqq_lane scale = s->scale * u->factor;
    hqq_fit fit;
    fit.slope = u->step / scale;
    fit.offset = u->low / scale + s->zero;
    return fit;
}

#endif

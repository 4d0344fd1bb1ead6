/* The steps of hqq's own solver on one group, on the lanes of solver.h. */
#ifndef HQQ_KERNELS_SOLVER_HQQ_H
#define HQQ_KERNELS_SOLVER_HQQ_H

#include "solver.h"

/* hqq works with the inverse of the scale: q = rint(w * multiplier + zero), w = (q - zero) /
 * multiplier; the scale is inverted at the end. Its order of operations is kept throughout. */
typedef struct hqq_half_quadratic {
    hqq_lane multiplier, zero;
} hqq_half_quadratic;

HQQ_INLINE hqq_half_quadratic hqq_half_quadratic_start(hqq_lane smallest, hqq_lane largest,
                                                       float levels, int round_zero)
{
    hqq_half_quadratic h;
    hqq_lane range = largest - smallest;
    h.multiplier = (1.0f / range) * levels; /* torch divides a number by a tensor like this */
    h.multiplier =
        hqq_lane_select(hqq_lane_abs(range) <= 1e-4f, hqq_lane_set(1.0f), h.multiplier);
    h.multiplier = hqq_lane_min(h.multiplier, hqq_lane_set(2e4f));
    h.zero = (hqq_lane_set(0.0f) - smallest) * h.multiplier;
    if (round_zero) h.zero = hqq_rint(h.zero);
    return h;
}

/* sign(e) * max(|e| - |e|^(p-1) / beta, 0), given power = |e|^(p-1) (p = 1: given 1). */
HQQ_INLINE hqq_lane hqq_shrink(hqq_lane e, hqq_lane power, float inverse_beta)
{
    hqq_lane size = hqq_lane_abs(e) - power * inverse_beta;
    size = hqq_lane_max(size, hqq_lane_set(0.0f));
    return hqq_lane_select(e < 0.0f, hqq_lane_set(0.0f) - size, size);
}

/* x^y for positive normal x, correct to the last bit but for rare halves: log2 by its series in
 * (m - 1) / (m + 1), exp2 by Taylor's, each to 1e-11, in double, free of tables and branches.
 */
HQQ_WRAPS HQQ_INLINE float hqq_power(float x, float y)
{
    uint32_t bits = hqq_float_to_bits(x);
    int32_t exponent =
        (int32_t)(bits - 0x3f3504f3u) >> 23; /* mantissa m in [sqrt 1/2, sqrt 2) */
    double m = (double)hqq_bits_to_float(bits - ((uint32_t)exponent << 23));
    double s = (m - 1.0) / (m + 1.0), s2 = s * s;
    double series = 1.0 / 15;
    series = series * s2 + 1.0 / 13;
    series = series * s2 + 1.0 / 11;
    series = series * s2 + 1.0 / 9;
    series = series * s2 + 1.0 / 7;
    series = series * s2 + 1.0 / 5;
    series = series * s2 + 1.0 / 3;
    series = series * s2 + 1.0;
    double log2 = (double)exponent + 2.8853900817779268 * s * series; /* 2 / ln 2 */
    double product = log2 * (double)y;
    float rounded = ((float)product + 12582912.0f) - 12582912.0f;
    double f = (product - (double)rounded) * 0.69314718055994531;
    double power = 1.0 / 3628800;
    power = power * f + 1.0 / 362880;
    power = power * f + 1.0 / 40320;
    power = power * f + 1.0 / 5040;
    power = power * f + 1.0 / 720;
    power = power * f + 1.0 / 120;
    power = power * f + 1.0 / 24;
    power = power * f + 1.0 / 6;
    power = power * f + 0.5;
    power = power * f + 1.0;
    power = power * f + 1.0;
    rounded = rounded < -126.0f ? -126.0f : rounded;
    rounded = rounded > 127.0f ? 127.0f : rounded;
    return (float)power * hqq_bits_to_float((uint32_t)((int32_t)rounded + 127) << 23);
}

/* Up to this |e| the shrunk error is 0 for sure: |e|^(2-p) * beta < 1, less a little for the
 * rounding of pow. */
HQQ_INLINE float hqq_shrink_threshold(float lp_norm, float inverse_beta)
{
    return 0.999f * powf(inverse_beta, 1.0f / (2.0f - lp_norm));
}

/* The threshold for errors that were computed with the inverse of the multiplier instead of a
 * division: they are off by up to 2^-20 of the group's largest weight. */
HQQ_INLINE hqq_lane hqq_quick_threshold(float threshold, hqq_lane smallest, hqq_lane largest)
{
    hqq_lane size = hqq_lane_max(hqq_lane_abs(smallest), hqq_lane_abs(largest));
    return threshold - size * 0x1p-19f;
}

/* What hqq stores; where that is not finite or its scale 0 (which hqq lets pass), what
 * hqq_store_group makes of it. *h becomes what the codes are to be chosen with: as in hqq the
 * unrounded values, but for those groups the stored ones. */
HQQ_INLINE hqq_stored hqq_store_half_quadratic(hqq_half_quadratic *h, hqq_lane middle,
                                               float levels, hqq_dtype dtype)
{
    hqq_lane scale = 1.0f / h->multiplier;
    hqq_stored s;
    s.scale = hqq_lane_round_to(scale, dtype);
    s.zero = hqq_lane_round_to(h->zero, dtype);
    float largest = hqq_largest_scale(dtype);
    hqq_lane_mask good = (hqq_lane_set(0.0f) < s.scale) & (s.scale <= largest) &
                         (hqq_lane_abs(s.zero) <= largest);
    if (hqq_lane_any(good == 0)) {
        hqq_stored g =
            hqq_store_group(scale, h->zero, good & (good == 0), middle, levels, dtype);
        s.scale = hqq_lane_select(good, s.scale, g.scale);
        s.zero = hqq_lane_select(good, s.zero, g.zero);
        h->multiplier = hqq_lane_select(good, h->multiplier, 1.0f / s.scale);
        h->zero = hqq_lane_select(good, h->zero, s.zero);
    }
    return s;
}

#endif

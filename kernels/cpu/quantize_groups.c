/*
 * The default solver on tiles of HQQ_LANES groups; kernels/solver.h says what each step does.
 *
 * Why this one: on SmolLM2 and MiniLM it makes better models than hqq's solver (4 bits: 15 to
 * 18 % less divergence from the dense model), and ranking by the sum of |e|^3 follows model
 * quality where the squared error misleads. 8 bits profit from the search as well (6 % of the
 * squared error); at 1 bit, two levels, least squares alone has settled after 8 rounds.
 *
 * Work on 16 weights with AVX-512, two operations a cycle: 16 candidates x 10 operations + 4
 * rounds of least squares x 14 + 25 to load, convert and store = 240 operations, 120 cycles,
 * 7.5 a weight; at 2.9 GHz 390 M weights/s a thread, of which 310 are attained. A tile of 64
 * steps is 4 KB and never leaves L1; memory moves 4 bytes a weight once more than needed (the
 * check for NaN), 2 GB/s of what a core can do.
 */
#include "quantize_store.h"

/* The candidates (i, 0) to (i, 3) of the range search in one pass. */
HQQ_ALWAYS_INLINE void search_row(hqq_tile *t, int i, float levels, int clips, hqq_lane *best,
                                  hqq_fit *fit)
{
    hqq_lane zero = hqq_lane_set(0.0f);
    hqq_lane sum[HQQ_SEARCH], total[HQQ_SEARCH], slope[HQQ_SEARCH];
    for (int j = 0; j < HQQ_SEARCH; j++) {
        sum[j] = total[j] = zero;
        slope[j] = hqq_lane_set(hqq_candidate_at(i, j, levels).slope);
    }
    hqq_lane low = hqq_lane_set(hqq_candidate_at(i, 0, levels).low);
    HQQ_TILE_PASS(
        t, w -= low;
        for (int j = 0; j < HQQ_SEARCH; j++) sum[j] +=
        clips ? hqq_cubed_error(w * slope[j], levels) : hqq_cubed_error_inside(w * slope[j]),
        for (int j = 0; j < HQQ_SEARCH; j++) {
            total[j] += sum[j];
            sum[j] = zero;
        })
    for (int j = 0; j < HQQ_SEARCH; j++) {
        hqq_lane error = total[j] * hqq_candidate_at(i, j, levels).weight;
        hqq_lane_mask better = error < *best;
        *best = hqq_lane_select(better, error, *best);
        fit->slope = hqq_lane_select(better, slope[j], fit->slope);
        fit->offset = hqq_lane_select(better, zero - low * slope[j], fit->offset);
    }
}

static hqq_fit search_range(hqq_tile *t, float levels)
{
    hqq_lane best = hqq_lane_set(INFINITY);
    hqq_fit fit = {hqq_lane_set(1.0f), hqq_lane_set(0.0f)};
    if (hqq_search_clips(levels))
        for (int i = 0; i < HQQ_SEARCH; i++) search_row(t, i, levels, 1, &best, &fit);
    else
        for (int i = 0; i < HQQ_SEARCH; i++) search_row(t, i, levels, 0, &best, &fit);
    return fit;
}

static hqq_fit least_squares(hqq_tile *t, hqq_fit fit, float levels)
{
    hqq_moments run = hqq_moments_zero(), total = run;
    HQQ_TILE_PASS(t, hqq_moments_add(&run, w * fit.slope + fit.offset, levels),
                  hqq_moments_join(&total, &run);
                  run = hqq_moments_zero())
    return hqq_refit(fit, &total, (float)t->job->layout.G, levels);
}

static void solve_default(hqq_tile *t, void *data)
{
    (void)data;
    int nbits = t->job->layout.nbits;
    float levels = (float)hqq_max_code(nbits);
    hqq_lane smallest, largest;
    hqq_tile_range(t, &smallest, &largest);
    hqq_units units = hqq_units_of(smallest, largest, levels);
    hqq_tile_set_units(t, &units);
    hqq_fit fit = {hqq_lane_set(1.0f), hqq_lane_set(0.0f)};
    if (hqq_lane_any(units.flat == 0)) {
        if (hqq_searches_range(nbits)) fit = search_range(t, levels);
        for (int round = 0; round < hqq_least_squares_rounds(nbits); round++)
            fit = least_squares(t, fit, levels);
    }
    hqq_stored stored = hqq_store_fit(&fit, &units, levels, t->job->meta_dtype);
    hqq_tile_store_meta(t, &stored);
    if (hqq_units_unsaturate(&units, &stored, t->job->meta_dtype)) hqq_tile_forget(t);
    hqq_tile_store_codes(t, hqq_fit_of(&stored, &units), levels);
}

void HQQ_ISA_NAME(hqq_quantize_default)(const hqq_quantize_job *job, int64_t begin, int64_t end,
                                        void *scratch)
{
    hqq_for_each_tile(job, begin, end, scratch, solve_default, NULL);
}

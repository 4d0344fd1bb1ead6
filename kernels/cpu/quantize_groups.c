/*
 * The default solver on tiles of HQQ_LANES groups; kernels/solver.h says what each step does.
 *
 * Why this one: on SmolLM2 and MiniLM it makes better models than hqq's solver (4 bits: 15 to
 * 18 % less divergence from the dense model), and ranking by the sum of |e|^3 follows model
 * quality where the squared error misleads. 8 bits profit from the search as well (6 % of the
 * squared error); at 1 bit, two levels, least squares alone has settled after 8 rounds.
 *
 * Work on 16 weights with AVX-512, two operations a cycle: 16 candidates x 6 operations and 4
 * for the ends, 4 rounds of least squares x 13, 22 to load, convert and store: 174 operations,
 * 87 cycles, 5.4 a weight. A Xeon at 2.5 GHz needs 1.3 to 1.4 times that, as its two vector
 * units are seldom both busy. A tile of 64 steps is 4 KB and never leaves L1; memory moves each
 * weight once more than needed (the check for NaN).
 */
#include "quantize_store.h"

/* Candidates in a pass: as many sums and slopes as there are registers for. */
enum { AT_ONCE = HQQ_LANES == 16 ? 2 * HQQ_SEARCH : HQQ_SEARCH };

HQQ_ALWAYS_INLINE hqq_lane cubed_error(hqq_lane t, float levels, int clips)
{
    return clips ? hqq_cubed_error(t, levels) : hqq_cubed_error_inside(t);
}

/* AT_ONCE candidates of the range search in one pass: from (first, 0) on, row by row. */
HQQ_ALWAYS_INLINE void search_rows(hqq_tile *t, int first, float levels, int clips,
                                   hqq_lane *best, hqq_fit *fit)
{
    hqq_lane zero = hqq_lane_set(0.0f);
    hqq_lane sum[AT_ONCE], total[AT_ONCE], slope[AT_ONCE], low[AT_ONCE];
    float weight[AT_ONCE];
    for (int c = 0; c < AT_ONCE; c++) {
        hqq_candidate candidate =
            hqq_candidate_at(first + c / HQQ_SEARCH, c % HQQ_SEARCH, levels);
        sum[c] = total[c] = zero;
        slope[c] = hqq_lane_set(candidate.slope);
        low[c] = hqq_lane_set(candidate.low);
        weight[c] = candidate.weight;
    }
    HQQ_TILE_PASS(
        t,
        for (int c = 0; c < AT_ONCE; c++) sum[c] +=
        cubed_error((w - low[c]) * slope[c], levels, clips),
        for (int c = 0; c < AT_ONCE; c++) {
            total[c] += sum[c];
            sum[c] = zero;
        })
    for (int c = 0; c < AT_ONCE; c++) {
        hqq_lane error = total[c] * weight[c];
        hqq_lane_mask better = error < *best;
        *best = hqq_lane_select(better, error, *best);
        fit->slope = hqq_lane_select(better, slope[c], fit->slope);
        fit->offset = hqq_lane_select(better, zero - low[c] * slope[c], fit->offset);
    }
}

static hqq_fit search_range(hqq_tile *t, float levels)
{
    hqq_lane best = hqq_lane_set(INFINITY);
    hqq_fit fit = {hqq_lane_set(1.0f), hqq_lane_set(0.0f)};
    int clips = hqq_search_clips(levels);
    for (int i = 0; i < HQQ_SEARCH; i += AT_ONCE / HQQ_SEARCH) {
        if (clips)
            search_rows(t, i, levels, 1, &best, &fit);
        else
            search_rows(t, i, levels, 0, &best, &fit);
    }
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

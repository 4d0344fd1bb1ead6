/*
 * The default solver on tiles of HQQ_LANES groups; kernels/solver.h says what each step does.
 *
 * Why this one: on SmolLM2 and MiniLM it makes better models than hqq's solver (4 bits: 15 to
 * 18 % less divergence from the dense model), and ranking by the sum of |e|^3 follows model
 * quality where the squared error misleads. 8 bits profit from the search as well (6 % of the
 * squared error); at 1 bit, two levels, least squares alone has settled after 8 rounds.
 *
 * Work on 16 weights with AVX-512, two operations a cycle: 16 candidates x 5 operations and 4
 * for the ends, 4 rounds of least squares x 13, 22 to load, convert and store: 158 operations,
 * 79 cycles, 4.9 a weight. On a Xeon the search attains that, and all takes 100 cycles. A tile
 * of 64 steps is 4 KB and never leaves L1; memory moves each weight once more than needed (the
 * check for NaN). Weighted by importance, a candidate takes one operation more and a round
 * three, and the shares are loaded, for all slots of a word at once: 1.1 to 1.4 times the
 * cycles, at 3 bits, which then search, 1.75.
 */
#include "quantize_shares.h"
#include "quantize_store.h"

/* Candidates in a pass: as many sums and slopes as there are registers for. */
enum { AT_ONCE = HQQ_LANES == 16 ? 2 * HQQ_SEARCH : HQQ_SEARCH };

typedef struct range_search {
    float levels;
    int clips;               /* hqq_search_clips(levels) */
    int fused;               /* whether products are added by one operation, rounded once */
    hqq_tile_shares *shares; /* NULL: all 1 */
    hqq_lane least, second;  /* errors */
    hqq_fit fit;             /* of the least */
} range_search;

/* share: NULL for 1 */
HQQ_ALWAYS_INLINE hqq_lane add_cubed_error(hqq_lane sum, hqq_lane t, const hqq_lane *share,
                                           const range_search *s)
{
    hqq_lane e = s->clips ? hqq_off_code(t, s->levels) : HQQ_LANE_OFF_INTEGER(t);
    hqq_lane square = e * e, size = hqq_lane_abs(e);
    if (share) size = size * *share;
    return s->fused ? HQQ_LANE_ADD_PRODUCT(sum, square, size) : sum + square * size;
}

/* AT_ONCE candidates in one pass: from (first, 0) on, row by row. */
HQQ_ALWAYS_INLINE void search_rows(hqq_tile *t, int first, range_search *s)
{
    hqq_lane zero = hqq_lane_set(0.0f);
    hqq_lane sum[AT_ONCE], total[AT_ONCE], slope[AT_ONCE], low[AT_ONCE];
    float weight[AT_ONCE];
    for (int c = 0; c < AT_ONCE; c++) {
        hqq_candidate candidate =
            hqq_candidate_at(first + c / HQQ_SEARCH, c % HQQ_SEARCH, s->levels);
        sum[c] = total[c] = zero;
        slope[c] = hqq_lane_set(candidate.slope);
        low[c] = hqq_lane_set(candidate.low);
        weight[c] = candidate.weight;
    }
#define JOIN_RUN                        \
    for (int c = 0; c < AT_ONCE; c++) { \
        total[c] += sum[c];             \
        sum[c] = zero;                  \
    }
    if (s->shares)
        HQQ_WEIGHTED_PASS(t, s->shares,
                          for (int c = 0; c < AT_ONCE; c++) sum[c] =
                              add_cubed_error(sum[c], (w - low[c]) * slope[c], &share, s),
                          JOIN_RUN)
    else
        HQQ_TILE_PASS(t,
                      for (int c = 0; c < AT_ONCE; c++) sum[c] =
                          add_cubed_error(sum[c], (w - low[c]) * slope[c], NULL, s),
                      JOIN_RUN)
    for (int c = 0; c < AT_ONCE; c++) {
        hqq_lane error = total[c] * weight[c];
        hqq_lane_mask better = error < s->least;
        s->second = hqq_lane_min(hqq_lane_max(error, s->least), s->second);
        s->least = hqq_lane_min(error, s->least);
        s->fit.slope = hqq_lane_select(better, slope[c], s->fit.slope);
        s->fit.offset = hqq_lane_select(better, zero - low[c] * slope[c], s->fit.offset);
    }
}

HQQ_ALWAYS_INLINE range_search search_all(hqq_tile *t, hqq_tile_shares *shares, float levels,
                                          int clips, int fused)
{
    range_search s = {.levels = levels,
                      .clips = clips,
                      .fused = fused,
                      .shares = shares,
                      .least = hqq_lane_set(INFINITY),
                      .second = hqq_lane_set(INFINITY),
                      .fit = {hqq_lane_set(1.0f), hqq_lane_set(0.0f)}};
    for (int i = 0; i < HQQ_SEARCH; i += AT_ONCE / HQQ_SEARCH) search_rows(t, i, &s);
    return s;
}

/* Whether sums of n terms that are rounded otherwise may have another least one: each is off by
 * n / 2^24 of itself and a few roundings at most, and so are the others. A group of 64 is about
 * once in 10,000. */
static int is_close(const range_search *s, hqq_lane_mask flat, int64_t G)
{
    int64_t roundings = (G < HQQ_TILE_RUN ? G : HQQ_TILE_RUN) + G / HQQ_TILE_RUN + 8;
    hqq_lane beyond = s->least * (1.0f + 5.0f * (float)roundings * 0x1p-24f);
    return hqq_lane_any((s->second <= beyond) & (flat == 0));
}

/* Products in one operation save one in six; where that might decide, all is done again. */
HQQ_ALWAYS_INLINE hqq_fit search_range(hqq_tile *t, hqq_tile_shares *shares, hqq_lane_mask flat,
                                       float levels, int clips)
{
    if (HQQ_ADD_PRODUCT_IS_ONE) {
        range_search quick = search_all(t, shares, levels, clips, 1);
        if (__builtin_expect(!is_close(&quick, flat, t->job->layout.G), 1)) return quick.fit;
    }
    return search_all(t, shares, levels, clips, 0).fit;
}

/* shares: NULL for 1 */
HQQ_ALWAYS_INLINE hqq_fit least_squares(hqq_tile *t, hqq_tile_shares *shares, hqq_fit fit,
                                        float levels)
{
    hqq_moments run = hqq_moments_zero(), total = run;
    hqq_lane n = shares ? shares->total : hqq_lane_set((float)t->job->layout.G);
    if (shares)
        HQQ_WEIGHTED_PASS(
            t, shares,
            hqq_moments_add_weighted(&run, w * fit.slope + fit.offset, share, levels),
            hqq_moments_join(&total, &run);
            run = hqq_moments_zero())
    else
        HQQ_TILE_PASS(t, hqq_moments_add(&run, w * fit.slope + fit.offset, levels),
                      hqq_moments_join(&total, &run);
                      run = hqq_moments_zero())
    return hqq_refit(fit, &total, n, levels);
}

static void store_solution(hqq_tile *t, const hqq_fit *fit, hqq_units *units, float levels)
{
    hqq_stored stored = hqq_store_fit(fit, units, levels, t->job->meta_dtype);
    hqq_tile_store_meta(t, &stored);
    if (hqq_units_unsaturate(units, &stored, t->job->meta_dtype)) hqq_tile_forget(t);
    hqq_tile_store_codes(t, hqq_fit_of(&stored, units), levels);
}

/* The shares of tile k, which may be those of an earlier one. */
static hqq_tile_shares *shares_of(hqq_tile_shares *shares, const hqq_tile *tiles, int k)
{
    int64_t column = hqq_first_column(&tiles[k]);
    for (int i = 0; i < k; i++)
        if (shares[i].column == column) return &shares[i];
    hqq_shares_of(&shares[k], &tiles[k]);
    return &shares[k];
}

/* Groups whose elements all count the same become what they are without importance, where that
 * begins otherwise. */
static void solve_even(hqq_tile *t, hqq_tile_shares *shares, hqq_fit *fit, float levels)
{
    int nbits = t->job->layout.nbits;
    hqq_lane_mask even = shares->total == (float)t->job->layout.G;
    if (hqq_searches_range(nbits, 0) == hqq_searches_range(nbits, 1) || !hqq_lane_any(even))
        return;
    hqq_fit own = {hqq_lane_set(1.0f), hqq_lane_set(0.0f)};
    for (int round = 0; round < hqq_least_squares_rounds(nbits, 0); round++)
        own = least_squares(t, shares, own, levels);
    fit->slope = hqq_lane_select(even, own.slope, fit->slope);
    fit->offset = hqq_lane_select(even, own.offset, fit->offset);
}

/* shares [HQQ_TILES_MOST], or NULL: all are 1 */
HQQ_ALWAYS_INLINE void solve(hqq_tile *tiles, int count, hqq_tile_shares *shares)
{
    int nbits = tiles->job->layout.nbits, any = 0;
    int rounds = hqq_least_squares_rounds(nbits, shares != NULL);
    float levels = (float)hqq_max_code(nbits);
    hqq_units units[HQQ_TILES_MOST];
    hqq_fit fits[HQQ_TILES_MOST];
    hqq_tile_shares *own[HQQ_TILES_MOST];
    for (int k = 0; k < count; k++) {
        hqq_lane smallest, largest;
        hqq_tile_range(&tiles[k], &smallest, &largest);
        units[k] = hqq_units_of(smallest, largest, levels);
        hqq_tile_set_units(&tiles[k], &units[k]);
        fits[k] = (hqq_fit){hqq_lane_set(1.0f), hqq_lane_set(0.0f)};
        own[k] = shares ? shares_of(shares, tiles, k) : NULL;
        if (!hqq_lane_any(units[k].flat == 0)) continue;
        any = 1;
        if (hqq_searches_range(nbits, shares != NULL))
            fits[k] =
                hqq_search_clips(levels)
                    ? search_range(&tiles[k], shares ? own[k] : NULL, units[k].flat, levels, 1)
                    : search_range(&tiles[k], shares ? own[k] : NULL, units[k].flat, levels, 0);
    }
    for (int round = 0; any && round < rounds; round++)
        for (int k = 0; k < count; k++)
            fits[k] = least_squares(&tiles[k], shares ? own[k] : NULL, fits[k], levels);
    for (int k = 0; any && shares && k < count; k++)
        solve_even(&tiles[k], own[k], &fits[k], levels);
    for (int k = 0; k < count; k++) store_solution(&tiles[k], &fits[k], &units[k], levels);
}

static void solve_default(hqq_tile *tiles, int count, void *data)
{
    (void)data;
    solve(tiles, count, NULL);
}

static void solve_weighted(hqq_tile *tiles, int count, void *data)
{
    solve(tiles, count, data);
}

void HQQ_ISA_NAME(hqq_quantize_default)(const hqq_quantize_job *job, int64_t begin, int64_t end,
                                        void *scratch)
{
    if (!job->importance) {
        hqq_for_each_tile(job, begin, end, scratch, solve_default, NULL);
        return;
    }
    const hqq_layout *l = &job->layout;
    int64_t steps = l->G < HQQ_TILE_STEPS ? l->G : HQQ_TILE_STEPS, most = hqq_tiles_at_once(l);
    hqq_tile_shares shares[HQQ_TILES_MOST];
    for (int k = 0; k < most; k++) {
        shares[k].column = -1;
        shares[k].values = (float *)scratch + (most + k) * steps * HQQ_LANES;
    }
    hqq_for_each_tile(job, begin, end, scratch, solve_weighted, shares);
}

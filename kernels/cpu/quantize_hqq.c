/*
 * hqq's own solver on tiles of HQQ_LANES groups: what hqq 0.2.8 computes in fp32 on a CPU
 * (optimize_weights_proximal_legacy), operation by operation, the order of sums
 * (mean_order.h) included.
 *
 * Cycles of a step on 16 weights: 10 for the one division (with AVX-512), the other 16
 * operations beside it. Most tiles of 64 steps come to a fixed point of zero after 7 to 11
 * steps, which ends them: 6 cycles a weight in steps, 160 to 260 M weights/s a thread. The
 * division and the sum of errors are there for the stop and fall away without it.
 */
#include "mean_order.h"
#include "quantize_store.h"
#include "solver_hqq.h"

typedef struct mean_sums {
    hqq_lane level[HQQ_MEAN_LEVELS][HQQ_MEAN_WIDEST];
    hqq_lane rest;
} mean_sums;

/* Passes full levels on, when `rows` rows have been added. */
static void pass_on(mean_sums *s, const hqq_mean_order *o, int64_t rows)
{
    if (o->levels == 1 || rows & o->level_mask) return;
    for (int j = 1; j < HQQ_MEAN_LEVELS; j++) {
        for (int c = 0; c < o->width; c++) {
            s->level[j][c] += s->level[j - 1][c];
            s->level[j - 1][c] = hqq_lane_set(0.0f);
        }
        if (rows & o->level_mask << j * o->level_power) break;
    }
}

static void join_levels(mean_sums *s, const hqq_mean_order *o)
{
    for (int c = 0; c < o->width; c++)
        for (int j = 1; j < o->levels; j++) s->level[0][c] += s->level[j][c];
}

static hqq_lane mean_of(const mean_sums *s, const hqq_mean_order *o, int64_t n)
{
    hqq_lane sum = s->rest;
    for (int first = 0; first < o->unit; first++) {
        hqq_lane part = s->level[0][first];
        for (int c = first + o->unit; c < o->used; c += o->unit) part += s->level[0][c];
        sum = o->unit == 1 ? part : sum + part;
    }
    return sum / (float)n;
}

/* One step of hqq, with everything that is constant in it. */
typedef struct hqq_step {
    hqq_lane multiplier, zero;
    hqq_lane error;     /* sum of |w - w'| */
    hqq_lane threshold; /* up to which hqq_shrink gives 0 for sure */
    float levels, lp_norm, inverse_beta;
    int want_error;
} hqq_step;

static hqq_lane shrunk(const hqq_step *s, hqq_lane e)
{
    if (s->lp_norm == 1.0f) return hqq_shrink(e, hqq_lane_set(1.0f), s->inverse_beta);
    float power[HQQ_LANES], exponent = (float)((double)s->lp_norm - 1.0);
    hqq_vec_store(power, hqq_lane_abs(e));
    for (int lane = 0; lane < HQQ_LANES; lane++) power[lane] = hqq_power(power[lane], exponent);
    return hqq_shrink(e, hqq_vec_load(power), s->inverse_beta);
}

/* sums[i * stride] += q - (w - shrunk error) * multiplier, for n values. Where the error is not
 * wanted a product replaces the division by the multiplier: it only has to tell whether any
 * error may be above the threshold. */
static inline void add_terms(hqq_step *s, const float *values, int64_t n, hqq_lane *sums,
                             int stride, int want_error)
{
    hqq_lane multiplier = s->multiplier, zero = s->zero, error = s->error;
    hqq_lane inverse = 1.0f / multiplier, threshold = s->threshold;
    for (int64_t i = 0; i < n; i++, values += HQQ_LANES) {
        hqq_lane w = hqq_vec_load(values);
        hqq_lane scaled = w * multiplier;
        hqq_lane q = hqq_nearest_code(scaled + zero, s->levels);
        hqq_lane e = want_error ? w - (q - zero) / multiplier : w - (q - zero) * inverse;
        hqq_lane size = hqq_lane_abs(e);
        if (want_error) error += size;
        if (__builtin_expect(hqq_lane_any_above(size, threshold), 0))
            scaled = (w - shrunk(s, w - (q - zero) / multiplier)) * multiplier;
        sums[i * stride] += q - scaled;
    }
    s->error = error;
}

/* The mean of the terms of one step: the next zero. */
static hqq_lane next_zero(hqq_tile *t, hqq_step *s, const hqq_mean_order *o)
{
    mean_sums sums;
    sums.rest = hqq_lane_set(0.0f);
    for (int j = 0; j < o->levels; j++)
        for (int c = 0; c < o->used; c++) sums.level[j][c] = hqq_lane_set(0.0f);
    int64_t G = t->job->layout.G, length;
    for (int64_t run = 0; run < G; run += HQQ_TILE_RUN) {
        const float *values = hqq_tile_at(t, run);
        int64_t end = run + HQQ_TILE_RUN < G ? run + HQQ_TILE_RUN : G;
        for (int64_t i = run; i < end; i += length) {
            int in_rows = i < o->rows_end, in_units = i < o->units_end;
            int64_t limit = in_rows ? o->rows_end : in_units ? o->units_end : G;
            hqq_lane *to = in_units ? sums.level[0] : &sums.rest;
            length = in_rows ? o->chunk : in_units ? o->unit : G;
            if (limit > end) limit = end;
            if (length > limit - i) length = limit - i;
            int stride = in_units && (!in_rows || o->width > 1);
            const float *from = values + (i - run) * HQQ_LANES;
            if (s->want_error)
                add_terms(s, from, length, to, stride, 1);
            else
                add_terms(s, from, length, to, stride, 0);
            if (in_rows && length == o->chunk) pass_on(&sums, o, (i + length) / o->width);
            if (i + length == o->rows_end) join_levels(&sums, o);
        }
    }
    return mean_of(&sums, o, G);
}

typedef struct hqq_steps {
    const hqq_quantize_options *options;
    int iters;
    float threshold; /* hqq_shrink_threshold of the first step */
    double *errors;  /* [iters] or NULL */
} hqq_steps;

static float shrink_threshold(const hqq_quantize_options *options, double beta)
{
    return hqq_shrink_threshold(options->lp_norm, (float)(1.0 / beta));
}

/* sums[0..steps) += the error of each lane, one after another. */
static void add_errors(double *restrict sums, int steps, hqq_lane error, int live)
{
    float lanes[HQQ_LANES];
    hqq_vec_store(lanes, error);
    for (int lane = 0; lane < live; lane++)
        for (int step = 0; step < steps; step++) sums[step] += (double)lanes[lane];
}

/* steps->iters steps on one tile; *h becomes their result. Returns the number of steps from
 * which on it stays what it is, or HQQ_UNSETTLED. */
static int run_steps(hqq_tile *t, hqq_half_quadratic *h, hqq_lane smallest, hqq_lane largest,
                     const hqq_steps *steps)
{
    const hqq_quantize_options *options = steps->options;
    hqq_mean_order order = hqq_mean_order_of(&t->job->layout, t->first);
    double beta = (double)options->beta;
    float threshold = steps->threshold;
    for (int i = 0; i < steps->iters; i++, beta *= (double)options->kappa) {
        hqq_step step = {.multiplier = h->multiplier,
                         .zero = h->zero,
                         .levels = (float)hqq_max_code(t->job->layout.nbits),
                         .lp_norm = options->lp_norm,
                         .inverse_beta = (float)(1.0 / beta),
                         .want_error = steps->errors != NULL};
        if (i && options->kappa != 1.0f) threshold = shrink_threshold(options, beta);
        step.threshold = step.want_error ? hqq_lane_set(threshold)
                                         : hqq_quick_threshold(threshold, smallest, largest);
        h->zero = next_zero(t, &step, &order);
        int fixed = options->kappa == 1.0f && !hqq_lane_any(~(h->zero == step.zero));
        if (steps->errors) /* all steps from a fixed point on are this one */
            add_errors(steps->errors + i, fixed ? steps->iters - i : 1, step.error, t->live);
        if (fixed) return i < HQQ_UNSETTLED ? i : HQQ_UNSETTLED;
    }
    return HQQ_UNSETTLED;
}

/* Where the tile's entry of job->settled is; NULL: there are none. */
static uint8_t *settled_at(const hqq_tile *t)
{
    const hqq_quantize_job *job = t->job;
    return job->settled ? job->settled + t->band / HQQ_FEWEST_LANES : NULL;
}

static void solve_tile(hqq_tile *t, const hqq_steps *steps)
{
    uint8_t *settled = settled_at(t);
    if (settled && !steps->errors && *settled != HQQ_UNSETTLED && *settled <= steps->iters)
        return; /* an earlier run with more steps has stored it */
    float levels = (float)hqq_max_code(t->job->layout.nbits);
    hqq_lane smallest, largest;
    hqq_tile_range(t, &smallest, &largest);
    hqq_half_quadratic h =
        hqq_half_quadratic_start(smallest, largest, levels, steps->options->round_zero);
    int settles = run_steps(t, &h, smallest, largest, steps);
    if (settled && steps->errors && settles > *settled) *settled = (uint8_t)settles;
    hqq_stored stored = hqq_store_half_quadratic(&h, smallest * 0.5f + largest * 0.5f, levels,
                                                 t->job->meta_dtype);
    hqq_tile_store_meta(t, &stored);
    hqq_tile_store_codes(t, (hqq_fit){h.multiplier, h.zero}, levels);
}

static void solve_hqq(hqq_tile *tiles, int count, void *data)
{
    for (int i = 0; i < count; i++) solve_tile(&tiles[i], data);
}

void HQQ_ISA_NAME(hqq_quantize_hqq)(const hqq_quantize_job *job, int64_t begin, int64_t end,
                                    int iters, double *errors, void *scratch)
{
    hqq_steps steps = {.options = job->options,
                       .iters = iters,
                       .threshold = shrink_threshold(job->options, (double)job->options->beta),
                       .errors = errors};
    hqq_for_each_tile(job, begin, end, scratch, solve_hqq, &steps);
}

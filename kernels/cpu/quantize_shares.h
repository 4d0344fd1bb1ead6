/*
 * What an error in each element of a tile counts (solver.h: hqq_share), in the order of the
 * tile's values: step i of a lane is the share of element i of its group.
 *
 * All tiles whose first group begins at the same column have the same shares, so that they are
 * loaded once for all slots of a band, and once for a whole weight where the columns that
 * HQQ_LANES groups cover are a multiple of its rows.
 */
#ifndef HQQ_KERNELS_CPU_QUANTIZE_SHARES_H
#define HQQ_KERNELS_CPU_QUANTIZE_SHARES_H

#include "quantize_tile.h"

typedef struct hqq_tile_shares {
    const hqq_quantize_job *job;
    int64_t column;     /* of step 0 in the first lane; -1: nothing is loaded */
    int64_t begin, end; /* the steps that values holds */
    hqq_importance importance;
    hqq_lane total; /* of a group's shares */
    float *values;  /* [HQQ_TILE_STEPS or G][HQQ_LANES] */
} hqq_tile_shares;

/* The importance of HQQ_LANES columns from `column` on, the first one after the last. */
HQQ_ALWAYS_INLINE hqq_lane hqq_columns_at(const hqq_quantize_job *job, int64_t column)
{
    int64_t K = job->layout.K;
    if (__builtin_expect(column + HQQ_LANES <= K, 1))
        return hqq_vec_load(job->importance + column);
    float lanes[HQQ_LANES];
    for (int i = 0; i < HQQ_LANES; i++, column++) {
        if (column >= K) column = 0;
        lanes[i] = job->importance[column];
    }
    return hqq_vec_load(lanes);
}

/* `by` columns on, with 0 <= by < K. */
static inline int64_t hqq_column_on(int64_t column, int64_t by, int64_t K)
{
    return column + by < K ? column + by : column + by - K;
}

static inline void hqq_shares_load_rows(const hqq_tile_shares *s)
{
    int64_t G = s->job->layout.G, K = s->job->layout.K, columns[HQQ_LANES];
    float *out = s->values;
    columns[0] = (s->column + s->begin) % K;
    for (int lane = 1; lane < HQQ_LANES; lane++)
        columns[lane] = hqq_column_on(columns[lane - 1], G % K, K);
    for (int64_t i = s->begin; i < s->end; i += HQQ_LANES, out += HQQ_LANES * HQQ_LANES) {
        hqq_lane rows[HQQ_LANES];
        for (int lane = 0; lane < HQQ_LANES; lane++) {
            rows[lane] = hqq_columns_at(s->job, columns[lane]);
            columns[lane] += HQQ_LANES;
            if (columns[lane] >= K) columns[lane] %= K;
        }
        hqq_put_steps(out, rows, s->end - i < HQQ_LANES ? (int)(s->end - i) : HQQ_LANES);
    }
}

static inline void hqq_shares_load_columns(const hqq_tile_shares *s)
{
    int64_t groups = s->job->layout.groups, K = s->job->layout.K;
    float *out = s->values;
    int64_t column = (s->column + s->begin * groups) % K;
    for (int64_t i = s->begin; i < s->end; i++, out += HQQ_LANES) {
        hqq_vec_store(out, hqq_columns_at(s->job, column));
        column = hqq_column_on(column, groups % K, K);
    }
}

static inline void hqq_shares_convert(const hqq_tile_shares *s, const hqq_importance *by)
{
    hqq_importance importance = *by;
    const float *end = s->values + (s->end - s->begin) * HQQ_LANES;
    for (float *v = s->values; v < end; v += HQQ_LANES)
        hqq_vec_store(v, hqq_share(&importance, hqq_vec_load(v)));
}

/* The shares of step `i`, and of those behind it up to s->end. */
static inline const float *hqq_shares_at(hqq_tile_shares *s, int64_t i)
{
    if (i < s->begin || i >= s->end) {
        int64_t G = s->job->layout.G;
        s->begin = i / HQQ_TILE_STEPS * HQQ_TILE_STEPS;
        s->end = s->begin + HQQ_TILE_STEPS < G ? s->begin + HQQ_TILE_STEPS : G;
        if (s->job->layout.axis == 1)
            hqq_shares_load_rows(s);
        else
            hqq_shares_load_columns(s);
        hqq_shares_convert(s, &s->importance);
    }
    return s->values + (i - s->begin) * HQQ_LANES;
}

/* HQQ_TILE_PASS with the share of each step in `share`, alone and beside `w`. */
#define HQQ_SHARES_PASS(shares, body, each_run)                                    \
    for (int64_t at_ = 0, G_ = (shares)->job->layout.G, n_; at_ < G_; at_ += n_) { \
        const float *shares_ = hqq_shares_at(shares, at_);                         \
        n_ = G_ - at_ < HQQ_TILE_RUN ? G_ - at_ : HQQ_TILE_RUN;                    \
        for (int64_t i_ = 0; i_ < n_; i_++) {                                      \
            hqq_lane share = hqq_vec_load(shares_ + i_ * HQQ_LANES);               \
            body;                                                                  \
        }                                                                          \
        each_run;                                                                  \
    }
#define HQQ_WEIGHTED_PASS(tile, shares, body, each_run)                                     \
    for (int64_t run_ = 0, G__ = (tile)->job->layout.G; run_ < G__; run_ += HQQ_TILE_RUN) { \
        const float *shares_ = hqq_shares_at(shares, run_);                                 \
        const float *values_ = hqq_tile_at(tile, run_);                                     \
        int64_t n_ = G__ - run_ < HQQ_TILE_RUN ? G__ - run_ : HQQ_TILE_RUN;                 \
        for (int64_t i_ = 0; i_ < n_; i_++) {                                               \
            hqq_lane w = hqq_vec_load(values_ + i_ * HQQ_LANES);                            \
            hqq_lane share = hqq_vec_load(shares_ + i_ * HQQ_LANES);                        \
            body;                                                                           \
        }                                                                                   \
        each_run;                                                                           \
    }

static inline hqq_lane hqq_shares_sum(hqq_tile_shares *s)
{
    hqq_lane run = hqq_lane_set(0.0f), total = run;
    HQQ_SHARES_PASS(s, run += share, total += run; run = hqq_lane_set(0.0f))
    return total;
}

/* The next ones are those of `importance`; `by` gives them from the present ones. */
static inline void hqq_shares_become(hqq_tile_shares *s, hqq_importance importance,
                                     hqq_importance by)
{
    s->importance = importance;
    if (s->end - s->begin == s->job->layout.G)
        hqq_shares_convert(s, &by);
    else
        s->begin = s->end = 0;
}

static inline int64_t hqq_first_column(const hqq_tile *t)
{
    const hqq_layout *l = &t->job->layout;
    return t->first * (l->axis == 1 ? l->G : 1) % l->K;
}

/* *s = the shares of a tile. */
static inline void hqq_shares_of(hqq_tile_shares *s, const hqq_tile *t)
{
    int64_t column = hqq_first_column(t);
    if (s->column == column) return;
    hqq_lane zero = hqq_lane_set(0.0f), one = hqq_lane_set(1.0f), largest = zero;
    s->job = t->job;
    s->column = column;
    s->begin = s->end = 0;
    s->importance = (hqq_importance){one, zero}; /* as it is */
    HQQ_SHARES_PASS(s, largest = hqq_lane_max(largest, share), (void)0)
    hqq_importance unfloored = {largest, zero};
    hqq_shares_become(s, unfloored, unfloored);
    hqq_lane floor = hqq_share_floor(hqq_shares_sum(s), (float)t->job->layout.G);
    hqq_shares_become(s, (hqq_importance){largest, floor}, (hqq_importance){one, floor});
    s->total = hqq_shares_sum(s);
}

#endif

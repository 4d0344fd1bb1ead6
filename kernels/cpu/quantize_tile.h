/*
 * A tile: up to HQQ_LANES neighbouring groups, one a lane, step i of it holding element i of
 * each. Loading transposes at axis 1, where a group is contiguous, and is a plain copy at
 * axis 0, where the groups are; quantize_store.h does the opposite. Nothing else in the
 * quantizer knows of axes.
 */
#ifndef HQQ_KERNELS_CPU_QUANTIZE_TILE_H
#define HQQ_KERNELS_CPU_QUANTIZE_TILE_H

#include "lanes.h"
#include "transpose.h"
#include "quantize_groups.h"
#include "solver.h"

typedef struct hqq_tile {
    const hqq_quantize_job *job;
    int64_t first; /* group */
    int live;      /* groups, 1 to HQQ_LANES; the lanes behind them hold anything finite */
    int slot;      /* axis 1: of all its codes */
    int64_t band;  /* of the first group */
    const hqq_units *units; /* NULL: values are w; otherwise hqq_to_units(w) */
    int64_t begin, end;     /* the steps that values holds */
    float *values;          /* [HQQ_TILE_STEPS or G][HQQ_LANES] */
} hqq_tile;

/* Where the group of a lane begins in W; lanes behind the last one that lives read the first.
 */
static inline int64_t hqq_tile_row(const hqq_tile *t, int lane)
{
    return (t->first + (lane < t->live ? lane : 0)) * t->job->layout.G;
}

/* out[step] = step `step` of all lanes, for the steps in `rows`. */
HQQ_ALWAYS_INLINE void hqq_put_steps(float *out, hqq_lane rows[HQQ_LANES], int steps)
{
    hqq_vec_transpose(rows);
    for (int step = 0; step < steps; step++) hqq_vec_store(out + step * HQQ_LANES, rows[step]);
}

/* Blocks of 2 * HQQ_LANES bf16, as far as they are whole; returns the step behind them. Pairs
 * are transposed, and taken apart afterwards: half the shuffles. */
static inline int64_t hqq_tile_load_pairs(const hqq_tile *t)
{
    const uint16_t *W = t->job->W;
    float *out = t->values;
    int64_t i = t->begin;
    for (; i + 2 * HQQ_LANES <= t->end; i += 2 * HQQ_LANES) {
        hqq_lane rows[HQQ_LANES];
        for (int lane = 0; lane < HQQ_LANES; lane++)
            memcpy(&rows[lane], W + hqq_tile_row(t, lane) + i, sizeof rows[lane]);
        hqq_vec_transpose(rows);
        for (int pair = 0; pair < HQQ_LANES; pair++, out += 2 * HQQ_LANES) {
            hqq_uvec bits = (hqq_uvec)rows[pair];
            hqq_vec_store(out, (hqq_lane)(bits << 16));
            hqq_vec_store(out + HQQ_LANES, (hqq_lane)(bits & 0xffff0000u));
        }
    }
    return i;
}

static inline void hqq_tile_load_rows(const hqq_tile *t)
{
    const void *W = t->job->W;
    hqq_dtype dtype = t->job->W_dtype;
    hqq_lane rows[HQQ_LANES];
    int64_t i = dtype == HQQ_BF16 ? hqq_tile_load_pairs(t) : t->begin;
    float *out = t->values + (i - t->begin) * HQQ_LANES;
    for (; i + HQQ_LANES <= t->end; i += HQQ_LANES, out += HQQ_LANES * HQQ_LANES) {
        for (int lane = 0; lane < HQQ_LANES; lane++)
            rows[lane] = hqq_vec_load_dtype(W, dtype, hqq_tile_row(t, lane) + i);
        hqq_put_steps(out, rows, HQQ_LANES);
    }
    int steps = (int)(t->end - i);
    for (int lane = 0; lane < HQQ_LANES && steps > 0; lane++) {
        int64_t e = hqq_tile_row(t, lane) + i;
        /* what lies behind the group is not used, but must lie within W */
        rows[lane] = e + HQQ_LANES <= t->job->layout.elements
                         ? hqq_vec_load_dtype(W, dtype, e)
                         : hqq_vec_load_dtype_part(W, dtype, e, steps);
    }
    if (steps > 0) hqq_put_steps(out, rows, steps);
}

/* The weights of step i, at axis 0. */
static inline hqq_lane hqq_tile_load_column(const hqq_tile *t, int64_t i)
{
    const hqq_quantize_job *job = t->job;
    int64_t e = i * job->layout.groups + t->first;
    return t->live == HQQ_LANES ? hqq_vec_load_dtype(job->W, job->W_dtype, e)
                                : hqq_vec_load_dtype_part(job->W, job->W_dtype, e, t->live);
}

static inline void hqq_tile_load_columns(const hqq_tile *t)
{
    float *out = t->values;
    for (int64_t i = t->begin; i < t->end; i++, out += HQQ_LANES)
        hqq_vec_store(out, hqq_tile_load_column(t, i));
}

static inline void hqq_tile_convert(const hqq_tile *t)
{
    hqq_units u = *t->units;
    const float *end = t->values + (t->end - t->begin) * HQQ_LANES;
    for (float *v = t->values; v < end; v += HQQ_LANES)
        hqq_vec_store(v, hqq_to_units(&u, hqq_vec_load(v)));
}

/* The values of step `i`, and of those behind it up to t->end. */
static inline const float *hqq_tile_at(hqq_tile *t, int64_t i)
{
    if (i < t->begin || i >= t->end) {
        int64_t G = t->job->layout.G;
        t->begin = i / HQQ_TILE_STEPS * HQQ_TILE_STEPS;
        t->end = t->begin + HQQ_TILE_STEPS < G ? t->begin + HQQ_TILE_STEPS : G;
        if (t->job->layout.axis == 1)
            hqq_tile_load_rows(t);
        else
            hqq_tile_load_columns(t);
        if (t->units) hqq_tile_convert(t);
    }
    return t->values + (i - t->begin) * HQQ_LANES;
}

/* The value of one step, in any order, at axis 0: it is not kept. */
static inline hqq_lane hqq_tile_step(const hqq_tile *t, int64_t i)
{
    if (i >= t->begin && i < t->end)
        return hqq_vec_load(t->values + (i - t->begin) * HQQ_LANES);
    hqq_lane w = hqq_tile_load_column(t, i);
    return t->units ? hqq_to_units(t->units, w) : w;
}

/* From now on values are positions in units. */
static inline void hqq_tile_set_units(hqq_tile *t, const hqq_units *units)
{
    t->units = units;
    hqq_tile_convert(t);
}

/* To be called when they have changed: the values are read again. */
static inline void hqq_tile_forget(hqq_tile *t)
{
    t->begin = t->end = 0;
}

/* Loops `body` over all steps with the value of each in `w`, in runs of at most HQQ_TILE_RUN;
 * `each_run` comes after every run. Sums are kept per run first: long groups lose no bits. */
enum { HQQ_TILE_RUN = 512 };
#define HQQ_TILE_PASS(tile, body, each_run)                                      \
    for (int64_t at_ = 0, G_ = (tile)->job->layout.G, n_; at_ < G_; at_ += n_) { \
        const float *values_ = hqq_tile_at(tile, at_);                           \
        n_ = G_ - at_ < HQQ_TILE_RUN ? G_ - at_ : HQQ_TILE_RUN;                  \
        for (int64_t i_ = 0; i_ < n_; i_++) {                                    \
            hqq_lane w = hqq_vec_load(values_ + i_ * HQQ_LANES);                 \
            body;                                                                \
        }                                                                        \
        each_run;                                                                \
    }

static inline void hqq_tile_range(hqq_tile *t, hqq_lane *smallest, hqq_lane *largest)
{
    hqq_lane low = hqq_lane_set(INFINITY), high = hqq_lane_set(-INFINITY);
    HQQ_TILE_PASS(t, low = hqq_lane_min(low, w); high = hqq_lane_max(high, w), (void)0)
    *smallest = low;
    *largest = high;
}

static inline void hqq_tile_store_meta(const hqq_tile *t, const hqq_stored *s)
{
    const hqq_quantize_job *job = t->job;
    hqq_vec_store_dtype_part(job->scale, job->meta_dtype, t->first, s->scale, t->live);
    hqq_vec_store_dtype_part(job->zero, job->meta_dtype, t->first, s->zero, t->live);
}

/* Calls solve(tiles, count, data) for the tiles of bands [begin, end), hqq_tiles_at_once of
 * them or fewer at a time. */
static inline void hqq_for_each_tile(const hqq_quantize_job *job, int64_t begin, int64_t end,
                                     void *scratch, void (*solve)(hqq_tile *, int, void *),
                                     void *data)
{
    const hqq_layout *l = &job->layout;
    int slots = l->axis == 1 ? l->per : 1, most = hqq_tiles_at_once(l), count = 0;
    hqq_tile tiles[HQQ_TILES_MOST];
    for (int64_t band = begin; band < end; band += HQQ_LANES)
        for (int slot = 0; slot < slots; slot++) {
            int64_t first = band + slot * job->bands;
            int64_t live = end - band < HQQ_LANES ? end - band : HQQ_LANES;
            if (live > l->groups - first) live = l->groups - first;
            if (live <= 0) break; /* the tail of the last slots stays zero */
            tiles[count] = (hqq_tile){.job = job,
                                      .first = first,
                                      .live = (int)live,
                                      .slot = slot,
                                      .band = band,
                                      .values = (float *)scratch + count * l->G * HQQ_LANES};
            if (++count < most) continue;
            solve(tiles, count, data);
            count = 0;
        }
    if (count) solve(tiles, count, data);
}

#endif

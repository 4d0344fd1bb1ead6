/* What an error in each element of a tile counts (solver.h: hqq_share), in shared memory behind
 * the tile's values and laid out like them. Each lane loads and reads those of its own group
 * alone: no barrier. Groups longer than HQQ_SHARE_STEPS are loaded part by part in each pass:
 * beside a run's values, a run's shares would not fit where a block may have 99 KB. */
#ifndef HQQ_KERNELS_CUDA_QUANTIZE_SHARES_CUH
#define HQQ_KERNELS_CUDA_QUANTIZE_SHARES_CUH

#include "quantize_tile.cuh"

typedef struct hqq_tile_shares {
    int lane;
    int64_t column;     /* of the group's first element */
    int64_t begin, end; /* the steps that cells holds */
    hqq_importance importance;
    float total; /* of the group's shares */
    int finite;  /* whether all that has been loaded is, and at least 0 */
    float4 *cells;
} hqq_tile_shares;

/* Axis 1: one column after another, axis 0: `groups` on each time, both in a circle. */
HQQ_DEVICE_INLINE void hqq_shares_load(hqq_tile_shares *s, const hqq_quantize_job *job)
{
    const hqq_layout *l = &job->layout;
    int64_t K = l->K, by = l->axis == 1 ? 1 : l->groups;
    int64_t column = (s->column + s->begin * by) % K;
    int steps = static_cast<int>(s->end - s->begin);
    float *cells = reinterpret_cast<float *>(s->cells);
    by %= K;
#pragma unroll 4
    for (int step = 0; step < steps; step++) {
        float m = job->importance[column];
        s->finite = s->finite && m >= 0.0f && m <= FLT_MAX;
        cells[hqq_tile_cell(step, s->lane)] = hqq_share(&s->importance, m);
        column += by;
        column -= column >= K ? K : 0;
    }
}

/* This lane's cells from step `part` on, a multiple of HQQ_SHARE_STEPS. */
HQQ_DEVICE_INLINE const float4 *hqq_shares_at(hqq_tile_shares *s, const hqq_quantize_job *job,
                                              int64_t part)
{
    if (part < s->begin || part >= s->end) {
        int64_t G = job->layout.G;
        s->begin = part;
        s->end = G - part < HQQ_SHARE_STEPS ? G : part + HQQ_SHARE_STEPS;
        hqq_shares_load(s, job);
    }
    return s->cells + s->lane;
}

/* HQQ_TILE_PASS over the shares alone, each in `share`. */
#define HQQ_SHARES_PASS(shares, job, body, each_run)                                     \
    _Pragma("unroll 1") for (int64_t part_ = 0; part_ < (job)->layout.G;)                \
    {                                                                                    \
        const float4 *at_ = hqq_shares_at(shares, job, part_);                           \
        int n_ = static_cast<int>((shares)->end - part_);                                \
        _Pragma("unroll 1") for (int i_ = 0; i_ < n_; i_++)                              \
        {                                                                                \
            float share =                                                                \
                reinterpret_cast<const float *>(at_ + i_ / 4 * HQQ_TILE_STRIDE)[i_ % 4]; \
            body;                                                                        \
        }                                                                                \
        part_ += n_;                                                                     \
        if (part_ % HQQ_TILE_RUN == 0 || part_ == (job)->layout.G) {                     \
            each_run;                                                                    \
        }                                                                                \
    }

/* HQQ_TILE_PASS with the share of each step in `share`. */
#define HQQ_WEIGHTED_PASS(tile, shares, job, body, each_run)                                  \
    _Pragma("unroll 1") for (int64_t run_ = 0; run_ < (job)->layout.G; run_ += HQQ_TILE_RUN)  \
    {                                                                                         \
        const float4 *at_ = hqq_tile_at(tile, job, run_);                                     \
        _Pragma("unroll 1") for (int64_t part_ = run_; part_ < (tile)->end;                   \
                                 part_ += HQQ_SHARE_STEPS)                                    \
        {                                                                                     \
            const float4 *of_ = hqq_shares_at(shares, job, part_);                            \
            int n_ = static_cast<int>((shares)->end - (shares)->begin);                       \
            _Pragma("unroll 1") for (; n_ >= 4;                                               \
                                     n_ -= 4, at_ += HQQ_TILE_STRIDE, of_ += HQQ_TILE_STRIDE) \
            {                                                                                 \
                float4 four_ = *at_, shares_ = *of_;                                          \
                _Pragma("unroll") for (int i_ = 0; i_ < 4; i_++)                              \
                {                                                                             \
                    float w = hqq_component(four_, i_);                                       \
                    float share = hqq_component(shares_, i_);                                 \
                    body;                                                                     \
                }                                                                             \
            }                                                                                 \
            _Pragma("unroll 1") for (int i_ = 0; i_ < n_; i_++)                               \
            {                                                                                 \
                float w = reinterpret_cast<const float *>(at_)[i_];                           \
                float share = reinterpret_cast<const float *>(of_)[i_];                       \
                body;                                                                         \
            }                                                                                 \
        }                                                                                     \
        each_run;                                                                             \
    }

HQQ_DEVICE_INLINE float hqq_shares_sum(hqq_tile_shares *s, const hqq_quantize_job *job)
{
    float run = 0.0f, total = 0.0f;
    HQQ_SHARES_PASS(s, job, run = run + share, total = total + run; run = 0.0f)
    return total;
}

/* The next ones are those of `importance`; `by` gives them from the present ones. */
HQQ_DEVICE_INLINE void hqq_shares_become(hqq_tile_shares *s, const hqq_quantize_job *job,
                                         hqq_importance importance, hqq_importance by)
{
    s->importance = importance;
    if (job->layout.G > HQQ_SHARE_STEPS) {
        s->begin = s->end = 0;
        return;
    }
    float *cells = reinterpret_cast<float *>(s->cells);
#pragma unroll 1
    for (int step = 0; step < static_cast<int>(job->layout.G); step++) {
        float *cell = cells + hqq_tile_cell(step, s->lane);
        *cell = hqq_share(&by, *cell);
    }
}

/* The shares of this lane's group, in the order of the CPU. */
HQQ_DEVICE_INLINE hqq_tile_shares hqq_shares_of(const hqq_tile *t, const hqq_quantize_job *job)
{
    const hqq_layout *l = &job->layout;
    hqq_tile_shares s;
    s.lane = t->lane;
    s.column = t->live ? t->group * (l->axis == 1 ? l->G : 1) % l->K : 0;
    s.cells = t->cells + hqq_tile_cells(job, HQQ_TILE_RUN);
    s.begin = s.end = 0;
    s.importance = hqq_importance{1.0f, 0.0f}; /* as it is */
    s.finite = 1;
    float largest = 0.0f;
    HQQ_SHARES_PASS(&s, job, largest = hqq_lane_max(largest, share), (void)0)
    hqq_shares_become(&s, job, hqq_importance{largest, 0.0f}, hqq_importance{largest, 0.0f});
    float sum = hqq_shares_sum(&s, job);
    float floor = hqq_share_floor(sum, static_cast<float>(l->G));
    hqq_shares_become(&s, job, hqq_importance{largest, floor}, hqq_importance{1.0f, floor});
    s.total = hqq_shares_sum(&s, job);
    return s;
}

#endif

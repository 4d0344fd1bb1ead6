/*
 * A tile: 32 groups, one a lane of a warp, and the warp is the whole block. The values lie in
 * shared memory, step i of lane c at
 *
 *     cells[i / 4][c][i % 4]     c in 0 .. 31, and one more column of padding
 *
 * so that a lane reads four steps of its own group by one 16-byte load, and 32 lanes that write
 * neighbouring steps of one group, or neighbouring lanes one step, meet no bank twice.
 *
 *     axis 1   a group is contiguous: lanes load along it. A word holds the groups band,
 *              band + bands, ...: the tile takes all of them for 32 / per bands, as lane
 *              slot * tile_bands + (band - first), and owns these rows of words.
 *     axis 0   a group is a column of W: lane c loads group first + c, which owns a column of
 *              words.
 *
 * One thread works through a group in the order of the CPU, so that every sum has the same
 * bits. Several lanes a group would need shuffles and another order; registers for the values
 * would end at 128 elements and unroll each pass, where shared memory costs a quarter of an
 * instruction a weight and pass. Groups of up to HQQ_TILE_RUN elements are read from memory
 * once; longer ones a run at a time in each pass.
 *
 * Everything here is called by all lanes of the warp together.
 */
#ifndef HQQ_KERNELS_CUDA_QUANTIZE_TILE_CUH
#define HQQ_KERNELS_CUDA_QUANTIZE_TILE_CUH

#include <float.h>

#include "elements.cuh"
#include "quantize_job.h"
#include "quantize_lanes.cuh"

enum {
    HQQ_TILE_STRIDE = HQQ_TILE_LANES + 1, /* 16-byte cells from four steps to the next four */
    HQQ_TILE_LOADS = 8
};

typedef struct hqq_tile {
    int lane;
    int live; /* whether the lane has a group; if not, its values are 0 */
    int64_t index;
    int64_t first;      /* band of lane 0 */
    int bands;          /* of this tile: tile_bands, but for the last one */
    int64_t group;      /* of this lane */
    int64_t begin, end; /* the steps that cells holds */
    int in_units;       /* values are hqq_to_units(w), not w */
    hqq_units units;
    float4 *cells;
    float2 *fits; /* [32], for storing */
} hqq_tile;

HQQ_DEVICE_INLINE hqq_tile hqq_tile_make(const hqq_quantize_job *job, int64_t index)
{
    hqq_tile t;
    t.lane = static_cast<int>(threadIdx.x);
    t.index = index;
    t.first = index * job->tile_bands;
    int64_t left = job->bands - t.first;
    t.bands = left < job->tile_bands ? static_cast<int>(left) : job->tile_bands;
    int slot = t.lane / job->tile_bands, band = t.lane % job->tile_bands;
    t.group = t.first + band + slot * job->bands;
    t.live = slot < job->tile_slots && band < t.bands && t.group < job->layout.groups;
    t.begin = t.end = 0;
    t.in_units = 0;
    t.fits = hqq_dynamic_shared<float2>();
    t.cells = reinterpret_cast<float4 *>(t.fits + HQQ_TILE_LANES);
    return t;
}

/* Where a value lies, in floats from the first cell. */
HQQ_DEVICE_INLINE int hqq_tile_cell(int step, int lane)
{
    return (step / 4 * HQQ_TILE_STRIDE + lane) * 4 + step % 4;
}

HQQ_DEVICE_INLINE float *hqq_tile_floats(const hqq_tile *t)
{
    return reinterpret_cast<float *>(t->cells);
}

/* ---- loading ---------------------------------------------------------------------------- */

/* A walk of the warp over `rows` x `steps` cells, 32 at a time, rows apart by `pitch` elements.
 */
typedef struct hqq_tile_walk {
    int row, step;
    int64_t element;
} hqq_tile_walk;

HQQ_DEVICE_INLINE hqq_tile_walk hqq_walk_start(int lane, int steps, int64_t first,
                                               int64_t pitch)
{
    hqq_tile_walk walk;
    walk.row = lane / steps;
    walk.step = lane % steps;
    walk.element = first + walk.row * pitch + walk.step;
    return walk;
}

/* `by` is what 32 cells are: hqq_walk_start(32, steps, 0, pitch). */
HQQ_DEVICE_INLINE void hqq_walk_on(hqq_tile_walk *walk, const hqq_tile_walk *by, int steps,
                                   int64_t pitch)
{
    walk->row += by->row;
    walk->step += by->step;
    walk->element += by->element;
    if (walk->step >= steps) {
        walk->step -= steps;
        walk->row++;
        walk->element += pitch - steps;
    }
}

template <class T>
HQQ_DEVICE_INLINE void hqq_tile_load_rows(const hqq_tile *t, const hqq_quantize_job *job)
{
    const T *W = static_cast<const T *>(job->W);
    float *cells = hqq_tile_floats(t);
    int steps = static_cast<int>(t->end - t->begin);
    int64_t G = job->layout.G;
    hqq_tile_walk by = hqq_walk_start(HQQ_TILE_LANES, steps, 0, G);
#pragma unroll 1
    for (int slot = 0; slot < job->tile_slots; slot++) {
        int64_t first = t->first + slot * job->bands, left = job->layout.groups - first;
        int rows = left < t->bands ? static_cast<int>(left) : t->bands;
        hqq_tile_walk walk = hqq_walk_start(t->lane, steps, first * G + t->begin, G);
        while (walk.row < rows) { /* so many loads are under way together */
            float values[HQQ_TILE_LOADS];
            int to[HQQ_TILE_LOADS];
#pragma unroll
            for (int i = 0; i < HQQ_TILE_LOADS; i++) {
                to[i] = hqq_tile_cell(walk.step, slot * job->tile_bands + walk.row);
                to[i] = walk.row < rows ? to[i] : -1;
                values[i] = to[i] >= 0 ? hqq_to_float(W[walk.element]) : 0.0f;
                hqq_walk_on(&walk, &by, steps, G);
            }
#pragma unroll
            for (int i = 0; i < HQQ_TILE_LOADS; i++)
                if (to[i] >= 0) cells[to[i]] = values[i];
        }
    }
    if (t->live) return;
#pragma unroll 1
    for (int step = 0; step < steps; step += 4)
        t->cells[step / 4 * HQQ_TILE_STRIDE + t->lane] = float4{};
}

template <class T>
HQQ_DEVICE_INLINE void hqq_tile_load_columns(const hqq_tile *t, const hqq_quantize_job *job)
{
    int64_t pitch = job->layout.groups;
    const T *W = static_cast<const T *>(job->W) + t->begin * pitch + t->group;
    int steps = static_cast<int>(t->end - t->begin), read = t->live ? steps : 0;
    float4 *to = t->cells + t->lane;
#pragma unroll 4
    for (int step = 0; step < steps; step += 4, to += HQQ_TILE_STRIDE) {
        float4 four = {};
        if (step < read) four.x = hqq_to_float(W[0]);
        if (step + 1 < read) four.y = hqq_to_float(W[pitch]);
        if (step + 2 < read) four.z = hqq_to_float(W[2 * pitch]);
        if (step + 3 < read) four.w = hqq_to_float(W[3 * pitch]);
        *to = four;
        W += 4 * pitch;
    }
}

template <class T>
HQQ_DEVICE_INLINE void hqq_tile_load_as(const hqq_tile *t, const hqq_quantize_job *job)
{
    if (job->layout.axis == 1)
        hqq_tile_load_rows<T>(t, job);
    else
        hqq_tile_load_columns<T>(t, job);
}

/* Steps [begin, end) into the cells. A call, not inlined: every pass contains it, and long
 * groups alone come back to it. */
static __device__ __attribute__((noinline)) void
hqq_tile_load(const hqq_quantize_job *job, int64_t index, int64_t begin, int64_t end)
{
    hqq_tile t = hqq_tile_make(job, index);
    t.begin = begin;
    t.end = end;
    __syncwarp(); /* all have read what was here */
    HQQ_BY_DTYPE(job->W_dtype, hqq_tile_load_as, &t, job);
    __syncwarp();
}

/* A lane's own values; padding behind the group's end as well, which nobody reads. */
HQQ_DEVICE_INLINE void hqq_tile_convert(const hqq_tile *t)
{
    float4 *at = t->cells + t->lane;
    for (int64_t step = t->begin; step < t->end; step += 4, at += HQQ_TILE_STRIDE) {
        float4 w = *at;
        *at = float4{hqq_to_units(&t->units, w.x), hqq_to_units(&t->units, w.y),
                     hqq_to_units(&t->units, w.z), hqq_to_units(&t->units, w.w)};
    }
}

/* This lane's cells from step `run` on, a multiple of HQQ_TILE_RUN. */
HQQ_DEVICE_INLINE const float4 *hqq_tile_at(hqq_tile *t, const hqq_quantize_job *job,
                                            int64_t run)
{
    if (run < t->begin || run >= t->end) {
        int64_t G = job->layout.G;
        t->begin = run;
        t->end = G - run < HQQ_TILE_RUN ? G : run + HQQ_TILE_RUN;
        hqq_tile_load(job, t->index, t->begin, t->end);
        if (t->in_units) hqq_tile_convert(t);
    }
    return t->cells + t->lane;
}

/* From now on values are positions in units. */
HQQ_DEVICE_INLINE void hqq_tile_set_units(hqq_tile *t, const hqq_units *units)
{
    t->units = *units;
    t->in_units = 1;
    hqq_tile_convert(t);
}

/* To be called when the units have changed: the values are read again. */
HQQ_DEVICE_INLINE void hqq_tile_forget(hqq_tile *t, const hqq_units *units)
{
    t->units = *units;
    t->begin = t->end = 0;
}

/* ---- passes ----------------------------------------------------------------------------- */

HQQ_DEVICE_INLINE float hqq_component(const float4 &four, int i)
{
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

/* Loops `body` over all steps of this lane's group with the value of each in `w`, in runs of at
 * most HQQ_TILE_RUN; `each_run` comes after every run: the CPU's order. */
#define HQQ_TILE_PASS(tile, job, body, each_run)                                             \
    _Pragma("unroll 1") for (int64_t run_ = 0; run_ < (job)->layout.G; run_ += HQQ_TILE_RUN) \
    {                                                                                        \
        const float4 *at_ = hqq_tile_at(tile, job, run_);                                    \
        int n_ = static_cast<int>((tile)->end - (tile)->begin);                              \
        _Pragma("unroll 1") for (; n_ >= 4; n_ -= 4, at_ += HQQ_TILE_STRIDE)                 \
        {                                                                                    \
            float4 four_ = *at_;                                                             \
            _Pragma("unroll") for (int i_ = 0; i_ < 4; i_++)                                 \
            {                                                                                \
                float w = hqq_component(four_, i_);                                          \
                body;                                                                        \
            }                                                                                \
        }                                                                                    \
        _Pragma("unroll 1") for (int i_ = 0; i_ < n_; i_++)                                  \
        {                                                                                    \
            float w = reinterpret_cast<const float *>(at_)[i_];                              \
            body;                                                                            \
        }                                                                                    \
        each_run;                                                                            \
    }

typedef struct hqq_tile_span {
    float smallest, largest; /* both 0 if not finite */
    int finite;
} hqq_tile_span;

/* The comparisons are the CPU's: of two zeros of different sign the later one is kept. */
HQQ_DEVICE_INLINE hqq_tile_span hqq_tile_range(hqq_tile *t, const hqq_quantize_job *job)
{
    hqq_tile_span s = {HUGE_VALF, -HUGE_VALF, 1};
    HQQ_TILE_PASS(t, job, s.smallest = s.smallest < w ? s.smallest : w;
                  s.largest = s.largest > w ? s.largest : w;
                  s.finite = s.finite && fabsf(w) <= FLT_MAX, (void)0)
    if (!s.finite) s.smallest = s.largest = 0.0f;
    return s;
}

/* ---- storing ---------------------------------------------------------------------------- */

HQQ_DEVICE_INLINE void hqq_tile_store_meta(const hqq_tile *t, const hqq_quantize_job *job,
                                           const hqq_stored *s)
{
    if (!t->live) return;
    hqq_store(job->scale, job->meta_dtype, t->group, s->scale);
    hqq_store(job->zero, job->meta_dtype, t->group, s->zero);
}

HQQ_DEVICE_INLINE void hqq_put_word(const hqq_quantize_job *job, int64_t at, uint32_t word)
{
    if (job->layout.word_bytes == 4)
        static_cast<uint32_t *>(job->packed)[at] = word;
    else
        static_cast<uint8_t *>(job->packed)[at] = static_cast<uint8_t>(word);
}

HQQ_DEVICE_INLINE uint32_t hqq_code(float value, float slope, float offset, float levels)
{
    return static_cast<uint32_t>(
        static_cast<int>(hqq_nearest_code(value * slope + offset, levels)));
}

/* Axis 1: lanes along the words of each band; the groups of a word lie tile_bands lanes apart.
 */
HQQ_DEVICE_INLINE void hqq_tile_store_rows(hqq_tile *t, const hqq_quantize_job *job,
                                           const hqq_fit *fit)
{
    /* free: whoever read the tile before has passed the barrier of this one's load */
    t->fits[t->lane] = make_float2(fit->slope, fit->offset);
    int64_t G = job->layout.G;
#pragma unroll 1
    for (int64_t run = 0; run < G; run += HQQ_TILE_RUN) {
        hqq_tile_at(t, job, run);
        __syncwarp(); /* fits and converted values are there */
        int steps = static_cast<int>(t->end - t->begin);
        hqq_tile_walk by = hqq_walk_start(HQQ_TILE_LANES, steps, 0, G);
        hqq_tile_walk walk = hqq_walk_start(t->lane, steps, t->first * G + run, G);
#pragma unroll 1
        while (walk.row < t->bands) {
            uint32_t word = 0;
            for (int slot = 0; slot < job->tile_slots; slot++) {
                int lane = slot * job->tile_bands + walk.row;
                float2 f = t->fits[lane];
                float value = hqq_tile_floats(t)[hqq_tile_cell(walk.step, lane)];
                word |= hqq_code(value, f.x, f.y, job->levels)
                        << hqq_slot_shift(job->layout.nbits, slot);
            }
            hqq_put_word(job, walk.element, word);
            hqq_walk_on(&walk, &by, steps, G);
        }
    }
}

/* Axis 0: a lane along its own column of words. Groups longer than a run come from memory: the
 * codes of a word are far apart. */
HQQ_DEVICE_INLINE void hqq_tile_store_columns(hqq_tile *t, const hqq_quantize_job *job,
                                              const hqq_fit *fit)
{
    int64_t G = job->layout.G, groups = job->layout.groups, rows = job->layout.words / groups;
    int held = G <= HQQ_TILE_RUN;
    if (held) hqq_tile_at(t, job, 0);
    if (!t->live) return;
#pragma unroll 1
    for (int64_t row = 0; row < rows; row++) {
        uint32_t word = 0;
        int64_t step = row;
        for (int slot = 0; slot < job->layout.per && step < G; slot++, step += rows) {
            float value;
            if (held) {
                value = hqq_tile_floats(t)[hqq_tile_cell(static_cast<int>(step), t->lane)];
            } else {
                value = hqq_load_one(job->W, job->W_dtype, step * groups + t->group);
                if (t->in_units) value = hqq_to_units(&t->units, value);
            }
            word |= hqq_code(value, fit->slope, fit->offset, job->levels)
                    << hqq_slot_shift(job->layout.nbits, slot);
        }
        hqq_put_word(job, row * groups + t->group, word);
    }
}

/* Stores the codes nearest to value * slope + offset. */
HQQ_DEVICE_INLINE void hqq_tile_store_codes(hqq_tile *t, const hqq_quantize_job *job,
                                            const hqq_fit *fit)
{
    if (job->layout.axis == 1)
        hqq_tile_store_rows(t, job, fit);
    else
        hqq_tile_store_columns(t, job, fit);
}

/* Stores scale, zero and codes. What is not finite gets NaN, and 0 for every code. */
HQQ_DEVICE_INLINE void hqq_tile_store(hqq_tile *t, const hqq_quantize_job *job,
                                      hqq_stored stored, hqq_fit fit, int finite)
{
    if (!finite) stored.scale = stored.zero = hqq_bits_to_float(0x7fc00000u);
    if (!finite || !t->live) fit.slope = fit.offset = 0.0f; /* 0, or NaN, whose code is 0 */
    hqq_tile_store_meta(t, job, &stored);
    hqq_tile_store_codes(t, job, &fit);
}

#endif

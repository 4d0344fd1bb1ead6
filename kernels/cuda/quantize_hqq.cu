/*
 * hqq's own solver: what hqq 0.2.8 computes in fp32 on a CPU, operation by operation, the order
 * of sums (mean_order.h) included. A step, for each group:
 *
 *     q = clip(rint(w * multiplier + zero));  e = w - (q - zero) / multiplier
 *     zero = mean of q - (w - shrink(e)) * multiplier
 *
 * quantize_tile.cuh says how a warp holds 32 groups, one a lane. Groups do not know of each
 * other, but where hqq stops shows in the mean error of the whole matrix, step by step. Nothing
 * waits for the device and there is no memory but the outputs, so these carry what one kernel
 * tells the next, before they get their own values:
 *
 *     errors   all steps of all groups. Warp c adds its sums of |w - w'| to sums[step][c],
 *              doubles, in `packed`; as many warps as that has room for
 *     decide   one block adds them up, finds the step, and leaves it in the scale and zero of
 *              each tile's first group (16 bits in each)
 *     solve    a warp reads the step where its own tile will write, runs up to there, stores
 *
 * A matrix whose words do not even hold one warp's sums (160 bytes at 20 steps) is done by a
 * single warp that runs 1 step, 2 steps, ... over everything until the error stops falling.
 *
 * What equals what: a group after a given number of steps is the CPU's, bit for bit. The number
 * of steps hangs on sums in double that are added in another order than the CPU's: it could
 * differ only where two steps' mean errors are the same to 1e-15 and round to different floats.
 *
 * Instructions a lane executes for a weight (sm_90's machine code; groups of 64): a step 34 in
 * errors (10 of them the division), 19 in solve; 20 steps of both 1,060, with loading twice and
 * storing 1,200: at most 24e9 weights/s, 70e9 in 2.9 s (predicted); half of that where the
 * groups come to their fixed points after 10 steps. Memory as in quantize_default.cu, W twice.
 * Shared memory: a step reads the value and reads and writes a sum, 48 bytes a lane and four
 * weights: 12 of 19 to 34 cycles of a warp. 12.9 KB a warp, 16 warps a multiprocessor.
 */
#include "quantize_sums.cuh"
#include "quantize_tile.cuh"
#include "solver_hqq.h"

typedef struct hqq_job {
    hqq_quantize_job job;
    hqq_mean_order orders[2]; /* of tiles of 32 bands; of others */
    int sum_quads;            /* 16-byte units a lane has for its sums */
    int iters;
    int round_zero;
    float lp_norm, beta, kappa;
} hqq_job;

/* ---- one step --------------------------------------------------------------------------- */

/* Everything that is constant in a step. */
typedef struct hqq_step {
    float multiplier, zero;
    float inverse; /* 1 / multiplier */
    float levels, exponent, inverse_beta;
    float threshold; /* up to which hqq_shrink gives 0 for sure */
} hqq_step;

/* (w - shrunk error) * multiplier, for the few errors that may be above the threshold. */
HQQ_DEVICE_INLINE float shrunk_and_scaled(const hqq_step *s, float w, float q)
{
    float e = w - (q - s->zero) / s->multiplier;
    float power = s->exponent == 0.0f ? 1.0f : hqq_power(fabsf(e), s->exponent);
    return (w - hqq_shrink(e, power, s->inverse_beta)) * s->multiplier;
}

typedef struct hqq_terms {
    float term[4];  /* q - (w - shrunk error) * multiplier */
    float error[4]; /* |w - w'| */
} hqq_terms;

/* Where the error is not wanted a product replaces the division by the multiplier: it only has
 * to tell whether any error may be above the threshold. */
template <bool want_error>
HQQ_DEVICE_INLINE hqq_terms terms_of(const hqq_step *s, const float4 &four)
{
    hqq_terms t;
    float code[4];
    int large = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float w = hqq_component(four, i), scaled = w * s->multiplier;
        float q = hqq_nearest_code(scaled + s->zero, s->levels);
        float back = want_error ? (q - s->zero) / s->multiplier : (q - s->zero) * s->inverse;
        t.error[i] = fabsf(w - back);
        t.term[i] = q - scaled;
        code[i] = q;
        large |= t.error[i] > s->threshold;
    }
    if (large) { /* once in the code: hqq_power is long */
#pragma unroll 1
        for (int k = 0; k < 4; k++) {
            float w = hqq_component(four, k), q = code[0];
#pragma unroll
            for (int i = 1; i < 4; i++) q = i == k ? code[i] : q;
            float term = q - shrunk_and_scaled(s, w, q);
#pragma unroll
            for (int i = 0; i < 4; i++) t.term[i] = i == k ? term : t.term[i];
        }
    }
    return t;
}

/* ---- one step of a tile ------------------------------------------------------------------ */

/* The mean of the terms of one step: the next zero. */
template <bool want_error>
HQQ_DEVICE_INLINE float next_zero(hqq_tile *tile, const hqq_job *arguments,
                                  const hqq_step *step, const hqq_mean_order *order,
                                  hqq_sums *sums, float *error)
{
    const hqq_quantize_job *job = &arguments->job;
    int64_t G = job->layout.G;
    for (int level = 0; level < order->levels; level++) hqq_clear_level(sums, level);
    sums->chain = 0.0f;
    const float4 *at = NULL;
#pragma unroll 1
    for (int64_t i = 0; i < G;) {
        if (i % HQQ_TILE_RUN == 0) at = hqq_tile_at(tile, job, i);
        hqq_stretch stretch = hqq_stretch_from(i, order, G);
        if (stretch.end > tile->end) stretch.end = tile->end;
        int c = static_cast<int>(i / 4) & stretch.mask;
#pragma unroll 1
        for (int left = static_cast<int>(stretch.end - i); left > 0; left -= 4) {
            hqq_terms t = terms_of<want_error>(step, *at); /* of padding too, not added */
            at += HQQ_TILE_STRIDE;
            if (want_error) {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (k < left) *error = *error + t.error[k];
            }
            if (stretch.wide) {
                hqq_add_four(sums->at + c * HQQ_TILE_LANES,
                             float4{t.term[0], t.term[1], t.term[2], t.term[3]});
                c = (c + 1) & stretch.mask;
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (k < left) sums->chain = sums->chain + t.term[k];
            }
        }
        i = stretch.end;
        if (!stretch.in_rows) continue;
        if (order->levels > 1 && (i & ((order->width << order->level_power) - 1)) == 0)
            hqq_pass_on(sums, order, i / order->width);
        if (i == order->rows_end) hqq_join_levels(sums, order);
    }
    return hqq_mean_of(sums, order, G);
}

/* ---- all steps of a tile ---------------------------------------------------------------- */

HQQ_DEVICE_INLINE double warp_sum(double x)
{
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    return x;
}

/* Column `column` of sums[step][columns], added to by lane 0 alone. */
typedef struct error_sums {
    double *at; /* NULL: not wanted */
    int64_t columns;
} error_sums;

HQQ_DEVICE_INLINE void add_error(const error_sums *sums, const hqq_tile *t, int step,
                                 float error, int first)
{
    double sum = warp_sum(static_cast<double>(error));
    if (t->lane != 0) return;
    double *to = sums->at + step * sums->columns;
    *to = first ? sum : *to + sum;
}

typedef struct hqq_solved {
    hqq_half_quadratic h;
    hqq_tile_span span;
    float error; /* of the last step; 0 for what is not finite */
} hqq_solved;

/* `steps` steps on one tile. `first`: the sums hold nothing yet. */
template <bool want_error>
HQQ_DEVICE_INLINE hqq_solved solve_tile(hqq_tile *tile, const hqq_job *arguments, int steps,
                                        const error_sums *sums, int first)
{
    const hqq_quantize_job *job = &arguments->job;
    const hqq_mean_order *order = &arguments->orders[tile->bands != HQQ_TILE_LANES];
    hqq_sums lane_sums;
    lane_sums.quads = order->width < 4 ? 1 : order->width / 4;
    lane_sums.at = tile->cells + (hqq_tile_bytes(job) / 16 - HQQ_TILE_LANES / 2) + tile->lane;
    hqq_solved s;
    s.error = 0.0f;
    s.span = hqq_tile_range(tile, job);
    s.h = hqq_half_quadratic_start(s.span.smallest, s.span.largest, job->levels,
                                   arguments->round_zero);
    hqq_step step;
    step.multiplier = s.h.multiplier;
    step.inverse = 1.0f / s.h.multiplier;
    step.levels = job->levels;
    step.exponent = static_cast<float>(static_cast<double>(arguments->lp_norm) - 1.0);
    double beta = static_cast<double>(arguments->beta);
    int fixed = 0;
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        if (!fixed) { /* all steps from a fixed point on are that one */
            step.zero = s.h.zero;
            step.inverse_beta = static_cast<float>(1.0 / beta);
            step.threshold = hqq_shrink_threshold(arguments->lp_norm, step.inverse_beta);
            if (!want_error)
                step.threshold =
                    hqq_quick_threshold(step.threshold, s.span.smallest, s.span.largest);
            s.error = 0.0f;
            s.h.zero =
                next_zero<want_error>(tile, arguments, &step, order, &lane_sums, &s.error);
            if (!s.span.finite || !tile->live) s.error = 0.0f;
            beta *= static_cast<double>(arguments->kappa);
            int same = s.h.zero == step.zero || !s.span.finite || !tile->live;
            fixed = arguments->kappa == 1.0f && __all_sync(~0u, same);
        }
        if (want_error && sums->at)
            add_error(sums, tile, i, s.error, first);
        else if (fixed)
            break;
    }
    return s;
}

HQQ_DEVICE_INLINE void store_tile(hqq_tile *tile, const hqq_quantize_job *job, hqq_solved *s)
{
    float middle = s->span.smallest * 0.5f + s->span.largest * 0.5f;
    hqq_stored stored = hqq_store_half_quadratic(&s->h, middle, job->levels, job->meta_dtype);
    hqq_fit fit = {s->h.multiplier, s->h.zero};
    hqq_tile_store(tile, job, stored, fit, s->span.finite);
}

/* ---- where to stop ---------------------------------------------------------------------- */

/* hqq stops after the first step whose mean error, in fp32, is not below the least so far. */
typedef struct hqq_stop {
    float least;
    int steps; /* taken: all, until one is found */
    int found;
} hqq_stop;

HQQ_DEVICE_INLINE void consider_step(hqq_stop *stop, int step, double sum, int64_t elements)
{
    float error = static_cast<float>(sum / static_cast<double>(elements));
    if (error < stop->least) {
        stop->least = error;
    } else {
        stop->steps = step + 1;
        stop->found = 1;
    }
}

/* The number of steps travels in the first two bytes of a group's scale and zero. */
HQQ_DEVICE_INLINE uint16_t *steps_half(const hqq_quantize_job *job, void *array, int64_t tile)
{
    return static_cast<uint16_t *>(hqq_at_mut(array, job->meta_dtype, tile * job->tile_bands));
}

HQQ_DEVICE_INLINE void put_steps(const hqq_quantize_job *job, int64_t tile, int steps)
{
    *steps_half(job, job->scale, tile) = static_cast<uint16_t>(steps & 0xffff);
    *steps_half(job, job->zero, tile) = static_cast<uint16_t>(steps >> 16);
}

HQQ_DEVICE_INLINE int get_steps(const hqq_quantize_job *job, int64_t tile)
{
    return *steps_half(job, job->scale, tile) | *steps_half(job, job->zero, tile) << 16;
}

/* ---- kernels ---------------------------------------------------------------------------- */

__global__ void __launch_bounds__(HQQ_TILE_LANES, HQQ_TILE_WARPS)
    hqq_quantize_errors_kernel(const __grid_constant__ hqq_job arguments, double *errors)
{
    const hqq_quantize_job *job = &arguments.job;
    error_sums sums = {errors + blockIdx.x, gridDim.x};
    for (int64_t index = blockIdx.x; index < job->tiles; index += gridDim.x) {
        hqq_tile tile = hqq_tile_make(job, index);
        solve_tile<true>(&tile, &arguments, arguments.iters, &sums, index == blockIdx.x);
    }
}

enum { DECIDE_THREADS = 256 };

/* One block. */
__global__ void __launch_bounds__(DECIDE_THREADS)
    hqq_quantize_decide_kernel(const __grid_constant__ hqq_job arguments, const double *errors,
                               int64_t columns)
{
    HQQ_SHARED(double[DECIDE_THREADS / 32], parts);
    const hqq_quantize_job *job = &arguments.job;
    int thread = static_cast<int>(threadIdx.x);
    hqq_stop stop = {HUGE_VALF, arguments.iters, 0};
    for (int step = 0; step < arguments.iters && !stop.found; step++) {
        double sum = 0;
#pragma unroll 4
        for (int64_t c = thread; c < columns; c += DECIDE_THREADS)
            sum += errors[step * columns + c];
        sum = warp_sum(sum);
        if (thread % 32 == 0) parts[thread / 32] = sum;
        __syncthreads();
        double total = 0;
        for (int part = 0; part < DECIDE_THREADS / 32; part++) total += parts[part];
        __syncthreads();
        consider_step(&stop, step, total, job->layout.elements);
    }
    for (int64_t tile = thread; tile < job->tiles; tile += DECIDE_THREADS)
        put_steps(job, tile, stop.steps);
}

/* `decided`: the number of steps was left by the kernel above; otherwise it is iters. */
__global__ void __launch_bounds__(HQQ_TILE_LANES, HQQ_TILE_WARPS)
    hqq_quantize_solve_kernel(const __grid_constant__ hqq_job arguments, int decided)
{
    const hqq_quantize_job *job = &arguments.job;
    error_sums none = {NULL, 0};
    for (int64_t index = blockIdx.x; index < job->tiles; index += gridDim.x) {
        hqq_tile tile = hqq_tile_make(job, index);
        int steps = decided ? get_steps(job, index) : arguments.iters;
        hqq_solved s = solve_tile<false>(&tile, &arguments, steps, &none, 0);
        store_tile(&tile, job, &s);
    }
}

/* One warp: the whole of a matrix too small to hold sums. The last round stores. */
__global__ void __launch_bounds__(HQQ_TILE_LANES, HQQ_TILE_WARPS)
    hqq_quantize_tiny_kernel(const __grid_constant__ hqq_job arguments)
{
    const hqq_quantize_job *job = &arguments.job;
    error_sums none = {NULL, 0};
    hqq_stop stop = {HUGE_VALF, arguments.iters, 0};
    for (int step = 0, store = 0; !store; step++) {
        store = stop.found || step == arguments.iters;
        double sum = 0;
        for (int64_t index = 0; index < job->tiles; index++) {
            hqq_tile tile = hqq_tile_make(job, index);
            hqq_solved s =
                solve_tile<true>(&tile, &arguments, store ? stop.steps : step + 1, &none, 0);
            sum += warp_sum(static_cast<double>(s.error));
            if (store) store_tile(&tile, job, &s);
        }
        consider_step(&stop, step, sum, job->layout.elements);
    }
}

/* ---- launches --------------------------------------------------------------------------- */

static int sum_quads_of(const hqq_mean_order *o)
{
    return (o->width < 4 ? 1 : o->width / 4) * o->levels;
}

static hqq_job job_of(const hqq_quantize_job *job, const hqq_quantize_options *options)
{
    hqq_job j;
    j.job = *job;
    j.orders[0] = hqq_mean_order_of(&job->layout, 0);
    j.orders[1] = hqq_mean_order_of(&job->layout, job->layout.groups - 1);
    int full = sum_quads_of(&j.orders[0]), last = sum_quads_of(&j.orders[1]);
    j.sum_quads = full > last ? full : last;
    j.iters = options->solver == HQQ_SOLVER_REFERENCE ? options->iters : 0;
    j.round_zero = options->round_zero;
    j.lp_norm = options->lp_norm;
    j.beta = options->beta;
    j.kappa = options->kappa;
    return j;
}

/* The columns of sums [iters][columns] that the words have room for, from *errors on. */
static int64_t error_columns(const hqq_job *j, double **errors)
{
    uintptr_t begin = reinterpret_cast<uintptr_t>(j->job.packed), at = (begin + 7) / 8 * 8;
    int64_t bytes = j->job.layout.words * j->job.layout.word_bytes;
    int64_t room = (bytes - static_cast<int64_t>(at - begin)) / 8 / j->iters;
    *errors = reinterpret_cast<double *>(at);
    enum { MOST = 1 << 14 }; /* several waves of warps, and little for one block to add up */
    if (room > MOST) room = MOST;
    return room < j->job.tiles ? room : j->job.tiles;
}

extern "C" hqq_status hqq_cuda_quantize_hqq(const hqq_quantize_job *job,
                                            const hqq_quantize_options *options, void *stream)
{
    hqq_job j = job_of(job, options);
    dim3 warp(HQQ_TILE_LANES), tiles(hqq_tile_blocks(job));
    size_t bytes = static_cast<size_t>(hqq_tile_bytes(job) + j.sum_quads * HQQ_TILE_LANES * 16);
    int decided = j.iters > 0 && options->early_stop;
    if (decided) {
        double *errors;
        int64_t columns = error_columns(&j, &errors);
        if (columns < 1)
            return hqq_launch(hqq_quantize_tiny_kernel, dim3(1), warp, bytes, stream, j);
        HQQ_TRY(hqq_launch(hqq_quantize_errors_kernel, dim3(static_cast<unsigned>(columns)),
                           warp, bytes, stream, j, errors));
        HQQ_TRY(hqq_launch(hqq_quantize_decide_kernel, dim3(1), dim3(DECIDE_THREADS), 0, stream,
                           j, errors, columns));
    }
    return hqq_launch(hqq_quantize_solve_kernel, tiles, warp, bytes, stream, j, decided);
}

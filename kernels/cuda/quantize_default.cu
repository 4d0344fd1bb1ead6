/*
 * The default solver on tiles of 32 groups:
 *
 *     for 16 candidates (low, slope) of the range:  least sum of weight * |t - q|^3,
 *                                                   t = (u - low) * slope,  q = nearest code
 *     4 or 8 times:  slope and offset of the line through (q, u) by least squares
 *     scale and zero as stored;  q = nearest code to w / scale + zero
 *
 * solver.h says what each step does, quantize_tile.cuh how a warp holds its groups, one a lane.
 * No step looks at another group, so nothing is exchanged and no lane waits; codes, scales and
 * zeros are those of the CPU, bit for bit.
 *
 * Instructions a lane executes for a weight (sm_90's machine code; 4 bits, groups of 64):
 *     load 33 (axis 0: 9), range 7, to units 4, search 4 x 38, least squares 4 x 15, words 45
 *     = 300. 132 multiprocessors issue 28.7e12 a second at 1.7 GHz: at most 95e9 weights/s.
 *     With importance: search 4 x 43, least squares 4 x 18.
 * Memory: 2 bytes of W and 0.56 of words, scale and zero a weight, each once: 1.3e12 weights/s
 * at 3.3 TB/s. So arithmetic is the limit, and 70e9 weights take 0.75 s at best (predicted).
 * Shared memory: 16 bytes a lane and four weights in each pass, 4 of 15 to 38 cycles of a
 * multiprocessor. 8.7 KB a warp; the registers allow 16 warps a multiprocessor. Shares of
 * importance take as much again, so that 12 warps fit (by arithmetic; not run on a GPU).
 */
#include "quantize_shares.cuh"
#include "quantize_tile.cuh"

typedef struct default_job {
    hqq_quantize_job job;
    hqq_candidate search[HQQ_SEARCH][HQQ_SEARCH];
} default_job;

/* Where `weighted` is false, shares are not read. */

/* The candidates (i, 0) to (i, 3) of the range search in one pass. */
template <bool weighted>
HQQ_DEVICE_INLINE void
search_row(hqq_tile *t, hqq_tile_shares *shares, const hqq_quantize_job *job,
           const hqq_candidate (&candidates)[HQQ_SEARCH], float *best, hqq_fit *fit)
{
    float sum[HQQ_SEARCH] = {}, total[HQQ_SEARCH] = {}, levels = job->levels;
    float low = candidates[0].low;
#define JOIN_RUN                           \
    for (int j = 0; j < HQQ_SEARCH; j++) { \
        total[j] = total[j] + sum[j];      \
        sum[j] = 0.0f;                     \
    }
    if constexpr (weighted) {
        HQQ_WEIGHTED_PASS(t, shares, job, w -= low;
                          for (int j = 0; j < HQQ_SEARCH; j++) sum[j] =
                              sum[j] +
                              hqq_weighted_cubed_error(w * candidates[j].slope, share, levels),
                          JOIN_RUN)
    } else {
        HQQ_TILE_PASS(t, job, w -= low;
                      for (int j = 0; j < HQQ_SEARCH; j++) sum[j] =
                          sum[j] + hqq_cubed_error(w * candidates[j].slope, levels),
                      JOIN_RUN)
    }
    for (int j = 0; j < HQQ_SEARCH; j++) {
        float error = total[j] * candidates[j].weight, slope = candidates[j].slope;
        int better = error < *best;
        *best = better ? error : *best;
        fit->slope = better ? slope : fit->slope;
        fit->offset = better ? 0.0f - low * slope : fit->offset;
    }
}

template <bool weighted>
HQQ_DEVICE_INLINE hqq_fit least_squares(hqq_tile *t, hqq_tile_shares *shares,
                                        const hqq_quantize_job *job, hqq_fit fit)
{
    float levels = job->levels, n = static_cast<float>(job->layout.G);
    hqq_moments run = hqq_moments_zero(), total = run;
    if constexpr (weighted) {
        n = shares->total;
        HQQ_WEIGHTED_PASS(
            t, shares, job,
            hqq_moments_add_weighted(&run, w * fit.slope + fit.offset, share, levels),
            hqq_moments_join(&total, &run);
            run = hqq_moments_zero())
    } else {
        HQQ_TILE_PASS(t, job, hqq_moments_add(&run, w * fit.slope + fit.offset, levels),
                      hqq_moments_join(&total, &run);
                      run = hqq_moments_zero())
    }
    return hqq_refit(fit, &total, n, levels);
}

/* Groups whose elements all count the same become what they are without importance, where that
 * begins otherwise. All lanes go together: long groups are loaded by all. */
HQQ_DEVICE_INLINE void solve_even(hqq_tile *t, hqq_tile_shares *shares,
                                  const hqq_quantize_job *job, hqq_fit *fit)
{
    int nbits = job->layout.nbits;
    if (hqq_searches_range(nbits, 0) == hqq_searches_range(nbits, 1)) return;
    int even = shares->total == static_cast<float>(job->layout.G);
    if (!__any_sync(~0u, even)) return;
    hqq_fit own = {1.0f, 0.0f};
#pragma unroll 1
    for (int round = 0; round < hqq_least_squares_rounds(nbits, 0); round++)
        own = least_squares<true>(t, shares, job, own);
    if (even) *fit = own;
}

template <bool weighted>
__global__ void __launch_bounds__(HQQ_TILE_LANES, HQQ_TILE_WARPS)
    hqq_quantize_default_kernel(const __grid_constant__ default_job arguments)
{
    const hqq_quantize_job *job = &arguments.job;
    int nbits = job->layout.nbits;
    for (int64_t index = blockIdx.x; index < job->tiles; index += gridDim.x) {
        hqq_tile tile = hqq_tile_make(job, index);
        hqq_tile_span span = hqq_tile_range(&tile, job);
        hqq_units units = hqq_units_of(span.smallest, span.largest, job->levels);
        hqq_tile_set_units(&tile, &units);
        hqq_tile_shares shares = {};
        if constexpr (weighted) {
            shares = hqq_shares_of(&tile, job);
            span.finite = span.finite && shares.finite;
        }
        hqq_fit fit = {1.0f, 0.0f};
        if (hqq_searches_range(nbits, weighted)) {
            float best = HUGE_VALF;
#pragma unroll 1
            for (int i = 0; i < HQQ_SEARCH; i++)
                search_row<weighted>(&tile, &shares, job, arguments.search[i], &best, &fit);
        }
#pragma unroll 1
        for (int round = 0; round < hqq_least_squares_rounds(nbits, weighted); round++)
            fit = least_squares<weighted>(&tile, &shares, job, fit);
        if constexpr (weighted) solve_even(&tile, &shares, job, &fit);
        hqq_stored stored = hqq_store_fit(&fit, &units, job->levels, job->meta_dtype);
        if (__any_sync(~0u, hqq_units_unsaturate(&units, &stored, job->meta_dtype)))
            hqq_tile_forget(&tile, &units);
        hqq_tile_store(&tile, job, stored, hqq_fit_of(&stored, &units), span.finite);
    }
}

extern "C" hqq_status hqq_cuda_quantize_default(const hqq_quantize_job *job, void *stream)
{
    default_job arguments = {*job, {}};
    for (int i = 0; i < HQQ_SEARCH; i++)
        for (int j = 0; j < HQQ_SEARCH; j++)
            arguments.search[i][j] = hqq_candidate_at(i, j, job->levels);
    auto kernel = job->importance ? hqq_quantize_default_kernel<true>
                                  : hqq_quantize_default_kernel<false>;
    return hqq_launch(kernel, dim3(hqq_tile_blocks(job)), dim3(HQQ_TILE_LANES),
                      hqq_tile_bytes(job), stream, arguments);
}

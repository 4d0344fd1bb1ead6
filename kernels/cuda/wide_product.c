/* Which products the kernel of many tokens serves, when, and its launch. */
#include "wide_product.h"

#include <math.h>

#include "block_width.h"
#include "format.h"
#include "integers.h"
#include "lora.h"
#include "status.h"
#include "wide_launch.h"

/* Whether the library holds it: it has to be compiled for sm_90a (CMakeLists.txt). */
#ifndef HQQ_CUDA_HAS_WIDE
#define HQQ_CUDA_HAS_WIDE 0
#endif

int hqq_cuda_wide_serves(const hqq_weight *w, int64_t M, hqq_dtype dtype,
                         const hqq_cuda_device *device)
{
    const int64_t most = INT64_C(1) << 30; /* sizes are ints */
    if (!HQQ_CUDA_HAS_WIDE || !device || device->compute_capability != 90) return 0;
    hqq_layout l =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    return dtype != HQQ_F32 && w->meta_dtype == dtype && w->axis == 1 && hqq_rows_align(&l) &&
           hqq_groups_align(&l) && l.words % (8 * l.K) == 0 && l.K % HQQ_WIDE_CHUNK == 0 &&
           l.G % HQQ_WIDE_CHUNK == 0 && M <= most && l.N <= most && l.K <= most &&
           l.elements / 8 < INT32_MAX && M * l.N / 2048 < INT32_MAX / 2 &&
           M * l.K / 2048 < INT32_MAX / 2 && (uintptr_t)w->packed % 16 == 0;
}

/* ---- tiles and splits ------------------------------------------------------------------- */

static int64_t outputs_of(const hqq_weight *w, int transpose)
{
    return transpose ? w->in_features : w->out_features;
}

/*
 * What bounds a block is L2, at 24 bytes a cycle for each multiprocessor: a chunk's tokens and
 * codes take a little longer than a GEMM takes for as many operations, and with the scales of
 * dgrad, of which a block uses a quarter of each sector, 1.18 times as long. A tile's first
 * loads and its stores hide behind nothing, as a multiprocessor has one block at a time. A sum
 * that is split is written and read once more, in fp32.
 */
static double cost_of(const hqq_wide_grid *g, int64_t M, int64_t outputs, int transpose,
                      double processors)
{
    const double factor = transpose ? 1.18 : 1.03, operations_per_byte = 128.0;
    const double launch = 7.5e6, tile_ends = 7.5e6; /* 1.25 us each */
    double waves = ceil((double)(g->token_tiles * g->output_tiles * g->splits) / processors);
    double chunk = 2.0 * HQQ_WIDE_OUTPUTS * HQQ_WIDE_TOKENS * HQQ_WIDE_CHUNK * factor;
    double cost = waves * ((double)g->chunks_per_split * chunk + tile_ends);
    if (g->splits == 1) return cost + launch;
    double bytes = 8.0 * (double)g->splits * (double)M * (double)outputs;
    return cost + 2 * launch + bytes * operations_per_byte / processors;
}

/*
 * The same for a tile of few tokens, in the terms of small_product.cu, with which it competes:
 * what is read from memory; what moves through L2; the instructions of the fullest
 * multiprocessor, more than its products take; a block's first loads, which hide behind
 * nothing; and what the blocks of a cluster read of each other, between two barriers, the
 * second beside their stores. benchmarks/sass/assumptions.py has the sources.
 */
static double cost_of_few(const hqq_wide_grid *g, const hqq_weight *w, int64_t M, int transpose,
                          double processors)
{
    const double memory_rate = 19e3, cache_rate = 35e3, cycles_per_us = 1450; /* as there */
    const double issued = transpose ? 600 : 700; /* cycles of a quarter for a chunk */
    const double first_loads = 0.7, barrier = 0.21, latency = 0.11;
    const double scales =
        transpose ? 4096 : 1024; /* bytes; of dgrad a quarter of each sector */
    double tiles = (double)(g->output_tiles * g->chunks);
    double codes = HQQ_WIDE_OUTPUTS * HQQ_WIDE_CHUNK * w->nbits / 8;
    double memory = tiles * (codes + 1024) / memory_rate / processors;
    double cache = tiles * (codes + scales + 128.0 * (double)M) / cache_rate / processors;
    double waves = ceil((double)(g->output_tiles * g->splits) / processors);
    double issue = waves * (double)g->chunks_per_split * issued / cycles_per_us;
    double time = memory > cache ? memory : cache;
    if (issue > time) time = issue;
    time += waves * first_loads;
    if (g->cluster) {
        double sums = 4.0 * HQQ_WIDE_FEW * HQQ_WIDE_OUTPUTS, own_rate = 128;
        double read = sums * (double)(g->splits - 1) / (double)g->splits;
        double read_rate = g->splits == 2 ? 16 : 13;
        time += waves * (1.15 * barrier + latency +
                         (sums / own_rate + read / read_rate) / cycles_per_us);
    }
    return time * HQQ_CUDA_OPERATIONS_A_MICROSECOND + HQQ_CUDA_LAUNCH_OPERATIONS;
}

/* Up to 64 tokens splits are a cluster, of so few blocks that as many fit the multiprocessors
 * as without: clusters of eight have been seen on 120 of an H100's 132. */
static hqq_wide_grid grid_of_few(hqq_wide_grid g, const hqq_weight *w, int64_t M, int transpose,
                                 const hqq_cuda_device *device, double processors)
{
    enum { CLUSTER_MOST = 3 };
    hqq_wide_grid best = g;
    for (int64_t splits = 1; splits <= CLUSTER_MOST && splits <= g.chunks; splits++) {
        if (splits > 1 && !device->has_clusters) break;
        g.chunks_per_split = hqq_ceil_div(g.chunks, splits);
        g.splits = hqq_ceil_div(g.chunks, g.chunks_per_split);
        g.cluster = g.splits > 1;
        g.cost = cost_of_few(&g, w, M, transpose, processors);
        if (splits == 1 || g.cost < best.cost) best = g;
    }
    return best;
}

hqq_wide_grid hqq_cuda_wide_grid(const hqq_weight *w, int64_t M, int transpose,
                                 const hqq_cuda_device *device)
{
    enum { SPLITS_MOST = 16 };
    int64_t outputs = outputs_of(w, transpose), per = hqq_slots_per_word(w->nbits);
    double processors = device->multiprocessors > 0 ? device->multiprocessors : 1;
    hqq_wide_grid g = {.tokens = M <= HQQ_WIDE_FEW ? HQQ_WIDE_FEW : HQQ_WIDE_TOKENS,
                       .output_tiles = hqq_ceil_div(outputs, HQQ_WIDE_OUTPUTS)};
    g.token_tiles = hqq_ceil_div(M, g.tokens);
    g.chunks = transpose ? hqq_ceil_div(w->out_features / per, HQQ_WIDE_CHUNK / per)
                         : w->in_features / HQQ_WIDE_CHUNK;
    if (g.tokens == HQQ_WIDE_FEW) return grid_of_few(g, w, M, transpose, device, processors);
    hqq_wide_grid best = g;
    for (int64_t splits = 1; splits <= SPLITS_MOST && splits <= g.chunks; splits++) {
        g.chunks_per_split = hqq_ceil_div(g.chunks, splits);
        g.splits = hqq_ceil_div(g.chunks, g.chunks_per_split);
        g.cost = cost_of(&g, M, outputs, transpose, processors);
        if (splits == 1 || g.cost < best.cost) best = g;
    }
    return best;
}

int hqq_cuda_wide_is_faster(const hqq_weight *w, int64_t M, hqq_dtype dtype, int transpose,
                            const hqq_cuda_device *device)
{
    int64_t length = outputs_of(w, !transpose);
    return hqq_cuda_wide_grid(w, M, transpose, device).cost <
           hqq_cuda_blocks_cost(outputs_of(w, transpose), length, M, dtype, device);
}

size_t hqq_cuda_wide_workspace(const hqq_weight *weight, int64_t M, int transpose,
                               const hqq_cuda_device *device)
{
    hqq_wide_grid grid = hqq_cuda_wide_grid(weight, M, transpose, device);
    if (grid.splits == 1 || grid.cluster) return 0;
    return (size_t)grid.splits * (size_t)M * (size_t)outputs_of(weight, transpose) *
           sizeof(float);
}

/* ---- the launch ------------------------------------------------------------------------- */

static hqq_wide_arguments arguments_of(void *out, const void *in, int64_t ld_in,
                                       const hqq_weight *w, int64_t M,
                                       const hqq_wide_grid *grid, int64_t outputs, int adds)
{
    return (hqq_wide_arguments){
        .packed = w->packed,
        .scale = w->scale,
        .zero = w->zero,
        .in = in,
        .ld_in = ld_in,
        .out = out,
        .M = (int)M,
        .N = (int)w->out_features,
        .K = (int)w->in_features,
        .groups_per_row = (int)(w->in_features / w->group_size),
        .chunks_per_group = (int)(w->group_size / HQQ_WIDE_CHUNK),
        .chunks = (int)grid->chunks,
        .splits = (int)grid->splits,
        .chunks_per_split = (int)grid->chunks_per_split,
        .tokens = (int)grid->tokens,
        .cluster = grid->cluster,
        .token_tiles = (int)grid->token_tiles,
        .output_tiles = (int)grid->output_tiles,
        .in_aligned = (uintptr_t)in % 16 == 0 && (ld_in % 8 == 0 || M == 1),
        .out_aligned = (uintptr_t)out % 16 == 0 && outputs % 8 == 0,
        .adds = adds,
    };
}

hqq_status hqq_cuda_wide_product(void *out, const void *in, int64_t ld_in,
                                 const hqq_weight *weight, const hqq_addend *addend, int64_t M,
                                 hqq_dtype dtype, int transpose, void *workspace,
                                 const hqq_cuda_device *device, void *stream)
{
    int adds = addend->bias || addend->rank > 0;
    int64_t outputs = outputs_of(weight, transpose);
    hqq_wide_grid grid = hqq_cuda_wide_grid(weight, M, transpose, device);
    if (M == 1) ld_in = 0; /* its stride is never used, and may be anything */
    hqq_wide_arguments a = arguments_of(out, in, ld_in, weight, M, &grid, outputs, adds);
    const int leaves = grid.splits > 1 && !grid.cluster; /* parts in the workspace */
    if (leaves) a.partial = workspace;
    if (adds) HQQ_TRY(hqq_cuda_write_addend(out, dtype, addend, M, outputs, stream));
#if HQQ_CUDA_HAS_WIDE
    HQQ_TRY(dtype == HQQ_BF16 ? hqq_wide_launch_bf16(&a, weight->nbits, transpose, stream)
                              : hqq_wide_launch_f16(&a, weight->nbits, transpose, stream));
    return leaves ? hqq_wide_launch_sum(&a, dtype, outputs, stream) : HQQ_OK;
#else
    (void)stream;
    return hqq_fail(HQQ_UNSUPPORTED, "no kernel of many tokens in this build");
#endif
}

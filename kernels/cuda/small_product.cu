/* Which products the small-M kernels serve, how their grid is cut, and their launch. */
#include "small_product.h"

#include <math.h>

#include "block_width.h"

#include "cuda.cuh"
#include "small_dot.h"
#include "small_launch.h"

/* ---- what is served --------------------------------------------------------------------- */

/* By small_kernel.cuh: see small_layout.cuh. */
static int tensor_cores_serve(const hqq_weight *w, int64_t M, hqq_dtype dtype)
{
    const int64_t most = INT64_C(65535) * 256; /* outputs of a grid; and sizes are ints */
    hqq_layout l =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    return dtype != HQQ_F32 && w->meta_dtype == dtype && hqq_rows_align(&l) &&
           hqq_groups_align(&l) && l.K % HQQ_CHUNK == 0 && l.G % HQQ_CHUNK == 0 && M <= most &&
           l.N <= most && l.K <= most && l.elements / 8 < INT32_MAX &&
           (uintptr_t)w->packed % 16 == 0;
}

int hqq_cuda_small_serves(const hqq_weight *w, int64_t M, hqq_dtype dtype, int transpose)
{
    return tensor_cores_serve(w, M, dtype) || hqq_small_dot_serves(w, M, transpose);
}

/* ---- the grid --------------------------------------------------------------------------- */

typedef struct small_grid {
    int token_tiles, tokens; /* of 8, 16 or 64 */
    int64_t units, chunks;
    int warps;                /* of a block */
    int ways, units_of_block; /* ways * units_of_block = warps */
    int64_t unit_blocks;
    int splits, chunks_per_split, chunks_per_way; /* the last ones may have fewer */
    int paired;                                   /* see small_pair.cuh */
} small_grid;

/* What begins at a multiple of so many chunks is staged fast: forward at axis 1 reads the
 * scales of four at once (see meta_aligned); dgrad at axis 0 a panel's tokens (see
 * small_stage.cuh). */
static int chunk_step(int transpose, int axis, int tokens)
{
    if (transpose == 0) return axis == 1 ? 4 : 1;
    return axis == 1 ? 1 : tokens == 64 ? 4 : 8;
}

/* A part of `whole` where there are `parts`, a multiple of `step` if it is not the whole. */
static int64_t part_of(int64_t whole, int parts, int step)
{
    if (parts == 1) return whole;
    return ((whole + parts - 1) / parts + step - 1) / step * step;
}

/* Cuts the reduction of each unit into splits, and these into ways; fewer splits where that
 * many would leave some without any. */
static void cut_reduction(small_grid *g, int ways, int splits, int step)
{
    int64_t split = part_of(g->chunks, splits, step);
    g->ways = ways;
    g->units_of_block = g->warps / ways;
    g->unit_blocks = (g->units + g->units_of_block - 1) / g->units_of_block;
    g->chunks_per_split = (int)split;
    g->chunks_per_way = (int)part_of(split, ways, step);
    g->splits = (int)((g->chunks + split - 1) / split);
    g->paired = 0;
}

static int chunks_of_way(const small_grid *g, int way)
{
    int left = g->chunks_per_split - way * g->chunks_per_way;
    return left < 0 ? 0 : left < g->chunks_per_way ? left : g->chunks_per_way;
}

/* Chunks of the busiest quarter of a block's multiprocessor: warps 0 and 4 are of ways 0 and
 * ways / 2. */
static int busiest_chunks(const small_grid *g)
{
    return chunks_of_way(g, 0) + (g->warps == 8 ? chunks_of_way(g, g->ways / 2) : 0);
}

/* From the last chunk of a pair to its sums, in microseconds: half of a block's to its own
 * shared memory, a barrier, as much from the other's; benchmarks/sass/assumptions.py has the
 * sources. */
static double meeting(const small_grid *g, double cycles_per_us)
{
    const double barrier = 0.21, latency = 0.11, own_rate = 128, other_rate = 16;
    double half = 128.0 * g->tokens * g->units_of_block / cycles_per_us;
    double time = half / own_rate + barrier + latency + half / other_rate;
    return g->splits == 2 ? time + 0.03 : time; /* the other hides behind stores or parts */
}

/* From there, or from the last chunk of a split, to the sums of all: a block's arrival, then
 * the parts that the last one reads, with a wait for some of them at a time, and no faster than
 * a multiprocessor can read. */
static double parts_end(const small_grid *g, double cycles_per_us, double arrival)
{
    double wait = g->tokens == 8 ? 0.05 : g->tokens == 16 ? 0.1 : g->ways > 1 ? 0.1 : 0.2;
    double read = 256.0 * g->tokens * g->units_of_block / (64 * cycles_per_us);
    int parts_read = g->tokens == 64 ? g->splits : g->splits - 1; /* else its own is kept */
    if (g->paired) {
        wait = g->tokens == 16 ? 0.05 : 0.2;
        read /= 2;
        parts_read = g->splits / 2 - 1;
    }
    return arrival + (wait > read ? wait : read) * parts_read;
}

/*
 * A prediction of the time in microseconds, with an H100's figures from compute capability 9.0
 * on and an A100's below, each for one multiprocessor: what is read from memory, which also
 * wants enough bytes under way to hide its latency; what moves through L2, where each block
 * reads all tokens of its part of the reduction, and split sums are written and read; the
 * instructions of the fullest multiprocessor; and the end of a sum that several warps or blocks
 * share.
 */
static double predicted_time(const small_grid *g, const hqq_weight *w, int64_t M, int transpose,
                             const hqq_cuda_device *device)
{
    const int newer = device->compute_capability >= 90;
    const double memory_rate = newer ? 19e3 : 14e3, cache_rate = 35e3; /* bytes/us */
    const double under_way_wanted = 16e3, cycles_per_us = newer ? 1450 : 1200;
    const double chunk_of_mma = newer ? 850 : 1024; /* cycles of 128, one after the other */
    double sm = device->multiprocessors > 0 ? device->multiprocessors : 1;
    double along = (w->axis == 1) != (transpose == 1); /* scales belong to an output */
    double blocks = (double)g->unit_blocks * g->token_tiles * g->splits;
    double pieces = (double)g->units * (double)g->chunks * g->token_tiles; /* of 64 x 64 */
    double codes = 512.0 * w->nbits;

    double on_one = ceil(blocks / sm);
    double stages = g->tokens == 64 ? 2 : w->nbits == 8 ? 1 : 3;
    double residents = g->tokens == 64 ? 8.0 / g->warps : 2;
    double resident = blocks / sm < residents ? blocks / sm : residents;
    double under_way = resident * g->warps * stages * codes;
    double memory = pieces / g->token_tiles * (codes + 256) / memory_rate / sm;
    if (under_way < under_way_wanted) memory *= under_way_wanted / under_way;

    double meta = w->axis == 0 ? 256 : !transpose ? 512 : 4096.0 / g->units_of_block;
    double tokens = 128.0 * (double)M * (double)g->unit_blocks * (double)g->chunks;
    int left = g->paired ? g->splits / 2 : g->splits; /* parts of a sum in the workspace */
    double parts = 256.0 * g->tokens * g->token_tiles * (double)g->units * left;
    double cache = pieces * (codes + meta) + tokens + (left > 1 ? 2 * parts : 0);
    cache /= cache_rate * sm;

    /* cycles of a quarter of a multiprocessor for one chunk: issued, or 128 mma */
    double unpack = along ? (transpose ? 380 : 305) : (transpose ? 455 : 400);
    if (g->tokens == 16) unpack += along ? 70 : 30;
    double stage = g->tokens == 64 ? 6 : along ? 10 : 5; /* a token */
    double chunk = (g->tokens == 64 ? 600 : unpack) + stage * g->tokens / g->units_of_block;
    if (g->tokens == 64 && chunk < chunk_of_mma) chunk = chunk_of_mma;
    double issue = on_one * busiest_chunks(g) * chunk / cycles_per_us;

    double time = memory > cache ? memory : cache;
    if (issue > time) time = issue;
    if (g->ways > 1) time += 0.2;
    if (g->paired) /* where a block is alone on a multiprocessor, every wave waits */
        time += meeting(g, cycles_per_us) * (residents == 1 ? on_one : 1);
    if (left > 1) time += parts_end(g, cycles_per_us, newer ? 0.65 : 1.0);
    return time;
}

/* Dynamic shared memory of a block; some is static. */
static int shared_most(const hqq_cuda_device *device)
{
    return (int)device->shared_bytes - 1024;
}

/* Of the generations whose clusters are known: GeForce's 12.0 has them in name. */
static int pairs_serve(const hqq_cuda_device *device)
{
    return device->has_clusters && device->compute_capability >= 90 &&
           device->compute_capability < 120;
}

static small_grid small_grid_of(const hqq_weight *w, int64_t M, int transpose,
                                const hqq_cuda_device *device)
{
    small_grid g, best;
    int64_t outputs = transpose ? w->in_features : w->out_features;
    int64_t reduced = transpose ? w->out_features : w->in_features;
    g.tokens = M <= 8 ? 8 : M <= 16 ? 16 : 64;
    g.token_tiles = (int)((M + g.tokens - 1) / g.tokens);
    g.units = (outputs + HQQ_UNIT - 1) / HQQ_UNIT;
    g.chunks = (reduced + HQQ_CHUNK - 1) / HQQ_CHUNK;
    g.warps = hqq_small_warps(g.tokens, w->nbits);
    int step = chunk_step(transpose, w->axis, g.tokens);
    cut_reduction(&g, 1, 1, step);
    best = g;
    double least = predicted_time(&g, w, M, transpose, device);
    for (int ways = 1; ways <= 4; ways *= 2)
        for (int splits = 1; splits <= 64; splits++) {
            if (2 * ways * splits > g.chunks) break;
            if (ways > 1 && hqq_small_shared_most(g.tokens, ways) > shared_most(device)) break;
            cut_reduction(&g, ways, splits, step);
            if (g.unit_blocks > 65535) break;
            for (int paired = 0; paired <= 1; paired++) {
                if (paired && !(pairs_serve(device) && hqq_small_pairs(g.tokens))) break;
                if (paired && g.splits % 2 != 0) break;
                g.paired = paired;
                double time = predicted_time(&g, w, M, transpose, device);
                if (time < least) least = time, best = g;
            }
        }
    return best;
}

double hqq_cuda_small_cost(const hqq_weight *w, int64_t M, int transpose,
                           const hqq_cuda_device *device)
{
    small_grid g = small_grid_of(w, M, transpose, device);
    return predicted_time(&g, w, M, transpose, device) * HQQ_CUDA_OPERATIONS_A_MICROSECOND +
           HQQ_CUDA_LAUNCH_OPERATIONS;
}

/* What says which parts have arrived, then the parts; for pairs too, which need less: code for
 * older devices has none. */
static size_t arrived_bytes(const small_grid *g)
{
    return ((size_t)g->unit_blocks * (size_t)g->token_tiles * (size_t)g->splits * 16 + 63) /
           64 * 64;
}

size_t hqq_cuda_small_workspace(const hqq_weight *w, int64_t M, hqq_dtype dtype, int transpose,
                                const hqq_cuda_device *device)
{
    if (!tensor_cores_serve(w, M, dtype)) return 0;
    small_grid g = small_grid_of(w, M, transpose, device);
    if (g.splits == 1) return 0;
    size_t part = (size_t)g.units_of_block * HQQ_UNIT * (size_t)g.tokens * sizeof(float);
    return arrived_bytes(&g) +
           (size_t)g.unit_blocks * (size_t)g.token_tiles * (size_t)g.splits * part;
}

/* ---- launch ----------------------------------------------------------------------------- */

hqq_status hqq_cuda_small_product(void *out, const void *in, int64_t ld_in, const hqq_weight *w,
                                  const hqq_addend *addend, int64_t M, hqq_dtype dtype,
                                  int transpose, void *workspace, const hqq_cuda_device *device,
                                  void *stream)
{
    if (!tensor_cores_serve(w, M, dtype))
        return hqq_small_dot(out, in, ld_in, w, addend, M, dtype, transpose, stream);
    small_grid g = small_grid_of(w, M, transpose, device);
    hqq_small_arguments a = {};
    a.packed = static_cast<const unsigned char *>(w->packed);
    a.scale = w->scale;
    a.zero = w->zero;
    a.in = in;
    a.ld_in = ld_in;
    a.out = out;
    a.M = (int)M;
    a.N = (int)w->out_features;
    a.K = (int)w->in_features;
    a.groups_per_row = (int)(w->in_features / w->group_size);
    a.residues = (int)(w->out_features / w->group_size);
    a.chunks_per_group = (int)(w->group_size / HQQ_CHUNK);
    a.units = (int)g.units;
    a.chunks = (int)g.chunks;
    a.chunks_per_split = g.chunks_per_split;
    a.chunks_per_way = g.chunks_per_way;
    a.meta_aligned = a.chunks_per_group == 1 && a.groups_per_row % 4 == 0 &&
                     (g.chunks_per_split % 4 == 0 || g.splits == 1) &&
                     (g.chunks_per_way % 4 == 0 || g.ways == 1) &&
                     ((uintptr_t)w->scale | (uintptr_t)w->zero) % 8 == 0;
    a.in_aligned = (uintptr_t)in % 16 == 0 && ld_in % 8 == 0;
    a.out_aligned = (uintptr_t)out % 16 == 0;
    a.counts_splits = device->compute_capability >= 90;
    a.paired = g.paired;
    a.addend = *addend;
    if (g.splits > 1) {
        a.arrived = workspace;
        a.partial =
            reinterpret_cast<float *>(static_cast<char *>(workspace) + arrived_bytes(&g));
    }
    a.tokens = g.tokens;
    a.ways = g.ways;
    while (1 << a.unit_bits < g.units_of_block) a.unit_bits++;
    a.unit_blocks = (int)g.unit_blocks;
    a.token_tiles = g.token_tiles;
    a.splits = g.splits;
    a.shared_most = shared_most(device);
    if (dtype == HQQ_BF16)
        return hqq_small_launch_bf16(&a, w->nbits, transpose, w->axis, stream);
    return hqq_small_launch_f16(&a, w->nbits, transpose, w->axis, stream);
}

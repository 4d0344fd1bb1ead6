/* Which products the small-M kernels serve, how their grid is cut, and their launch. */
#include "small_product.h"

#include "cuda.cuh"
#include "small_dot.h"
#include "small_launch.h"

/* ---- what is served --------------------------------------------------------------------- */

/* By small_kernel.cuh: see small_layout.cuh. */
static int tensor_cores_serve(const hqq_weight *w, int64_t M, hqq_dtype dtype)
{
    const int64_t most = INT64_C(1)
                         << 24; /* of a size: 65535 blocks of 256 outputs, and ints */
    hqq_layout l =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    return dtype != HQQ_F32 && w->meta_dtype == dtype && hqq_rows_align(&l) &&
           hqq_groups_align(&l) && l.K % HQQ_CHUNK == 0 && l.G % HQQ_CHUNK == 0 && M < most &&
           l.N < most && l.K < most && l.elements / 8 < INT32_MAX &&
           (uintptr_t)w->packed % 16 == 0;
}

int hqq_cuda_small_serves(const hqq_weight *w, int64_t M, hqq_dtype dtype, int transpose)
{
    return tensor_cores_serve(w, M, dtype) || hqq_small_dot_serves(w, M, transpose);
}

/* ---- the grid --------------------------------------------------------------------------- */

typedef struct small_grid {
    int token_tiles, tokens; /* of 8, 16 or 64 */
    int64_t units, unit_blocks, chunks;
    int64_t tiles; /* unit_blocks * token_tiles */
    int warps;     /* of a block */
    int splits, chunks_per_split;
} small_grid;

/* Blocks of a multiprocessor: by their registers for 64 tokens, else by their shared memory, of
 * which compute capability 8.6 and 8.9 have less than half. */
static int resident_blocks(const small_grid *g, const hqq_cuda_device *device)
{
    if (g->tokens == 64) return 8 / g->warps;
    return device->shared_bytes >= 160 * 1024 ? 3 : 2;
}

/* Chunks of a block, where the reduction is split so many times. */
static int chunks_of_split(const small_grid *g, int splits)
{
    int64_t chunks = (g->chunks + splits - 1) / splits;
    if (splits > 1) chunks = (chunks + 3) / 4 * 4; /* see meta_aligned */
    return (int)chunks;
}

/* A prediction of the time, in chunks (about a microsecond on an H100): the waves of blocks,
 * each with a chunk's time to start and end; and for a split the counters' memset, the wait for
 * the last part, and adding the parts, of which a block has 4, 2 or 1 on their way at a time.
 */
static double cost_of_splits(const small_grid *g, int splits, const hqq_cuda_device *device)
{
    int64_t slots = (int64_t)resident_blocks(g, device) * device->multiprocessors;
    int64_t waves = (g->tiles * splits + slots - 1) / slots;
    double cost = (double)waves * (chunks_of_split(g, splits) + 1);
    double add = g->tokens == 8 ? 0.05 : g->tokens == 16 ? 0.1 : 0.25;
    return splits == 1 ? cost : cost + 2.0 + add * splits;
}

static small_grid small_grid_of(const hqq_weight *w, int64_t M, int transpose,
                                const hqq_cuda_device *device)
{
    small_grid g;
    int64_t outputs = transpose ? w->in_features : w->out_features;
    int64_t reduced = transpose ? w->out_features : w->in_features;
    g.tokens = M <= 8 ? 8 : M <= 16 ? 16 : 64;
    g.token_tiles = (int)((M + g.tokens - 1) / g.tokens);
    g.units = (outputs + HQQ_UNIT - 1) / HQQ_UNIT;
    g.chunks = (reduced + HQQ_CHUNK - 1) / HQQ_CHUNK;
    g.warps = hqq_small_warps(g.tokens, w->nbits);
    g.unit_blocks = (g.units + g.warps - 1) / g.warps;
    g.tiles = g.unit_blocks * g.token_tiles;
    int best = 1;
    for (int splits = 2; splits <= 64 && splits * 2 <= g.chunks; splits++)
        if (cost_of_splits(&g, splits, device) < cost_of_splits(&g, best, device))
            best = splits;
    g.chunks_per_split = chunks_of_split(&g, best);
    g.splits = (int)((g.chunks + g.chunks_per_split - 1) / g.chunks_per_split);
    return g;
}

/* Counters first, then the parts. */
static size_t counter_bytes(const small_grid *g)
{
    return ((size_t)g->tiles * sizeof(unsigned) + 63) / 64 * 64;
}

size_t hqq_cuda_small_workspace(const hqq_weight *w, int64_t M, hqq_dtype dtype, int transpose,
                                const hqq_cuda_device *device)
{
    if (!tensor_cores_serve(w, M, dtype)) return 0;
    small_grid g = small_grid_of(w, M, transpose, device);
    if (g.splits == 1) return 0;
    size_t part = (size_t)g.warps * HQQ_UNIT * (size_t)g.tokens * sizeof(float);
    return counter_bytes(&g) + (size_t)g.tiles * (size_t)g.splits * part;
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
    a.meta_aligned = a.chunks_per_group == 1 && a.groups_per_row % 4 == 0 &&
                     g.chunks_per_split % 4 == 0 &&
                     ((uintptr_t)w->scale | (uintptr_t)w->zero) % 8 == 0;
    a.in_aligned = (uintptr_t)in % 16 == 0 && ld_in % 8 == 0;
    a.out_aligned = (uintptr_t)out % 16 == 0;
    a.addend = *addend;
    if (g.splits > 1) {
        a.arrived = static_cast<unsigned *>(workspace);
        a.partial =
            reinterpret_cast<float *>(static_cast<char *>(workspace) + counter_bytes(&g));
        HQQ_TRY(hqq_cuda_fill_zero(workspace, counter_bytes(&g), stream));
    }
    a.tokens = g.tokens;
    a.unit_blocks = (int)g.unit_blocks;
    a.token_tiles = g.token_tiles;
    a.splits = g.splits;
    if (dtype == HQQ_BF16)
        return hqq_small_launch_bf16(&a, w->nbits, transpose, w->axis, stream);
    return hqq_small_launch_f16(&a, w->nbits, transpose, w->axis, stream);
}

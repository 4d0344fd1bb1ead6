/*
 * Input gradient for few rows: chunks are blocks of columns of dx, cut further into parts of
 * the rows of W where the columns alone would be too few for the threads. Parts are summed in
 * their order afterwards. Columns and parts follow from the shape alone, so the result does
 * not depend on the threads.
 */
#include "direct_dgrad.h"

#include "code_runs.h"
#include "direct_tile.h"
#include "parallel.h"
#include "workspace.h"

#define WANTED_CHUNKS    64
#define MIN_ROWS_OF_PART 128

static int64_t column_blocks(int64_t K)
{
    return (K + HQQ_DGRAD_COLUMNS - 1) / HQQ_DGRAD_COLUMNS;
}

/* At most 64 / M parts: writing and reading the partial sums stays small beside the codes. */
static int64_t parts_of(int64_t N, int64_t K, int64_t M)
{
    int64_t parts = WANTED_CHUNKS / column_blocks(K);
    if (parts > 64 / M) parts = 64 / M;
    if (parts > N / MIN_ROWS_OF_PART) parts = N / MIN_ROWS_OF_PART;
    return parts > 1 ? parts : 1;
}

/* Cuts the workspace, and sets the job's pointers into it. */
static float *take_workspace(hqq_direct_dgrad_job *job, hqq_arena *arena)
{
    int64_t N = job->weight->out_features, K = job->weight->in_features, M = job->M;
    float *dy_t = hqq_arena_take(arena, (size_t)(N * M) * sizeof(float));
    job->dy_t = dy_t;
    job->parts = parts_of(N, K, M);
    if (job->parts > 1)
        job->partial = hqq_arena_take(arena, (size_t)(job->parts * M * K) * sizeof(float));
    return dy_t;
}

size_t hqq_direct_dgrad_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype)
{
    hqq_arena arena = {0};
    hqq_direct_dgrad_job job = {.weight = weight, .M = M, .dtype = dtype};
    take_workspace(&job, &arena);
    return arena.used;
}

static size_t scratch_bytes(void)
{
    hqq_arena arena = {0};
    hqq_direct_tile_take(&arena);
    hqq_arena_take(&arena, HQQ_DGRAD_ROWS * HQQ_DGRAD_COLUMNS * sizeof(float));
    return arena.used;
}

static void columns_of(int64_t block, int64_t K, int64_t *begin, int64_t *end)
{
    *begin = block * HQQ_DGRAD_COLUMNS;
    *end = *begin + HQQ_DGRAD_COLUMNS < K ? *begin + HQQ_DGRAD_COLUMNS : K;
}

static hqq_status dgrad_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_direct_dgrad_job *job = data;
    int64_t begin, end;
    columns_of(chunk / job->parts, job->weight->in_features, &begin, &end);
    HQQ_ISA_SELECT(job->isa, hqq_direct_dgrad_columns)
    (job, chunk % job->parts, begin, end, scratch);
    return HQQ_OK;
}

static hqq_status reduce_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_direct_dgrad_job *job = data;
    int64_t begin, end;
    (void)scratch;
    columns_of(chunk, job->weight->in_features, &begin, &end);
    HQQ_ISA_SELECT(job->isa, hqq_direct_dgrad_reduce)(job, begin, end);
    return HQQ_OK;
}

hqq_status hqq_direct_dgrad(void *dx, const void *dy, int64_t lddy, const hqq_weight *weight,
                            const float *addend, int64_t M, hqq_dtype dtype, void *workspace,
                            hqq_isa isa, const hqq_context *context)
{
    hqq_layout layout = hqq_weight_layout(weight);
    hqq_direct_dgrad_job job = {.dx = dx, .weight = weight, .addend = addend, .M = M,
                                .dtype = dtype, .sets = hqq_row_sets_of(&layout), .isa = isa};
    hqq_arena arena = {.base = workspace};
    float *dy_t = take_workspace(&job, &arena);
    HQQ_ISA_SELECT(isa, hqq_transpose_rows)(dy_t, dy, lddy, dtype, M, layout.N);
    int64_t blocks = column_blocks(layout.K);
    hqq_status status =
        hqq_for_each_chunk(blocks * job.parts, dgrad_chunk, &job, scratch_bytes(), context);
    if (status != HQQ_OK || job.parts == 1) return status;
    return hqq_for_each_chunk(blocks, reduce_chunk, &job, 0, context);
}

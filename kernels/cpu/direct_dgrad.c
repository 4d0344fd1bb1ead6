/*
 * Input gradient for few rows: chunks are blocks of columns of dx, cut further into parts of
 * the rows of W where the columns alone would be too few for the threads. Parts are summed in
 * their order afterwards. Columns and parts follow from the shape alone, so the result does
 * not depend on the threads.
 */
#include "direct_dgrad.h"

#include "code_runs.h"
#include "parallel.h"

#define WANTED_CHUNKS    32
#define MIN_ROWS_OF_PART 128

static int64_t column_blocks(const hqq_direct_dgrad_job *job)
{
    return (job->layout.K + job->columns - 1) / job->columns;
}

/* At most 64 / M parts: writing and reading the partial sums stays small beside the codes. */
static int64_t parts_of(const hqq_direct_dgrad_job *job)
{
    int64_t parts = WANTED_CHUNKS / column_blocks(job);
    if (parts > 64 / job->M) parts = 64 / job->M;
    if (parts > job->layout.N / MIN_ROWS_OF_PART) parts = job->layout.N / MIN_ROWS_OF_PART;
    return parts > 1 ? parts : 1;
}

static int64_t columns_of(const hqq_layout *l, int64_t M)
{
    int64_t tokens = M <= 4 ? 4 : M <= 8 ? 8 : HQQ_DGRAD_ANY_TOKENS;
    if (hqq_vectors_align(l)) tokens = hqq_tokens_at_once(M, 8);
    int64_t columns = HQQ_DGRAD_SUMS / tokens;
    return columns < HQQ_DGRAD_MAX_COLUMNS ? columns : HQQ_DGRAD_MAX_COLUMNS;
}

/* Cuts the workspace, and sets the job's pointers into it. */
static float *take_workspace(hqq_direct_dgrad_job *job, hqq_arena *arena)
{
    int64_t N = job->layout.N, K = job->layout.K, M = job->M;
    job->columns = columns_of(&job->layout, M);
    job->ld_dy = hqq_padded_tokens(M);
    float *dy_t = hqq_arena_take(arena, (size_t)(N * job->ld_dy) * sizeof(float));
    job->dy_t = dy_t;
    job->parts = parts_of(job);
    if (job->parts > 1)
        job->partial = hqq_arena_take(arena, (size_t)(job->parts * M * K) * sizeof(float));
    return dy_t;
}

size_t hqq_direct_dgrad_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype)
{
    hqq_arena arena = {0};
    hqq_direct_dgrad_job job = {
        .weight = weight, .layout = hqq_weight_layout(weight), .M = M, .dtype = dtype};
    take_workspace(&job, &arena);
    return arena.used;
}

static size_t scratch_bytes(int64_t columns)
{
    hqq_arena arena = {0};
    hqq_dgrad_scratch_take(&arena, columns);
    return arena.used;
}

static void block_columns(const hqq_direct_dgrad_job *job, int64_t block, int64_t *begin,
                          int64_t *end)
{
    *begin = block * job->columns;
    *end = *begin + job->columns < job->layout.K ? *begin + job->columns : job->layout.K;
}

static hqq_status dgrad_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_direct_dgrad_job *job = data;
    int64_t begin, end;
    block_columns(job, chunk / job->parts, &begin, &end);
    if (hqq_vectors_align(&job->layout)) HQQ_ISA_SELECT(job->isa, hqq_direct_dgrad_aligned)
    (job, chunk % job->parts, begin, end, scratch);
    else HQQ_ISA_SELECT(job->isa, hqq_direct_dgrad_any)(job, chunk % job->parts, begin, end,
                                                        scratch);
    return HQQ_OK;
}

static hqq_status reduce_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_direct_dgrad_job *job = data;
    int64_t begin, end;
    (void)scratch;
    block_columns(job, chunk, &begin, &end);
    HQQ_ISA_SELECT(job->isa, hqq_dgrad_reduce)(job, begin, end);
    return HQQ_OK;
}

hqq_status hqq_direct_dgrad(void *dx, const void *dy, int64_t lddy, const hqq_weight *weight,
                            const float *addend, int64_t M, hqq_dtype dtype, void *workspace,
                            hqq_isa isa, const hqq_context *context)
{
    hqq_layout layout = hqq_weight_layout(weight);
    if (layout.planes && hqq_vectors_align(&layout)) layout = hqq_layout_of_planes(&layout, 8);
    hqq_direct_dgrad_job job = {.dx = dx,
                                .weight = weight,
                                .layout = layout,
                                .addend = addend,
                                .M = M,
                                .dtype = dtype,
                                .sets = hqq_row_sets_of(&layout),
                                .pairs = hqq_direct_dgrad_in_pairs(&layout, dtype, isa),
                                .isa = isa};
    hqq_arena arena = {.base = workspace};
    float *dy_t = take_workspace(&job, &arena);
    HQQ_ISA_SELECT(isa, hqq_transpose_rows)(dy_t, job.ld_dy, dy, lddy, dtype, M, layout.N);
    int64_t blocks = column_blocks(&job);
    hqq_status status = hqq_for_each_chunk_in_runs(blocks * job.parts, dgrad_chunk, &job,
                                                   scratch_bytes(job.columns), context);
    if (status != HQQ_OK || job.parts == 1) return status;
    return hqq_for_each_chunk(blocks, reduce_chunk, &job, 0, context);
}

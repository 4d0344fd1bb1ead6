/* Cuts a product in AMX tiles into panels of tokens and chunks, packs the input of a panel, and
 * begins each chunk with its part of the LoRA product. */
#include "amx.h"

#include "amx_rows.h"
#include "code_runs.h"
#include "dtype.h"
#include "integers.h"
#include "lora.h"
#include "parallel.h"
#include "status.h"
#include "workspace.h"

/*
 * What stays in cache. Forward: a pair of tiles of W, 32 rows of 512 columns, takes 32 KB of
 * the first one in bf16, and all tokens of the panel pass by it; dgrad: a pair of token tiles
 * takes as much, and all columns of a decoded block pass by. Three parts have half as long
 * blocks. Where a panel is a pair of token tiles at most, a tile of W is read once, and forward
 * decodes longer rows for less. The second cache holds a panel's packed input of a block and
 * the sums of a chunk, 512 KB each at most.
 */
#define BLOCK         512
#define BLOCK_OF_FEW  2048
#define FEW_TOKENS    (2 * HQQ_AMX_TOKENS)
#define PANEL_BYTES   (INT64_C(512) << 10)
#define SUMS_BYTES    (INT64_C(512) << 10)
#define CHUNK_ROWS    256
#define CHUNK_COLUMNS 512 /* where there are few tokens; 256 at least */
/* Chunks are made smaller until there are that many. */
#define WANTED_CHUNKS 8

/* Of the reduction at a time: columns, or rows of W, at most. */
static int64_t block_limit(const hqq_amx_job *job, int64_t M)
{
    int64_t limit = M <= FEW_TOKENS && !job->transpose ? BLOCK_OF_FEW : BLOCK;
    return job->parts == 3 ? limit / 2 : limit;
}

static hqq_amx_job job_of(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose)
{
    hqq_amx_job job = {.weight = weight, .dtype = dtype, .transpose = transpose};
    job.layout = hqq_weight_layout(weight);
    job.sets = hqq_row_sets_of(&job.layout);
    job.group_sets = job.sets.slots == 1 ? 32 : 16;
    job.group_rows = job.group_sets * job.sets.slots;
    job.parts = dtype == HQQ_BF16 ? 1 : dtype == HQQ_F16 ? 2 : HQQ_AMX_PARTS;
    int64_t limit = block_limit(&job, M);
    job.reduction = transpose ? job.sets.sets : job.layout.K;
    job.block = transpose ? hqq_most(limit / job.group_rows, 1) * job.group_sets
                          : hqq_even_part(job.layout.K, limit, HQQ_AMX_STEP);
    return job;
}

static int64_t panel_tokens(const hqq_amx_job *job, int64_t M)
{
    int64_t limit = PANEL_BYTES / (block_limit(job, M) * 2 * job->parts);
    return hqq_even_part(M, hqq_most(limit, FEW_TOKENS), HQQ_AMX_TOKENS);
}

/* Steps of the whole reduction. */
static int64_t all_steps(const hqq_amx_job *job)
{
    return job->transpose ? hqq_amx_steps_of_sets(job, job->reduction)
                          : hqq_ceil_div(job->reduction, HQQ_AMX_STEP);
}

size_t hqq_amx_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose)
{
    if (M == 0) return 0;
    hqq_amx_job job = job_of(weight, M, dtype, transpose);
    int64_t tiles = panel_tokens(&job, M) / HQQ_AMX_TOKENS * all_steps(&job);
    return (size_t)(tiles * job.parts) * HQQ_AMX_BYTES;
}

static size_t take_scratch(hqq_amx_chunk *c, void *scratch)
{
    const hqq_amx_job *job = c->job;
    int transpose = job->transpose;
    hqq_arena arena = {.base = scratch};
    int64_t tokens = hqq_amx_token_tiles(job) * HQQ_AMX_TOKENS, parts = job->parts;
    int64_t width =
        transpose ? hqq_ceil_div(job->width, 32) * 32 : job->width * job->sets.slots;
    int64_t ld = transpose ? width : hqq_amx_stride(job->block);
    int64_t weights =
        transpose ? width * (job->block / job->group_sets * job->group_rows) : 32 * ld;
    c->ld_addend = width;
    c->sums = hqq_arena_take(&arena, (size_t)(width * tokens) * 4);
    c->carry = hqq_arena_take(&arena, 4096);
    c->rows = hqq_arena_take(&arena, (size_t)(16 * ld) * 4);
    c->weights = hqq_arena_take(&arena, (size_t)(weights * parts) * 2);
    if (job->lora) c->addend = hqq_arena_take(&arena, (size_t)(width * tokens) * 4);
    return arena.used;
}

static hqq_status pack_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_amx_job *job = data;
    int64_t tiles = hqq_amx_token_tiles(job), begin = chunk / tiles * job->block;
    int64_t end = hqq_least(begin + job->block, job->reduction);
    (void)scratch;
    (job->transpose ? hqq_amx_pack_dy : hqq_amx_pack_x)(job, chunk % tiles, begin, end);
    return HQQ_OK;
}

/* Panel by panel: packs the input, then multiplies in parts of `job->width` of `count`. */
static hqq_status run_panels(hqq_amx_job *job, int64_t M, int64_t tokens, int64_t count,
                             hqq_chunk_fn multiply_chunk, const hqq_context *context)
{
    for (int64_t m = 0; m < M; m += tokens) {
        job->m_begin = m, job->m_end = hqq_least(m + tokens, M);
        HQQ_TRY(hqq_for_each_chunk(hqq_amx_token_tiles(job) *
                                       hqq_ceil_div(job->reduction, job->block),
                                   pack_chunk, job, 0, context));
        hqq_amx_chunk measured = {.job = job};
        HQQ_TRY(hqq_for_each_chunk(hqq_ceil_div(count, job->width), multiply_chunk, job,
                                   take_scratch(&measured, NULL), context));
    }
    return HQQ_OK;
}

/* ---- forward ------------------------------------------------------------------------- */

static hqq_status begin_linear(hqq_amx_chunk *c)
{
    const hqq_amx_job *job = c->job;
    if (!job->lora) return HQQ_OK;
    hqq_context alone = {0};
    hqq_row_piece pieces[HQQ_MAX_SLOTS];
    hqq_row_pieces(pieces, &job->sets, c->begin, c->end);
    for (int j = 0; j < job->sets.slots; j++)
        HQQ_TRY(hqq_lora_addend(c->addend + j * job->width, c->ld_addend, HQQ_F32,
                                job->inner + job->m_begin * job->lora->rank, NULL, HQQ_F32,
                                job->lora, job->m_end - job->m_begin, pieces[j].first,
                                pieces[j].first + pieces[j].count, &alone));
    return HQQ_OK;
}

static hqq_status linear_chunk(int64_t chunk, void *scratch, void *data)
{
    hqq_amx_chunk c = {.job = data};
    take_scratch(&c, scratch);
    c.begin = chunk * c.job->width;
    c.end = hqq_least(c.begin + c.job->width, c.job->sets.sets);
    HQQ_TRY(begin_linear(&c));
    hqq_amx_linear_chunk(&c);
    return HQQ_OK;
}

hqq_status hqq_amx_linear(const hqq_forward *f, const float *xa, void *workspace,
                          const hqq_context *context)
{
    hqq_amx_job job = job_of(f->weight, f->M, f->dtype, 0);
    job.out = f->y, job.in = f->x, job.ld_in = f->ldx;
    job.bias = f->bias, job.bias_dtype = f->bias_dtype;
    job.lora = f->lora, job.inner = xa;
    job.input = workspace;
    int64_t rows = CHUNK_ROWS;
    while (rows > job.group_rows && job.layout.N / rows < WANTED_CHUNKS) rows /= 2;
    job.width = hqq_most(rows / job.group_rows, 1) * job.group_sets;
    return run_panels(&job, f->M, panel_tokens(&job, f->M), job.sets.sets, linear_chunk,
                      context);
}

/* ---- dgrad --------------------------------------------------------------------------- */

static hqq_status dgrad_chunk(int64_t chunk, void *scratch, void *data)
{
    hqq_amx_chunk c = {.job = data};
    const hqq_amx_job *job = c.job;
    take_scratch(&c, scratch);
    c.begin = chunk * job->width;
    c.end = hqq_least(c.begin + job->width, job->layout.K);
    hqq_context alone = {0};
    if (job->lora)
        HQQ_TRY(hqq_lora_dx_addend_rows(
            c.addend, c.ld_addend, HQQ_F32, job->inner + job->m_begin * job->lora->rank,
            job->lora, job->m_begin, job->m_end, job->layout.K, c.begin, c.end, &alone));
    hqq_amx_dgrad_chunk(&c);
    return HQQ_OK;
}

hqq_status hqq_amx_dgrad(const hqq_backward *b, const float *dyb, void *workspace,
                         const hqq_context *context)
{
    hqq_amx_job job = job_of(b->weight, b->M, b->dtype, 1);
    job.out = b->dx, job.in = b->dy, job.ld_in = b->lddy;
    job.lora = b->lora, job.inner = dyb;
    job.input = workspace;
    int64_t tokens = panel_tokens(&job, b->M);
    int64_t columns =
        hqq_most(hqq_least(SUMS_BYTES / (4 * tokens), CHUNK_COLUMNS), 256) / 64 * 64;
    while (columns > 64 && job.layout.K / columns < WANTED_CHUNKS) columns -= 64;
    job.width = hqq_even_part(job.layout.K, columns, 64);
    return run_panels(&job, b->M, tokens, job.layout.K, dgrad_chunk, context);
}

/* Forward for few rows: brings x to fp32 once and hands out chunks of row sets. */
#include "direct_linear.h"

#include "code_runs.h"
#include "direct_tile.h"
#include "dtype.h"
#include "integers.h"
#include "parallel.h"
#include "workspace.h"

/* Weights in a chunk: about 10 microseconds at M = 1; and sets, which bounds the sums kept. */
#define CHUNK_WEIGHTS  (INT64_C(1) << 18)
#define MAX_CHUNK_SETS 128

static int64_t padded_columns(int64_t K)
{
    return (K + 15) / 16 * 16;
}

size_t hqq_direct_linear_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype)
{
    hqq_arena arena = {0};
    (void)dtype;
    hqq_arena_take(&arena,
                   (size_t)(hqq_padded_tokens(M) * padded_columns(weight->in_features)) *
                       sizeof(float));
    return arena.used;
}

static size_t any_scratch(int64_t M)
{
    hqq_arena arena = {0};
    hqq_direct_tile_take(&arena);
    hqq_arena_take(&arena, (size_t)(M * HQQ_TILE_ROWS) * sizeof(float));
    return arena.used;
}

static size_t aligned_scratch(int64_t sets_in_chunk)
{
    hqq_arena arena = {0};
    hqq_linear_scratch_take(&arena, sets_in_chunk);
    return arena.used;
}

static hqq_status any_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_direct_linear_job *job = data;
    int64_t begin = chunk * job->sets_in_chunk, end = begin + job->sets_in_chunk;
    if (end > job->sets.sets) end = job->sets.sets;
    HQQ_ISA_SELECT(job->isa, hqq_direct_linear_any)(job, begin, end, scratch);
    return HQQ_OK;
}

static hqq_status aligned_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_direct_linear_job *job = data;
    int64_t begin = chunk * job->sets_in_chunk, end = begin + job->sets_in_chunk;
    if (end > job->sets.sets) end = job->sets.sets;
    HQQ_ISA_SELECT(job->isa, hqq_direct_linear_aligned)(job, begin, end, scratch);
    return HQQ_OK;
}

/* Sets that share scales share what is made of x and them: a chunk takes all of a cycle, or a
 * part without rest where there are few cycles. (4096 x 4096, 4 bits, axis 0: 33 sets in place
 * of 32 made nearly all of it twice.) And two where there are many: while the first is
 * multiplied, the next one's zeros and scales are on their way. */
static int64_t in_whole_cycles(const hqq_row_sets *sets, int64_t in_chunk)
{
    const int64_t many = 32;
    if (sets->cycle > 1 && in_chunk / sets->cycle < 2 && 2 * sets->cycle <= MAX_CHUNK_SETS &&
        sets->sets >= many * 2 * sets->cycle)
        return 2 * sets->cycle;
    if (in_chunk >= sets->cycle) return in_chunk - in_chunk % sets->cycle;
    if (sets->cycle <= MAX_CHUNK_SETS && sets->sets >= many * sets->cycle) return sets->cycle;
    return sets->cycle / hqq_ceil_div(sets->cycle, in_chunk);
}

/* A weight in planes, by as many rows that share bytes as have sums in registers. */
static hqq_layout planes_together(const hqq_layout *l, int64_t M, hqq_isa isa)
{
    int sums = isa >= HQQ_ISA_AVX512 ? 16 : 8, tokens = hqq_tokens_at_once(M, 8);
    int per = sums / tokens;
    return hqq_layout_of_planes(l, per > 8 ? 8 : per < 2 ? 2 : per);
}

hqq_status hqq_direct_linear(void *y, const void *x, int64_t ldx, const hqq_weight *weight,
                             const float *addend, int64_t M, hqq_dtype dtype, void *workspace,
                             hqq_isa isa, const hqq_context *context)
{
    hqq_layout layout = hqq_weight_layout(weight);
    if (layout.planes && hqq_vectors_align(&layout)) layout = planes_together(&layout, M, isa);
    hqq_direct_linear_job job = {.y = y,
                                 .ldx = padded_columns(layout.K),
                                 .weight = weight,
                                 .layout = layout,
                                 .addend = addend,
                                 .M = M,
                                 .dtype = dtype,
                                 .sets = hqq_row_sets_of(&layout),
                                 .isa = isa};
    hqq_arena arena = {.base = workspace};
    float *padded =
        hqq_arena_take(&arena, (size_t)(hqq_padded_tokens(M) * job.ldx) * sizeof(float));
    int aligned = hqq_vectors_align(&layout);
    job.pairs = hqq_direct_in_pairs(&layout, dtype, isa);
    if (aligned) HQQ_ISA_SELECT(isa, hqq_interleave_tokens)
    (padded, x, ldx, dtype, M, &layout, job.pairs);
    else HQQ_ISA_SELECT(isa, hqq_pad_rows)(padded, job.ldx, x, ldx, dtype, M, layout.K);
    job.x = padded;
    job.sets_in_chunk = CHUNK_WEIGHTS / (layout.K * layout.per) + 1;
    if (job.sets_in_chunk > MAX_CHUNK_SETS) job.sets_in_chunk = MAX_CHUNK_SETS;
    if (aligned) job.sets_in_chunk = in_whole_cycles(&job.sets, job.sets_in_chunk);
    int64_t chunks = hqq_ceil_div(job.sets.sets, job.sets_in_chunk);
    if (aligned)
        return hqq_for_each_chunk_in_runs(chunks, aligned_chunk, &job,
                                          aligned_scratch(job.sets_in_chunk), context);
    return hqq_for_each_chunk_in_runs(chunks, any_chunk, &job, any_scratch(M), context);
}

/* Cuts a product on panels (panels.h) into blocks and chunks. */
#include "panels.h"

#include "code_runs.h"
#include "decode_floats.h"
#include "integers.h"
#include "parallel.h"
#include "status.h"

/* Of a block of panels. It is written once and read by all threads, so it is to stay in the
 * last cache. */
#define BLOCK_BYTES (INT64_C(4) << 20)
/* The longest panel: half of a second cache of 1 MB, as each tile reads all of it. */
#define PANEL_BYTES (INT64_C(512) << 10)
/* Tokens of a chunk; fewer, until there are that many chunks. */
#define TOKENS        256
#define LEAST_TOKENS  48
#define WANTED_CHUNKS 16
/* And of the last ones, so that no thread waits long for another at the end. */
#define LAST_TOKENS 48

/*
 * Below, W as it is decoded for a few tokens, or x turned (turned.h), is read sooner. Times the
 * speed of those, 4 bits, two threads of a Zen 5, bf16 but where it says fp32:
 *
 *     M                           64      96     128     192     256     512
 *     forward  4096 x 4096      0.89    0.92    0.95    0.98    0.99    1.02
 *              14336 x 4096     0.84    0.88    0.92    0.94    0.97    1.00
 *              1024 x 2048      1.02    1.06    1.07    1.09    1.12    1.13
 *              1536 x 576       0.91    0.96    0.97    1.00    1.01    1.03
 *              1536 x 576 fp32  0.89            0.93            0.97    1.01
 *     dgrad    4096 x 4096      0.89    0.79    0.96    0.96    1.02    1.08
 *              1536 x 576       0.78    0.91    1.35    1.14    1.15    1.29
 *              4096 x 4096 fp32                         0.88    0.94    1.10
 *              14336 x 4096     0.93            1.0     1.14    1.20    1.26
 *              1024 x 2048      0.79    0.89    0.93    1.00    1.04    1.03
 *              1536 x 576       0.68    0.69    0.77    0.88    0.99    1.05
 */
static int64_t fewest_tokens(hqq_dtype dtype, int transpose)
{
    if (dtype == HQQ_F32) return transpose ? 256 : 512;
    return transpose ? 160 : 256;
}

/* Columns of a panel's longest part of the reduction. */
static int64_t longest_part(int pairs)
{
    return PANEL_BYTES / (HQQ_PANEL_COLUMNS * 4) * (pairs ? 2 : 1);
}

/* The weight may be unsound, or NULL: hqq_choose_kernel answers all the same. */
int hqq_panels_serve(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                     hqq_isa isa)
{
    if (!weight || M < fewest_tokens(dtype, transpose) || isa < HQQ_ISA_AVX512) return 0;
    int64_t reduction = transpose ? weight->out_features : weight->in_features;
    int pairs = hqq_multiplies_pairs(dtype, isa);
    if (pairs ? reduction % 2 != 0 : dtype != HQQ_F32) return 0;
    return reduction > 0 && (reduction <= longest_part(pairs) || (transpose && !pairs));
}

/* Cuts the product into blocks and parts. */
static hqq_panels_job cut(const hqq_weight *weight, hqq_dtype dtype, int transpose)
{
    hqq_panels_job job = {.transpose = transpose};
    hqq_tiled_job *p = &job.product;
    p->weight = weight;
    p->dtype = dtype;
    p->pairs = dtype == HQQ_BF16;
    p->layout = hqq_weight_layout(weight);
    job.columns = transpose ? p->layout.K : p->layout.N;
    job.reduction = transpose ? p->layout.N : p->layout.K;
    job.strips = transpose && !p->pairs && hqq_strips_decode(weight);
    job.spans = job.strips ? p->layout.per : 1;
    job.apart = job.reduction / job.spans;
    job.count = hqq_even_part(job.apart, longest_part(p->pairs) / job.spans, 1);
    job.part_steps = job.count * job.spans / (p->pairs ? 2 : 1);
    return job;
}

static int64_t panel_bytes(const hqq_panels_job *job)
{
    return job->part_steps * HQQ_PANEL_COLUMNS * 4;
}

/* Blocks, or parts of one, whose panels are in memory at a time: one is decoded while another
 * is multiplied. A weight of three panels has too few for that. */
static int64_t at_once(const hqq_panels_job *job)
{
    return job->columns > 3 * HQQ_PANEL_COLUMNS ? 2 : 1;
}

/* Panels in a block: so many that those in memory are half of the weight at most, so that it is
 * never whole there (but one of a single panel). */
static int64_t block_panels(const hqq_panels_job *job)
{
    int64_t all = hqq_ceil_div(job->columns, HQQ_PANEL_COLUMNS);
    int64_t most = hqq_least(BLOCK_BYTES / panel_bytes(job), all / 2);
    return hqq_even_part(all, hqq_most(most / at_once(job), 1), 1);
}

size_t hqq_panels_workspace(const hqq_weight *weight, hqq_dtype dtype, int transpose)
{
    hqq_panels_job job = cut(weight, dtype, transpose);
    return (size_t)(at_once(&job) * block_panels(&job) * panel_bytes(&job));
}

/* A product, as its stages see it: round after round, a part of the reduction of a block, then
 * the block's next part, then the next block. */
typedef struct panels_plan {
    hqq_panels_job job;    /* but for the round */
    int64_t blocks, parts; /* parts of a block */
    int64_t panels;        /* of a block, but maybe the last */
    int64_t at_once;       /* rounds in memory */
} panels_plan;

/* The rows of out that one kind of stage computes, `tokens` of them a chunk. */
typedef struct panels_rows {
    const panels_plan *plan;
    int64_t begin, end, tokens;
} panels_rows;

static int64_t panels_in(const panels_plan *plan, int64_t round)
{
    int64_t all = hqq_ceil_div(plan->job.columns, HQQ_PANEL_COLUMNS);
    return hqq_least(plan->panels, all - round / plan->parts * plan->panels);
}

static hqq_panels_job job_of_round(const panels_plan *plan, int64_t round)
{
    hqq_panels_job job = plan->job;
    int64_t block = round / plan->parts, part = round % plan->parts;
    job.begin = block * plan->panels * HQQ_PANEL_COLUMNS;
    job.end = hqq_least(job.begin + plan->panels * HQQ_PANEL_COLUMNS, job.columns);
    job.first = part * job.count;
    job.count = hqq_least(job.count, job.apart - job.first);
    job.steps = job.count * job.spans / (job.product.pairs ? 2 : 1);
    job.is_first = part == 0;
    job.is_last = part == plan->parts - 1;
    job.panels =
        (char *)job.panels + round % plan->at_once * plan->panels * panel_bytes(&plan->job);
    return job;
}

/* Chunks are numbered through all rounds. */
static hqq_status decode_chunk(int64_t chunk, void *scratch, void *data)
{
    const panels_plan *plan = data;
    hqq_panels_job job = job_of_round(plan, chunk / plan->panels);
    HQQ_ISA_SELECT(job.product.isa, hqq_panels_decode)(&job, chunk % plan->panels, scratch);
    return HQQ_OK;
}

/* Chunks of a round of a whole block. */
static int64_t chunks_in(const panels_rows *rows)
{
    return hqq_ceil_div(rows->end - rows->begin, rows->tokens) * rows->plan->panels;
}

static hqq_status multiply_chunk(int64_t chunk, void *scratch, void *data)
{
    const panels_rows *rows = data;
    int64_t round = chunk / chunks_in(rows), panels = panels_in(rows->plan, round);
    hqq_panels_job job = job_of_round(rows->plan, round);
    chunk %= chunks_in(rows);
    int64_t m = rows->begin + chunk / panels * rows->tokens;
    HQQ_ISA_SELECT(job.product.isa, hqq_panels_multiply)
    (&job, chunk % panels, m, hqq_least(m + rows->tokens, rows->end), scratch);
    return HQQ_OK;
}

size_t hqq_panels_decode_scratch(const hqq_panels_job *job)
{
    int64_t width = job->transpose ? HQQ_PANEL_COLUMNS : hqq_tiled_stride(job->part_steps);
    return (size_t)(HQQ_PANEL_STRIP * width * 4);
}

/* The adapter's second factor, [R][HQQ_PANEL_COLUMNS], and the bias. */
size_t hqq_panels_multiply_scratch(const hqq_panels_job *job)
{
    int64_t rank = job->product.lora ? job->product.lora->rank : 0;
    return (size_t)((rank + 1) * HQQ_PANEL_COLUMNS * 4);
}

static void add_decoding(hqq_stages *stages, panels_plan *plan, int64_t round, int after)
{
    hqq_add_stage(stages, decode_chunk, plan, round * plan->panels, panels_in(plan, round),
                  hqq_panels_decode_scratch(&plan->job), after);
}

static void add_rows(hqq_stages *stages, panels_rows *rows, int64_t round, int after)
{
    int64_t chunks = chunks_in(rows) / rows->plan->panels * panels_in(rows->plan, round);
    hqq_add_stage(stages, multiply_chunk, rows, round * chunks_in(rows), chunks,
                  hqq_panels_multiply_scratch(&rows->plan->job), after);
}

/*
 * Each round's rows in two parts, and between them the next round's panels are decoded, where
 * the one before has been multiplied:
 *
 *     decode 0 | upper 0, decode 1, lower 0 | upper 1, decode 2, lower 1 | ... | lower n
 *
 * so what a stage waits for has been done long before it. With memory for one round alone it is
 * decoded behind all of the last. Sums that a round goes on with are those of the round before:
 * `upper` has them when its panels are decoded, `lower` waits for them.
 */
static void add_rounds(hqq_stages *stages, panels_plan *plan, panels_rows *upper,
                       panels_rows *lower, panels_rows *last)
{
    add_decoding(stages, plan, 0, 0);
    int decoded = stages->count; /* so that all that the first round needs is done */
    int multiplied = 0;
    int64_t rounds = plan->blocks * plan->parts;
    for (int64_t round = 0; round < rounds; round++) {
        int more = round + 1 < rounds, ready = decoded;
        add_rows(stages, upper, round, ready);
        if (more && plan->at_once > 1) {
            add_decoding(stages, plan, round + 1, multiplied);
            decoded = stages->count;
        }
        int goes_on = round % plan->parts != 0;
        add_rows(stages, more ? lower : last, round, hqq_most(ready, goes_on ? multiplied : 0));
        multiplied = stages->count;
        if (more && plan->at_once == 1) {
            add_decoding(stages, plan, round + 1, multiplied);
            decoded = stages->count;
        }
    }
}

static hqq_status run(const hqq_panels_job *job, hqq_stages *stages, const hqq_context *context)
{
    const hqq_tiled_job *p = &job->product;
    panels_plan plan = {.job = *job, .at_once = at_once(job), .panels = block_panels(job)};
    plan.job.product.isa = hqq_isa_in_use(context);
    plan.blocks = hqq_ceil_div(hqq_ceil_div(job->columns, HQQ_PANEL_COLUMNS), plan.panels);
    plan.parts = hqq_ceil_div(job->apart, job->count);

    int64_t tokens = TOKENS;
    while (tokens > LEAST_TOKENS && hqq_ceil_div(p->M, tokens) * plan.panels < WANTED_CHUNKS)
        tokens -= HQQ_TILED_TOKENS;
    tokens = hqq_even_part(p->M, tokens, HQQ_TILED_TOKENS);
    int64_t half = hqq_ceil_div(hqq_ceil_div(p->M, tokens), 2) * tokens;
    half = hqq_least(half, p->M);
    panels_rows upper = {&plan, 0, half, tokens}, lower = {&plan, half, p->M, tokens};
    panels_rows last = {&plan, half, p->M, hqq_least(tokens, LAST_TOKENS)};
    add_rounds(stages, &plan, &upper, &lower, &last);
    return hqq_run_stages(stages, context);
}

hqq_status hqq_panels_linear(const hqq_forward *f, const float *xa, hqq_stages *before,
                             void *workspace, const hqq_context *context)
{
    hqq_panels_job job = cut(f->weight, f->dtype, 0);
    hqq_tiled_job *p = &job.product;
    job.panels = workspace;
    p->out = f->y, p->in = f->x, p->ld_in = f->ldx, p->M = f->M;
    p->bias = f->bias, p->bias_dtype = f->bias_dtype;
    p->lora = f->lora, p->inner = xa;
    return run(&job, before, context);
}

hqq_status hqq_panels_dgrad(const hqq_backward *b, const float *dyb, hqq_stages *before,
                            void *workspace, const hqq_context *context)
{
    hqq_panels_job job = cut(b->weight, b->dtype, 1);
    hqq_tiled_job *p = &job.product;
    job.panels = workspace;
    p->out = b->dx, p->in = b->dy, p->ld_in = b->lddy, p->M = b->M;
    p->lora = b->lora, p->inner = dyb;
    return run(&job, before, context);
}

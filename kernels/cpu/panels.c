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

/* Panels in a block: of half of the weight at most, so that it is never whole in memory (but
 * one of a single panel). */
static int64_t block_panels(const hqq_panels_job *job)
{
    int64_t all = hqq_ceil_div(job->columns, HQQ_PANEL_COLUMNS);
    int64_t most = hqq_least(BLOCK_BYTES / panel_bytes(job), all / 2);
    return hqq_even_part(all, hqq_most(most, 1), 1);
}

size_t hqq_panels_workspace(const hqq_weight *weight, hqq_dtype dtype, int transpose)
{
    hqq_panels_job job = cut(weight, dtype, transpose);
    return (size_t)(block_panels(&job) * panel_bytes(&job));
}

static hqq_status decode_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_panels_job *job = data;
    HQQ_ISA_SELECT(job->product.isa, hqq_panels_decode)(job, chunk, scratch);
    return HQQ_OK;
}

static hqq_status multiply_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_panels_job *job = data;
    int64_t panels = hqq_ceil_div(job->end - job->begin, HQQ_PANEL_COLUMNS);
    int64_t m = chunk / panels * job->product.tokens;
    HQQ_ISA_SELECT(job->product.isa, hqq_panels_multiply)
    (job, chunk % panels, m, hqq_least(m + job->product.tokens, job->product.M), scratch);
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

/* A part of the reduction of a block. */
static hqq_status run_part(hqq_panels_job *job, const hqq_context *context)
{
    hqq_tiled_job *p = &job->product;
    int64_t panels = hqq_ceil_div(job->end - job->begin, HQQ_PANEL_COLUMNS);
    HQQ_TRY(
        hqq_for_each_chunk(panels, decode_chunk, job, hqq_panels_decode_scratch(job), context));
    int64_t tokens = TOKENS;
    while (tokens > LEAST_TOKENS && hqq_ceil_div(p->M, tokens) * panels < WANTED_CHUNKS)
        tokens -= HQQ_TILED_TOKENS;
    p->tokens = hqq_even_part(p->M, tokens, HQQ_TILED_TOKENS);
    return hqq_for_each_chunk(hqq_ceil_div(p->M, p->tokens) * panels, multiply_chunk, job,
                              hqq_panels_multiply_scratch(job), context);
}

static hqq_status run(hqq_panels_job *job, const hqq_context *context)
{
    int64_t side = block_panels(job) * HQQ_PANEL_COLUMNS, part = job->count;
    job->product.isa = hqq_isa_in_use(context);
    for (job->begin = 0; job->begin < job->columns; job->begin = job->end) {
        job->end = hqq_least(job->begin + side, job->columns);
        for (job->first = 0; job->first < job->apart; job->first += job->count) {
            job->count = hqq_least(part, job->apart - job->first);
            job->steps = job->count * job->spans / (job->product.pairs ? 2 : 1);
            job->is_first = job->first == 0;
            job->is_last = job->first + job->count == job->apart;
            HQQ_TRY(run_part(job, context));
        }
    }
    return HQQ_OK;
}

hqq_status hqq_panels_linear(const hqq_forward *f, const float *xa, void *workspace,
                             const hqq_context *context)
{
    hqq_panels_job job = cut(f->weight, f->dtype, 0);
    hqq_tiled_job *p = &job.product;
    job.panels = workspace;
    p->out = f->y, p->in = f->x, p->ld_in = f->ldx, p->M = f->M;
    p->bias = f->bias, p->bias_dtype = f->bias_dtype;
    p->lora = f->lora, p->inner = xa;
    return run(&job, context);
}

hqq_status hqq_panels_dgrad(const hqq_backward *b, const float *dyb, void *workspace,
                            const hqq_context *context)
{
    hqq_panels_job job = cut(b->weight, b->dtype, 1);
    hqq_tiled_job *p = &job.product;
    job.panels = workspace;
    p->out = b->dx, p->in = b->dy, p->ld_in = b->lddy, p->M = b->M;
    p->lora = b->lora, p->inner = dyb;
    return run(&job, context);
}

/* Cuts a product with turned input (turned.h) into parts of the tokens, and those into chunks.
 */
#include "turned.h"

#include "code_runs.h"
#include "decode_floats.h"
#include "integers.h"
#include "lora.h"
#include "parallel.h"
#include "status.h"
#include "workspace.h"

/*
 * Rows of W in a chunk, words of them that are decoded at a time, and tokens; at most. Decoded
 * rows, a panel of as many words and sums take 830 KB. 4096 x 4096 in bf16, a Zen 5: 192 rows
 * of 512 words are 1 to 5 % slower, 384 of 256 3 to 8 %, 256 tokens 2 %.
 */
#define ROWS        96
#define COLUMNS     1024
#define TOKENS      512
#define PANEL_WORDS (INT64_C(1) << 21) /* of all panels: 8 MB */
/* Chunks are made smaller until there are that many. */
#define WANTED_CHUNKS 16
/* Tokens up to which sets of axis 0 are taken cycle by cycle: then zeros and scales are loaded
 * once for rows that share them, but what is stored is scattered. 4096 x 4096, a Zen 5, times
 * as fast as in plain order, at 48, 64, 128 and 192 tokens: bf16, 4
 * bits 1.24, 1.16, 1.06, 1.03, 8 bits 1.18, 1.14, 1.06, 1.02, 3 bits 1.06, 1.02, .99, .98;
 * fp32 1.02, 1.02, 1.01, .98. */
#define CYCLE_TOKENS 128

/* The lanes of a whole vector are multiplied, used or not. 4096 x 4096, 4 bits, two threads,
 * times the speed of dot products along the lanes:
 *
 *     M                          36      40      48      64     128     256     512
 *     bf16, a Zen 5            0.79    0.88    1.03    1.07    1.12    1.16    1.19
 *     fp32                     0.83    0.96    1.12    1.14    1.16    1.20    1.21
 *     fp32, AVX2 on it         1.05            1.24    1.26    1.26            1.29
 *     bf16, axis 0                             0.97    1.00    1.10    1.20    1.28
 *     bf16, 8 bits                             0.94    0.99    1.13    1.24    1.28
 *     bf16, 3, 2, 1 bits                       1.09    1.09    1.11    1.15    1.18 */
int hqq_turns_input(int64_t M)
{
    int64_t multiplied = (M + 15) / 16 * 16;
    return M >= 128 || (M > 40 && 15 * multiplied <= 16 * M);
}

static int64_t words_of(const hqq_weight *weight, hqq_dtype dtype, hqq_isa isa)
{
    return hqq_ceil_div(weight->in_features, hqq_multiplies_pairs(dtype, isa) ? 2 : 1);
}

static int64_t tokens_at_once(int64_t M, int64_t words)
{
    int64_t most = hqq_most(PANEL_WORDS / words, HQQ_PANEL_TOKENS);
    return hqq_even_part(M, hqq_least(most, TOKENS), HQQ_PANEL_UNIT);
}

size_t hqq_turned_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype, hqq_isa isa)
{
    int64_t words = words_of(weight, dtype, isa), tokens = tokens_at_once(M, words);
    int64_t panel = hqq_even_part(tokens, HQQ_PANEL_TOKENS, HQQ_PANEL_UNIT);
    return (size_t)(hqq_ceil_div(tokens, panel) * panel * words) * 4;
}

static hqq_status turn_chunk(int64_t chunk, void *scratch, void *data)
{
    (void)scratch;
    const hqq_turned_part *part = data;
    int64_t across = hqq_ceil_div(part->words, COLUMNS), word = chunk % across * COLUMNS;
    HQQ_ISA_SELECT(part->job.isa, hqq_turn_tokens)
    (part, part->m_begin + chunk / across * HQQ_PANEL_UNIT, word,
     hqq_least(word + COLUMNS, part->words));
    return HQQ_OK;
}

static size_t scratch_of(hqq_tiled_chunk *c, void *scratch)
{
    const hqq_tiled_job *job = c->job;
    hqq_arena arena = {.base = scratch};
    int64_t rows = job->sets.slots * job->block_sets;
    c->ld_sums = hqq_tiled_stride(job->tokens);
    c->sums = hqq_arena_take(&arena, (size_t)(rows * c->ld_sums) * 4);
    c->weights =
        hqq_arena_take(&arena, (size_t)(rows * hqq_tiled_stride(job->block_columns)) * 4);
    c->bias = hqq_arena_take(&arena, (size_t)(job->block_sets + 16) * 4); /* whole vectors */
    if (job->by_cycle && job->lora)
        c->lora_B = hqq_arena_take(&arena, (size_t)(job->block_sets * job->lora->rank) * 4);
    return arena.used;
}

/* begin_with_lora where the rows of W lie apart, and so do their rows of B. */
static hqq_status begin_cycles(hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    hqq_context alone = {.isa = job->isa};
    hqq_lora lora = *job->lora;
    lora.B = c->lora_B;
    for (int j = 0; j < job->sets.slots; j++) {
        hqq_take_rows_of_B(c->lora_B, job, j, c->begin, c->end);
        HQQ_TRY(hqq_lora_addend_turned(c->sums + j * job->block_sets * c->ld_sums, c->ld_sums,
                                       job->inner + c->m_begin * lora.rank, &lora,
                                       c->m_end - c->m_begin, 0, c->end - c->begin, &alone));
    }
    return HQQ_OK;
}

/* The sums begin with scaling B xa^T. */
static hqq_status begin_with_lora(hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    if (!job->lora) return HQQ_OK;
    hqq_context alone = {.isa = job->isa};
    hqq_row_piece pieces[HQQ_MAX_SLOTS];
    hqq_row_pieces(pieces, &job->sets, c->begin, c->end);
    c->add = 1;
    if (job->by_cycle) return begin_cycles(c);
    for (int j = 0; j < job->sets.slots; j++)
        HQQ_TRY(hqq_lora_addend_turned(c->sums + j * job->block_sets * c->ld_sums, c->ld_sums,
                                       job->inner + c->m_begin * job->lora->rank, job->lora,
                                       c->m_end - c->m_begin, pieces[j].first,
                                       pieces[j].first + pieces[j].count, &alone));
    return HQQ_OK;
}

static hqq_status linear_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_turned_part *part = data;
    const hqq_tiled_job *job = &part->job;
    hqq_tiled_chunk c = {.job = job, .m_begin = part->m_begin, .m_end = part->m_end};
    scratch_of(&c, scratch);
    c.begin = chunk * job->block_sets;
    c.end = hqq_least(c.begin + job->block_sets, job->sets.sets);
    HQQ_TRY(begin_with_lora(&c));
    HQQ_ISA_SELECT(job->isa, hqq_turned_linear_chunk)(part, &c);
    return HQQ_OK;
}

/* Sets of a chunk: whole tiles of each slot. */
static int64_t sets_of_chunk(const hqq_tiled_job *job)
{
    int64_t rows = hqq_least(ROWS, hqq_ceil_div(job->layout.N, WANTED_CHUNKS));
    return hqq_even_part(job->sets.sets, hqq_most(rows / job->sets.slots, HQQ_TILED_TOKENS),
                         HQQ_TILED_TOKENS);
}

hqq_status hqq_turned_linear(const hqq_forward *f, const float *xa, void *workspace,
                             const hqq_context *context)
{
    hqq_turned_part part;
    part.panels = workspace;
    hqq_tiled_job *job = &part.job;
    *job = (hqq_tiled_job){.out = f->y,
                           .in = f->x,
                           .ld_in = f->ldx,
                           .dtype = f->dtype,
                           .weight = f->weight,
                           .layout = hqq_weight_layout(f->weight),
                           .bias = f->bias,
                           .bias_dtype = f->bias_dtype,
                           .lora = f->lora,
                           .inner = xa,
                           .M = f->M,
                           .isa = hqq_isa_in_use(context)};
    job->sets = hqq_row_sets_of(&job->layout);
    job->pairs = hqq_multiplies_pairs(f->dtype, job->isa);
    job->by_cycle =
        hqq_residues_decode(f->weight) && job->sets.cycle > 1 && f->M <= CYCLE_TOKENS;
    part.words = words_of(f->weight, f->dtype, job->isa);
    job->tokens = tokens_at_once(f->M, part.words);
    job->block_columns = hqq_least(hqq_even_part(part.words, COLUMNS, 64), part.words);
    job->block_sets = sets_of_chunk(job);
    hqq_tiled_chunk measured = {.job = job};
    size_t bytes = scratch_of(&measured, NULL);
    for (part.m_begin = 0; part.m_begin < f->M; part.m_begin = part.m_end) {
        part.m_end = hqq_least(part.m_begin + job->tokens, f->M);
        int64_t chunks = hqq_ceil_div(part.m_end - part.m_begin, HQQ_PANEL_UNIT) *
                         hqq_ceil_div(part.words, COLUMNS);
        HQQ_TRY(hqq_for_each_chunk(chunks, turn_chunk, &part, 0, context));
        HQQ_TRY(hqq_for_each_chunk(hqq_ceil_div(job->sets.sets, job->block_sets), linear_chunk,
                                   &part, bytes, context));
    }
    return HQQ_OK;
}

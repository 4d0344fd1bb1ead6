/* Cuts a tiled product into chunks, and begins each with its part of the LoRA product. */
#include "tiled.h"

#include "amx.h"
#include "code_runs.h"
#include "decode_floats.h"
#include "dtype.h"
#include "integers.h"
#include "lora.h"
#include "panels.h"
#include "parallel.h"
#include "status.h"
#include "turned.h"
#include "workspace.h"

/*
 * Of a chunk and of what is decoded at a time, at most; in words, rows and tokens. They take
 * about three quarters of a second cache of 1 MB:
 *
 *   forward   x [128 tokens, 1024 words] and sums [128 tokens, 256 rows]. Where x [tokens, K]
 *             takes 384 KB at most it is copied once, and rows of W are decoded end to end.
 *   dgrad     W [500 rows, 256 columns] and sums [256 tokens, 256 columns]; where W is decoded
 *             strip by strip (decode_floats.h), strips of W [96 rows, 64 columns] in the first
 *             cache, and dy [256 tokens, 96 rows], copied once for all strips
 *
 * Measured on 4096 x 4096, one thread: 256 rows instead of 128 are worth 4 % at M = 512, 128
 * tokens instead of 512 15 %; strips of 128 columns, not 256, cost dgrad a third. Of few tokens
 * little is left of a tile's time to hide memory behind: up to DGRAD_FEW of them W
 * [64 rows, 512 columns] is decoded at a time, so that longer pieces of packed rows are read
 * (4096 x 4096, a Zen 5 in bf16, two threads, times as fast as with 256 columns and up to 500
 * rows: 4 bits 1.11, 1.07, 1.01 at 16, 32, 64 tokens, 8 bits of axis 0 1.4, 1.2, 1.1; in fp32
 * 1.06 at 32 and 64; of 128 tokens 0.98 in bf16). Strips in fp32, times as fast as blocks of
 * 256 columns, which were decoded row by row, at 4, 8, 16, 32, 64, 128
 * tokens: 1.6, 1.4, 1.3, 1.2, 1.1, 1.02, and with AVX2 alone 1.5, 1.3, 1.25 at 4, 8, 16; of
 * 1536 x 576 2.6, 2.1, 1.5. In pairs of bf16, where 256 columns take no more bytes than the
 * first cache has, strips take 1.1 to 1.2 times as long; of 512 columns of 8 bits, at axis 1,
 * .93, .96 and 1.02 at 8, 12 and 16 tokens.
 */
#define FORWARD_ROWS      256
#define FORWARD_COLUMNS   1024
#define FORWARD_FEW       18
#define FORWARD_TOKENS    128
#define KEPT_WORDS        98304
#define SCALED_GROUP      256 /* the longest groups for which x is scaled */
#define DGRAD_ROWS        500
#define DGRAD_FEW         96
#define DGRAD_COLUMNS     256
#define DGRAD_FEW_COLUMNS 1024
#define DGRAD_FEW_WEIGHTS 32768
#define DGRAD_TOKENS      256
#define STRIP_COLUMNS     64
#define STRIP_ROWS        96
#define RESIDUE_ROWS      64 /* at axis 0 */
#define STRIPS_OF_BYTES   12 /* tokens in bf16 */
/* Chunks are made smaller until there are that many; for dgrad of few tokens until there are
 * half: with 16 of 256 columns the EPYC takes 1.05 to 1.08 times as long at 8 and 16 tokens.
 * More than 8 threads are idle then at 4096 columns. */
#define WANTED_CHUNKS    16
#define DGRAD_FEW_CHUNKS 8

static hqq_tiled_job job_of(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                            const hqq_lora *lora, const float *inner, int64_t tokens,
                            hqq_isa isa)
{
    hqq_tiled_job job = {.weight = weight, .M = M, .dtype = dtype, .lora = lora};
    job.layout = hqq_weight_layout(weight);
    job.sets = hqq_row_sets_of(&job.layout);
    job.inner = inner;
    job.tokens = hqq_even_part(M, tokens, HQQ_TILED_TOKENS);
    job.isa = isa;
    job.pairs = hqq_multiplies_pairs(dtype, isa);
    return job;
}

/* As many sets as hold about `rows` rows, in multiples of `unit`. */
static int64_t sets_for(const hqq_tiled_job *job, int64_t rows, int64_t unit)
{
    return hqq_even_part(job->sets.sets, hqq_most(rows / job->sets.slots, unit), unit);
}

/* Takes what both passes need: `width` columns of sums, `inputs` rows of `words` words, and a
 * decoded block of `rows` rows of words. */
static void take_scratch(hqq_tiled_chunk *c, hqq_arena *arena, int64_t width, int64_t inputs,
                         int64_t words, int64_t rows, int64_t columns)
{
    const hqq_tiled_job *job = c->job;
    c->ld_sums = hqq_tiled_stride(width);
    c->sums = hqq_arena_take(arena, (size_t)(job->tokens * c->ld_sums) * 4);
    c->input = hqq_arena_take(arena, (size_t)(inputs * hqq_tiled_stride(words)) * 4);
    c->weights = hqq_arena_take(arena, (size_t)(rows * hqq_tiled_stride(columns)) * 4);
}

/* Tokens and parts (of sets, or of columns) of chunk number `chunk`. */
static void place_chunk(hqq_tiled_chunk *c, int64_t chunk, int64_t count, int64_t length)
{
    int64_t parts = hqq_ceil_div(count, length);
    c->begin = chunk % parts * length;
    c->end = hqq_least(c->begin + length, count);
    c->m_begin = chunk / parts * c->job->tokens;
    c->m_end = hqq_least(c->m_begin + c->job->tokens, c->job->M);
}

/* ---- forward ------------------------------------------------------------------------- */

static int64_t column_blocks(const hqq_tiled_job *job)
{
    return hqq_ceil_div(job->layout.K, job->block_columns * (job->pairs ? 2 : 1));
}

/* Words of x and of W that are taken at a time, at most. In bf16 half as many leave what is
 * decoded in the first cache until it is multiplied, but sums are added up along the lanes
 * twice as often. 4096 x 4096, a Zen 5, times as fast as with FORWARD_COLUMNS:
 *
 *     M                    8      12      16      24      32
 *     4 bits, axis 1    1.09    1.04    1.04    1.04    1.10
 *             axis 0    1.19    1.03    1.00    0.96    0.96
 *     8 bits, axis 1    1.19    1.14    1.01    0.96    0.98
 *             axis 0    1.32    1.25    1.12    1.01    0.99
 *     3 bits, axis 1    1.00    1.00    1.01    1.02    1.07
 *             axis 0                    0.94    0.89    0.92
 *     2 bits                            1.01    0.98    1.01
 *     1 bit                             0.93    0.93    0.94 */
static int64_t forward_columns(const hqq_tiled_job *job)
{
    int bits = job->weight->nbits, axis = job->layout.axis;
    if (!job->pairs) return FORWARD_COLUMNS;
    if (bits == 8 || (bits == 4 && axis == 0))
        return job->M <= FORWARD_FEW ? FORWARD_COLUMNS / 2 : FORWARD_COLUMNS;
    return (bits == 4 || bits == 3) && axis == 1 ? FORWARD_COLUMNS / 2 : FORWARD_COLUMNS;
}

static size_t linear_scratch(hqq_tiled_chunk *c, void *scratch)
{
    const hqq_tiled_job *job = c->job;
    hqq_arena arena = {.base = scratch};
    int64_t slots = job->sets.slots;
    int64_t blocks = job->keeps_input ? column_blocks(job) : 1;
    take_scratch(c, &arena, slots * job->block_sets, job->tokens * blocks, job->block_columns,
                 slots * HQQ_TILED_SETS, job->block_columns);
    c->bias = hqq_arena_take(&arena, (size_t)(job->block_sets + 16) * 4); /* whole vectors */
    if (job->by_cycle && job->lora)
        c->lora_B = hqq_arena_take(&arena, (size_t)(job->sets.cycle * job->lora->rank) * 4);
    return arena.used;
}

/* Whether x is to be multiplied by the scales of axis 0, for all rows that share them: that
 * takes a few operations a token, column and G rows of W, where decoding with a zero and a
 * scale a weight takes as many a weight. */
static int scales_input(const hqq_tiled_job *job)
{
    const hqq_layout *l = &job->layout;
    int64_t cycle = job->sets.cycle;
    return job->pairs && l->axis == 0 && job->weight->meta_dtype == HQQ_BF16 &&
           hqq_rows_align(l) && hqq_groups_align(l) && l->K % 32 == 0 &&
           (cycle % 16 == 0 || cycle == 8 || cycle == 4) && l->G <= SCALED_GROUP &&
           2 * job->M <= l->G;
}

/* begin_linear where rows that share scales are decoded together: they lie apart, and so do
 * their rows of B. */
static hqq_status begin_cycles(hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    const hqq_row_sets *sets = &job->sets;
    hqq_context alone = {.isa = job->isa};
    hqq_lora lora = *job->lora;
    lora.B = c->lora_B;
    for (int64_t set = c->begin; set < c->end; set += sets->cycle)
        for (int j = 0; j < sets->slots; j++) {
            hqq_take_rows_of_B(c->lora_B, job, j, set, set + sets->cycle);
            HQQ_TRY(hqq_lora_addend(c->sums + j * job->block_sets + set - c->begin, c->ld_sums,
                                    HQQ_F32, job->inner + c->m_begin * lora.rank, NULL, HQQ_F32,
                                    &lora, c->m_end - c->m_begin, 0, sets->cycle, &alone));
        }
    return HQQ_OK;
}

/* The sums of the rows of W, in the order in which they are decoded. */
static hqq_status begin_linear(hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    if (!job->lora) return HQQ_OK;
    hqq_context alone = {.isa = job->isa};
    hqq_row_piece pieces[HQQ_MAX_SLOTS];
    hqq_row_pieces(pieces, &job->sets, c->begin, c->end);
    c->add = 1;
    if (job->by_cycle) return begin_cycles(c);
    for (int j = 0; j < job->sets.slots; j++)
        HQQ_TRY(hqq_lora_addend(c->sums + j * job->block_sets, c->ld_sums, HQQ_F32,
                                job->inner + c->m_begin * job->lora->rank, NULL, HQQ_F32,
                                job->lora, c->m_end - c->m_begin, pieces[j].first,
                                pieces[j].first + pieces[j].count, &alone));
    return HQQ_OK;
}

static hqq_status linear_chunk(int64_t chunk, void *scratch, void *data)
{
    hqq_tiled_chunk c = {.job = data};
    linear_scratch(&c, scratch);
    place_chunk(&c, chunk, c.job->sets.sets, c.job->block_sets);
    HQQ_TRY(begin_linear(&c));
    HQQ_ISA_SELECT(c.job->isa, hqq_tiled_linear_chunk)(&c);
    return HQQ_OK;
}

/* Whether sums of dx are to be multiplied by the scales of axis 0, residue by residue: a tile
 * of sums then takes a few operations a residue and token, and decoding none but a table's.
 * 4096 x 4096, 4 bits, bf16, a Zen 5, two threads, times as fast as with a zero and a scale a
 * weight, and at 192 tokens as panels:
 *
 *     M          16      64     128     192
 *     G = 32    1.5    1.09    0.91
 *     G = 64    1.8     1.2     1.1
 *     G = 128   1.7     1.3    1.14     1.5 */
static int scales_sums(const hqq_tiled_job *job)
{
    const hqq_layout *l = &job->layout;
    return job->pairs && l->axis == 0 && hqq_rows_align(l) && hqq_groups_align(l) &&
           l->K % 32 == 0 && job->sets.cycle % 2 == 0 && l->G >= 32 && l->G <= SCALED_GROUP &&
           job->M <= hqq_least(DGRAD_TOKENS, 2 * l->G);
}

/* Whether dx is summed residue by residue, dy turned. In floats, with a zero and a scale a
 * weight, which a strip of a residue loads once for all of its rows. 4096 x 4096, G = 64, a Zen
 * 5, two threads, times as fast as row by row, by tokens:
 *
 *     M            4       8      12      16      24      32      64
 *     4 bits     1.9     1.5     1.4    1.35     1.2     1.2     1.05
 *     8 bits     2.3     2.0     1.7     1.6     1.5    1.25     1.04 */
static int by_residue(const hqq_tiled_job *job)
{
    if (job->pairs) return scales_sums(job);
    return hqq_residues_decode(job->weight) && job->M <= DGRAD_TOKENS;
}

/* dy as residues take it, in rows that do not fall into one set of L1; bytes. */
static size_t take_turned(hqq_tiled_job *job, void *workspace)
{
    hqq_arena arena = {.base = workspace};
    int64_t residues = job->layout.N / job->layout.G;
    int64_t in_word = job->pairs ? 2 : 1;
    job->ld_turned = hqq_tiled_stride(hqq_ceil_div(job->layout.N, in_word)) * in_word;
    job->turned = hqq_arena_take(&arena, (size_t)(job->M * job->ld_turned / in_word) * 4);
    if (job->pairs) job->residue_sums = hqq_arena_take(&arena, (size_t)(job->M * residues) * 4);
    return arena.used;
}

static hqq_status turn_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_tiled_job *job = data;
    (void)scratch;
    HQQ_ISA_SELECT(job->isa, hqq_turn_residues)(job, chunk);
    return HQQ_OK;
}

#if HQQ_HAS_AMX
/* Parts cost three and six products where FMA units multiply at an eighth of the tiles' rate,
 * and more to decode: 4096 x 4096 on a Xeon, one thread, times the other tiles by tokens,
 *
 *                      16           32           64          128          256
 *     fp16    0.68 - 0.98    1.2 - 1.3    1.6 - 1.6    2.1 - 2.2
 *     fp32    0.67 - 0.75   0.85 - 0.95   1.1 - 1.2    1.4 - 1.4    1.25 - 1.6
 *
 * and in fp32 0.85 at 128 while the processor held its AMX back (see amx.h). */
static int in_amx_tiles(int64_t M, hqq_dtype dtype, hqq_isa isa)
{
    const int64_t least_tokens = dtype == HQQ_BF16 ? 1 : dtype == HQQ_F16 ? 32 : 128;
    return isa == HQQ_ISA_AMX && M >= least_tokens;
}
#endif

/* Whether panels serve a product, which then runs in one loop with what comes before it. */
static int on_panels(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                     hqq_isa isa)
{
#if HQQ_HAS_AMX
    if (in_amx_tiles(M, dtype, isa)) return 0;
#endif
    if (!hqq_panels_serve(weight, M, dtype, transpose, isa)) return 0;
    hqq_tiled_job job = job_of(weight, M, dtype, NULL, NULL, DGRAD_TOKENS, isa);
    return !transpose || !scales_sums(&job);
}

size_t hqq_tiled_workspace(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                           hqq_isa isa)
{
#if HQQ_HAS_AMX
    if (in_amx_tiles(M, dtype, isa)) return hqq_amx_workspace(weight, M, dtype, transpose);
#endif
    if (transpose) {
        hqq_tiled_job job = job_of(weight, M, dtype, NULL, NULL, DGRAD_TOKENS, isa);
        if (!on_panels(weight, M, dtype, 1, isa) && by_residue(&job))
            return take_turned(&job, NULL);
    }
    if (on_panels(weight, M, dtype, transpose, isa))
        return hqq_panels_workspace(weight, dtype, transpose);
    if (transpose || !hqq_turns_input(M)) return 0;
    return hqq_turned_workspace(weight, M, dtype, isa);
}

hqq_status hqq_tiled_linear(const hqq_forward *f, const float *xa, hqq_stages *before,
                            void *workspace, const hqq_context *context)
{
    if (on_panels(f->weight, f->M, f->dtype, 0, hqq_isa_in_use(context)))
        return hqq_panels_linear(f, xa, before, workspace, context);
    HQQ_TRY(hqq_run_stages(before, context));
#if HQQ_HAS_AMX
    if (in_amx_tiles(f->M, f->dtype, hqq_isa_in_use(context)))
        return hqq_amx_linear(f, xa, workspace, context);
#endif
    if (hqq_turns_input(f->M)) return hqq_turned_linear(f, xa, workspace, context);
    hqq_tiled_job job =
        job_of(f->weight, f->M, f->dtype, f->lora, xa, FORWARD_TOKENS, hqq_isa_in_use(context));
    job.out = f->y;
    job.in = f->x;
    job.ld_in = f->ldx;
    job.bias = f->bias;
    job.bias_dtype = f->bias_dtype;
    int64_t words = hqq_ceil_div(job.layout.K, job.pairs ? 2 : 1);
    job.block_columns =
        hqq_least(hqq_even_part(words, forward_columns(&job), 64), (words + 15) / 16 * 16);
    job.scales_input = scales_input(&job);
    /* 4096 x 4096 in fp32, a Zen 5, times as fast as in plain order, at 8, 16 and 32 tokens: 4
     * bits 1.39, 1.21, 1.09, 8 bits 1.36, 1.20, 1.08, 3 bits 1.28, 1.20, 1.07 */
    job.by_cycle = job.scales_input ||
                   (hqq_residues_decode(job.weight) && job.sets.cycle % HQQ_TILED_SETS == 0);
    job.keeps_input =
        !job.scales_input &&
        job.tokens * column_blocks(&job) * hqq_tiled_stride(job.block_columns) <= KEPT_WORDS;
    int64_t rows = FORWARD_ROWS, parts = hqq_ceil_div(job.M, job.tokens);
    while (rows > 16 && job.layout.N / rows * parts < WANTED_CHUNKS) rows -= 16;
    job.block_sets = sets_for(&job, rows, job.by_cycle ? job.sets.cycle : HQQ_TILED_SETS);
    hqq_tiled_chunk measured = {.job = &job};
    return hqq_for_each_chunk(hqq_ceil_div(job.sets.sets, job.block_sets) * parts, linear_chunk,
                              &job, linear_scratch(&measured, NULL), context);
}

/* ---- dgrad --------------------------------------------------------------------------- */

static size_t dgrad_scratch(hqq_tiled_chunk *c, void *scratch)
{
    const hqq_tiled_job *job = c->job;
    hqq_arena arena = {.base = scratch};
    int64_t rows = job->block_rows / (job->pairs ? 2 : 1);
    int64_t inputs = job->keeps_input ? job->tokens : HQQ_TILED_TOKENS;
    take_scratch(c, &arena, job->block_columns, job->by_cycle ? 0 : inputs, rows, rows,
                 job->strip);
    if (job->by_cycle && job->pairs) {
        int64_t residues = job->block_sets / job->sets.cycle;
        size_t bytes = (size_t)(residues * job->block_columns) * 4;
        c->zero = hqq_arena_take(&arena, bytes);
        c->scale = hqq_arena_take(&arena, bytes);
    } else if (job->pairs)
        c->rows = hqq_arena_take(&arena, (size_t)(job->block_rows * job->strip) * 2);
    return arena.used;
}

static hqq_status begin_dgrad(hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    if (!job->lora) return HQQ_OK;
    hqq_context alone = {.isa = job->isa};
    c->add = 1;
    return hqq_lora_dx_addend_rows(
        c->sums, c->ld_sums, HQQ_F32, job->inner + c->m_begin * job->lora->rank, job->lora,
        c->m_begin, c->m_end, job->layout.K, c->begin, c->end, &alone);
}

static hqq_status dgrad_chunk(int64_t chunk, void *scratch, void *data)
{
    hqq_tiled_chunk c = {.job = data};
    dgrad_scratch(&c, scratch);
    place_chunk(&c, chunk, c.job->layout.K, c.job->block_columns);
    HQQ_TRY(begin_dgrad(&c));
    HQQ_ISA_SELECT(c.job->isa, hqq_tiled_dgrad_chunk)(&c);
    return HQQ_OK;
}

hqq_status hqq_tiled_dgrad(const hqq_backward *b, const float *dyb, hqq_stages *before,
                           void *workspace, const hqq_context *context)
{
    if (on_panels(b->weight, b->M, b->dtype, 1, hqq_isa_in_use(context)))
        return hqq_panels_dgrad(b, dyb, before, workspace, context);
    HQQ_TRY(hqq_run_stages(before, context));
#if HQQ_HAS_AMX
    if (in_amx_tiles(b->M, b->dtype, hqq_isa_in_use(context)))
        return hqq_amx_dgrad(b, dyb, workspace, context);
#endif
    hqq_tiled_job job =
        job_of(b->weight, b->M, b->dtype, b->lora, dyb, DGRAD_TOKENS, hqq_isa_in_use(context));
    job.by_cycle = by_residue(&job);
    job.out = b->dx;
    job.in = b->dy;
    job.ld_in = b->lddy;
    int few = job.M <= DGRAD_FEW;
    int64_t columns = few ? DGRAD_FEW_COLUMNS : DGRAD_COLUMNS;
    int64_t wanted = few ? DGRAD_FEW_CHUNKS : WANTED_CHUNKS;
    int64_t parts = hqq_ceil_div(job.M, job.tokens);
    while (columns > 64 && job.layout.K / columns * parts < wanted) columns -= 64;
    job.block_columns = hqq_even_part(job.layout.K, columns, 64);
    job.strip = job.block_columns;
    int64_t rows = DGRAD_ROWS;
    if (few) rows = hqq_least(rows, hqq_most(DGRAD_FEW_WEIGHTS / job.block_columns, 64));
    if (!job.pairs && (job.by_cycle || hqq_strips_decode(job.weight))) {
        job.strip = hqq_least(STRIP_COLUMNS, job.block_columns);
        rows = job.by_cycle ? RESIDUE_ROWS : STRIP_ROWS;
    }
    if (job.pairs && !job.by_cycle && job.weight->nbits == 8 && job.M <= STRIPS_OF_BYTES)
        job.strip = hqq_least(STRIP_COLUMNS, job.block_columns);
    job.keeps_input = job.strip < job.block_columns;
    if (job.by_cycle) {
        take_turned(&job, workspace);
        HQQ_TRY(hqq_for_each_chunk(job.M, turn_chunk, &job, 0, context));
    }
    job.block_sets = sets_for(&job, rows, job.by_cycle ? job.sets.cycle : 2);
    job.block_rows = hqq_ceil_div(job.block_sets * job.sets.slots, 2) * 2;
    hqq_tiled_chunk measured = {.job = &job};
    return hqq_for_each_chunk(hqq_ceil_div(job.layout.K, job.block_columns) * parts,
                              dgrad_chunk, &job, dgrad_scratch(&measured, NULL), context);
}

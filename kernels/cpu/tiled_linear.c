/* One chunk of the tiled forward product (tiled.h): y [tokens, rows of some sets of W]. */
#include "tiled.h"

#include "integers.h"
#include "tiled_block.h"
#include "tiled_fetch.h"

HQQ_TILE_TABLE(hqq_multiply_inner);

/* Columns of a block, in elements of the terms. */
typedef struct column_block {
    int64_t begin, end;
    int64_t ld, width; /* elements between rows, and of a row with zeros up to a whole vector */
    int64_t steps;
} column_block;

static column_block block_at(const hqq_tiled_job *job, int64_t begin)
{
    int64_t in_word = job->pairs ? 2 : 1, in_vector = in_word * HQQ_LANES;
    int64_t end = begin + job->block_columns * in_word;
    column_block b = {.begin = begin, .end = hqq_least(end, job->layout.K)};
    b.ld = hqq_tiled_stride(job->block_columns) * in_word;
    b.steps = hqq_ceil_div(b.end - begin, in_vector);
    b.width = b.steps * in_vector;
    return b;
}

/* Where the input of a block is: each has a place, or all share one. */
static void *input_of(const hqq_tiled_chunk *c, const column_block *b)
{
    const hqq_tiled_job *job = c->job;
    int64_t block = b->begin / (job->block_columns * (job->pairs ? 2 : 1));
    int64_t words = job->tokens * hqq_tiled_stride(job->block_columns);
    return (char *)c->input + (job->keeps_input ? block * words * 4 : 0);
}

static void copy_input(const hqq_tiled_chunk *c, const column_block *b)
{
    void *input = input_of(c, b);
    for (int64_t m = c->m_begin; m < c->m_end; m++) {
        int64_t to = (m - c->m_begin) * b->ld, columns = b->end - b->begin;
        hqq_copy_terms(input, to, c->job, m * c->job->ld_in + b->begin, columns);
        hqq_clear_terms(input, c->job, to + columns, to + b->width);
    }
}

/* Sets [set, set + 4), or those of them that there are, against all tokens of the chunk. Rows
 * that there are not are multiplied all the same, to sums that nobody reads. */
static void multiply_sets(const hqq_tiled_chunk *c, const column_block *b, int64_t set,
                          hqq_strips *next)
{
    const hqq_tiled_job *job = c->job;
    int64_t set_end = set + HQQ_TILED_SETS < c->end ? set + HQQ_TILED_SETS : c->end;
    int64_t rows = job->sets.slots * HQQ_TILED_SETS, ld = hqq_tiled_stride(job->block_columns);
    int64_t done = 0, all = hqq_ceil_div(c->m_end - c->m_begin, HQQ_TILED_TOKENS);
    hqq_decode_rows(c->weights, b->ld, HQQ_TILED_SETS, job, set, set_end, b->begin, b->end);
    for (int64_t r = 0; r < rows && b->begin + b->width > b->end; r++)
        hqq_clear_terms(c->weights, job, r * b->ld + b->end - b->begin, r * b->ld + b->width);
    for (int64_t m = c->m_begin; m < c->m_end;) {
        int tokens = hqq_tiled_tokens(c->m_end - m);
        hqq_tile_fn tile = tiles[job->pairs][tokens];
        float *sums = c->sums + (m - c->m_begin) * c->ld_sums + set - c->begin;
        const void *input = hqq_word(input_of(c, b), (m - c->m_begin) * ld);
        hqq_fetch_part(next, ++done, all);
        for (int64_t r = 0; r < rows; r += HQQ_TILED_SIDE)
            tile(sums + r / HQQ_TILED_SETS * job->block_sets + r % HQQ_TILED_SETS, c->ld_sums,
                 input, ld, hqq_word(c->weights, r * ld), ld, b->steps, c->add || b->begin > 0);
        m += tokens;
    }
}

/* The sums, with the bias, to the columns of y that the rows of W are. */
static void store_chunk(const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    hqq_row_piece pieces[HQQ_MAX_SLOTS];
    hqq_row_pieces(pieces, &job->sets, c->begin, c->end);
    for (int j = 0; j < job->sets.slots; j++) {
        float *bias = job->bias ? c->bias : NULL;
        if (bias)
            hqq_load_floats(bias, job->bias, job->bias_dtype, pieces[j].first, pieces[j].count);
        for (int64_t m = c->m_begin; m < c->m_end; m++)
            hqq_store_sums(job, m * job->layout.N + pieces[j].first,
                           c->sums + (m - c->m_begin) * c->ld_sums + j * job->block_sets, bias,
                           pieces[j].count);
    }
}

/* Sets and columns that are multiplied one after the other: of `each` sets all columns, before
 * the next sets. */
typedef struct place {
    int64_t begin, set; /* begin: of the `each` sets */
    column_block block;
} place;

static place next_place(const hqq_tiled_chunk *c, place p, int64_t each)
{
    const hqq_tiled_job *job = c->job;
    p.set += HQQ_TILED_SETS;
    if (p.set < hqq_least(p.begin + each, c->end)) return p;
    if (p.block.end < job->layout.K) {
        p.block = block_at(job, p.block.end);
    } else {
        p.begin += each;
        p.block = block_at(job, 0);
    }
    p.set = p.begin;
    return p;
}

void HQQ_ISA_NAME(hqq_tiled_linear_chunk)(const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    int64_t K = job->layout.K, each = job->keeps_input ? HQQ_TILED_SETS : job->block_sets;
    column_block b;
    for (b = block_at(job, 0); b.begin < K && job->keeps_input; b = block_at(job, b.end))
        copy_input(c, &b);
    place at = {c->begin, c->begin, block_at(job, 0)};
    while (K > 0 && at.set < c->end) {
        place after = next_place(c, at, each);
        int64_t fetched = hqq_least(after.set + HQQ_TILED_SETS, c->end);
        hqq_strips next = hqq_strips_of(job, hqq_least(after.set, fetched), fetched,
                                        after.block.begin, after.block.end);
        if (!job->keeps_input && at.set == at.begin) copy_input(c, &at.block);
        multiply_sets(c, &at.block, at.set, &next);
        at = after;
    }
    store_chunk(c);
}

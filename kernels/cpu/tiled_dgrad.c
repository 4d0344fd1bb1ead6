/* One chunk of the tiled input gradient (tiled.h): dx [tokens, some columns of W]. */
#include "tiled.h"

#include "integers.h"
#include "tiled_block.h"
#include "tiled_fetch.h"
#if HQQ_HAS_PAIRS
#include "decode_pairs.h"
#include "tiled_residues.h"
#endif

HQQ_TILE_TABLE(hqq_multiply_outer);

#if HQQ_HAS_PAIRS
/* out [rows / 2] words a column: the bf16 of row 2 i, and above it that of row 2 i + 1. */
static void pair_rows(void *out, int64_t ld_out, const uint16_t *in, int64_t ld_in,
                      int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r += 2) {
        const uint16_t *even = in + r * ld_in, *odd = even + ld_in;
        char *words = (char *)out + r / 2 * ld_out * 4;
        for (int64_t k = 0; k < columns; k += 32)
            hqq_pair_rows(words + k * 4, words + k * 4 + 64, even + k, odd + k);
    }
}
#endif

/* Rows of a block as they are decoded: `sets` of each slot, of which the last slots may lack
 * some; a row that lacks counts as zeros. */
typedef struct row_block {
    hqq_row_piece pieces[HQQ_MAX_SLOTS];
    int64_t begin, end; /* sets */
    int64_t rows;       /* with pairs, an even number */
} row_block;

static row_block block_of(const hqq_tiled_job *job, int64_t begin)
{
    row_block b = {.begin = begin, .end = begin + job->block_sets};
    if (b.end > job->sets.sets) b.end = job->sets.sets;
    hqq_row_pieces(b.pieces, &job->sets, b.begin, b.end);
    b.rows = (b.end - b.begin) * job->sets.slots;
    if (job->pairs) b.rows += b.rows % 2;
    return b;
}

/* Zeros in place of the rows that lack: their elements are `ld` apart, `count` of each. */
static void clear_lacking(void *out, const hqq_tiled_job *job, const row_block *b, int64_t ld,
                          int64_t count)
{
    int64_t sets = b->end - b->begin, rows = sets * job->sets.slots;
    for (int j = 0; j < job->sets.slots; j++)
        for (int64_t r = b->pieces[j].count; r < sets; r++)
            hqq_clear_terms(out, job, (j * sets + r) * ld, (j * sets + r) * ld + count);
    if (rows < b->rows) hqq_clear_terms(out, job, rows * ld, rows * ld + count);
}

/* Columns [begin, end) of a block. */
static void decode_block(const hqq_tiled_chunk *c, const row_block *b, int64_t begin,
                         int64_t end)
{
    const hqq_tiled_job *job = c->job;
    int64_t columns = job->strip, ld = hqq_tiled_stride(columns), sets = b->end - b->begin;
    if (job->by_cycle) {
        int64_t cycle = job->sets.cycle;
        for (int64_t set = b->begin; set < b->end; set += cycle)
            HQQ_ISA_NAME(hqq_decode_residue)
        ((float *)c->weights + (set - b->begin) * job->sets.slots * ld, ld, cycle * ld, HQQ_F32,
         job->weight, &job->layout, hqq_row_in_slot(&job->sets, set), cycle, begin, end);
        return;
    }
    if (!job->pairs) {
        hqq_decode_rows(c->weights, ld, sets, job, b->begin, b->end, begin, end);
        clear_lacking(c->weights, job, b, ld, columns);
        return;
    }
#if HQQ_HAS_PAIRS
    if (hqq_rows_decode_in_pairs(job) && sets % 2 == 0) {
        for (int j = 0; j < job->sets.slots; j++)
            hqq_decode_piece_in_pairs((uint32_t *)c->weights + j * (sets / 2) * ld, ld, job,
                                      b->pieces[j], j, begin, end - begin);
        return;
    }
    hqq_decode_rows(c->rows, columns, sets, job, b->begin, b->end, begin, end);
    clear_lacking(c->rows, job, b, columns, columns);
    pair_rows(c->weights, ld, c->rows, columns, b->rows, columns);
#endif
}

/* dy of `tokens` tokens from m on, in the order of the decoded rows. */
static void copy_input(void *input, const hqq_tiled_chunk *c, const row_block *b, int64_t m,
                       int tokens, int64_t ld)
{
    const hqq_tiled_job *job = c->job;
    int64_t sets = b->end - b->begin;
    for (int i = 0; i < tokens; i++)
        for (int j = 0; j < job->sets.slots; j++)
            hqq_copy_terms(input, i * ld + j * sets, job,
                           (m + i) * job->ld_in + b->pieces[j].first, b->pieces[j].count);
    for (int i = 0; i < tokens; i++) {
        int64_t rows = sets * job->sets.slots;
        for (int j = 0; j < job->sets.slots; j++)
            hqq_clear_terms(input, job, i * ld + j * sets + b->pieces[j].count,
                            i * ld + (j + 1) * sets);
        hqq_clear_terms(input, job, i * ld + rows, i * ld + b->rows);
    }
}

/* A block of rows against all tokens of the chunk: strip by strip of its columns. */
static void multiply_block(const hqq_tiled_chunk *c, const row_block *b, hqq_strips *next)
{
    const hqq_tiled_job *job = c->job;
    const int64_t width = HQQ_TILED_SIDE * HQQ_LANES;
    int64_t in_word = job->pairs ? 2 : 1, tokens = c->m_end - c->m_begin;
    int64_t ld = hqq_tiled_stride(job->strip);
    int64_t ld_dy =
        job->by_cycle ? job->ld_turned : hqq_tiled_stride(job->block_rows / in_word);
    int64_t tiles_down = hqq_ceil_div(tokens, HQQ_TILED_TOKENS);
    int64_t done = 0, all = tiles_down * hqq_ceil_div(c->end - c->begin, width);
    for (int64_t begin = c->begin, end; begin < c->end; begin = end) {
        end = hqq_least(begin + job->strip, c->end);
        decode_block(c, b, begin, end);
        for (int64_t m = 0; m < tokens;) {
            int rows = hqq_tiled_tokens(tokens - m);
            hqq_tile_fn tile = tiles[job->pairs][rows];
            float *sums = c->sums + m * c->ld_sums + begin - c->begin;
            char *input = (char *)c->input + (job->keeps_input ? m * ld_dy * 4 : 0);
            if (job->by_cycle)
                input = (char *)((float *)job->turned + (c->m_begin + m) * ld_dy +
                                 b->begin * job->sets.slots);
            else if (begin == c->begin || !job->keeps_input)
                copy_input(input, c, b, c->m_begin + m, rows, ld_dy * in_word);
            for (int64_t k = 0; k < end - begin; k += width) {
                hqq_fetch_part(next, ++done, all);
                tile(sums + k, c->ld_sums, input, ld_dy, hqq_word(c->weights, k), ld,
                     b->rows / in_word, c->add || b->begin > 0);
            }
            m += rows;
        }
    }
}

static void sum_blocks(const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    row_block b = block_of(job, 0);
    hqq_strips next = hqq_strips_of(job, b.begin, b.end, c->begin, c->end);
    hqq_fetch_part(&next, 1, 1);
    for (; b.begin < job->sets.sets; b = block_of(job, b.end)) {
        row_block after = block_of(job, b.end);
        next = hqq_strips_of(job, after.begin, after.end, c->begin, c->end);
        multiply_block(c, &b, &next);
    }
}

void HQQ_ISA_NAME(hqq_tiled_dgrad_chunk)(const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
#if HQQ_HAS_PAIRS
    if (job->by_cycle && job->pairs)
        sum_residues(c);
    else
#endif
        sum_blocks(c);
    for (int64_t m = c->m_begin; m < c->m_end; m++)
        hqq_store_sums(job, m * job->layout.K + c->begin,
                       c->sums + (m - c->m_begin) * c->ld_sums, NULL, c->end - c->begin);
}

void HQQ_ISA_NAME(hqq_turn_residues)(const hqq_tiled_job *job, int64_t m)
{
    int64_t G = job->layout.G, residues = job->layout.N / G;
    float *floats = (float *)job->turned + m * job->ld_turned;
    uint16_t *halves = (uint16_t *)job->turned + m * job->ld_turned;
    for (int64_t r = 0; r < residues; r += HQQ_LANES) {
        int count = (int)hqq_least(residues - r, HQQ_LANES);
        int64_t at = m * job->ld_in + r, to = r * G;
        hqq_vec sum = hqq_vec_zero();
        for (int64_t i = 0; i < G; i++, at += residues, to++) {
            hqq_vec dy = hqq_vec_load_dtype_part(job->in, job->dtype, at, count);
            const uint16_t *in = (const uint16_t *)job->in + at;
            sum += dy;
            for (int j = 0; j < count && job->pairs; j++) halves[to + j * G] = in[j];
            for (int j = 0; j < count && !job->pairs; j++) floats[to + j * G] = dy[j];
        }
        if (job->pairs)
            hqq_vec_store_dtype_part(job->residue_sums + m * residues, HQQ_F32, r, sum, count);
    }
}

/* Panels of turned tokens, and one chunk of the product with them (turned.h). */
#include "turned.h"

#include "tiled_block.h"
#include "tiled_fetch.h"
#include "transpose.h"

/* Of 6 rows of W, by vectors of tokens. */
#define TURNED_TILE(vectors, kind)                                                            \
    static void tile_##vectors##_##kind(float *sums, int64_t ld_sums, const void *left,       \
                                        int64_t ld_left, const void *right, int64_t ld_right, \
                                        int64_t steps, int add)                               \
    {                                                                                         \
        hqq_multiply_outer(sums, ld_sums, left, ld_left, right, ld_right, steps, add,         \
                           HQQ_TILED_TOKENS, vectors, kind);                                  \
    }
#if HQQ_TILE_REGISTERS == 24
#define TURNED_TILES(kind) \
    TURNED_TILE(1, kind)   \
    TURNED_TILE(2, kind) TURNED_TILE(3, kind) TURNED_TILE(4, kind)
#define TURNED_ROW(kind) {tile_1_##kind, tile_2_##kind, tile_3_##kind, tile_4_##kind}
#else
#define TURNED_TILES(kind) TURNED_TILE(1, kind) TURNED_TILE(2, kind)
#define TURNED_ROW(kind)   {tile_1_##kind, tile_2_##kind}
#endif
TURNED_TILES(HQQ_FLOATS)
#if HQQ_HAS_PAIRS
TURNED_TILES(HQQ_PAIRS)
static const hqq_tile_fn tiles[2][HQQ_TILED_SIDE] = {TURNED_ROW(HQQ_FLOATS),
                                                     TURNED_ROW(HQQ_PAIRS)};
#else
static const hqq_tile_fn tiles[1][HQQ_TILED_SIDE] = {TURNED_ROW(HQQ_FLOATS)};
#endif

/* Tokens of a panel: whole vectors, about as many in each. */
static int64_t panel_tokens(const hqq_turned_part *part)
{
    return hqq_even_part(part->m_end - part->m_begin, HQQ_TILED_SIDE * HQQ_LANES, HQQ_LANES);
}

static float *panel_at(const hqq_turned_part *part, int64_t panel, int64_t word)
{
    return (float *)part->panels + (panel * part->words + word) * panel_tokens(part);
}

/* HQQ_LANES words of token m from column k on; zeros behind the last column. */
HQQ_ALWAYS_INLINE hqq_vec words_of_token(const hqq_tiled_job *job, int64_t m, int64_t k)
{
    int64_t at = m * job->ld_in + k, left = job->layout.K - k;
    hqq_vec words = hqq_vec_zero();
    if (job->pairs)
        memcpy(&words, hqq_at(job->in, HQQ_BF16, at),
               left < 2 * HQQ_LANES ? (size_t)left * 2 : sizeof words);
    else if (left < HQQ_LANES)
        words = hqq_vec_load_dtype_part(job->in, job->dtype, at, (int)left);
    else
        words = hqq_vec_load_dtype(job->in, job->dtype, at);
    return words;
}

void HQQ_ISA_NAME(hqq_turn_tokens)(const hqq_turned_part *part, int64_t m_begin, int64_t begin,
                                   int64_t end)
{
    int64_t in_word = part->job.pairs ? 2 : 1, width = panel_tokens(part);
    int64_t m_end = hqq_least(m_begin + HQQ_PANEL_UNIT, part->m_end);
    for (int64_t m = m_begin; m < m_end; m += HQQ_LANES) {
        int64_t at = m - part->m_begin;
        float *panel = panel_at(part, at / width, 0) + at % width;
        for (int64_t w = begin; w < end; w += HQQ_LANES) {
            hqq_vec block[HQQ_LANES];
            for (int i = 0; i < HQQ_LANES; i++)
                block[i] = m + i < m_end ? words_of_token(&part->job, m + i, w * in_word)
                                         : hqq_vec_zero();
            hqq_vec_transpose(block);
            for (int i = 0; i < hqq_least(end - w, HQQ_LANES); i++)
                hqq_vec_store(panel + (w + i) * width, block[i]);
        }
    }
}

/* All rows of the chunk, words [begin, end) of each. Rows that there are not keep what is
 * there: they go to sums that nobody reads. */
static void decode_chunk(const hqq_turned_part *part, const hqq_tiled_chunk *c, int64_t begin,
                         int64_t end)
{
    const hqq_tiled_job *job = &part->job;
    int64_t in_word = job->pairs ? 2 : 1, ld = hqq_tiled_stride(job->block_columns) * in_word;
    int64_t columns = hqq_least(end * in_word, job->layout.K) - begin * in_word;
    hqq_decode_rows(c->weights, ld, job->block_sets, job, c->begin, c->end, begin * in_word,
                    begin * in_word + columns);
    for (int64_t r = 0; r < job->sets.slots * job->block_sets; r++)
        hqq_clear_terms(c->weights, job, r * ld + columns, r * ld + (end - begin) * in_word);
}

/* The decoded words against all tokens of the part. Tokens that there are not are zeros. */
static void multiply_panels(const hqq_turned_part *part, const hqq_tiled_chunk *c,
                            int64_t begin, int64_t end, int add, hqq_strips *next)
{
    const hqq_tiled_job *job = &part->job;
    int64_t rows = job->sets.slots * job->block_sets, tokens = c->m_end - c->m_begin;
    int64_t ld = hqq_tiled_stride(job->block_columns), done = 0;
    int64_t width = panel_tokens(part);
    int64_t all = hqq_ceil_div(tokens, width) * (rows / HQQ_TILED_TOKENS);
    for (int64_t m = 0; m < tokens; m += width) {
        int64_t vectors = hqq_ceil_div(hqq_least(tokens - m, width), HQQ_LANES);
        hqq_tile_fn tile = tiles[job->pairs][vectors - 1];
        const float *panel = panel_at(part, m / width, begin);
        for (int64_t r = 0; r < rows; r += HQQ_TILED_TOKENS) {
            hqq_fetch_part(next, ++done, all);
            tile(c->sums + r * c->ld_sums + m, c->ld_sums, hqq_word(c->weights, r * ld), ld,
                 panel, width, end - begin, add);
        }
    }
}

/* y [tokens, rows of slot j] = the sums, turned back, with the bias. */
static void store_slot(const hqq_tiled_chunk *c, int j, hqq_row_piece rows, const float *bias)
{
    const hqq_tiled_job *job = c->job;
    const float *sums = c->sums + j * job->block_sets * c->ld_sums;
    for (int64_t m = c->m_begin; m < c->m_end; m += HQQ_LANES)
        for (int64_t r = 0; r < rows.count; r += HQQ_LANES) {
            int64_t count = hqq_least(rows.count - r, HQQ_LANES);
            hqq_vec block[HQQ_LANES];
            for (int i = 0; i < HQQ_LANES; i++)
                block[i] = i < count
                               ? hqq_vec_load(sums + (r + i) * c->ld_sums + m - c->m_begin)
                               : hqq_vec_zero();
            hqq_vec_transpose(block);
            for (int i = 0; i < hqq_least(c->m_end - m, HQQ_LANES); i++) {
                float lanes[HQQ_LANES];
                int64_t at = (m + i) * job->layout.N;
                if (job->by_cycle) {
                    hqq_vec sums_of_m = bias ? block[i] + hqq_vec_load(bias + r) : block[i];
                    hqq_store_sets(job, at + job->sets.start[j], c->begin + r, sums_of_m,
                                   (int)count);
                    continue;
                }
                hqq_vec_store(lanes, block[i]);
                hqq_store_sums(job, at + rows.first + r, lanes, bias ? bias + r : NULL, count);
            }
        }
}

static void store_chunk(const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    hqq_row_piece pieces[HQQ_MAX_SLOTS];
    hqq_row_pieces(pieces, &job->sets, c->begin, c->end);
    for (int j = 0; j < job->sets.slots; j++) {
        if (job->bias && !job->by_cycle)
            hqq_load_floats(c->bias, job->bias, job->bias_dtype, pieces[j].first,
                            pieces[j].count);
        for (int64_t set = c->begin; job->bias && job->by_cycle && set < c->end; set++) {
            int64_t row = job->sets.start[j] + hqq_row_in_slot(&job->sets, set);
            c->bias[set - c->begin] = hqq_load_quick(job->bias, job->bias_dtype, row);
        }
        store_slot(c, j, pieces[j], job->bias ? c->bias : NULL);
    }
}

void HQQ_ISA_NAME(hqq_turned_linear_chunk)(const hqq_turned_part *part,
                                           const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = &part->job;
    int64_t in_word = job->pairs ? 2 : 1;
    for (int64_t begin = 0, end; begin < part->words; begin = end) {
        end = hqq_least(begin + job->block_columns, part->words);
        int64_t after = hqq_least((end + job->block_columns) * in_word, job->layout.K);
        hqq_strips next = hqq_strips_of(job, c->begin, end < part->words ? c->end : c->begin,
                                        end * in_word, after);
        decode_chunk(part, c, begin, end);
        multiply_panels(part, c, begin, end, c->add || begin > 0, &next);
    }
    store_chunk(c);
}

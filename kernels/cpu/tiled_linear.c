/* One chunk of the tiled forward product (tiled.h): y [tokens, rows of some sets of W]. */
#include "tiled.h"

#include "integers.h"
#include "tiled_block.h"
#include "tiled_fetch.h"
#if HQQ_HAS_PAIRS
#include "tiled_scaled.h"
#endif

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

/* One of `parts` of what is decoded some steps later, the sets from `set` on, on its way to the
 * second cache while the tiles multiply: words, and at axis 1 zeros and scales. Part by part,
 * as the processor waits for memory where more lines are asked for than it can keep track of.
 */
HQQ_ALWAYS_INLINE void fetch_sets(const hqq_tiled_chunk *c, const column_block *b, int64_t set,
                                  int64_t part, int64_t parts)
{
    const hqq_layout *l = &c->job->layout;
    const hqq_weight *w = c->job->weight;
    int64_t end = hqq_least(set + HQQ_TILED_SETS, c->end);
    int64_t columns = b->end - b->begin, bytes = hqq_dtype_bytes(w->meta_dtype);
    int64_t lines = hqq_ceil_div(columns * l->word_bytes, 64);
    int64_t first = part * lines / parts * 64, last = (part + 1) * lines / parts * 64;
    for (; set < end; set++) {
        int64_t row = c->job->by_cycle ? hqq_row_in_slot(&c->job->sets, set) : set;
        int64_t word = row * l->K + b->begin;
        hqq_fetch_codes(c->job, row, b->begin, first, last);
        for (int j = 0; j < l->per && l->axis == 1 && part == 0; j++) {
            int64_t at = (word + j * l->words) / l->G * bytes;
            hqq_fetch_bytes(w->zero, at, columns / l->G * bytes);
            hqq_fetch_bytes(w->scale, at, columns / l->G * bytes);
        }
    }
}

/* Where a chunk is: parts of its sets (`each` of them that share the input, as it is copied or
 * scaled for them) by blocks of columns by sets that are decoded together. */
typedef struct place {
    int64_t part, set;
    column_block b;
} place;

static place place_after(const hqq_tiled_chunk *c, place at, int64_t each)
{
    at.set += HQQ_TILED_SETS;
    if (at.set < hqq_least(at.part + each, c->end)) return at;
    at.b = block_at(c->job, at.b.end);
    if (at.b.begin >= c->job->layout.K) {
        at.part += each;
        at.b = block_at(c->job, 0);
    }
    at.set = at.part;
    return at;
}

/* The sets from `set` on that are decoded together against all tokens of the chunk. Rows that
 * there are not are multiplied all the same, to sums that nobody reads. */
static void multiply_sets(const hqq_tiled_chunk *c, const place *at, const place *next, int add)
{
    const hqq_tiled_job *job = c->job;
    const column_block *b = &at->b;
    int64_t sets = HQQ_TILED_SETS, set = at->set, set_end = hqq_least(set + sets, c->end);
    int64_t rows = job->sets.slots * sets, ld = hqq_tiled_stride(job->block_columns);
#if HQQ_HAS_PAIRS
    if (job->scales_input)
        decode_codes(c->weights, b->ld, sets, job, set, set_end, b->begin, b->end);
    else
#endif
        hqq_decode_rows(c->weights, b->ld, sets, job, set, set_end, b->begin, b->end);
    for (int64_t r = 0; r < rows && b->begin + b->width > b->end; r++)
        hqq_clear_terms(c->weights, job, r * b->ld + b->end - b->begin, r * b->ld + b->width);
    int64_t tiles_across = hqq_ceil_div(c->m_end - c->m_begin, HQQ_TILED_TOKENS);
    int64_t done = 0, all = tiles_across * (rows / HQQ_TILED_SIDE);
    for (int64_t m = c->m_begin; m < c->m_end;) {
        int tokens = hqq_tiled_tokens(c->m_end - m);
        hqq_tile_fn tile = tiles[job->pairs][tokens];
        float *sums = c->sums + (m - c->m_begin) * c->ld_sums + set - c->begin;
        const void *input = hqq_word(input_of(c, b), (m - c->m_begin) * ld);
        for (int64_t r = 0; r < rows; r += HQQ_TILED_SIDE) {
            fetch_sets(c, &next->b, next->set, done++, all);
            tile(sums + r / sets * job->block_sets + r % sets, c->ld_sums, input, ld,
                 hqq_word(c->weights, r * ld), ld, b->steps, add);
        }
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

/* The same where the sets are taken cycle by cycle: rows lie apart. */
static void store_scattered(const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    const hqq_row_sets *sets = &job->sets;
    const int width = sets->cycle % HQQ_LANES == 0 ? HQQ_LANES : HQQ_TILED_SETS;
    for (int64_t set = c->begin; set < c->end; set += width)
        for (int j = 0; j < sets->slots; j++) {
            int64_t row = sets->start[j] + hqq_row_in_slot(sets, set);
            hqq_vec bias = hqq_vec_zero();
            for (int i = 0; i < width && job->bias; i++)
                bias[i] = hqq_load_quick(job->bias, job->bias_dtype, row + i * sets->step);
            for (int64_t m = c->m_begin; m < c->m_end; m++) {
                const float *sums = c->sums + (m - c->m_begin) * c->ld_sums +
                                    j * job->block_sets + set - c->begin;
                hqq_vec sum = hqq_vec_load_dtype_part(sums, HQQ_F32, 0, width);
                hqq_store_sets(job, m * job->layout.N + sets->start[j], set, sum + bias, width);
            }
        }
}

void HQQ_ISA_NAME(hqq_tiled_linear_chunk)(const hqq_tiled_chunk *c)
{
    const hqq_tiled_job *job = c->job;
    int64_t each = job->scales_input  ? job->sets.cycle
                   : job->keeps_input ? HQQ_TILED_SETS
                                      : job->block_sets;
    place at = {c->begin, c->begin, block_at(job, 0)};
    for (column_block b = at.b; b.begin < job->layout.K && job->keeps_input;
         b = block_at(job, b.end))
        copy_input(c, &b);
    while (at.part < c->end) {
        int add = c->add || at.b.begin > 0;
        if (at.set == at.part && job->scales_input) {
#if HQQ_HAS_PAIRS
            scale_input(c, input_of(c, &at.b), at.b.ld, at.b.begin, at.b.end, at.part, add);
#endif
        } else if (at.set == at.part && !job->keeps_input) {
            copy_input(c, &at.b);
        }
        /* in fp32 these columns of the next rows: there are more blocks of columns, so steps
         * ahead */
        place after = place_after(c, at, each), next = after;
        if (job->pairs)
            next = place_after(c, after, each);
        else if (job->keeps_input)
            next = (place){at.part + each, at.part + each, at.b};
        multiply_sets(c, &at, &next, add || job->scales_input);
        at = after;
    }
    if (job->by_cycle)
        store_scattered(c);
    else
        store_chunk(c);
}

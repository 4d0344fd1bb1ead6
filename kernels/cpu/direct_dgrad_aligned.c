/*
 * The work of one chunk of the direct input gradient, for weights whose vectors align.
 *
 * A byte holds the codes of `per` rows of W, n + j * N/per, at one k: it is loaded once,
 * decoded in registers to `per` weights, and each is multiplied with up to eight rows of dy:
 *
 *     64 bytes of packed row p, columns k to k + 63, four vectors v
 *       slot 0: W[p,         k..]  *  dy[m, p]          ->  acc[m][v]       m = 0 to 7
 *       slot 1: W[p + N/per, k..]  *  dy[m, p + N/per]  ->  acc[m][v]
 *       ...
 *
 * for a batch of packed rows, before the next 64 columns; acc is loaded from and stored to the
 * sums of dx in the first cache once a batch.
 *
 *   axis 1: a table (decode.h) for each row and group.
 *   axis 0: rows of one residue modulo N/G share their scales: within a batch of such rows the
 *           weight is the code itself, and the sum begins with the zeros times -sum dy and is
 *           multiplied by the scales at its end.
 *
 * In fp32 with weights in fp32 (add_floats.h), or in pairs of bf16 (add_pairs.h).
 *
 * Napkin, 4 bits, AVX-512, fp32: 64 bytes cost 4 loads that widen, 4 shifts, 8 look-ups, 2
 * tables of 2, and 8 M multiplications: (20 + 8 M) / 2 cycles for 128 weights; 27 G weights/s a
 * thread at M = 1 and 3 GHz, 9 at M = 8. Measured from memory: 16 and 5.
 */
#include "add_floats.h"
#include "code_runs.h"
#include "direct_dgrad.h"
#include "direct_tile.h"
#include "integers.h"
#include "multiply_tile.h"
#if HQQ_HAS_PAIRS
#include "add_pairs.h"
#endif

static int log2_of(int power)
{
    return __builtin_ctz((unsigned)power);
}

/* One chunk: a part of the row sets, a block of columns. */
typedef struct dgrad_chunk {
    const hqq_direct_dgrad_job *job;
    int64_t set_begin, set_end, column, columns;
    hqq_dgrad_scratch s;
    int64_t residue; /* axis 0: whose zeros and scales are loaded; -1: none's */
} dgrad_chunk;

/* Axis 1: zeros and scales of the groups of the rows of a set, as row r of the batch. */
static void load_group_meta(const dgrad_chunk *c, const add_block *b, int64_t p, int r)
{
    const hqq_layout *l = &c->job->layout;
    const hqq_weight *w = c->job->weight;
    for (int j = 0; j < l->per; j++) {
        int64_t group = (p + j * (l->N / l->per)) * (l->K / l->G) + c->column / l->G;
        int64_t at = (r * l->per + j) * b->groups;
        hqq_load_floats(c->s.zero + at, w->zero, w->meta_dtype, group, b->groups);
        hqq_load_floats(c->s.scale + at, w->scale, w->meta_dtype, group, b->groups);
    }
}

/* Axis 0: zeros and scales of the columns, for the rows of a residue. */
static void load_residue(dgrad_chunk *c, int64_t residue)
{
    const hqq_weight *w = c->job->weight;
    int64_t at = residue * c->job->layout.K + c->column;
    if (residue == c->residue) return;
    c->residue = residue;
#if HQQ_HAS_PAIRS
    if (c->job->pairs && w->meta_dtype == HQQ_BF16) {
        hqq_load_pair_order(c->s.zero, (const uint16_t *)w->zero + at, c->columns);
        hqq_load_pair_order(c->s.scale, (const uint16_t *)w->scale + at, c->columns);
        return;
    }
#endif
    hqq_load_floats(c->s.zero, w->zero, w->meta_dtype, at, c->columns);
    hqq_load_floats(c->s.scale, w->scale, w->meta_dtype, at, c->columns);
#if HQQ_HAS_PAIRS
    if (c->job->pairs) {
        hqq_to_pair_order(c->s.zero, c->columns);
        hqq_to_pair_order(c->s.scale, c->columns);
    }
#endif
}

/* Fills the batch from the sets `set` on; how many it took. */
static int64_t gather_batch(dgrad_chunk *c, add_block *b, int64_t set, int64_t m0)
{
    const hqq_direct_dgrad_job *job = c->job;
    const hqq_layout *l = &job->layout;
    const hqq_weight *w = job->weight;
    int64_t end = hqq_least(
        c->set_end, set + hqq_least(BATCH_ROWS / l->per, batch_packed_rows(l, b->tokens)));
    if (l->axis == 0) { /* the rest of this residue at most */
        int64_t residue = set / job->sets.cycle;
        end = hqq_least(end, (residue + 1) * job->sets.cycle);
        load_residue(c, residue);
    }
    for (b->rows = 0; set + b->rows < end; b->rows++) {
        int64_t p = hqq_row_in_slot(&job->sets, set + b->rows);
        if (l->planes)
            b->planes[b->rows] = hqq_plane_bytes_of(w->packed, l, p, c->column);
        else
            b->words[b->rows] = (const uint8_t *)w->packed + p * l->K + c->column;
        b->dy[b->rows] = job->dy_t + p * job->ld_dy + m0;
        if (l->axis == 1) load_group_meta(c, b, p, b->rows);
    }
#if HQQ_HAS_PAIRS
    if (job->pairs) gather_dy_pairs(b, l->per);
#endif
    if (!job->pairs && l->axis == 0) sum_dy(b, l->per);
    /* The next batch's words; behind the last ones are those of the next part. */
    int64_t after = hqq_least(set + b->rows, job->sets.sets - 1);
    b->next = (hqq_row_in_slot(&job->sets, after) - hqq_row_in_slot(&job->sets, set)) * l->K;
    return b->rows;
}

/* sums [MB, columns] = tokens m0 to m0 + MB of dy, times the part's rows of W. */
static void sum_part(dgrad_chunk *c, int64_t m0, int MB)
{
    const hqq_direct_dgrad_job *job = c->job;
    const hqq_layout *l = &job->layout;
    int per = log2_of(l->per), tokens = log2_of(MB);
    add_fn add = (l->planes ? float_planes : float_adds[per])[tokens][l->axis];
#if HQQ_HAS_PAIRS
    if (job->pairs) add = (l->planes ? pair_planes : pair_adds[per])[tokens][l->axis];
#endif
    add_block b = {.sums = c->s.sums,
                   .ld = job->columns,
                   .tokens = MB,
                   .dy_slot = l->N / l->per * job->ld_dy,
                   .zero = c->s.zero,
                   .scale = c->s.scale,
                   .columns = c->columns,
                   .G = l->G};
    if (l->axis == 1) {
        b.group_left = (c->column / l->G + 1) * l->G - c->column;
        b.groups = (c->column + c->columns - 1) / l->G - c->column / l->G + 1;
    }
    memset(c->s.sums, 0, (size_t)(MB * job->columns) * sizeof(float));
    for (int64_t set = c->set_begin; set < c->set_end;) {
        set += gather_batch(c, &b, set, m0);
        add(&b);
    }
#if HQQ_HAS_PAIRS
    for (int m = 0; m < MB && job->pairs; m++)
        hqq_from_pair_order(c->s.sums + m * job->columns, c->columns);
#endif
}

void HQQ_ISA_NAME(hqq_direct_dgrad_aligned)(const hqq_direct_dgrad_job *job, int64_t part,
                                            int64_t column_begin, int64_t column_end,
                                            void *scratch)
{
    hqq_arena arena = {.base = scratch};
    dgrad_chunk c = {.job = job,
                     .set_begin = hqq_dgrad_part_begin(job, part),
                     .set_end = hqq_dgrad_part_begin(job, part + 1),
                     .column = column_begin,
                     .columns = column_end - column_begin,
                     .s = hqq_dgrad_scratch_take(&arena, job->columns),
                     .residue = -1};
    for (int64_t m0 = 0; m0 < job->M;) {
        int MB = hqq_tokens_at_once(job->M - m0, MAX_TOKENS);
        int64_t tokens = job->M - m0 < MB ? job->M - m0 : MB;
        sum_part(&c, m0, MB);
        HQQ_ISA_NAME(hqq_dgrad_store)(job, c.s.sums, part, m0, tokens, column_begin,
                                      column_end);
        m0 += tokens;
    }
}

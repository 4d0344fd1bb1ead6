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
 *           weight is q - zero, and the sum is multiplied by the scales at its end.
 *
 * Napkin, 4 bits, AVX-512: 64 bytes cost 4 loads that widen, 4 shifts, 8 look-ups, 2 tables
 * of 2, and 8 M multiplications: (20 + 8 M) / 2 cycles for 128 weights; 27 G weights/s a
 * thread at M = 1 and 3 GHz, 9 at M = 8. Measured from memory: 16 and 5.
 */
#include "code_runs.h"
#include "decode.h"
#include "direct_dgrad.h"
#include "direct_tile.h"

#define INLINE HQQ_ALWAYS_INLINE

#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_SUMS 16
#else
#define MAX_SUMS 8
#endif
#define MAX_TOKENS (MAX_SUMS / 2)

/* Rows of W in a batch, about; packed rows are that over the slots of a word. */
#define BATCH_ROWS 32

/* A batch of packed rows against a block of columns, at whose first column the pointers are. */
typedef struct add_block {
    float *sums; /* [MB, ld] */
    int64_t ld;
    const uint8_t *words[BATCH_ROWS];
    const float *dy[BATCH_ROWS]; /* of slot 0: [MB]; slot j lies dy_slot behind */
    int64_t dy_slot;
    int rows;                  /* packed ones */
    int64_t next;              /* bytes to the words that are wanted after these */
    const float *zero, *scale; /* axis 1: [rows, per, groups]; axis 0: of each column */
    int64_t groups;
    int64_t columns;
    int64_t group_left; /* axis 1: columns to the end of the first group */
    int64_t G;
} add_block;

/* sums[:, k:k + VN vectors] += the batch. g: axis 1, the group. */
INLINE void add_vectors(const add_block *b, int64_t k, int64_t g, const int nbits,
                        const int axis, const int MB, const int VN)
{
    const int PER = 8 / nbits, BY_TABLE = nbits <= HQQ_TABLE_BITS;
    hqq_vec acc[16], zero[4];
    for (int v = 0; v < VN; v++) {
        if (axis == 0) zero[v] = hqq_vec_load(b->zero + k + v * HQQ_LANES);
        for (int m = 0; m < MB; m++)
            acc[m * VN + v] = axis == 0 ? hqq_vec_zero()
                                        : hqq_vec_load(b->sums + m * b->ld + k + v * HQQ_LANES);
    }
    hqq_decoder d = hqq_decoder_of(nbits, BY_TABLE, 0.0f, 1.0f);
    for (int r = 0; r < b->rows; r++) {
        const uint8_t *bytes = b->words[r] + k;
        hqq_ivec words[4];
        __builtin_prefetch(bytes + b->next);
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) words[v] = hqq_ivec_load_u8(bytes + v * HQQ_LANES);
#pragma GCC unroll 8
        for (int j = 0; j < PER; j++) {
            const float *dy = b->dy[r] + j * b->dy_slot;
            if (axis == 1) {
                int64_t at = (r * PER + j) * b->groups + g;
                d = hqq_decoder_of(nbits, BY_TABLE, b->zero[at], b->scale[at]);
            }
            hqq_vec w[4];
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) {
                w[v] = hqq_decode(&d, BY_TABLE, words[v] >> (8 - nbits * (j + 1)));
                if (axis == 0) w[v] -= zero[v];
            }
#pragma GCC unroll 8
            for (int m = 0; m < MB; m++) {
                hqq_vec c = hqq_vec_set1(dy[m]);
#pragma GCC unroll 4
                for (int v = 0; v < VN; v++) acc[m * VN + v] += c * w[v];
            }
        }
    }
    for (int v = 0; v < VN; v++)
        for (int m = 0; m < MB; m++) {
            float *sums = b->sums + m * b->ld + k + v * HQQ_LANES;
            hqq_vec sum = acc[m * VN + v];
            if (axis == 0)
                sum = hqq_vec_load(sums) + sum * hqq_vec_load(b->scale + k + v * HQQ_LANES);
            hqq_vec_store(sums, sum);
        }
}

INLINE void add_batch(const add_block *b, const int nbits, const int axis, const int MB)
{
    const int VN = MAX_SUMS / MB < 4 ? MAX_SUMS / MB : 4;
    int64_t end = axis == 1 ? b->group_left : b->columns;
    for (int64_t k = 0, g = 0; k < b->columns; g++, end += b->G) {
        int64_t stop = end < b->columns ? end : b->columns;
        for (; k + VN * HQQ_LANES <= stop; k += VN * HQQ_LANES)
            add_vectors(b, k, g, nbits, axis, MB, VN);
        for (; k < stop; k += HQQ_LANES) add_vectors(b, k, g, nbits, axis, MB, 1);
    }
}

typedef void (*add_fn)(const add_block *);

#define ADD(nbits, axis, MB)                                    \
    static void add_##nbits##_##axis##_##MB(const add_block *b) \
    {                                                           \
        add_batch(b, nbits, axis, MB);                          \
    }
#define ADDS(nbits, MB) ADD(nbits, 0, MB) ADD(nbits, 1, MB)
#define ALL_ADDS(nbits) ADDS(nbits, 1) ADDS(nbits, 2) ADDS(nbits, 4)
/* clang-format off */
ALL_ADDS(8) ALL_ADDS(4) ALL_ADDS(2) ALL_ADDS(1)
#define PAIR(nbits, MB) {add_##nbits##_0_##MB, add_##nbits##_1_##MB}
#if MAX_TOKENS == 8
ADDS(8, 8) ADDS(4, 8) ADDS(2, 8) ADDS(1, 8)
#define ROW(nbits) {PAIR(nbits, 1), PAIR(nbits, 2), PAIR(nbits, 4), PAIR(nbits, 8)}
#else
#define ROW(nbits) {PAIR(nbits, 1), PAIR(nbits, 2), PAIR(nbits, 4)}
#endif

/* By slots in a word (1, 2, 4, 8), tokens (1, 2, 4, 8) and axis; log2 of both. */
static const add_fn adds[4][4][2] = {ROW(8), ROW(4), ROW(2), ROW(1)};
/* clang-format on */

static int log2_of(int power)
{
    return __builtin_ctz((unsigned)power);
}

/* One chunk: a part of the row sets, a block of columns. */
typedef struct dgrad_chunk {
    const hqq_direct_dgrad_job *job;
    int64_t set_begin, set_end, column, columns;
    hqq_dgrad_scratch s;
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

/* Fills the batch from the sets `set` on; how many it took. */
static int64_t gather_batch(const dgrad_chunk *c, add_block *b, int64_t set, int64_t m0)
{
    const hqq_direct_dgrad_job *job = c->job;
    const hqq_layout *l = &job->layout;
    const hqq_weight *w = job->weight;
    int64_t end = set + BATCH_ROWS / l->per;
    if (l->axis == 0) { /* the rest of this residue at most */
        int64_t residue = set / job->sets.cycle;
        int64_t next_residue = (residue + 1) * job->sets.cycle;
        if (end > next_residue) end = next_residue;
        int64_t at = residue * l->K + c->column;
        hqq_load_floats(c->s.zero, w->zero, w->meta_dtype, at, c->columns);
        hqq_load_floats(c->s.scale, w->scale, w->meta_dtype, at, c->columns);
    }
    if (end > c->set_end) end = c->set_end;
    for (b->rows = 0; set + b->rows < end; b->rows++) {
        int64_t p = hqq_row_in_slot(&job->sets, set + b->rows);
        b->words[b->rows] = (const uint8_t *)w->packed + p * l->K + c->column;
        b->dy[b->rows] = job->dy_t + p * job->ld_dy + m0;
        if (l->axis == 1) load_group_meta(c, b, p, b->rows);
    }
    /* The words of the next batch: axis 1, behind these rows; axis 0, of the next residue. */
    b->next = l->K * (l->axis == 1 ? b->rows : 1);
    return b->rows;
}

/* sums [MB, columns] = tokens m0 to m0 + MB of dy, times the part's rows of W. */
static void sum_part(const dgrad_chunk *c, int64_t m0, int MB)
{
    const hqq_direct_dgrad_job *job = c->job;
    const hqq_layout *l = &job->layout;
    add_fn add = adds[log2_of(l->per)][log2_of(MB)][l->axis];
    add_block b = {.sums = c->s.sums,
                   .ld = job->columns,
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
                     .s = hqq_dgrad_scratch_take(&arena, job->columns)};
    for (int64_t m0 = 0; m0 < job->M;) {
        int MB = hqq_tokens_at_once(job->M - m0, MAX_TOKENS);
        int64_t tokens = job->M - m0 < MB ? job->M - m0 : MB;
        sum_part(&c, m0, MB);
        HQQ_ISA_NAME(hqq_dgrad_store)(job, c.s.sums, part, m0, tokens, column_begin,
                                      column_end);
        m0 += tokens;
    }
}

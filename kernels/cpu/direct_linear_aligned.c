/*
 * The work of one chunk of the direct forward product, for weights whose vectors align.
 *
 * A byte holds the codes of `per` rows of W, n + j * N/per, at one k: it is loaded once,
 * decoded in registers to `per` weights, and each is multiplied with up to eight rows of x:
 *
 *     16 bytes of packed row p, columns k to k + 15
 *       slot 0: W[p,         k..]  *  x[m, k..]  ->  acc[m][0]       m = 0 to 7
 *       slot 1: W[p + N/per, k..]  *  x[m, k..]  ->  acc[m][1]
 *       ...
 *
 *   axis 1: a table (decode.h) for each slot and group.
 *   axis 0: rows of one residue modulo N/G share their scales, so x is multiplied by them once
 *           for all of these rows; the weight is then q - zero alone.
 *
 * Sums are fp32 products and additions of fp32 weights, whatever x is. bf16 dot products were
 * no faster: on a Sapphire Rapids vdpbf16ps starts every second cycle, the FMA twice a cycle.
 *
 * x is kept as the loop reads it, [K/lanes, tokens, lanes] for each block of tokens, and taken
 * in blocks of columns that fit the first cache beside the codes.
 *
 * Napkin, 4 bits, AVX-512: 16 bytes cost a load that widens, a shift, two look-ups and 2 M
 * multiplications, and a table 3 for 64 weights: (6 + 2 M) / 2 cycles for 32 weights. At
 * 3 GHz that is 24 G weights/s a thread at M = 1 (12 GB/s of codes: memory is the bound), and
 * 8.7 at M = 8. Measured in cache: 22 and 6.9; from memory 16 and 6.
 */
#include "code_runs.h"
#include "decode.h"
#include "direct_linear.h"
#include "direct_tile.h"

#define INLINE HQQ_ALWAYS_INLINE

/* gcc would rather load a vector again for each use, and run out of load ports. */
#if defined(__AVX512F__)
#define HQQ_KEEP_IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define HQQ_KEEP_IN_REGISTER(v) (void)(v)
#endif

/* Sums that fit the registers beside the weights and tables. */
#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_SUMS 16
#else
#define MAX_SUMS 8
#endif

static int max_tokens(const hqq_layout *l)
{
    return MAX_SUMS / l->per;
}

void HQQ_ISA_NAME(hqq_interleave_tokens)(float *out, const void *x, int64_t ldx,
                                         hqq_dtype dtype, int64_t M, const hqq_layout *layout)
{
    int64_t K = layout->K;
    for (int64_t m0 = 0; m0 < M;) {
        int MB = hqq_tokens_at_once(M - m0, max_tokens(layout));
        float *block = out + m0 * K;
        for (int m = 0; m < MB; m++, m0++)
            for (int64_t k = 0; k < K; k += HQQ_LANES) {
                hqq_vec v =
                    m0 < M ? hqq_vec_load_dtype(x, dtype, m0 * ldx + k) : hqq_vec_zero();
                hqq_vec_store(block + k * MB + m * HQQ_LANES, v);
            }
    }
}

/* One packed row against a block of x. Pointers are at the block's first column. */
typedef struct dot_block {
    const uint8_t *words;
    int64_t next; /* bytes to the words that are wanted after these */
    const float *x;
    const float *zero, *scale; /* axis 1: [per, stride] of the block's groups; axis 0: zero of
                                  each column */
    int64_t stride;
    int64_t columns;
    int64_t group_left; /* axis 1: columns to the end of the first group */
    int64_t G;
} dot_block;

/* acc[m * PER + j] += the weight of slot j * x[m], for a vector of columns. */
INLINE void dot_vector(hqq_vec *acc, const dot_block *b, int64_t k, const hqq_decoder *decoders,
                       const int nbits, const int axis, const int MB)
{
    const int PER = 8 / nbits;
    hqq_ivec words = hqq_ivec_load_u8(b->words + k);
    hqq_vec x[8];
#pragma GCC unroll 8
    for (int m = 0; m < MB; m++) {
        x[m] = hqq_vec_load(b->x + k * MB + m * HQQ_LANES);
        HQQ_KEEP_IN_REGISTER(x[m]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < PER; j++) {
        hqq_vec w = hqq_decode(&decoders[axis == 1 ? j : 0], nbits <= HQQ_TABLE_BITS,
                               words >> (8 - nbits * (j + 1)));
        if (axis == 0) w -= hqq_vec_load(b->zero + k);
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) acc[m * PER + j] += w * x[m];
    }
}

/* Columns [k, end), end - k a multiple of 16, in UNROLL independent sets of sums. */
INLINE void dot_columns(hqq_vec *acc, const dot_block *b, int64_t k, int64_t end,
                        const hqq_decoder *decoders, const int nbits, const int axis,
                        const int MB, const int UNROLL)
{
    const int SUMS = MB * 8 / nbits;
    for (; k + UNROLL * HQQ_LANES <= end; k += UNROLL * HQQ_LANES) {
        if (UNROLL > 1 || k % 64 == 0) __builtin_prefetch(b->words + k + b->next);
#pragma GCC unroll 4
        for (int u = 0; u < UNROLL; u++)
            dot_vector(acc + u * SUMS, b, k + u * HQQ_LANES, decoders, nbits, axis, MB);
    }
    for (; k < end; k += HQQ_LANES) dot_vector(acc, b, k, decoders, nbits, axis, MB);
}

/* sums[m * PER + j] += the products of the block; lanes are summed at the very end. */
INLINE void dot_packed_row(hqq_vec *sums, const dot_block *b, const int nbits, const int axis,
                           const int MB)
{
    const int PER = 8 / nbits, SUMS = MB * PER;
    /* at least eight chains of additions, to hide their latency */
    const int UNROLL = SUMS >= 8 ? 1 : SUMS >= 4 ? 2 : 4;
    hqq_vec acc[16] = {{0}};
    hqq_decoder decoders[8];
    if (axis == 0) {
        decoders[0] = hqq_decoder_of(nbits, nbits <= HQQ_TABLE_BITS, 0.0f, 1.0f);
        dot_columns(acc, b, 0, b->columns, decoders, nbits, axis, MB, UNROLL);
    } else {
        int64_t end = b->group_left;
        for (int64_t k = 0, g = 0; k < b->columns; g++, k = end, end += b->G) {
#pragma GCC unroll 8
            for (int j = 0; j < PER; j++)
                decoders[j] =
                    hqq_decoder_of(nbits, nbits <= HQQ_TABLE_BITS, b->zero[j * b->stride + g],
                                   b->scale[j * b->stride + g]);
            dot_columns(acc, b, k, end < b->columns ? end : b->columns, decoders, nbits, axis,
                        MB, UNROLL);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
        hqq_vec sum = sums[i] + acc[i];
        for (int u = 1; u < UNROLL; u++) sum += acc[u * SUMS + i];
        sums[i] = sum;
    }
}

typedef void (*dot_fn)(hqq_vec *, const dot_block *);

#define DOT(nbits, axis, MB)                                                   \
    static void dot_##nbits##_##axis##_##MB(hqq_vec *sums, const dot_block *b) \
    {                                                                          \
        dot_packed_row(sums, b, nbits, axis, MB);                              \
    }
#define DOTS(nbits, MB) DOT(nbits, 0, MB) DOT(nbits, 1, MB)
/* clang-format off */
DOTS(8, 1) DOTS(8, 2) DOTS(8, 4) DOTS(8, 8)
DOTS(4, 1) DOTS(4, 2) DOTS(4, 4)
DOTS(2, 1) DOTS(2, 2)
DOTS(1, 1)
#define PAIR(nbits, MB) {dot_##nbits##_0_##MB, dot_##nbits##_1_##MB}
#if MAX_SUMS == 16
DOTS(4, 8) DOTS(2, 4) DOTS(1, 2)
#define WIDEST PAIR
#else
#define WIDEST(nbits, MB) {NULL, NULL}
#endif

/* By slots in a word (1, 2, 4, 8), tokens (1, 2, 4, 8) and axis; log2 of both. */
static const dot_fn dots[4][4][2] = {
    {PAIR(8, 1), PAIR(8, 2), PAIR(8, 4), PAIR(8, 8)},
    {PAIR(4, 1), PAIR(4, 2), PAIR(4, 4), WIDEST(4, 8)},
    {PAIR(2, 1), PAIR(2, 2), WIDEST(2, 4)},
    {PAIR(1, 1), WIDEST(1, 2)},
};
/* clang-format on */

static int log2_of(int power)
{
    return __builtin_ctz((unsigned)power);
}

/* One chunk. */
typedef struct linear_chunk {
    const hqq_direct_linear_job *job;
    int64_t set_begin, set_end;
    hqq_linear_scratch s;
} linear_chunk;

/* Axis 1: the zeros and scales of `groups` groups from group g0 of the rows of packed row p. */
static void load_group_meta(const linear_chunk *c, int64_t p, int64_t g0, int64_t groups)
{
    const hqq_layout *l = &c->job->layout;
    const hqq_weight *w = c->job->weight;
    for (int j = 0; j < l->per; j++) {
        int64_t at = (p + j * (l->N / l->per)) * (l->K / l->G) + g0;
        hqq_load_floats(c->s.zero + j * groups, w->zero, w->meta_dtype, at, groups);
        hqq_load_floats(c->s.scale + j * groups, w->scale, w->meta_dtype, at, groups);
    }
}

/* Axis 0: the zeros of residue r at the block's columns, and x times its scales. */
static void load_residue(const linear_chunk *c, int64_t r, const float *x, int MB, int64_t k0,
                         int64_t columns)
{
    const hqq_weight *w = c->job->weight;
    int64_t at = r * c->job->layout.K + k0;
    hqq_load_floats(c->s.zero, w->zero, w->meta_dtype, at, columns);
    hqq_load_floats(c->s.scale, w->scale, w->meta_dtype, at, columns);
    for (int64_t k = 0; k < columns; k += HQQ_LANES) {
        hqq_vec scale = hqq_vec_load(c->s.scale + k);
        for (int64_t i = k * MB; i < (k + HQQ_LANES) * MB; i += HQQ_LANES)
            hqq_vec_store(c->s.scaled_x + i, hqq_vec_load(x + i) * scale);
    }
}

/* The sums of tokens m0 to m0 + MB over columns [k0, k0 + columns). */
static void dot_sets(const linear_chunk *c, int64_t m0, int MB, int64_t k0, int64_t columns)
{
    const hqq_direct_linear_job *job = c->job;
    const hqq_layout *l = &job->layout;
    dot_fn dot = dots[log2_of(l->per)][log2_of(MB)][l->axis];
    const float *x = job->x + m0 * l->K + k0 * MB;
    dot_block b = {.next = l->K,
                   .x = x,
                   .zero = c->s.zero,
                   .scale = c->s.scale,
                   .columns = columns,
                   .G = l->G};
    int64_t g0 = k0 / l->G, residue = -1;
    if (l->axis == 1) {
        b.group_left = (g0 + 1) * l->G - k0;
        b.stride = (k0 + columns - 1) / l->G - g0 + 1;
    } else {
        b.x = c->s.scaled_x;
    }
    for (int64_t set = c->set_begin; set < c->set_end; set++) {
        int64_t p = hqq_row_in_slot(&job->sets, set);
        b.words = (const uint8_t *)job->weight->packed + p * l->K + k0;
        if (l->axis == 1) {
            load_group_meta(c, p, g0, b.stride);
        } else if (set / job->sets.cycle != residue) {
            residue = set / job->sets.cycle;
            load_residue(c, residue, x, MB, k0, columns);
        }
        dot((hqq_vec *)c->s.sums + (set - c->set_begin) * MB * l->per, &b);
    }
}

/* y[m0:m0 + tokens, the rows of the sets] = round(sums + addend) */
static void store_sets(const linear_chunk *c, int64_t m0, int MB, int64_t tokens)
{
    const hqq_direct_linear_job *job = c->job;
    int64_t N = job->layout.N;
    int per = job->layout.per;
    for (int64_t set = c->set_begin; set < c->set_end; set++) {
        const hqq_vec *sums = (const hqq_vec *)c->s.sums + (set - c->set_begin) * MB * per;
        int64_t p = hqq_row_in_slot(&job->sets, set);
        for (int64_t m = 0; m < tokens; m++)
            for (int j = 0; j < per; j++) {
                int64_t at = (m0 + m) * N + p + j * (N / per);
                float sum = hqq_vec_sum(sums[m * per + j]);
                hqq_store(job->y, job->dtype, at, job->addend ? sum + job->addend[at] : sum);
            }
    }
}

void HQQ_ISA_NAME(hqq_direct_linear_aligned)(const hqq_direct_linear_job *job,
                                             int64_t set_begin, int64_t set_end, void *scratch)
{
    hqq_arena arena = {.base = scratch};
    linear_chunk c = {.job = job,
                      .set_begin = set_begin,
                      .set_end = set_end,
                      .s = hqq_linear_scratch_take(&arena, set_end - set_begin)};
    int64_t sets = set_end - set_begin;
    for (int64_t m0 = 0; m0 < job->M;) {
        int MB = hqq_tokens_at_once(job->M - m0, max_tokens(&job->layout));
        int64_t columns = HQQ_X_BLOCK / MB < HQQ_X_COLUMNS ? HQQ_X_BLOCK / MB : HQQ_X_COLUMNS;
        memset(c.s.sums, 0, (size_t)(sets * MB * job->layout.per) * sizeof(hqq_vec));
        for (int64_t k = 0; k < job->layout.K; k += columns)
            dot_sets(&c, m0, MB, k, job->layout.K - k < columns ? job->layout.K - k : columns);
        int64_t tokens = job->M - m0 < MB ? job->M - m0 : MB;
        store_sets(&c, m0, MB, tokens);
        m0 += tokens;
    }
}

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
 *           for all of these rows; the weight is then q - zero alone, or the code, where what x
 *           and the zeros make is taken from each sum at once.
 *
 * Sums are fp32 products and additions of fp32 weights, whatever x is (dot_floats.h); or of
 * pairs of bf16, rounded weights as for a GEMM in bf16 (dot_pairs.h). Whole groups of
 * 4-bit codes have loops of their own (dot_rows.h), as have four and eight tokens and 8-bit
 * codes (dot_byte_rows.h).
 *
 * x is kept as the loop reads it, [K/lanes, tokens, lanes] for each block of tokens (a vector
 * of bf16 has 32 lanes), and taken in blocks of columns that fit the first cache beside the
 * codes.
 *
 * Napkin, 4 bits, AVX-512, fp32: 16 bytes cost a load that widens, a shift, two look-ups and 2
 * M multiplications, and a table 3 for 64 weights: (6 + 2 M) / 2 cycles for 32 weights. At 3
 * GHz that is 24 G weights/s a thread at M = 1 (12 GB/s of codes: memory is the bound), and 8.7
 * at M = 8. Measured in cache: 22 and 6.9; from memory 16 and 6.
 */
#include "code_runs.h"
#include "direct_linear.h"
#include "direct_tile.h"
#include "dot_byte_rows.h"
#include "dot_floats.h"
#include "dot_rows.h"
#include "fetch.h"
#include "integers.h"
#include "multiply_tile.h"
#if HQQ_HAS_PAIRS
#include "dot_pairs.h"
#endif

static int max_tokens(const hqq_layout *l)
{
    return hqq_dots_rows(l) ? DOT_ROW_TOKENS : MAX_SUMS / l->per;
}

/* One token of a block of MB: x [K], or zeros for NULL. */
static void interleave_floats(float *out, const void *x, hqq_dtype dtype, int64_t i, int64_t K,
                              int MB)
{
    for (int64_t k = 0; k < K; k += HQQ_LANES)
        hqq_vec_store(out + k * MB, x ? hqq_vec_load_dtype(x, dtype, i + k) : hqq_vec_zero());
}

static void interleave_pairs(uint16_t *out, const uint16_t *x, int64_t K, int MB)
{
    for (int64_t k = 0; k < K; k += 32) {
        if (x)
            memcpy(out + k * MB, x + k, 64);
        else
            memset(out + k * MB, 0, 64);
    }
}

void HQQ_ISA_NAME(hqq_interleave_tokens)(void *out, const void *x, int64_t ldx, hqq_dtype dtype,
                                         int64_t M, const hqq_layout *layout, int pairs)
{
    int64_t K = layout->K;
    for (int64_t m0 = 0; m0 < M;) {
        int MB = hqq_tokens_at_once(M - m0, max_tokens(layout));
        int64_t block = m0 * K;
        for (int m = 0; m < MB; m++, m0++) {
            if (pairs)
                interleave_pairs((uint16_t *)out + block + m * 32,
                                 m0 < M ? (const uint16_t *)x + m0 * ldx : NULL, K, MB);
            else
                interleave_floats((float *)out + block + m * HQQ_LANES, m0 < M ? x : NULL,
                                  dtype, m0 * ldx, K, MB);
        }
    }
}

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

/* Axis 1: the zeros and scales of `groups` groups from group g0 of the rows of packed row p, as
 * number i of those that are taken together. */
static void load_group_meta(const linear_chunk *c, int64_t p, int64_t i, int64_t g0,
                            int64_t groups)
{
    const hqq_layout *l = &c->job->layout;
    const hqq_weight *w = c->job->weight;
    for (int j = 0; j < l->per; j++) {
        int64_t at = (p + j * (l->N / l->per)) * (l->K / l->G) + g0;
        int64_t to = (i * l->per + j) * groups;
        hqq_load_floats(c->s.zero + to, w->zero, w->meta_dtype, at, groups);
        hqq_load_floats(c->s.scale + to, w->scale, w->meta_dtype, at, groups);
    }
}

#if HQQ_HAS_PAIRS
/* 32 columns of a token of x, times scale, rounded to bf16. */
HQQ_ALWAYS_INLINE __m512i scaled_pairs(const uint16_t *x, const hqq_vec scale[2])
{
    return hqq_round_to_pairs(hqq_vec_load_bf16(x) * scale[0],
                              hqq_vec_load_bf16(x + 16) * scale[1]);
}

/* Axis 0: x times the scales, rounded to bf16; and of each token, -sum of that times zero, in
 * the lanes in which the codes' products are summed. It comes in two: what zeros are in bf16,
 * from which codes are subtracted exactly, and what is left of them. In one, a lone weight
 * whose code is close to its zero would be off. */
static void scale_pairs(const hqq_linear_scratch *s, const uint16_t *x, int MB, int64_t columns)
{
    hqq_vec *first = (hqq_vec *)s->constant, *rest = first + 8;
    for (int i = 0; i < 16; i++) first[i] = hqq_vec_zero();
    for (int64_t k = 0; k < columns; k += 32) {
        hqq_vec scale[2] = {hqq_vec_load(s->scale + k), hqq_vec_load(s->scale + k + 16)};
        hqq_vec zero[2] = {-hqq_vec_load(s->zero + k), -hqq_vec_load(s->zero + k + 16)};
        __m512i zeros[3]; /* fp32 is the sum of three bf16 */
        for (int part = 0; part < 3; part++) zeros[part] = hqq_take_pairs(zero);
        for (int m = 0; m < MB; m++) {
            int64_t at = k * MB + m * 32;
            __m512i scaled = scaled_pairs(x + at, scale);
            _mm512_storeu_si512((uint16_t *)s->scaled_x + at, scaled);
            first[m] = hqq_dot_pairs(first[m], scaled, zeros[0]);
            rest[m] = hqq_dot_pairs(rest[m], scaled, zeros[1]);
            rest[m] = hqq_dot_pairs(rest[m], scaled, zeros[2]);
        }
    }
}

/* The same for zeros and scales that are bf16 themselves: nothing is left of a zero. */
static void scale_pairs_bf16(const hqq_linear_scratch *s, const uint16_t *x, int MB,
                             int64_t columns, const uint16_t *zeros, const uint16_t *scales)
{
    const __m512i sign = _mm512_set1_epi16((short)0x8000);
    hqq_vec *first = (hqq_vec *)s->constant;
    for (int i = 0; i < 16; i++) first[i] = hqq_vec_zero();
    for (int64_t k = 0; k < columns; k += 32) {
        hqq_vec scale[2] = {hqq_vec_load_bf16(scales + k), hqq_vec_load_bf16(scales + k + 16)};
        __m512i zero = _mm512_xor_si512(_mm512_loadu_si512(zeros + k), sign);
        for (int m = 0; m < MB; m++) {
            int64_t at = k * MB + m * 32;
            __m512i scaled = scaled_pairs(x + at, scale);
            _mm512_storeu_si512((uint16_t *)s->scaled_x + at, scaled);
            first[m] = hqq_dot_pairs(first[m], scaled, zero);
        }
    }
}
#endif

/* In fp32: x times the scales, and of each token -sum of that times zero. Where zero and scale
 * have 16 bits, their products with each other and with a code are exact, so that a lone weight
 * is, and nothing need be subtracted for each. */
HQQ_ALWAYS_INLINE void scale_floats(const hqq_linear_scratch *s, const float *x, int MB,
                                    int64_t columns, const hqq_weight *w, int64_t at,
                                    const hqq_dtype meta)
{
    for (int m = 0; m < MB; m++) {
        hqq_vec sums[2] = {{0}}; /* two chains of additions */
        for (int64_t k = 0; k < columns; k += HQQ_LANES) {
            int64_t i = k * MB + m * HQQ_LANES;
            hqq_vec scaled = hqq_vec_load(x + i) * hqq_vec_load_dtype(w->scale, meta, at + k);
            hqq_vec_store(s->scaled_x + i, scaled);
            hqq_vec sum = sums[0] - scaled * hqq_vec_load_dtype(w->zero, meta, at + k);
            sums[0] = sums[1];
            sums[1] = sum;
        }
        hqq_vec_store(s->constant + m * HQQ_LANES, sums[0] + sums[1]);
    }
}

/* Axis 0: x times the scales of residue r at the block's columns; and its zeros, or constants.
 */
static void load_residue(const linear_chunk *c, int64_t r, const void *x, int MB, int64_t k0,
                         int64_t columns)
{
    const hqq_weight *w = c->job->weight;
    int64_t at = r * c->job->layout.K + k0;
#if HQQ_HAS_PAIRS
    if (c->job->pairs && w->meta_dtype == HQQ_BF16) {
        scale_pairs_bf16(&c->s, x, MB, columns, (const uint16_t *)w->zero + at,
                         (const uint16_t *)w->scale + at);
        return;
    }
#endif
    if (!c->job->pairs && w->meta_dtype != HQQ_F32) {
        if (w->meta_dtype == HQQ_BF16)
            scale_floats(&c->s, x, MB, columns, w, at, HQQ_BF16);
        else
            scale_floats(&c->s, x, MB, columns, w, at, HQQ_F16);
        return;
    }
    hqq_load_floats(c->s.zero, w->zero, w->meta_dtype, at, columns);
    hqq_load_floats(c->s.scale, w->scale, w->meta_dtype, at, columns);
    if (c->job->pairs) {
#if HQQ_HAS_PAIRS
        scale_pairs(&c->s, x, MB, columns);
#endif
        return;
    }
    for (int64_t k = 0; k < columns; k += HQQ_LANES) {
        hqq_vec scale = hqq_vec_load(c->s.scale + k);
        for (int64_t i = k * MB; i < (k + HQQ_LANES) * MB; i += HQQ_LANES)
            hqq_vec_store(c->s.scaled_x + i, hqq_vec_load((const float *)x + i) * scale);
    }
}

/* What takes whole steps of whole groups in this block, and how many sets that follow each
 * other at once; NULL: nothing. */
static dot_fn dot_of_whole(const hqq_direct_linear_job *job, const dot_block *b, int MB,
                           int64_t k0, int *sets)
{
    const hqq_layout *l = &job->layout;
    int bytes = hqq_dots_byte_rows(l);
    *sets = 1;
    if (!bytes && !hqq_dots_rows(l)) return NULL;
    if (bytes && MB < DOT_ROW_TOKENS) return NULL;
    if (l->axis == 0) {
        int step = bytes ? BYTE_ROW_STEP : DOT_ROW_STEP;
        if (b->columns % step != 0) return NULL;
    } else if (k0 % l->G != 0 || b->columns % l->G != 0) {
        return NULL;
    }
    *sets = bytes ? BYTE_ROW_SUMS / MB : MB == DOT_ROW_TOKENS ? 2 : 1;
    return bytes ? byte_rows(*sets, l->axis, job->pairs)
                 : row_dot(log2_of(MB), l->axis, job->pairs);
}

/* The sums of tokens m0 to m0 + MB over columns [k0, k0 + columns). */
static void dot_sets(const linear_chunk *c, int64_t m0, int MB, int64_t k0, int64_t columns)
{
    const hqq_direct_linear_job *job = c->job;
    const hqq_layout *l = &job->layout;
    const dot_table *dots = l->planes ? &float_planes : &float_dots;
#if HQQ_HAS_PAIRS
    if (job->pairs) dots = l->planes ? &pair_planes : &pair_dots;
#endif
    dot_fn dot = (*dots)[log2_of(l->per)][log2_of(MB)][l->axis];
    const void *x =
        (const char *)job->x + (m0 * l->K + k0 * MB) * (job->pairs ? 2 : (int)sizeof(float));
    const int ahead = l->planes ? 1 : 2;
    dot_block b = {.next = ahead * l->K,
                   .x = x,
                   .constant = (const hqq_vec *)c->s.constant,
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
        if (job->weight->meta_dtype != HQQ_F32) b.zero = NULL;
    }
    int several;
    dot_fn dot_whole = dot_of_whole(job, &b, MB, k0, &several);
    b.row = job->sets.step * l->K;
    for (int64_t set = c->set_begin, taken; set < c->set_end; set += taken) {
        int64_t p = hqq_row_in_slot(&job->sets, set);
        if (l->planes)
            b.planes = hqq_plane_bytes_of(job->weight->packed, l, p, k0);
        else
            b.words = (const uint8_t *)job->weight->packed + p * l->K + k0;
        taken = hqq_sets_in_step(&job->sets, set) >= several && set + several <= c->set_end
                    ? several
                    : 1;
        if (l->axis == 1) {
            b.next = (taken > ahead ? taken : ahead) * l->K;
            for (int64_t i = 0; i < taken; i++) load_group_meta(c, p + i, i, g0, b.stride);
        } else if (set / job->sets.cycle != residue) {
            residue = set / job->sets.cycle;
            load_residue(c, residue, x, MB, k0, columns);
        }
        if (l->axis == 0) {
            int64_t after = hqq_least(set + hqq_most(taken, ahead), c->set_end - 1);
            b.next = (hqq_row_in_slot(&job->sets, after) - p) * l->K;
            if ((residue + 1) * job->sets.cycle < c->set_end) /* the next one's, meanwhile */
                hqq_fetch_residue(job->weight, residue + 1, k0, columns, set % job->sets.cycle,
                                  taken, job->sets.cycle);
        }
        hqq_vec *sums = (hqq_vec *)c->s.sums + (set - c->set_begin) * MB * l->per;
        (dot_whole && taken == several ? dot_whole : dot)(sums, &b);
    }
}

/* out [count] = the sums of the lanes of vectors `apart` from each other. */
static void add_lanes(float *out, const hqq_vec *sums, int64_t apart, int64_t count)
{
    int64_t i = 0;
    for (; i + 4 <= count; i += 4, sums += 4 * apart) {
        const hqq_vec four[4] = {sums[0], sums[apart], sums[2 * apart], sums[3 * apart]};
        hqq_add_up(out + i, four, 0, 4);
    }
    for (; i < count; i++, sums += apart) out[i] = hqq_vec_sum(*sums);
}

/* y [count] at element `at` = round(sums + addend) */
static void store_row(const hqq_direct_linear_job *job, int64_t at, const float *sums,
                      int64_t count)
{
    for (int64_t i = 0; i < count; i += HQQ_LANES) {
        int left = (int)hqq_least(count - i, HQQ_LANES);
        hqq_vec sum = hqq_vec_load(sums + i);
        if (job->addend) sum += hqq_vec_load_dtype_part(job->addend, HQQ_F32, at + i, left);
        hqq_vec_store_dtype_part(job->y, job->dtype, at + i, sum, left);
    }
}

/* y[m0:m0 + tokens, the rows of the sets], which follow one another in plain order alone. */
static void store_sets(const linear_chunk *c, int64_t m0, int MB, int64_t tokens)
{
    const hqq_direct_linear_job *job = c->job;
    int64_t N = job->layout.N, sets = c->set_end - c->set_begin;
    int per = job->layout.per;
    float *row = c->s.row;
    for (int64_t m = 0; m < tokens; m++)
        for (int j = 0; j < per; j++) {
            int64_t at = (m0 + m) * N + j * (N / per);
            add_lanes(row, (const hqq_vec *)c->s.sums + m * per + j, MB * per, sets);
            if (job->sets.cycle == 1) {
                store_row(job, at + c->set_begin, row, sets);
                continue;
            }
            for (int64_t set = 0; set < sets; set++) {
                int64_t i = at + hqq_row_in_slot(&job->sets, c->set_begin + set);
                float addend = job->addend ? job->addend[i] : 0.0f;
                hqq_store(job->y, job->dtype, i, row[set] + addend);
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
    int64_t numbers = HQQ_X_BLOCK / (job->layout.per == 1 && !job->pairs ? 2 : 1);
    for (int64_t m0 = 0; m0 < job->M;) {
        int MB = hqq_tokens_at_once(job->M - m0, max_tokens(&job->layout));
        int64_t columns = numbers / MB;
        if (columns > HQQ_X_COLUMNS) columns = HQQ_X_COLUMNS;
        memset(c.s.sums, 0, (size_t)(sets * MB * job->layout.per) * sizeof(hqq_vec));
        for (int64_t k = 0; k < job->layout.K; k += columns)
            dot_sets(&c, m0, MB, k, job->layout.K - k < columns ? job->layout.K - k : columns);
        int64_t tokens = job->M - m0 < MB ? job->M - m0 : MB;
        store_sets(&c, m0, MB, tokens);
        m0 += tokens;
    }
}

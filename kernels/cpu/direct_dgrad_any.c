/*
 * The work of one chunk of the direct input gradient, for any weight.
 *
 * A tile of 8 to 10 rows of W by 512 columns is decoded into the first cache; then, for up to
 * four rows of dy and four vectors of columns at a time,
 *
 *     dx[m, k] += sum over the tile's rows n of dy[m, n] * W[n, k]
 *
 * with dx in fp32 in the first cache, loaded and stored once a tile.
 *
 * Napkin: a vector of weights costs 3 to 6 instructions to decode, a store, a load, and M
 * multiplications by a broadcast; loading and storing dx adds M / 4 to that at 8 rows a tile.
 */
#include "code_runs.h"
#include "dequantize_block.h"
#include "direct_dgrad.h"
#include "direct_tile.h"
#include "simd.h"

#define INLINE static inline __attribute__((always_inline))

#define TILE_COLUMNS 512

void HQQ_ISA_NAME(hqq_transpose_rows)(float *out, int64_t ldout, const void *dy, int64_t lddy,
                                      hqq_dtype dtype, int64_t M, int64_t N)
{
    for (int64_t m = 0; m < M; m++) {
        int64_t n = 0;
        for (; n + HQQ_LANES <= N; n += HQQ_LANES) {
            hqq_vec v = hqq_vec_load_dtype(dy, dtype, m * lddy + n);
            for (int i = 0; i < HQQ_LANES; i++) out[(n + i) * ldout + m] = v[i];
        }
        for (; n < N; n++) out[n * ldout + m] = hqq_load_quick(dy, dtype, m * lddy + n);
    }
    for (int64_t n = 0; n < N; n++)
        for (int64_t m = M; m < ldout; m++) out[n * ldout + m] = 0.0f;
}

/* sums [MR,VN vectors] += coefficients [rows,MR]^T tile [rows,VN vectors]. A row of
 * coefficients holds HQQ_DGRAD_ANY_TOKENS, one of the tile TILE_COLUMNS, one of sums ld. */
INLINE void add_products(float *sums, int64_t ld, const float *tile, const float *coefficients,
                         int rows, const int MR, const int VN)
{
    hqq_vec acc[4][4];
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < VN; v++) acc[i][v] = hqq_vec_load(sums + i * ld + v * HQQ_LANES);
    for (int t = 0; t < rows; t++) {
        hqq_vec w[4];
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++)
            w[v] = hqq_vec_load(tile + t * TILE_COLUMNS + v * HQQ_LANES);
#pragma GCC unroll 4
        for (int i = 0; i < MR; i++) {
            hqq_vec c = hqq_vec_set1(coefficients[t * HQQ_DGRAD_ANY_TOKENS + i]);
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) acc[i][v] += c * w[v];
        }
    }
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < VN; v++) hqq_vec_store(sums + i * ld + v * HQQ_LANES, acc[i][v]);
}

/* Vectors of columns at a time: 4 x 4 sums and their factors need more than 16 registers. */
#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_VN 4
#else
#define MAX_VN 2
#endif

INLINE void add_columns(float *sums, int64_t ld, const float *tile, const float *coefficients,
                        int rows, int64_t width, const int MR)
{
    int64_t k = 0;
    for (; k + MAX_VN * HQQ_LANES <= width; k += MAX_VN * HQQ_LANES)
        add_products(sums + k, ld, tile + k, coefficients, rows, MR, MAX_VN);
    for (; k < width; k += HQQ_LANES)
        add_products(sums + k, ld, tile + k, coefficients, rows, MR, 1);
}

/* width: of the tile, a multiple of HQQ_LANES. */
static void add_tile(float *sums, int64_t ld, const float *tile, const float *coefficients,
                     int rows, int64_t width, int64_t M)
{
    int64_t m = 0;
    for (; m + 4 <= M; m += 4)
        add_columns(sums + m * ld, ld, tile, coefficients + m, rows, width, 4);
    sums += m * ld;
    coefficients += m;
    switch (M - m) {
    case 3: add_columns(sums, ld, tile, coefficients, rows, width, 3); break;
    case 2: add_columns(sums, ld, tile, coefficients, rows, width, 2); break;
    case 1: add_columns(sums, ld, tile, coefficients, rows, width, 1); break;
    }
}

/* Brings in the words of a row that the tile after this one needs: rows lie a page apart, which
 * the processor's own prefetching does not follow. */
INLINE void prefetch_words(const hqq_weight *w, const hqq_layout *l, int64_t row,
                           int64_t column, int64_t columns)
{
    if (l->planes) return;
    const char *words =
        (const char *)w->packed + (row * l->K + column) % l->words * l->word_bytes;
    for (int64_t b = 0; b < columns * l->word_bytes; b += 64) __builtin_prefetch(words + b);
}

/* One chunk: a part of the row sets, a block of columns. */
typedef struct dgrad_chunk {
    const hqq_direct_dgrad_job *job;
    int64_t set_begin, set_end, column, columns;
    hqq_dgrad_scratch s;
} dgrad_chunk;

/* Decodes `columns` columns of the rows into the tile, padded with zeros to `width`. */
static void decode_tile(const dgrad_chunk *c, const int64_t *rows, int count, int64_t column,
                        int64_t columns, int64_t width)
{
    for (int t = 0; t < count; t++) {
        float *row = c->s.tile + t * TILE_COLUMNS;
        HQQ_ISA_NAME(hqq_dequantize_rows)
        (row, 0, HQQ_F32, c->job->weight, rows[t], 1, 1, column, column + columns);
        for (int64_t k = columns; k < width; k++) row[k] = 0.0f;
    }
}

static void prefetch_sets(const dgrad_chunk *c, int64_t set, int64_t set_end, int64_t column,
                          int64_t columns)
{
    int64_t rows[HQQ_MAX_SLOTS];
    for (; set < set_end && set < c->set_end; set++)
        if (hqq_row_set(rows, &c->job->sets, set) > 0)
            prefetch_words(c->job->weight, &c->job->layout, rows[0], column, columns);
}

/* sums [M, job->columns] += the tokens m0 to m0 + M of dy, times the rows of some sets. */
static void add_sets(const dgrad_chunk *c, int64_t set, int64_t set_end, int64_t m0, int64_t M)
{
    const hqq_direct_dgrad_job *job = c->job;
    int64_t rows[HQQ_TILE_ROWS], end = c->column + c->columns;
    float coefficients[HQQ_TILE_ROWS * HQQ_DGRAD_ANY_TOKENS];
    int count = 0;
    for (int64_t s = set; s < set_end; s++) count += hqq_row_set(rows + count, &job->sets, s);
    for (int t = 0; t < count; t++)
        memcpy(coefficients + t * HQQ_DGRAD_ANY_TOKENS, job->dy_t + rows[t] * job->ld_dy + m0,
               (size_t)M * sizeof(float));
    for (int64_t k = c->column; k < end; k += TILE_COLUMNS) {
        int64_t columns = end - k < TILE_COLUMNS ? end - k : TILE_COLUMNS;
        int64_t width = (columns + HQQ_LANES - 1) / HQQ_LANES * HQQ_LANES;
        prefetch_sets(c, set_end, set_end + (set_end - set), k, columns);
        decode_tile(c, rows, count, k, columns, width);
        add_tile(c->s.sums + k - c->column, job->columns, c->s.tile, coefficients, count, width,
                 M);
    }
}

void HQQ_ISA_NAME(hqq_direct_dgrad_any)(const hqq_direct_dgrad_job *job, int64_t part,
                                        int64_t column_begin, int64_t column_end, void *scratch)
{
    hqq_arena arena = {.base = scratch};
    dgrad_chunk c = {.job = job,
                     .set_begin = hqq_dgrad_part_begin(job, part),
                     .set_end = hqq_dgrad_part_begin(job, part + 1),
                     .column = column_begin,
                     .columns = column_end - column_begin,
                     .s = hqq_dgrad_scratch_take(&arena, job->columns)};
    int64_t tokens = HQQ_DGRAD_SUMS / job->columns, sets = hqq_tile_sets(&job->sets);
    for (int64_t m0 = 0; m0 < job->M; m0 += tokens) {
        int64_t M = job->M - m0 < tokens ? job->M - m0 : tokens;
        memset(c.s.sums, 0, (size_t)(M * job->columns) * sizeof(float));
        for (int64_t set = c.set_begin; set < c.set_end; set += sets)
            add_sets(&c, set, set + sets < c.set_end ? set + sets : c.set_end, m0, M);
        HQQ_ISA_NAME(hqq_dgrad_store)(job, c.s.sums, part, m0, M, column_begin, column_end);
    }
}

/* dx[m, column:column + columns] = round(sums + addend) */
static void store_dx(const hqq_direct_dgrad_job *job, const float *sums, int64_t m,
                     int64_t column, int64_t columns)
{
    int64_t at = m * job->layout.K + column;
    for (int64_t k = 0; k < columns; k += HQQ_LANES) {
        int n = columns - k < HQQ_LANES ? (int)(columns - k) : HQQ_LANES;
        hqq_vec v = hqq_vec_load(sums + k);
        if (job->addend) v += hqq_vec_load_dtype_part(job->addend, HQQ_F32, at + k, n);
        hqq_vec_store_dtype_part(job->dx, job->dtype, at + k, v, n);
    }
}

void HQQ_ISA_NAME(hqq_dgrad_store)(const hqq_direct_dgrad_job *job, const float *sums,
                                   int64_t part, int64_t m0, int64_t tokens,
                                   int64_t column_begin, int64_t column_end)
{
    int64_t K = job->layout.K, columns = column_end - column_begin;
    for (int64_t m = 0; m < tokens; m++) {
        if (job->parts == 1)
            store_dx(job, sums + m * job->columns, m0 + m, column_begin, columns);
        else
            memcpy(job->partial + (part * job->M + m0 + m) * K + column_begin,
                   sums + m * job->columns, (size_t)columns * sizeof(float));
    }
}

void HQQ_ISA_NAME(hqq_dgrad_reduce)(const hqq_direct_dgrad_job *job, int64_t column_begin,
                                    int64_t column_end)
{
    int64_t K = job->layout.K, columns = column_end - column_begin;
    for (int64_t m = 0; m < job->M; m++) {
        float sums[HQQ_DGRAD_MAX_COLUMNS];
        memset(sums, 0, sizeof sums);
        for (int64_t part = 0; part < job->parts; part++) {
            const float *row = job->partial + (part * job->M + m) * K + column_begin;
            for (int64_t k = 0; k < columns; k++) sums[k] += row[k];
        }
        store_dx(job, sums, m, column_begin, columns);
    }
}

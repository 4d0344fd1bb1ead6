/*
 * The work of one chunk of the direct input gradient, for each instruction set.
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

#define LD HQQ_DGRAD_COLUMNS

void HQQ_ISA_NAME(hqq_transpose_rows)(float *out, const void *dy, int64_t lddy, hqq_dtype dtype,
                                      int64_t M, int64_t N)
{
    for (int64_t m = 0; m < M; m++) {
        int64_t n = 0;
        for (; n + HQQ_LANES <= N; n += HQQ_LANES) {
            hqq_vec v = hqq_vec_load_dtype(dy, dtype, m * lddy + n);
            for (int i = 0; i < HQQ_LANES; i++) out[(n + i) * M + m] = v[i];
        }
        for (; n < N; n++) out[n * M + m] = hqq_load_quick(dy, dtype, m * lddy + n);
    }
}

/* sums [MR,VN vectors] += coefficients [rows,MR]^T tile [rows,VN vectors]. A row of
 * coefficients holds HQQ_DGRAD_ROWS; sums and tile rows hold LD. */
INLINE void add_products(float *sums, const float *tile, const float *coefficients, int rows,
                         const int MR, const int VN)
{
    hqq_vec acc[4][4];
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < VN; v++) acc[i][v] = hqq_vec_load(sums + i * LD + v * HQQ_LANES);
    for (int t = 0; t < rows; t++) {
        hqq_vec w[4];
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) w[v] = hqq_vec_load(tile + t * LD + v * HQQ_LANES);
#pragma GCC unroll 4
        for (int i = 0; i < MR; i++) {
            hqq_vec c = hqq_vec_set1(coefficients[t * HQQ_DGRAD_ROWS + i]);
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) acc[i][v] += c * w[v];
        }
    }
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < VN; v++) hqq_vec_store(sums + i * LD + v * HQQ_LANES, acc[i][v]);
}

/* Vectors of columns at a time: 4 x 4 sums and their factors need more than 16 registers. */
#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_VN 4
#else
#define MAX_VN 2
#endif

INLINE void add_columns(float *sums, const float *tile, const float *coefficients, int rows,
                        int64_t width, const int MR)
{
    int64_t k = 0;
    for (; k + MAX_VN * HQQ_LANES <= width; k += MAX_VN * HQQ_LANES)
        add_products(sums + k, tile + k, coefficients, rows, MR, MAX_VN);
    for (; k < width; k += HQQ_LANES)
        add_products(sums + k, tile + k, coefficients, rows, MR, 1);
}

/* width: of the tile, a multiple of HQQ_LANES. */
static void add_tile(float *sums, const float *tile, const float *coefficients, int rows,
                     int64_t width, int64_t M)
{
    int64_t m = 0;
    for (; m + 4 <= M; m += 4)
        add_columns(sums + m * LD, tile, coefficients + m, rows, width, 4);
    sums += m * LD;
    coefficients += m;
    switch (M - m) {
    case 3: add_columns(sums, tile, coefficients, rows, width, 3); break;
    case 2: add_columns(sums, tile, coefficients, rows, width, 2); break;
    case 1: add_columns(sums, tile, coefficients, rows, width, 1); break;
    }
}

/* Brings in the words of a row that the tile after this one needs: rows lie a page apart, which
 * the processor's own prefetching does not follow. */
INLINE void prefetch_words(const hqq_weight *w, const hqq_layout *l, int64_t row, int64_t column,
                           int64_t columns)
{
    const char *words = (const char *)w->packed +
                        (row * l->K + column) % l->words * l->word_bytes;
    for (int64_t b = 0; b < columns * l->word_bytes; b += 64) __builtin_prefetch(words + b);
}

typedef struct part {
    const hqq_direct_dgrad_job *job;
    hqq_layout layout;
    int64_t set_begin, set_end;
    int64_t column, columns;
} part;

/* sums [M,LD] = the rows m0 to m0 + M of dy, times the part's rows of W. */
static void sum_part(float *sums, float *tile, const part *p, int64_t m0, int64_t M)
{
    const hqq_direct_dgrad_job *job = p->job;
    int64_t sets_in_tile = hqq_tile_sets(&job->sets);
    int64_t width = (p->columns + HQQ_LANES - 1) / HQQ_LANES * HQQ_LANES;
    memset(sums, 0, (size_t)(M * LD) * sizeof(float));
    for (int64_t set = p->set_begin; set < p->set_end; set += sets_in_tile) {
        int64_t rows[HQQ_TILE_ROWS], next[HQQ_MAX_SLOTS];
        int count = 0;
        for (int64_t s = set; s < p->set_end && s < set + sets_in_tile; s++) {
            count += hqq_row_set(rows + count, &job->sets, s);
            if (s + sets_in_tile < p->set_end &&
                hqq_row_set(next, &job->sets, s + sets_in_tile) > 0)
                prefetch_words(job->weight, &p->layout, next[0], p->column, p->columns);
        }
        float coefficients[HQQ_TILE_ROWS * HQQ_DGRAD_ROWS];
        for (int t = 0; t < count; t++) {
            float *row = tile + t * LD;
            HQQ_ISA_NAME(hqq_dequantize_rows)
            (row, 0, HQQ_F32, job->weight, rows[t], 1, 1, p->column, p->column + p->columns);
            for (int64_t k = p->columns; k < width; k++) row[k] = 0.0f;
            memcpy(coefficients + t * HQQ_DGRAD_ROWS, job->dy_t + rows[t] * job->M + m0,
                   (size_t)M * sizeof(float));
        }
        add_tile(sums, tile, coefficients, count, width, M);
    }
}

/* dx[m, column:column + columns] = round(sums + addend) */
static void store_dx(const hqq_direct_dgrad_job *job, const float *sums, int64_t m,
                     int64_t column, int64_t columns)
{
    int64_t at = m * job->weight->in_features + column;
    for (int64_t k = 0; k < columns; k += HQQ_LANES) {
        int n = columns - k < HQQ_LANES ? (int)(columns - k) : HQQ_LANES;
        hqq_vec v = hqq_vec_load(sums + k);
        if (job->addend) v += hqq_vec_load_dtype_part(job->addend, HQQ_F32, at + k, n);
        hqq_vec_store_dtype_part(job->dx, job->dtype, at + k, v, n);
    }
}

void HQQ_ISA_NAME(hqq_direct_dgrad_columns)(const hqq_direct_dgrad_job *job, int64_t part_number,
                                            int64_t column_begin, int64_t column_end,
                                            void *scratch)
{
    hqq_arena arena = {.base = scratch};
    float *tile = hqq_direct_tile_take(&arena);
    float *sums = hqq_arena_take(&arena, HQQ_DGRAD_ROWS * LD * sizeof(float));
    int64_t K = job->weight->in_features, sets = job->sets.sets;
    part p = {.job = job, .layout = hqq_weight_layout(job->weight),
              .set_begin = part_number * sets / job->parts,
              .set_end = (part_number + 1) * sets / job->parts,
              .column = column_begin, .columns = column_end - column_begin};
    for (int64_t m0 = 0; m0 < job->M; m0 += HQQ_DGRAD_ROWS) {
        int64_t M = job->M - m0 < HQQ_DGRAD_ROWS ? job->M - m0 : HQQ_DGRAD_ROWS;
        sum_part(sums, tile, &p, m0, M);
        for (int64_t m = 0; m < M; m++) {
            if (job->parts == 1)
                store_dx(job, sums + m * LD, m0 + m, column_begin, p.columns);
            else
                memcpy(job->partial + (part_number * job->M + m0 + m) * K + column_begin,
                       sums + m * LD, (size_t)p.columns * sizeof(float));
        }
    }
}

void HQQ_ISA_NAME(hqq_direct_dgrad_reduce)(const hqq_direct_dgrad_job *job, int64_t column_begin,
                                           int64_t column_end)
{
    int64_t K = job->weight->in_features, columns = column_end - column_begin;
    for (int64_t m = 0; m < job->M; m++) {
        float sums[LD] = {0};
        for (int64_t part_number = 0; part_number < job->parts; part_number++) {
            const float *row = job->partial + (part_number * job->M + m) * K + column_begin;
            for (int64_t k = 0; k < columns; k++) sums[k] += row[k];
        }
        store_dx(job, sums, m, column_begin, columns);
    }
}

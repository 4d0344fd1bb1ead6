/*
 * The work of one chunk of the direct forward product, for any weight.
 *
 * A tile of 8 to 10 rows of W by 1024 columns is decoded into the first cache and multiplied
 * with all rows of x, four rows of W and up to four of x at a time:
 *
 *              tile row t      t+1      t+2      t+3
 *     x row m     acc          acc      acc      acc      each a vector of partial sums,
 *     x row m+1   acc          acc      acc      acc      summed at the end of the tile
 *
 * Napkin: a vector of weights costs 3 to 6 instructions to decode, a store, a load, and M
 * multiplications; 6 to 8 G weights/s a thread at M = 1.
 */
#include "code_runs.h"
#include "dequantize_block.h"
#include "direct_linear.h"
#include "direct_tile.h"
#include "simd.h"

#define INLINE static inline __attribute__((always_inline))

/* Rows of x at a time: 4 x 4 sums and their factors need more than 16 registers. */
#if defined(__AVX512F__) || !defined(__x86_64__)
#define MAX_MR 4
#else
#define MAX_MR 2
#endif

void HQQ_ISA_NAME(hqq_pad_rows)(float *out, int64_t ldout, const void *x, int64_t ldx,
                                hqq_dtype dtype, int64_t M, int64_t K)
{
    for (int64_t m = 0; m < M; m++) {
        hqq_load_floats(out + m * ldout, x, dtype, m * ldx, K);
        memset(out + m * ldout + K, 0, (size_t)(ldout - K) * sizeof(float));
    }
}

/* sums [MR,4] (row stride HQQ_TILE_ROWS) += x [MR] . w [4] over `columns`. */
INLINE void dot_rows(float *sums, const float *x, int64_t ldx, const float *w, int64_t columns,
                     const int MR)
{
    hqq_vec acc[4][4] = {{{0}}};
    for (int64_t k = 0; k < columns; k += HQQ_LANES)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            hqq_vec weights = hqq_vec_load(w + t * HQQ_TILE_COLUMNS + k);
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) acc[i][t] += weights * hqq_vec_load(x + i * ldx + k);
        }
    for (int i = 0; i < MR; i++)
        for (int t = 0; t < 4; t++) sums[i * HQQ_TILE_ROWS + t] += hqq_vec_sum(acc[i][t]);
}

static void dot_tile(float *sums, const float *x, int64_t ldx, int64_t M, const float *tile,
                     int rows, int64_t columns)
{
    for (int t = 0; t < rows; t += 4) {
        const float *w = tile + t * HQQ_TILE_COLUMNS;
        float *s = sums + t;
        int64_t m = 0;
        for (; m + MAX_MR <= M; m += MAX_MR)
            dot_rows(s + m * HQQ_TILE_ROWS, x + m * ldx, ldx, w, columns, MAX_MR);
        for (; m + 2 <= M; m += 2)
            dot_rows(s + m * HQQ_TILE_ROWS, x + m * ldx, ldx, w, columns, 2);
        if (m < M) dot_rows(s + m * HQQ_TILE_ROWS, x + m * ldx, ldx, w, columns, 1);
    }
}

/* y[:, rows] = round(sums + addend) */
static void store_columns(const hqq_direct_linear_job *job, const float *sums,
                          const int64_t *rows, int count)
{
    int64_t N = job->layout.N;
    for (int64_t m = 0; m < job->M; m++)
        for (int t = 0; t < count; t++) {
            int64_t i = m * N + rows[t];
            float sum = sums[m * HQQ_TILE_ROWS + t] + (job->addend ? job->addend[i] : 0.0f);
            hqq_store(job->y, job->dtype, i, sum);
        }
}

/* The columns `rows` of y. */
static void linear_tile(const hqq_direct_linear_job *job, const int64_t *rows, int count,
                        float *tile, float *sums)
{
    int64_t K = job->layout.K, M = job->M;
    memset(sums, 0, (size_t)(M * HQQ_TILE_ROWS) * sizeof(float));
    /* Rows behind the last one are multiplied too, up to four, and their sums dropped. */
    for (int t = count; t % 4 != 0; t++)
        memset(tile + t * HQQ_TILE_COLUMNS, 0, HQQ_TILE_COLUMNS * sizeof(float));
    for (int64_t k = 0; k < K; k += HQQ_TILE_COLUMNS) {
        int64_t columns = K - k < HQQ_TILE_COLUMNS ? K - k : HQQ_TILE_COLUMNS;
        int64_t width = (columns + HQQ_LANES - 1) / HQQ_LANES * HQQ_LANES;
        for (int t = 0; t < count; t++) {
            float *row = tile + t * HQQ_TILE_COLUMNS;
            HQQ_ISA_NAME(hqq_dequantize_rows)
            (row, 0, HQQ_F32, job->weight, rows[t], 1, 1, k, k + columns);
            for (int64_t i = columns; i < width; i++) row[i] = 0.0f;
        }
        dot_tile(sums, (const float *)job->x + k, job->ldx, M, tile, count, width);
    }
    store_columns(job, sums, rows, count);
}

void HQQ_ISA_NAME(hqq_direct_linear_any)(const hqq_direct_linear_job *job, int64_t set_begin,
                                         int64_t set_end, void *scratch)
{
    hqq_arena arena = {.base = scratch};
    float *tile = hqq_direct_tile_take(&arena);
    float *sums = hqq_arena_take(&arena, (size_t)(job->M * HQQ_TILE_ROWS) * sizeof(float));
    int64_t sets_in_tile = hqq_tile_sets(&job->sets);
    for (int64_t set = set_begin; set < set_end; set += sets_in_tile) {
        int64_t rows[HQQ_TILE_ROWS];
        int count = 0;
        for (int64_t s = set; s < set_end && s < set + sets_in_tile; s++)
            count += hqq_row_set(rows + count, &job->sets, s);
        linear_tile(job, rows, count, tile, sums);
    }
}

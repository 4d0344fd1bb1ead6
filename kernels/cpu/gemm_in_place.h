/*
 * Tiles of gemm_tile.c that read B where the caller has it, instead of a packed copy in fp32:
 * HQQ_LANES columns of x or dy in dA and dB, where a tile has all rows of C, so that a copy
 * would be read but once. The same multiply-adds in the same order, so the same bits. Rows are
 * on pages of their own, where no hardware prefetcher follows: while the first tile of a chunk
 * reads a cache line of each of 256 rows, it fetches the next one of each; the tiles below it
 * find them in the second cache, and fetch a few rows ahead. Included by gemm_tile.c only.
 *
 * Measured on a Zen 5, two threads, bf16, M = 1024, R = 16, K and N = 576 to 1536, median
 * GFLOP/s with packed copies and in place: dA 143 - 209 and 217 - 274, dB 157 - 195 and
 * 196 - 315; with the next line of all rows fetched, and not only 24 rows ahead, dA takes 0.86
 * and dB 0.9 of that time (fp32: 0.73 and 0.79). The same for rows of A (x A^T, dy B: two bf16
 * broadcast at once, then shifted or masked) was no faster than packing them.
 */
#ifndef HQQ_KERNELS_CPU_GEMM_IN_PLACE_H
#define HQQ_KERNELS_CPU_GEMM_IN_PLACE_H

#include "dtype.h"
#include "gemm_tile.h"
#include "multiply_tile.h"

/* Rows of B fetched ahead from the second cache: some 200 cycles at R = 16. */
#define HQQ_FETCH_ROWS 24

HQQ_ALWAYS_INLINE void store_outer(float *sums, const hqq_vec *c, int add, const int rows,
                                   const int vectors)
{
#pragma GCC unroll 24
    for (int i = 0; i < rows * vectors; i++) {
        hqq_vec sum = c[i];
        if (add) sum += hqq_vec_load(sums + i * HQQ_LANES);
        hqq_vec_store(sums + i * HQQ_LANES, sum);
    }
}

/* sums [rows, lanes] (+)= left [rows, kc] right [kc, lanes]: left packed, right's rows ld
 * elements apart. What is `fetch` elements behind each row is fetched into the second cache. */
HQQ_ALWAYS_INLINE void multiply_right(float *sums, const float *left, const void *right,
                                      int64_t ld, int64_t kc, int add, int64_t fetch,
                                      const int rows, const hqq_dtype dtype)
{
    hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 24
    for (int i = 0; i < rows; i++) c[i] = hqq_vec_zero();
    for (int64_t p = 0; p < kc; p++) {
        __builtin_prefetch(hqq_at(right, dtype, fetch));
        hqq_vec b = hqq_vec_load_dtype(right, dtype, 0);
#pragma GCC unroll 24
        for (int i = 0; i < rows; i++) c[i] += hqq_vec_set1(left[i * HQQ_GEMM_LDA]) * b;
        left++;
        right = hqq_at(right, dtype, ld);
    }
    store_outer(sums, c, add, rows, 1);
}

typedef void (*right_fn)(float *sums, const float *left, const void *right, int64_t ld,
                         int64_t kc, int add, int64_t fetch);

#define HQQ_RIGHT(rows, dtype)                                                            \
    static void right_##rows##_##dtype(float *sums, const float *left, const void *right, \
                                       int64_t ld, int64_t kc, int add, int64_t fetch)    \
    {                                                                                     \
        multiply_right(sums, left, right, ld, kc, add, fetch, rows, dtype);               \
    }
#define HQQ_RIGHTS(rows) HQQ_RIGHT(rows, HQQ_F32) HQQ_RIGHT(rows, HQQ_BF16)

/* Tiles of one vector. */
typedef struct right_tile {
    int rows;
    right_fn run[2];
} right_tile;

#define HQQ_RIGHT_TILE(rows)                                \
    {                                                       \
        rows,                                               \
        {                                                   \
            right_##rows##_HQQ_F32, right_##rows##_HQQ_BF16 \
        }                                                   \
    }

HQQ_RIGHTS(8)
#if HQQ_TILE_REGISTERS == 24
HQQ_RIGHTS(24)
HQQ_RIGHTS(16)
static const right_tile right_tiles[] = {HQQ_RIGHT_TILE(24), HQQ_RIGHT_TILE(16),
                                         HQQ_RIGHT_TILE(8)};
#else
HQQ_RIGHTS(12)
static const right_tile right_tiles[] = {HQQ_RIGHT_TILE(12), HQQ_RIGHT_TILE(8)};
#endif

/* The one of so many rows; NULL if there is none. */
static inline const right_tile *right_tile_of(int64_t rows)
{
    for (size_t i = 0; i < sizeof right_tiles / sizeof *right_tiles; i++)
        if (right_tiles[i].rows == rows) return &right_tiles[i];
    return NULL;
}

/* Whether a tile can read the rows of a view, of which each runs along. */
static inline int readable_in_place(const hqq_view *v)
{
    return v->column_stride == 1 && !v->dropout && v->dtype != HQQ_F16;
}

/* Elements between a panel of one vector, the last but `left - 1` of `panels`, and what is
 * fetched beside it: the next cache line of each row, behind the last panel the first of the
 * next slab. */
static inline int64_t to_next_line(const hqq_view *v, int64_t left, int64_t panels, int64_t kc)
{
    int64_t line = 64 / hqq_dtype_bytes(v->dtype);
    if (HQQ_LANES + line <= left * HQQ_LANES) return line;
    return (left - panels) * HQQ_LANES + kc * v->row_stride;
}

#endif

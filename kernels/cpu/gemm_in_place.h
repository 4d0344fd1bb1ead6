/*
 * Tiles of gemm_tile.c that read an operand where the caller has it, instead of a packed copy
 * in fp32: the same multiply-adds in the same order, so the same bits. Included by gemm_tile.c
 * only.
 *
 *   left    rows of A, fp32 or bf16, that run along k: x and dy in x A^T and dy B, and what
 *           the addends multiply. Two bf16 are broadcast with one load, and shifted or masked
 *           to fp32 by units that do not multiply.
 *   right   16 (HQQ_LANES) columns of B: x and dy in dA and dB, where a tile has all rows of C,
 *           so that a copy would be read once. Rows are on pages of their own, where no
 *           hardware prefetcher follows: they are fetched ahead.
 *
 * Measured on a Zen 5, two threads, bf16, M = 1024, R = 16, K and N = 576 to 1536, median
 * GFLOP/s with packed copies and in place: dA 143 - 209 and 217 - 274, dB 157 - 195 and
 * 196 - 315; x A^T and dy B about even, 182 - 248 and 157 - 210.
 */
#ifndef HQQ_KERNELS_CPU_GEMM_IN_PLACE_H
#define HQQ_KERNELS_CPU_GEMM_IN_PLACE_H

#include "dtype.h"
#include "gemm_tile.h"
#include "multiply_tile.h"

/* Rows of B fetched ahead: some 200 cycles at R = 16. */
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

/* sums [rows, vectors * lanes] (+)= left [rows, kc] right: left's rows ld elements apart, right
 * a packed panel. */
HQQ_ALWAYS_INLINE void multiply_left(float *sums, const void *left, int64_t ld,
                                     const float *right, int64_t kc, int add, const int rows,
                                     const int vectors, const hqq_dtype dtype)
{
    hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 24
    for (int i = 0; i < rows * vectors; i++) c[i] = hqq_vec_zero();
    int64_t p = 0;
    if (dtype == HQQ_BF16) {
        const uint16_t *a = left;
        for (; p + 2 <= kc; p += 2, a += 2, right += 2 * vectors * HQQ_LANES) {
#pragma GCC unroll 24
            for (int i = 0; i < rows; i++) {
                int32_t pair;
                memcpy(&pair, a + i * ld, sizeof pair);
                hqq_ivec both = pair - (hqq_ivec){0};
                hqq_vec even = (hqq_vec)(both << 16), odd = (hqq_vec)(both & (int)0xffff0000);
#pragma GCC unroll 4
                for (int j = 0; j < vectors; j++) {
                    const float *b = right + j * HQQ_LANES;
                    c[i * vectors + j] += even * hqq_vec_load(b);
                    c[i * vectors + j] += odd * hqq_vec_load(b + vectors * HQQ_LANES);
                }
            }
        }
        left = a;
    }
    for (; p < kc; p++, right += vectors * HQQ_LANES) {
#pragma GCC unroll 24
        for (int i = 0; i < rows; i++) {
            hqq_vec a = hqq_vec_set1(hqq_load(left, dtype, i * ld));
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                c[i * vectors + j] += a * hqq_vec_load(right + j * HQQ_LANES);
        }
        left = hqq_at(left, dtype, 1);
    }
    store_outer(sums, c, add, rows, vectors);
}

/* sums [rows, lanes] (+)= left [rows, kc] right [kc, lanes]: left packed, right's rows ld
 * elements apart. */
HQQ_ALWAYS_INLINE void multiply_right(float *sums, const float *left, const void *right,
                                      int64_t ld, int64_t kc, int add, const int rows,
                                      const hqq_dtype dtype)
{
    hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 24
    for (int i = 0; i < rows; i++) c[i] = hqq_vec_zero();
    for (int64_t p = 0; p < kc; p++) {
        __builtin_prefetch(hqq_at(right, dtype, HQQ_FETCH_ROWS * ld));
        hqq_vec b = hqq_vec_load_dtype(right, dtype, 0);
#pragma GCC unroll 24
        for (int i = 0; i < rows; i++) c[i] += hqq_vec_set1(left[i * HQQ_GEMM_LDA]) * b;
        left++;
        right = hqq_at(right, dtype, ld);
    }
    store_outer(sums, c, add, rows, 1);
}

typedef void (*left_fn)(float *sums, const void *left, int64_t ld, const float *right,
                        int64_t kc, int add);
typedef void (*right_fn)(float *sums, const float *left, const void *right, int64_t ld,
                         int64_t kc, int add);

#define HQQ_LEFT(rows, vectors, dtype)                                                       \
    static void left_##rows##x##vectors##_##dtype(float *sums, const void *left, int64_t ld, \
                                                  const float *right, int64_t kc, int add)   \
    {                                                                                        \
        multiply_left(sums, left, ld, right, kc, add, rows, vectors, dtype);                 \
    }
#define HQQ_LEFTS(rows, vectors) \
    HQQ_LEFT(rows, vectors, HQQ_F32) HQQ_LEFT(rows, vectors, HQQ_BF16)
#define HQQ_RIGHT(rows, dtype)                                                            \
    static void right_##rows##_##dtype(float *sums, const float *left, const void *right, \
                                       int64_t ld, int64_t kc, int add)                   \
    {                                                                                     \
        multiply_right(sums, left, right, ld, kc, add, rows, dtype);                      \
    }
#define HQQ_RIGHTS(rows) HQQ_RIGHT(rows, HQQ_F32) HQQ_RIGHT(rows, HQQ_BF16)

/* left_tiles[vectors - 1][is bf16]: of so many rows that those of a full tile of as many
 * vectors are a multiple. */
typedef struct left_tile {
    int rows;
    left_fn run[2];
} left_tile;
/* Tiles of one vector. */
typedef struct right_tile {
    int rows;
    right_fn run[2];
} right_tile;

#define HQQ_LEFT_TILE(rows, vectors)                                              \
    {                                                                             \
        rows,                                                                     \
        {                                                                         \
            left_##rows##x##vectors##_HQQ_F32, left_##rows##x##vectors##_HQQ_BF16 \
        }                                                                         \
    }
#define HQQ_RIGHT_TILE(rows)                                \
    {                                                       \
        rows,                                               \
        {                                                   \
            right_##rows##_HQQ_F32, right_##rows##_HQQ_BF16 \
        }                                                   \
    }

HQQ_LEFTS(12, 1)
HQQ_RIGHTS(8)
#if HQQ_TILE_REGISTERS == 24
HQQ_LEFTS(12, 2)
HQQ_LEFTS(8, 3)
HQQ_RIGHTS(24)
HQQ_RIGHTS(16)
static const left_tile left_tiles[] = {HQQ_LEFT_TILE(12, 1), HQQ_LEFT_TILE(12, 2),
                                       HQQ_LEFT_TILE(8, 3)};
static const right_tile right_tiles[] = {HQQ_RIGHT_TILE(24), HQQ_RIGHT_TILE(16),
                                         HQQ_RIGHT_TILE(8)};
#else
HQQ_LEFTS(6, 2)
HQQ_LEFTS(4, 3)
HQQ_RIGHTS(12)
static const left_tile left_tiles[] = {HQQ_LEFT_TILE(12, 1), HQQ_LEFT_TILE(6, 2),
                                       HQQ_LEFT_TILE(4, 3)};
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

#endif

/*
 * Tiles of gemm_tile.c that fetch the rows of A which are packed next while they multiply: a
 * cache line of one of them a step, line after line of all of them. A chunk waits for no row of
 * x or dy but its first ones then; where packing itself fetches, a few rows ahead, it goes no
 * faster than memory, and nothing is fetched while tiles multiply.
 *
 * Measured on a Zen 5, two threads, M = 1024, K and N = 192 to 1536: x A^T and dy B take 0.73
 * to 0.80 of the time at R = 16 (bf16 and fp32, AVX-512 and AVX2), 0.81 to 0.93 at R = 32
 * and 64. Included by gemm_tile.c only.
 */
#ifndef HQQ_KERNELS_CPU_GEMM_FETCH_H
#define HQQ_KERNELS_CPU_GEMM_FETCH_H

#include "dtype.h"
#include "gemm_tile.h"
#include "integers.h"
#include "multiply_tile.h"

/* `rows` rows, `stride` bytes apart, from `at` on. */
typedef struct next_rows {
    const char *at;
    int64_t rows, stride;
} next_rows;

/* sums [rows, vectors * lanes] (+)= a [rows, kc] b [kc, vectors * lanes], as they are packed;
 * `lines` adjacent lines are fetched a step. */
HQQ_ALWAYS_INLINE void multiply_and_fetch(float *sums, const float *a, const float *b,
                                          int64_t kc, int add, const next_rows *next,
                                          const int rows, const int vectors, const int lines)
{
    hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 24
    for (int i = 0; i < rows * vectors; i++) c[i] = hqq_vec_zero();
    const char *at = next->at;
    int64_t stride = next->stride, back = 64 * lines - (next->rows - 1) * stride;
    int64_t left = next->rows;
    for (int64_t p = 0; p < kc; p++) {
#pragma GCC unroll 2
        for (int i = 0; i < lines; i++) __builtin_prefetch(at + 64 * i, 0, 2);
        left--;
        at += left ? stride : back;
        left = left ? left : next->rows;
        hqq_vec v[3];
#pragma GCC unroll 3
        for (int j = 0; j < vectors; j++)
            v[j] = hqq_vec_load(b + (p * vectors + j) * HQQ_LANES);
#pragma GCC unroll 24
        for (int i = 0; i < rows; i++) {
            hqq_vec u = hqq_vec_set1(a[i * HQQ_GEMM_LDA + p]);
#pragma GCC unroll 3
            for (int j = 0; j < vectors; j++) c[i * vectors + j] += u * v[j];
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < rows * vectors; i++) {
        if (add) c[i] += hqq_vec_load(sums + i * HQQ_LANES);
        hqq_vec_store(sums + i * HQQ_LANES, c[i]);
    }
}

typedef void (*fetching_fn)(float *sums, const float *a, const float *b, int64_t kc, int add,
                            const next_rows *next);

/* A line a step of 16 bits, two of 32. */
#define HQQ_FETCHING_OF(rows, vectors, lines)                                             \
    static void fetching_##vectors##_##lines(float *sums, const float *a, const float *b, \
                                             int64_t kc, int add, const next_rows *next)  \
    {                                                                                     \
        multiply_and_fetch(sums, a, b, kc, add, next, rows, vectors, lines);              \
    }
#define HQQ_FETCHING(rows, vectors) \
    HQQ_FETCHING_OF(rows, vectors, 1) HQQ_FETCHING_OF(rows, vectors, 2)

/* The most rows of each, as in `variants`. */
#if HQQ_TILE_REGISTERS == 24
HQQ_FETCHING(24, 1)
HQQ_FETCHING(12, 2)
HQQ_FETCHING(8, 3)
#else
HQQ_FETCHING(12, 1)
HQQ_FETCHING(6, 2)
HQQ_FETCHING(4, 3)
#endif
static const fetching_fn fetching[][2] = {
    {fetching_1_1, fetching_1_2}, {fetching_2_1, fetching_2_2}, {fetching_3_1, fetching_3_2}};

/* Whether a tile from row i on fetches the rows of A that are packed after its own in its chunk
 * [i0, i1), and which: those below it, or the first ones of the next slab. */
static inline int fetches_next(next_rows *next, const hqq_gemm_plan *plan, int64_t i,
                               int64_t i0, int64_t i1, int64_t p)
{
    const hqq_view *v = &plan->g.A;
    int below = i + plan->rows < i1;
    if (v->column_stride != 1 || i + plan->rows > plan->g.m ||
        (!below && p + HQQ_GEMM_KC >= plan->g.k))
        return 0;
    int64_t row = below ? i + plan->rows : i0, column = below ? p : p + HQQ_GEMM_KC;
    next->at = hqq_at(v->data, v->dtype, row * v->row_stride + column);
    next->rows = hqq_least(plan->rows, i1 - row);
    next->stride = v->row_stride * hqq_dtype_bytes(v->dtype);
    return 1;
}

#endif

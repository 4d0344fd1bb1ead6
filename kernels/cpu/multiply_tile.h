/*
 * The innermost loops of all tiled products: a tile of sums, `rows` x `columns` registers,
 * stays in registers over the whole of a reduction. Included by ISA sources only.
 *
 *   outer   the right operand's rows lie across the reduction: each of their vectors is loaded,
 *           each element of the left one broadcast
 *
 *               sums[i][j] += left[i][p] * right[p][j .. j + lanes]         one step of p
 *
 *   inner   both operands' rows lie along the reduction: no transposition, no broadcast, and
 *           the lanes of each sum are added up at the end
 *
 *               sums[i][j] += left[i][p .. p + lanes] * right[j][p .. p + lanes]
 *
 * A word is a float, or a pair of bf16 that lie one after the other in the reduction: AVX-512
 * BF16 multiplies both and adds them to a float's sum. It takes subnormals for zero, and rounds
 * each of its two additions. Strides are in words.
 */
#ifndef HQQ_KERNELS_CPU_MULTIPLY_TILE_H
#define HQQ_KERNELS_CPU_MULTIPLY_TILE_H

#include "simd.h"

#if defined(__AVX512F__) /* 32 registers */
#define HQQ_TILE_REGISTERS 24
#else
#define HQQ_TILE_REGISTERS 12
#endif

/* Whether words may be pairs of bf16. */
#if defined(__AVX512BF16__)
#define HQQ_HAS_PAIRS 1
#else
#define HQQ_HAS_PAIRS 0
#endif

typedef enum hqq_tile_word { HQQ_FLOATS, HQQ_PAIRS } hqq_tile_word;

HQQ_ALWAYS_INLINE const void *hqq_word(const void *words, int64_t i)
{
    return (const char *)words + i * 4;
}

HQQ_ALWAYS_INLINE hqq_vec hqq_load_words(const void *words, int64_t i)
{
    hqq_vec v;
    memcpy(&v, hqq_word(words, i), sizeof v);
    return v;
}

HQQ_ALWAYS_INLINE hqq_vec hqq_broadcast_word(const void *words, int64_t i,
                                             const hqq_tile_word kind)
{
    if (kind == HQQ_FLOATS) return hqq_vec_set1(((const float *)words)[i]);
    int32_t pair;
    memcpy(&pair, hqq_word(words, i), sizeof pair);
    return (hqq_vec)(pair - (hqq_ivec){0});
}

HQQ_ALWAYS_INLINE hqq_vec hqq_multiply_add(hqq_vec sum, hqq_vec left, hqq_vec right,
                                           const hqq_tile_word kind)
{
#if HQQ_HAS_PAIRS
    if (kind == HQQ_PAIRS)
        return (hqq_vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#endif
    (void)kind;
    return sum + left * right;
}

/* c [rows, vectors] += left [rows, steps] right [steps, vectors * lanes]. The last three are
 * constants. */
HQQ_ALWAYS_INLINE void hqq_outer_steps(hqq_vec *c, const void *left, int64_t ld_left,
                                       const void *right, int64_t ld_right, int64_t steps,
                                       const int rows, const int vectors,
                                       const hqq_tile_word kind)
{
    for (int64_t p = 0; p < steps; p++) {
        hqq_vec b[4];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) b[j] = hqq_load_words(right, j * HQQ_LANES);
#pragma GCC unroll 24
        for (int i = 0; i < rows; i++) {
            hqq_vec a = hqq_broadcast_word(left, i * ld_left, kind);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                c[i * vectors + j] = hqq_multiply_add(c[i * vectors + j], a, b[j], kind);
        }
        left = hqq_word(left, 1);
        right = hqq_word(right, ld_right);
    }
}

/* sums [rows, vectors * lanes] (+)= left [rows, steps] right [steps, vectors * lanes]. The last
 * three are constants. */
HQQ_ALWAYS_INLINE void hqq_multiply_outer(float *sums, int64_t ld_sums, const void *left,
                                          int64_t ld_left, const void *right, int64_t ld_right,
                                          int64_t steps, int add, const int rows,
                                          const int vectors, const hqq_tile_word kind)
{
    hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 24
    for (int i = 0; i < rows * vectors; i++) c[i] = hqq_vec_zero();
    hqq_outer_steps(c, left, ld_left, right, ld_right, steps, rows, vectors, kind);
#pragma GCC unroll 24
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            float *at = sums + i * ld_sums + j * HQQ_LANES;
            hqq_vec sum = c[i * vectors + j];
            hqq_vec_store(at, add ? sum + hqq_vec_load(at) : sum);
        }
}

/* out [columns] (+)= the sum of the lanes of each of c; `columns` is 4 or 2. */
HQQ_ALWAYS_INLINE void hqq_add_up(float *out, const hqq_vec *c, int add, const int columns)
{
#if defined(__AVX512F__)
    if (columns == 4) {
        __m512 a0 = (__m512)c[0], a1 = (__m512)c[1], a2 = (__m512)c[2], a3 = (__m512)c[3];
        __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1));
        __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));
        /* low: sums of a0, a1, a0, a1 in each quarter; high: those of a2, a3 */
        __m512 all = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44),
                                   _mm512_shuffle_ps(low, high, 0xee));
        __m256 halves =
            _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        __m128 sum =
            _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
        if (add) sum = _mm_add_ps(sum, _mm_loadu_ps(out));
        _mm_storeu_ps(out, sum);
        return;
    }
#endif
    for (int j = 0; j < columns; j++)
        out[j] = add ? out[j] + hqq_vec_sum(c[j]) : hqq_vec_sum(c[j]);
}

/* sums [rows, columns] (+)= left [rows, steps * lanes] right [columns, steps * lanes]^T. The
 * last three are constants. */
HQQ_ALWAYS_INLINE void hqq_multiply_inner(float *sums, int64_t ld_sums, const void *left,
                                          int64_t ld_left, const void *right, int64_t ld_right,
                                          int64_t steps, int add, const int rows,
                                          const int columns, const hqq_tile_word kind)
{
    hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 24
    for (int i = 0; i < rows * columns; i++) c[i] = hqq_vec_zero();
    for (int64_t p = 0; p < steps; p++) {
        hqq_vec b[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) b[j] = hqq_load_words(right, j * ld_right);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            hqq_vec a = hqq_load_words(left, i * ld_left);
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++)
                c[i * columns + j] = hqq_multiply_add(c[i * columns + j], a, b[j], kind);
        }
        left = hqq_word(left, HQQ_LANES);
        right = hqq_word(right, HQQ_LANES);
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
        hqq_add_up(sums + i * ld_sums, c + i * columns, add, columns);
}

#endif

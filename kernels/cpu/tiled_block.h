/* What both passes of the tiled product copy: rows of an input in, rows of sums out, and
 * decoded rows of W. Included by ISA sources only. */
#ifndef HQQ_KERNELS_CPU_TILED_BLOCK_H
#define HQQ_KERNELS_CPU_TILED_BLOCK_H

#include "decode_floats.h"
#include "dequantize_block.h"
#include "integers.h"
#include "multiply_tile.h"
#include "tiled.h"
#if HQQ_HAS_PAIRS
#include "decode_rows_bf16.h"
#endif

/* Vectors, or rows of W, of a register tile: 6 x 4 or 6 x 2 registers. */
#define HQQ_TILED_SIDE (HQQ_TILE_REGISTERS / HQQ_TILED_TOKENS)

/* A tile of up to HQQ_TILED_TOKENS rows and HQQ_TILED_SIDE columns, or vectors of them. */
typedef void (*hqq_tile_fn)(float *sums, int64_t ld_sums, const void *left, int64_t ld_left,
                            const void *right, int64_t ld_right, int64_t steps, int add);

#define HQQ_TILE(multiply, rows, kind)                                                     \
    static void tile_##rows##_##kind(float *sums, int64_t ld_sums, const void *left,       \
                                     int64_t ld_left, const void *right, int64_t ld_right, \
                                     int64_t steps, int add)                               \
    {                                                                                      \
        multiply(sums, ld_sums, left, ld_left, right, ld_right, steps, add, rows,          \
                 HQQ_TILED_SIDE, kind);                                                    \
    }
#define HQQ_TILES(multiply, kind) \
    HQQ_TILE(multiply, 1, kind)   \
    HQQ_TILE(multiply, 2, kind)   \
    HQQ_TILE(multiply, 3, kind)   \
    HQQ_TILE(multiply, 4, kind) HQQ_TILE(multiply, 5, kind) HQQ_TILE(multiply, 6, kind)
#define HQQ_TILE_ROW(kind)                                       \
    {NULL,          tile_1_##kind, tile_2_##kind, tile_3_##kind, \
     tile_4_##kind, tile_5_##kind, tile_6_##kind}

/* tiles[kind][tokens], made of hqq_multiply_inner or hqq_multiply_outer (multiply_tile.h) */
#if HQQ_HAS_PAIRS
#define HQQ_TILE_TABLE(multiply)                                                         \
    HQQ_TILES(multiply, HQQ_FLOATS)                                                      \
    HQQ_TILES(multiply, HQQ_PAIRS)                                                       \
    static const hqq_tile_fn tiles[2][HQQ_TILED_TOKENS + 1] = {HQQ_TILE_ROW(HQQ_FLOATS), \
                                                               HQQ_TILE_ROW(HQQ_PAIRS)}
#else
#define HQQ_TILE_TABLE(multiply)    \
    HQQ_TILES(multiply, HQQ_FLOATS) \
    static const hqq_tile_fn tiles[1][HQQ_TILED_TOKENS + 1] = {HQQ_TILE_ROW(HQQ_FLOATS)}
#endif

/* How many tokens to take next, so that the last tile is about as high as the others. */
static inline int hqq_tiled_tokens(int64_t left)
{
    int64_t tiles = hqq_ceil_div(left, HQQ_TILED_TOKENS);
    return (int)hqq_ceil_div(left, tiles);
}

/* out[0:n] = elements from index i of an input, as terms of a product: fp32, or with pairs the
 * bf16 that they are. */
HQQ_ALWAYS_INLINE void hqq_copy_terms(void *out, int64_t to, const hqq_tiled_job *job,
                                      int64_t i, int64_t n)
{
    float *floats = (float *)out + to;
    if (job->pairs) {
        memcpy(hqq_at_mut(out, HQQ_BF16, to), hqq_at(job->in, HQQ_BF16, i), (size_t)n * 2);
        return;
    }
    switch (job->dtype) {
    case HQQ_F32: hqq_load_floats(floats, job->in, HQQ_F32, i, n); break;
    case HQQ_F16: hqq_load_floats(floats, job->in, HQQ_F16, i, n); break;
    case HQQ_BF16: hqq_load_floats(floats, job->in, HQQ_BF16, i, n); break;
    }
}

/* Zeros for elements [from, to) of terms. */
static inline void hqq_clear_terms(void *out, const hqq_tiled_job *job, int64_t from,
                                   int64_t to)
{
    hqq_dtype dtype = job->pairs ? HQQ_BF16 : HQQ_F32;
    if (from < to)
        memset(hqq_at_mut(out, dtype, from), 0, (size_t)((to - from) * hqq_dtype_bytes(dtype)));
}

HQQ_ALWAYS_INLINE void hqq_store_as(void *out, hqq_dtype dtype, int64_t i, const float *sums,
                                    const float *bias, int64_t n)
{
    for (int64_t at = 0; at < n; at += HQQ_LANES) {
        hqq_vec v = hqq_vec_load(sums + at);
        if (bias) v += hqq_vec_load(bias + at);
        if (n - at >= HQQ_LANES)
            hqq_vec_store_dtype(out, dtype, i + at, v);
        else
            hqq_vec_store_dtype_part(out, dtype, i + at, v, (int)(n - at));
    }
}

/* Elements from index i of y or dx = sums [n] + bias, rounded once. Reads whole vectors. */
static inline void hqq_store_sums(const hqq_tiled_job *job, int64_t i, const float *sums,
                                  const float *bias, int64_t n)
{
    switch (job->dtype) {
    case HQQ_F32: hqq_store_as(job->out, HQQ_F32, i, sums, bias, n); break;
    case HQQ_F16: hqq_store_as(job->out, HQQ_F16, i, sums, bias, n); break;
    case HQQ_BF16: hqq_store_as(job->out, HQQ_BF16, i, sums, bias, n); break;
    }
}

/* `count` elements of y that are the sets from `set` on, of a slot that begins at index i. */
static inline void hqq_store_sets(const hqq_tiled_job *job, int64_t i, int64_t set,
                                  hqq_vec sums, int count)
{
    uint32_t words[HQQ_LANES];
    hqq_vec_store_dtype(words, job->dtype, 0, sums);
    const uint16_t *halves = (const uint16_t *)words;
    int64_t row = hqq_row_in_slot(&job->sets, set), left = hqq_sets_in_step(&job->sets, set);
    for (int n = 0; n < count; n++, row += job->sets.step, left--) {
        if (left == 0) {
            row = hqq_row_in_slot(&job->sets, set + n);
            left = job->sets.cycle;
        }
        if (job->dtype == HQQ_F32)
            ((uint32_t *)job->out)[i + row] = words[n];
        else
            ((uint16_t *)job->out)[i + row] = halves[n];
    }
}

/* The rows of sets [set_begin, set_end), columns [begin, end), in fp32 or with pairs in bf16:
 * rows `ld` elements apart, those of slot j from row j * slot_rows on. */
static inline void hqq_decode_rows(void *out, int64_t ld, int64_t slot_rows,
                                   const hqq_tiled_job *job, int64_t set_begin, int64_t set_end,
                                   int64_t begin, int64_t end)
{
    hqq_dtype dtype = job->pairs ? HQQ_BF16 : HQQ_F32;
    if (job->by_cycle) {
        int64_t cycle = job->sets.cycle, count;
        for (int64_t set = set_begin; set < set_end; set += count) {
            count = hqq_least(cycle - set % cycle, set_end - set);
            HQQ_ISA_NAME(hqq_decode_residue)
            (hqq_at_mut(out, dtype, (set - set_begin) * ld), ld, slot_rows * ld, dtype,
             job->weight, &job->layout, hqq_row_in_slot(&job->sets, set), count, begin, end);
        }
        return;
    }
#if HQQ_HAS_PAIRS
    if (job->pairs && hqq_rows_decode_in_bf16(&job->layout)) {
        hqq_decode_rows_in_bf16(out, ld, slot_rows, job->weight, &job->layout, set_begin,
                                set_end, begin, end);
        return;
    }
#endif
    if (!job->pairs && hqq_strips_decode(job->weight)) {
        HQQ_ISA_NAME(hqq_decode_strips)
        (out, ld, slot_rows, job->weight, &job->layout, set_begin, set_end, begin, end, 0);
        return;
    }
    hqq_row_piece pieces[HQQ_MAX_SLOTS];
    hqq_row_pieces(pieces, &job->sets, set_begin, set_end);
    if (job->layout.planes) {
        HQQ_ISA_NAME(hqq_dequantize_halves)
        (out, ld, slot_rows * ld, dtype, job->weight, pieces[0].first, 1, pieces[0].count,
         begin, end);
        return;
    }
    for (int j = 0; j < job->sets.slots; j++) HQQ_ISA_NAME(hqq_dequantize_rows)
    (hqq_at_mut(out, dtype, j * slot_rows * ld), ld, dtype, job->weight, pieces[j].first, 1,
     pieces[j].count, begin, end);
}

#endif

/*
 * Codes to floats: W[n,k] = (q - zero) * scale, row by row and run by run (code_runs.h).
 *
 *   axis 1: a run has one zero and one scale. With AVX-512 and up to 4 bits, the 16 values of
 *           all codes are made once a run and looked up: load, shift, permute, store. The
 *           permutation ignores index bits above its own, and the table repeats every 2^nbits
 *           entries, so neighbouring slots need not be masked away. A 16-bit table is rounded
 *           once a run, not once a weight.
 *   axis 0: zeros and scales are vectors alongside the codes: subtract and multiply.
 *
 * Napkin: 32 bf16 weights in 3 instructions and a store against 16 fp32 ones. Zen 4 permutes 64
 * bytes a cycle and stores 32, so a group of 64 takes 6 cycles, 3 of them beside its table's.
 */
#include "dequantize_block.h"

#include "code_runs.h"
#include "decode.h"
#include "decode_bf16.h"
#include "look_up_16.h"
#include "planes.h"

#define INLINE HQQ_ALWAYS_INLINE

INLINE int is_by_table(code_kind kind)
{
    int bits = kind == SMALL_BYTES ? 4 : kind == WIDE_WORDS ? 3 : 8; /* at most */
    return bits <= HQQ_TABLE_BITS;
}

/* A run under one zero and one scale (axis 1) to out[at], out[at + 1], ... normal: as
 * values_are_normal says. */
INLINE void constant_run(void *out, hqq_dtype dtype, int64_t at, const hqq_run *run,
                         code_kind kind, int nbits, float zero, float scale, int normal)
{
    (void)normal;
    int by_table = is_by_table(kind);
    hqq_decoder d = hqq_decoder_of(nbits, by_table, zero, scale);
#if defined(__AVX512F__)
    if (dtype != HQQ_F32 && by_table) {
        constant_run_16((uint16_t *)out + at, dtype, run, kind, &d, normal);
        return;
    }
#elif defined(__AVX2__)
    if (dtype != HQQ_F32 && kind == SMALL_BYTES) {
        constant_run_16((uint16_t *)out + at, dtype, run, nbits, zero, scale);
        return;
    }
#endif
    int64_t i = 0, length = run->length;
#if defined(__AVX512BF16__)
    if (dtype == HQQ_BF16 && kind == WHOLE_BYTES) {
        const uint8_t *bytes = run->words;
        uint16_t *to = (uint16_t *)out + at;
        for (; normal && i + 32 <= length; i += 32)
            constant_32(to + i, bytes + i, d.zero, d.scale, 1);
        while (i + 32 <= length && constant_32(to + i, bytes + i, d.zero, d.scale, 0)) i += 32;
    }
#endif
#pragma GCC unroll 4
    for (; i + HQQ_LANES <= length; i += HQQ_LANES)
        hqq_vec_store_dtype(out, dtype, at + i,
                            hqq_decode(&d, by_table, load_words(run, kind, i)));
    if (i < run->length) {
        int n = (int)(run->length - i);
        hqq_vec v = hqq_decode(&d, by_table, load_words_part(run, kind, i, n));
        hqq_vec_store_dtype_part(out, dtype, at + i, v, n);
    }
}

/* A run with a zero and a scale for each element (axis 0), those of group run->group first. */
INLINE void varying_run(void *out, hqq_dtype dtype, int64_t at, const hqq_run *run,
                        code_kind kind, const hqq_weight *w, hqq_dtype meta)
{
    int by_table = is_by_table(kind);
    /* the codes themselves */
    hqq_decoder d = hqq_decoder_of(w->nbits, by_table, 0.0f, 1.0f);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if (dtype == HQQ_BF16 && meta == HQQ_BF16 && kind != WIDE_WORDS) {
        const uint16_t *zero = (const uint16_t *)w->zero + run->group;
        const uint16_t *scale = (const uint16_t *)w->scale + run->group;
        const uint8_t *bytes = run->words;
        uint16_t *to = (uint16_t *)out + at;
        while (i + 32 <= run->length &&
               varying_32(to + i, bytes + i, run->shift, zero + i, scale + i, &d, by_table))
            i += 32;
    }
#endif
    for (; i + HQQ_LANES <= run->length; i += HQQ_LANES) {
        hqq_ivec words = load_words(run, kind, i);
        hqq_vec q = hqq_decode(&d, by_table, words);
        hqq_vec zero = hqq_vec_load_dtype(w->zero, meta, run->group + i);
        hqq_vec scale = hqq_vec_load_dtype(w->scale, meta, run->group + i);
        hqq_vec_store_dtype(out, dtype, at + i, (q - zero) * scale);
    }
    if (i < run->length) {
        int n = (int)(run->length - i);
        hqq_ivec words = load_words_part(run, kind, i, n);
        hqq_vec q = hqq_decode(&d, by_table, words);
        hqq_vec zero = hqq_vec_load_dtype_part(w->zero, meta, run->group + i, n);
        hqq_vec scale = hqq_vec_load_dtype_part(w->scale, meta, run->group + i, n);
        hqq_vec_store_dtype_part(out, dtype, at + i, (q - zero) * scale, n);
    }
}

typedef struct block {
    void *out;
    int64_t ld;
    const hqq_weight *weight;
    int64_t row, row_step, rows, column, columns;
    int64_t second; /* planes: where the row N/2 behind goes, in elements; 0: nowhere */
} block;

/* The words of a narrow row some rows ahead: the processor's own prefetching does not follow
 * from row to row. A wrong guess where the words wrap does no harm. */
INLINE void prefetch_row(const block *b, const hqq_layout *l, const hqq_place *place,
                         const hqq_place *step)
{
    const int64_t rows_ahead = 8, narrow = 1024;
    int64_t bytes = b->columns * l->word_bytes;
    if (bytes > narrow || l->planes) return;
    int64_t word = place->word + rows_ahead * step->word;
    if (word >= l->words) return;
    const char *words = (const char *)b->weight->packed + word * l->word_bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(words + i);
}

/* Zeros and scales are brought to fp32 that many at a time. */
#define META_AT_ONCE 64

/* out [groups] = the elements from index i in fp32; whole vectors are written. */
INLINE void load_meta(float *out, const void *meta, hqq_dtype dtype, int64_t i, int64_t groups)
{
    int64_t at = 0;
    for (; at + HQQ_LANES <= groups; at += HQQ_LANES)
        hqq_vec_store(out + at, hqq_vec_load_dtype(meta, dtype, i + at));
    if (at < groups)
        hqq_vec_store(out + at,
                      hqq_vec_load_dtype_part(meta, dtype, i + at, (int)(groups - at)));
}

/* Whether no weight of these groups is subnormal, as far as it is asked. A difference of zero
 * and code is zero, or no smaller than 2^-24 times the zero, or the code. */
INLINE int values_are_normal(const float *zero, const float *scale, int64_t groups)
{
#if defined(__AVX512BF16__)
    const hqq_ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const hqq_ivec magnitude = (hqq_ivec){0} + 0x7fffffff;
    hqq_ivec subnormal = {0};
    for (int64_t g = 0; g < groups; g += HQQ_LANES) {
        hqq_vec z = (hqq_vec)((hqq_ivec)hqq_vec_load(zero + g) & magnitude);
        hqq_vec s = (hqq_vec)((hqq_ivec)hqq_vec_load(scale + g) & magnitude);
        hqq_ivec large = (s >= 0x1p-60f) & ((z >= 0x1p-30f) | (z == 0.0f));
        subnormal |= ~large & (lane < (int32_t)(groups - g));
    }
    return _mm512_test_epi32_mask((__m512i)subnormal, (__m512i)subnormal) == 0;
#else
    (void)zero, (void)scale, (void)groups;
    return 0;
#endif
}

/* Groups of the usual lengths, where there is code for them; how many were decoded. */
INLINE int64_t usual_groups(void *out, hqq_dtype dtype, int64_t at, const hqq_run *run,
                            code_kind kind, const hqq_layout *l, const float *zero,
                            const float *scale, int64_t groups, int normal)
{
#if defined(__AVX512F__)
    if (kind == SMALL_BYTES && dtype != HQQ_F32) {
        uint16_t *to = (uint16_t *)out + at;
        int n = l->nbits;
        switch (l->G) {
        case 32: constant_groups_16(to, dtype, run, n, zero, scale, groups, 32, normal); break;
        case 64: constant_groups_16(to, dtype, run, n, zero, scale, groups, 64, normal); break;
        case 128:
            constant_groups_16(to, dtype, run, n, zero, scale, groups, 128, normal);
            break;
        default: return 0;
        }
        return groups;
    }
#endif
    (void)out, (void)dtype, (void)at, (void)run, (void)kind, (void)l;
    (void)zero, (void)scale, (void)groups, (void)normal;
    return 0;
}

/* The columns of a row that begin with a group, all in one slot: groups follow one another.
 * words: of the first. */
INLINE void whole_groups(void *out, hqq_dtype dtype, int64_t at, const hqq_weight *w,
                         const hqq_layout *l, const hqq_place *place, const void *words,
                         int64_t columns, code_kind kind)
{
    float zero[META_AT_ONCE], scale[META_AT_ONCE];
    hqq_run run = {.words = words,
                   .group = place->turn,
                   .length = l->G,
                   .shift = hqq_slot_shift(l->nbits, (int)place->slot)};
    int nbits = l->nbits;
    while (columns > 0) {
        int64_t groups = (columns + l->G - 1) / l->G;
        if (groups > META_AT_ONCE) groups = META_AT_ONCE;
        load_meta(zero, w->zero, w->meta_dtype, run.group, groups);
        load_meta(scale, w->scale, w->meta_dtype, run.group, groups);
        int normal = values_are_normal(zero, scale, groups);
        int64_t whole = columns / l->G < groups ? columns / l->G : groups;
        whole = usual_groups(out, dtype, at, &run, kind, l, zero, scale, whole, normal);
        columns -= whole * l->G, at += whole * l->G;
        run.words = (const char *)run.words + whole * l->G * l->word_bytes;
        for (int64_t g = whole; g < groups; g++, columns -= l->G, at += l->G) {
            if (columns < l->G) run.length = columns;
            constant_run(out, dtype, at, &run, kind, nbits, zero[g], scale[g], normal);
            run.words = (const char *)run.words + l->G * l->word_bytes;
        }
        run.group += groups;
    }
}

/* Some columns of a row. words: where the one at `place` is, and the ones behind it. */
INLINE void decode_columns(void *out, hqq_dtype dtype, int64_t at, const hqq_weight *w,
                           const hqq_layout *l, const hqq_place *place, const void *words,
                           int64_t columns, code_kind kind, int axis, hqq_dtype meta)
{
    if (axis == 1 && place->rest == 0 && place->word + columns <= l->words) {
        whole_groups(out, dtype, at, w, l, place, words, columns, kind);
        return;
    }
    hqq_run_cursor cursor = hqq_runs_from(l, w->packed, place, columns);
    if (l->planes) cursor.packed = words, cursor.word = 0; /* its rows end with the words */
    for (hqq_run run; hqq_runs_next(&run, &cursor); at += run.length) {
        if (axis == 1) {
            float zero = hqq_load_quick(w->zero, meta, run.group);
            float scale = hqq_load_quick(w->scale, meta, run.group);
            int normal = scale == 1.0f && zero == 0.0f; /* codes themselves */
            constant_run(out, dtype, at, &run, kind, w->nbits, zero, scale, normal);
        } else {
            varying_run(out, dtype, at, &run, kind, w, meta);
        }
    }
}

/* Columns of planes that are made bytes of 4 bits at a time. */
#define NIBBLES 1024

/* Every row of the block; dtype, kind and axis are constants here, meta is one for axis 0. */
INLINE void all_rows(const block *b, hqq_dtype dtype, code_kind kind, int axis, hqq_dtype meta)
{
    const hqq_weight *w = b->weight;
    hqq_layout layout = hqq_weight_layout(w);
    hqq_place place = hqq_place_of(&layout, b->row * layout.K + b->column);
    hqq_place step = hqq_place_of(&layout, b->row_step * layout.K);
    for (int64_t i = 0; i < b->rows; i++, place = hqq_place_add(&layout, place, &step)) {
        const char *words = w->packed;
        int64_t columns = b->columns, at = i * b->ld;
        hqq_place from = place;
        uint8_t nibbles[NIBBLES];
        prefetch_row(b, &layout, &place, &step);
        if (!layout.planes) {
            words += place.word * layout.word_bytes;
            decode_columns(b->out, dtype, at, w, &layout, &from, words, columns, kind, axis,
                           meta);
            continue;
        }
        if (kind != SMALL_BYTES) return;
        int64_t p = (b->row + i * b->row_step) % (layout.N / 2);
        hqq_plane_row row = hqq_plane_row_of(w->packed, &layout, p);
        int64_t next = b->row_step * layout.K * (columns <= NIBBLES ? 8 : 1);
        for (int64_t k = 0; k < columns; k += NIBBLES) {
            int64_t n = columns - k < NIBBLES ? columns - k : NIBBLES;
            hqq_nibbles_of_planes(nibbles, &row, b->column + k, n, next);
            for (int64_t half = 0; half <= (b->second > 0); half++) {
                if (k > 0 || half > 0) {
                    int64_t r = b->row + i * b->row_step + half * (layout.N / 2);
                    from = hqq_place_of(&layout, r * layout.K + b->column + k);
                }
                decode_columns(b->out, dtype, at + k + half * b->second, w, &layout, &from,
                               nibbles, n, kind, axis, meta);
            }
        }
    }
}

INLINE void of_meta(const block *b, hqq_dtype dtype, code_kind kind)
{
    if (b->weight->axis == 1) {
        all_rows(b, dtype, kind, 1, b->weight->meta_dtype);
        return;
    }
    switch (b->weight->meta_dtype) {
    case HQQ_F16: all_rows(b, dtype, kind, 0, HQQ_F16); break;
    case HQQ_BF16: all_rows(b, dtype, kind, 0, HQQ_BF16); break;
    case HQQ_F32: all_rows(b, dtype, kind, 0, HQQ_F32); break;
    }
}

/* With sanitizers a function for each dtype and kind of code: some of the compiler's passes
 * take time with the square of a function's length, and for all 36 instances of all_rows in one
 * took nine times as long. Without, one: where that is split, some of its loops are slower. */
#ifdef HQQ_SANITIZED
#define APART static __attribute__((noinline))
#else
#define APART INLINE
#endif
#define TO_DTYPE(name, dtype)                          \
    APART void name##_from_bytes(const block *b)       \
    {                                                  \
        of_meta(b, dtype, SMALL_BYTES);                \
    }                                                  \
    APART void name##_from_whole_bytes(const block *b) \
    {                                                  \
        of_meta(b, dtype, WHOLE_BYTES);                \
    }                                                  \
    APART void name##_from_words(const block *b)       \
    {                                                  \
        of_meta(b, dtype, WIDE_WORDS);                 \
    }                                                  \
    INLINE void name(const block *b)                   \
    {                                                  \
        switch (b->weight->nbits) {                    \
        case 8: name##_from_whole_bytes(b); break;     \
        case 3:                                        \
            if (b->weight->packing == HQQ_PACKING_HQQ) \
                name##_from_words(b);                  \
            else                                       \
                name##_from_bytes(b);                  \
            break;                                     \
        case 4:                                        \
        case 2:                                        \
        case 1: name##_from_bytes(b); break;           \
        }                                              \
    }
TO_DTYPE(to_f16, HQQ_F16)
TO_DTYPE(to_bf16, HQQ_BF16)
TO_DTYPE(to_f32, HQQ_F32)

void HQQ_ISA_NAME(hqq_dequantize_halves)(void *out, int64_t ld, int64_t second, hqq_dtype dtype,
                                         const hqq_weight *weight, int64_t row,
                                         int64_t row_step, int64_t rows, int64_t column_begin,
                                         int64_t column_end)
{
    block b = {.out = out,
               .ld = ld,
               .weight = weight,
               .row = row,
               .row_step = row_step,
               .rows = rows,
               .column = column_begin,
               .columns = column_end - column_begin,
               .second = second};
    switch (dtype) {
    case HQQ_F16: to_f16(&b); break;
    case HQQ_BF16: to_bf16(&b); break;
    case HQQ_F32: to_f32(&b); break;
    }
}

void HQQ_ISA_NAME(hqq_dequantize_rows)(void *out, int64_t ld, hqq_dtype dtype,
                                       const hqq_weight *weight, int64_t row, int64_t row_step,
                                       int64_t rows, int64_t column_begin, int64_t column_end)
{
    HQQ_ISA_NAME(hqq_dequantize_halves)
    (out, ld, 0, dtype, weight, row, row_step, rows, column_begin, column_end);
}

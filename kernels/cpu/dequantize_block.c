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

#define INLINE HQQ_ALWAYS_INLINE

/* What the inner loops are compiled for: constants wherever these are passed on. */
typedef enum code_kind {
    SMALL_BYTES, /* 1, 2 or 4 bits in bytes */
    WHOLE_BYTES, /* 8 bits */
    WIDE_WORDS   /* 3 bits in int32 */
} code_kind;

/* Words i to i + HQQ_LANES of a run, one a lane, its slot shifted down; bits of the slots
 * above are left in. */
INLINE hqq_ivec load_words(const hqq_run *run, code_kind kind, int64_t i)
{
    hqq_ivec v = kind == WIDE_WORDS ? hqq_ivec_load_u32((const uint32_t *)run->words + i)
                                    : hqq_ivec_load_u8((const uint8_t *)run->words + i);
    return kind == WHOLE_BYTES ? v : v >> run->shift;
}

INLINE hqq_ivec load_words_part(const hqq_run *run, code_kind kind, int64_t i, int n)
{
    hqq_ivec v = kind == WIDE_WORDS
                     ? hqq_ivec_load_u32_part((const uint32_t *)run->words + i, n)
                     : hqq_ivec_load_u8_part((const uint8_t *)run->words + i, n);
    return kind == WHOLE_BYTES ? v : v >> run->shift;
}

INLINE int is_by_table(code_kind kind)
{
    int bits = kind == SMALL_BYTES ? 4 : kind == WIDE_WORDS ? 3 : 8; /* at most */
    return bits <= HQQ_TABLE_BITS;
}

#if defined(__AVX512F__)
/* The table rounded to dtype, twice. normal: none of its values is subnormal. */
INLINE __m512i table_16(hqq_dtype dtype, hqq_vec table, int normal)
{
#if defined(__AVX512BF16__)
    /* the instruction takes subnormals for zero */
    if (dtype == HQQ_BF16 && normal)
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)table, (__m512)table);
#endif
    (void)normal;
    if (dtype == HQQ_F16)
        return _mm512_broadcast_i64x4(
            _mm512_cvtps_ph((__m512)table, _MM_FROUND_TO_NEAREST_INT));
    uint16_t values[16];
    hqq_vec_store_dtype(values, dtype, 0, table);
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
}

/* A run to 16-bit values, of which the table holds each code's twice. */
INLINE void constant_run_16(uint16_t *out, hqq_dtype dtype, const hqq_run *run, code_kind kind,
                            const hqq_decoder *d, int normal)
{
    __m512i table = table_16(dtype, d->table, normal);
    int64_t i = 0, length = run->length;
    if (kind == WIDE_WORDS) {
        for (; i < length; i += 16) {
            int n = length - i < 16 ? (int)(length - i) : 16;
            __m512i words = (__m512i)load_words_part(run, kind, i, n);
            _mm512_mask_cvtepi32_storeu_epi16(out + i,
                                              (__mmask16)_bzhi_u32(0xffff, (unsigned)n),
                                              _mm512_permutexvar_epi16(words, table));
        }
        return;
    }
    const uint8_t *bytes = run->words;
    __m128i shift = _mm_cvtsi32_si128(run->shift);
    for (; i + 32 <= length; i += 32) {
        __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(bytes + i)));
        words = _mm512_srl_epi16(words, shift);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(words, table));
    }
    if (i < length) {
        __mmask32 mask = _bzhi_u32(0xffffffff, (unsigned)(length - i));
        __m512i words = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, bytes + i));
        words = _mm512_srl_epi16(words, shift);
        _mm512_mask_storeu_epi16(out + i, mask, _mm512_permutexvar_epi16(words, table));
    }
}
#elif defined(__AVX2__)
/* The values of 32 codes, from the low and the high bytes of all 16 values. */
INLINE void look_up_32(uint16_t *out, __m256i codes, __m256i low, __m256i high)
{
    __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
    __m256i even = _mm256_unpacklo_epi8(l, h), odd = _mm256_unpackhi_epi8(l, h);
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
}

/* A run of byte words to 16-bit values: made for each code once, looked up byte by byte. */
INLINE void constant_run_16(uint16_t *out, hqq_dtype dtype, const hqq_run *run, int nbits,
                            float zero, float scale)
{
    __m128i values[2]; /* of codes 0 to 7, and 8 to 15 */
    for (int i = 0; i < 2; i++) {
        hqq_vec code = hqq_code_of_lane(4) + hqq_vec_set1((float)(8 * i));
        hqq_vec value = (code - hqq_vec_set1(zero)) * hqq_vec_set1(scale);
        hqq_vec_store_dtype(&values[i], dtype, 0, value);
    }
    __m128i byte = _mm_set1_epi16(0xff);
    __m128i low =
        _mm_packus_epi16(_mm_and_si128(values[0], byte), _mm_and_si128(values[1], byte));
    __m128i high = _mm_packus_epi16(_mm_srli_epi16(values[0], 8), _mm_srli_epi16(values[1], 8));
    __m256i lows = _mm256_broadcastsi128_si256(low), highs = _mm256_broadcastsi128_si256(high);
    __m256i mask = _mm256_set1_epi8((char)hqq_max_code(nbits));
    __m128i shift = _mm_cvtsi32_si128(run->shift);
    const uint8_t *bytes = run->words;
    for (int64_t i = 0; i < run->length; i += 32) {
        uint8_t last[32] = {0};
        uint16_t values_32[32];
        int64_t n = run->length - i;
        const uint8_t *from = bytes + i;
        if (n < 32) from = memcpy(last, from, (size_t)n);
        __m256i codes = _mm256_srl_epi16(_mm256_loadu_si256((const __m256i *)from), shift);
        codes = _mm256_and_si256(codes, mask);
        look_up_32(n < 32 ? values_32 : out + i, codes, lows, highs);
        if (n < 32) memcpy(out + i, values_32, (size_t)n * 2);
    }
}
#endif

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
} block;

/* The words of a narrow row some rows ahead: the processor's own prefetching does not follow
 * from row to row. A wrong guess where the words wrap does no harm. */
INLINE void prefetch_row(const block *b, const hqq_layout *l, const hqq_place *place,
                         const hqq_place *step)
{
    const int64_t rows_ahead = 8, narrow = 1024;
    int64_t bytes = b->columns * l->word_bytes;
    if (bytes > narrow) return;
    const char *words = (const char *)b->weight->packed +
                        (place->word + rows_ahead * step->word) % l->words * l->word_bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(words + i);
}

/* Zeros and scales are brought to fp32 that many at a time. */
#define META_AT_ONCE 64

/* Whether no weight of these groups is subnormal. A difference of zero and code is zero, or no
 * smaller than 2^-24 times the zero, or the code. */
INLINE int values_are_normal(const float *zero, const float *scale, int64_t groups)
{
    int normal = 1;
    for (int64_t g = 0; g < groups; g++) {
        float z = __builtin_fabsf(zero[g]), s = __builtin_fabsf(scale[g]);
        normal &= (s >= 0x1p-60f) & ((z >= 0x1p-30f) | (z == 0.0f));
    }
    return normal;
}

/* The columns of a row that begin with a group, all in one slot: groups follow one another. */
INLINE void whole_groups(void *out, hqq_dtype dtype, int64_t at, const hqq_weight *w,
                         const hqq_layout *l, const hqq_place *place, int64_t columns,
                         code_kind kind)
{
    float zero[META_AT_ONCE], scale[META_AT_ONCE];
    hqq_run run = {.words = (const char *)w->packed + place->word * l->word_bytes,
                   .group = place->turn,
                   .length = l->G,
                   .shift = hqq_slot_shift(l->nbits, (int)place->slot)};
    int nbits = l->nbits;
    while (columns > 0) {
        int64_t groups = (columns + l->G - 1) / l->G;
        if (groups > META_AT_ONCE) groups = META_AT_ONCE;
        hqq_load_floats(zero, w->zero, w->meta_dtype, run.group, groups);
        hqq_load_floats(scale, w->scale, w->meta_dtype, run.group, groups);
        int normal = values_are_normal(zero, scale, groups);
        for (int64_t g = 0; g < groups; g++, columns -= l->G, at += l->G) {
            if (columns < l->G) run.length = columns;
            constant_run(out, dtype, at, &run, kind, nbits, zero[g], scale[g], normal);
            run.words = (const char *)run.words + l->G * l->word_bytes;
        }
        run.group += groups;
    }
}

/* Every row of the block; dtype, kind and axis are constants here, meta is one for axis 0. */
INLINE void all_rows(const block *b, hqq_dtype dtype, code_kind kind, int axis, hqq_dtype meta)
{
    const hqq_weight *w = b->weight;
    hqq_layout layout = hqq_weight_layout(w);
    hqq_place place = hqq_place_of(&layout, b->row * layout.K + b->column);
    hqq_place step = hqq_place_of(&layout, b->row_step * layout.K);
    for (int64_t i = 0; i < b->rows; i++, place = hqq_place_add(&layout, place, &step)) {
        int64_t at = i * b->ld;
        prefetch_row(b, &layout, &place, &step);
        if (axis == 1 && place.rest == 0 && place.word + b->columns <= layout.words) {
            whole_groups(b->out, dtype, at, w, &layout, &place, b->columns, kind);
            continue;
        }
        hqq_run_cursor cursor = hqq_runs_from(&layout, w->packed, &place, b->columns);
        for (hqq_run run; hqq_runs_next(&run, &cursor); at += run.length) {
            if (axis == 1)
                constant_run(b->out, dtype, at, &run, kind, w->nbits,
                             hqq_load_quick(w->zero, meta, run.group),
                             hqq_load_quick(w->scale, meta, run.group), 0);
            else
                varying_run(b->out, dtype, at, &run, kind, w, meta);
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
        case 3: name##_from_words(b); break;           \
        case 4:                                        \
        case 2:                                        \
        case 1: name##_from_bytes(b); break;           \
        }                                              \
    }
TO_DTYPE(to_f16, HQQ_F16)
TO_DTYPE(to_bf16, HQQ_BF16)
TO_DTYPE(to_f32, HQQ_F32)

void HQQ_ISA_NAME(hqq_dequantize_rows)(void *out, int64_t ld, hqq_dtype dtype,
                                       const hqq_weight *weight, int64_t row, int64_t row_step,
                                       int64_t rows, int64_t column_begin, int64_t column_end)
{
    block b = {.out = out,
               .ld = ld,
               .weight = weight,
               .row = row,
               .row_step = row_step,
               .rows = rows,
               .column = column_begin,
               .columns = column_end - column_begin};
    switch (dtype) {
    case HQQ_F16: to_f16(&b); break;
    case HQQ_BF16: to_bf16(&b); break;
    case HQQ_F32: to_f32(&b); break;
    }
}

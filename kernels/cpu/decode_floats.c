/*
 * Strips of many rows in fp32 (decode_floats.h). A strip of four vectors, a group or a part of
 * it, is decoded in all rows before the next: what comes with a group of a row is then little
 * more than its table, and a packed row is loaded once for all its slots.
 *
 *     16 bytes of a packed row -> for each slot: shift, look up -> 16 floats of a row of W
 *
 * Napkin for 128 weights at 4 bits: 4 loads that widen, 4 shifts, 8 look-ups, 8 stores, and 2
 * tables of 8 operations. A Zen 5 stores 16 floats a cycle: 8 to 10 cycles, 17 ps a weight.
 *
 * At axis 0 the rows of a residue take the place of rows that follow one another.
 */
#include "decode_floats.h"

#include "decode.h"
#include "multiply_tile.h"
#if HQQ_HAS_PAIRS
#include "pairs.h"
#endif
#include "integers.h"
#include "planes.h"

#define STRIP (4 * HQQ_LANES)

/* Some packed rows from a column on, all in one group. */
typedef struct strip {
    hqq_weight weight;
    hqq_layout layout;
    int64_t row, row_end, column;
    void *out;
    int64_t ld, slot; /* elements to the next row, and to the next slot's rows */
    int64_t ahead;    /* bytes to what is fetched meanwhile */
} strip;

/* HQQ_LANES words of a packed row: bytes, or the 4-bit bytes that planes make. */
typedef struct strip_words {
    const uint8_t *bytes, *ones; /* planes: codes of 2 bits and of 1 */
    int bytes_right, ones_right; /* planes: shifts, the former after one to the left */
} strip_words;

/* nbits, here and below: 3 are planes. */
HQQ_ALWAYS_INLINE strip_words words_of(const strip *s, int64_t p, const int nbits)
{
    const hqq_layout *l = &s->layout;
    strip_words w = {0};
    if (nbits == 3) {
        hqq_plane_row row = hqq_plane_row_of(s->weight.packed, l, p);
        w.bytes = row.twos + s->column;
        w.bytes_right = row.twos_left ? 0 : 2;
        w.ones = row.ones + s->column;
        w.ones_right = row.ones_right;
    } else {
        w.bytes = (const uint8_t *)s->weight.packed + p * l->K + s->column;
    }
    return w;
}

HQQ_ALWAYS_INLINE hqq_ivec load_strip(const strip_words *w, int64_t k, const int nbits)
{
    hqq_ivec bytes = hqq_ivec_load_u8(w->bytes + k);
    if (nbits != 3) return bytes;
    hqq_ivec ones = hqq_ivec_load_u8(w->ones + k) >> w->ones_right;
    return ((bytes + bytes) >> w->bytes_right & HQQ_TWOS_MASK) | (ones & HQQ_ONES_MASK);
}

/* `vectors` of each row. All but the strip are constants. */
HQQ_ALWAYS_INLINE void decode_strip(const strip *s, const int vectors, const int nbits,
                                    hqq_dtype meta)
{
    const int per = nbits == 3 ? 2 : 8 / nbits, by_table = nbits <= HQQ_TABLE_BITS;
    const hqq_weight *w = &s->weight;
    const hqq_layout *l = &s->layout;
    int64_t groups = l->K / l->G, slot_groups = l->N / per * groups;
    int64_t group = s->row * groups + s->column / l->G;
    hqq_decoder d[8] = {hqq_decoder_of(nbits, by_table, 0.0f, 1.0f)};
    hqq_vec code = d[0].table;
    float *out = s->out;
    for (int64_t p = s->row; p < s->row_end; p++, group += groups, out += s->ld) {
        strip_words words = words_of(s, p, nbits);
        __builtin_prefetch(words.bytes + s->ahead);
        if (nbits == 3) __builtin_prefetch(words.ones + s->ahead);
#pragma GCC unroll 8
        for (int j = 0; j < per; j++) {
            int64_t g = group + j * slot_groups;
            d[j].zero = hqq_vec_set1(hqq_load_quick(w->zero, meta, g));
            d[j].scale = hqq_vec_set1(hqq_load_quick(w->scale, meta, g));
            d[j].table = (code - d[j].zero) * d[j].scale;
            d[j].mask = d[0].mask;
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            hqq_ivec loaded = load_strip(&words, v * HQQ_LANES, nbits);
#pragma GCC unroll 8
            for (int j = 0; j < per; j++)
                hqq_vec_store(out + j * s->slot + v * HQQ_LANES,
                              hqq_decode(&d[j], by_table, loaded >> 8 / per * (per - 1 - j)));
        }
    }
}

HQQ_ALWAYS_INLINE void decode_strip_of(const strip *s, int whole, const int nbits,
                                       hqq_dtype meta)
{
    if (whole)
        decode_strip(s, 4, nbits, meta);
    else
        decode_strip(s, 1, nbits, meta);
}

/* A function for each width and dtype of zeros and scales. */
#define OF_META(nbits, meta)                                       \
    static void decode_##nbits##_##meta(const strip *s, int whole) \
    {                                                              \
        strip copy = *s; /* no store changes it */                 \
        decode_strip_of(&copy, whole, nbits, meta);                \
    }
#define OF_BITS(nbits) OF_META(nbits, HQQ_F32) OF_META(nbits, HQQ_F16) OF_META(nbits, HQQ_BF16)
#define ROW(nbits)                         \
    {[HQQ_F32] = decode_##nbits##_HQQ_F32, \
     [HQQ_F16] = decode_##nbits##_HQQ_F16, \
     [HQQ_BF16] = decode_##nbits##_HQQ_BF16}
/* clang-format off */
OF_BITS(8) OF_BITS(4) OF_BITS(3) OF_BITS(2) OF_BITS(1)
    /* clang-format on */

    typedef void (*decode_fn)(const strip *s, int whole);
static const decode_fn decode[][3] = {
    [1] = ROW(1), [2] = ROW(2), [3] = ROW(3), [4] = ROW(4), [8] = ROW(8)};

void HQQ_ISA_NAME(hqq_decode_strips)(float *out, int64_t ld, int64_t slot_rows,
                                     const hqq_weight *weight, const hqq_layout *l, int64_t row,
                                     int64_t row_end, int64_t begin, int64_t end, int64_t ahead)
{
    decode_fn of = decode[weight->nbits][weight->meta_dtype];
    strip s = {.weight = *weight,
               .layout = *l,
               .row = row,
               .row_end = row_end,
               .ld = ld,
               .slot = slot_rows * ld,
               .ahead = ahead * l->K};
    for (int64_t k = begin, width; k < end; k += width) {
        int64_t left = hqq_least(end - k, l->G - k % l->G);
        width = left >= STRIP ? STRIP : HQQ_LANES;
        s.column = k;
        s.out = out + k - begin;
        of(&s, width == STRIP);
    }
}

/* out = `vectors` vectors of floats, in fp32 or rounded to bf16. */
HQQ_ALWAYS_INLINE void store_vectors(void *out, int64_t at, const hqq_vec *row,
                                     const int vectors, const hqq_dtype dtype)
{
#if HQQ_HAS_PAIRS
    uint16_t *halves = (uint16_t *)out + at;
    if (dtype == HQQ_BF16 && vectors == 1) {
        _mm256_storeu_si256((__m256i *)halves, (__m256i)_mm512_cvtneps_pbh((__m512)row[0]));
        return;
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors && dtype == HQQ_BF16; v += 2)
        _mm512_storeu_si512(halves + v * HQQ_LANES, hqq_round_to_pairs(row[v], row[v + 1]));
#endif
#pragma GCC unroll 4
    for (int v = 0; v < vectors && dtype == HQQ_F32; v++)
        hqq_vec_store((float *)out + at + v * HQQ_LANES, row[v]);
}

/* Axis 0: `vectors` of each row, whose zeros and scales stay in registers. Napkin for 128
 * weights at 4 bits: 4 loads that widen, 4 shifts, 8 look-ups, 16 of arithmetic, 8 stores: 8 to
 * 10 cycles on a Zen 5, as at axis 1; 8 bits have no shifts, and twice the loads. In bf16 half
 * of the stores, and a rounding for each. */
HQQ_ALWAYS_INLINE void decode_residue(const strip *s, const int vectors, const int nbits,
                                      const hqq_dtype dtype)
{
    const int per = nbits == 3 ? 2 : 8 / nbits, by_table = nbits <= HQQ_TABLE_BITS;
    const hqq_decoder codes = hqq_decoder_of(nbits, by_table, 0.0f, 1.0f);
    const hqq_weight *w = &s->weight;
    int64_t step = s->layout.N / s->layout.G;
    int64_t meta = s->row % step * s->layout.K + s->column;
    hqq_vec zero[4], scale[4];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        zero[v] = hqq_vec_load_dtype(w->zero, w->meta_dtype, meta + v * HQQ_LANES);
        scale[v] = hqq_vec_load_dtype(w->scale, w->meta_dtype, meta + v * HQQ_LANES);
    }
    int64_t at = 0;
    for (int64_t p = s->row; p < s->row_end; p += step, at += s->ld) {
        strip_words words = words_of(s, p, nbits);
        hqq_ivec loaded[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) loaded[v] = load_strip(&words, v * HQQ_LANES, nbits);
#pragma GCC unroll 8
        for (int j = 0; j < per; j++) {
            hqq_vec row[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                hqq_ivec shifted = loaded[v] >> 8 / per * (per - 1 - j);
                row[v] = (hqq_decode(&codes, by_table, shifted) - zero[v]) * scale[v];
            }
            store_vectors(s->out, at + j * s->slot, row, vectors, dtype);
        }
    }
}

#define RESIDUE_OF(nbits, dtype)                                            \
    static void decode_residue_##nbits##_##dtype(const strip *s, int whole) \
    {                                                                       \
        strip copy = *s; /* no store changes it */                          \
        if (whole)                                                          \
            decode_residue(&copy, 4, nbits, dtype);                         \
        else                                                                \
            decode_residue(&copy, 1, nbits, dtype);                         \
    }
#define RESIDUES_OF(dtype)                                                       \
    RESIDUE_OF(8, dtype)                                                         \
    RESIDUE_OF(4, dtype)                                                         \
    RESIDUE_OF(3, dtype)                                                         \
    RESIDUE_OF(2, dtype)                                                         \
    RESIDUE_OF(1, dtype)                                                         \
    static const decode_fn residues_##dtype[] = {[1] = decode_residue_1_##dtype, \
                                                 [2] = decode_residue_2_##dtype, \
                                                 [3] = decode_residue_3_##dtype, \
                                                 [4] = decode_residue_4_##dtype, \
                                                 [8] = decode_residue_8_##dtype};
RESIDUES_OF(HQQ_F32)
#if HQQ_HAS_PAIRS
RESIDUES_OF(HQQ_BF16)
#endif

void HQQ_ISA_NAME(hqq_decode_residue)(void *out, int64_t ld, int64_t slot, hqq_dtype dtype,
                                      const hqq_weight *weight, const hqq_layout *l,
                                      int64_t row, int64_t rows, int64_t begin, int64_t end)
{
    decode_fn of = residues_HQQ_F32[weight->nbits];
#if HQQ_HAS_PAIRS
    if (dtype == HQQ_BF16) of = residues_HQQ_BF16[weight->nbits];
#endif
    strip s = {.weight = *weight,
               .layout = *l,
               .row = row,
               .row_end = row + rows * (l->N / l->G),
               .ld = ld,
               .slot = slot};
    for (int64_t k = begin, width; k < end; k += width) {
        width = end - k >= STRIP ? STRIP : HQQ_LANES;
        s.column = k;
        s.out = hqq_at_mut(out, dtype, k - begin);
        of(&s, width == STRIP);
    }
}

/*
 * Storing the codes of a tile, straight into their words.
 *
 * Axis 1: the codes of a group are neighbours in the words, all in one slot. Four steps are
 * gathered in the octets of a lane, so that one transposition serves 4 * HQQ_LANES steps, and
 * laid out group by group; the groups of a tile are neighbours in the words, too, so whole
 * stretches are then merged into the slot.
 *
 * Axis 0: the codes of a step are neighbours in the words; all codes of a word are in one lane.
 */
#ifndef HQQ_KERNELS_CPU_QUANTIZE_STORE_H
#define HQQ_KERNELS_CPU_QUANTIZE_STORE_H

#include "quantize_tile.h"

static inline hqq_uvec hqq_code_of(hqq_lane value, hqq_fit fit, float levels)
{
    return hqq_lane_to_code(hqq_clip_to_codes(value * fit.slope + fit.offset, levels));
}

/* ---- axis 1 ----------------------------------------------------------------------------- */

enum {
    HQQ_STAGE_STEPS = 512,          /* at a time */
    HQQ_STAGE_BLOCK = 4 * HQQ_LANES /* steps in a transposition */
};

/* rows[lane] = the codes of up to HQQ_STAGE_BLOCK steps of that lane, an octet each, shifted;
 * 0 behind `steps`. */
static inline void hqq_gather_block(hqq_lane rows[HQQ_LANES], const float *values, int steps,
                                    hqq_fit fit, float levels, int shift)
{
    for (int four = 0; four < HQQ_LANES; four++) {
        const float *at = values + four * 4 * HQQ_LANES;
        int left = steps - four * 4;
        hqq_uvec codes = {0};
        for (int i = 0; i < 4 && i < left; i++)
            codes |= hqq_code_of(hqq_vec_load(at + i * HQQ_LANES), fit, levels) << 8 * i;
        rows[four] = (hqq_lane)(codes << shift);
    }
    hqq_vec_transpose(rows);
}

/* stage[lane * n + i] = the code of value i, for n values. Each block is written whole: the
 * last first and lanes in turn, so that what goes beyond its lane is overwritten. */
static inline void hqq_stage_codes(uint8_t *stage, const float *values, int n, hqq_fit fit,
                                   float levels, int shift)
{
    for (int i = (n - 1) / HQQ_STAGE_BLOCK * HQQ_STAGE_BLOCK; i >= 0; i -= HQQ_STAGE_BLOCK) {
        int steps = n - i < HQQ_STAGE_BLOCK ? n - i : HQQ_STAGE_BLOCK;
        hqq_lane rows[HQQ_LANES];
        hqq_gather_block(rows, values + i * HQQ_LANES, steps, fit, levels, shift);
        for (int lane = 0; lane < HQQ_LANES; lane++)
            memcpy(stage + lane * n + i, &rows[lane], sizeof rows[lane]);
    }
}

/* Puts n codes, already in their place within an octet, into words of one octet. */
static inline void hqq_merge_bytes(uint8_t *restrict out, const uint8_t *restrict codes,
                                   int64_t n, int first_slot)
{
    if (first_slot)
        memcpy(out, codes, (size_t)n);
    else
        for (int64_t i = 0; i < n; i++) out[i] |= codes[i];
}

/* Puts n codes into slots of 32-bit words. */
static inline void hqq_merge_words(uint32_t *restrict out, const uint8_t *restrict codes,
                                   int64_t n, int shift, int first_slot)
{
    if (first_slot)
        for (int64_t i = 0; i < n; i++) out[i] = (uint32_t)codes[i] << shift;
    else
        for (int64_t i = 0; i < n; i++) out[i] |= (uint32_t)codes[i] << shift;
}

static inline void hqq_tile_store_rows(hqq_tile *t, hqq_fit fit, float levels)
{
    const hqq_quantize_job *job = t->job;
    int64_t G = job->layout.G;
    int octets = job->layout.word_bytes == 1,
        shift = hqq_slot_shift(job->layout.nbits, t->slot);
    uint8_t stage[HQQ_STAGE_STEPS * HQQ_LANES + HQQ_STAGE_BLOCK];
    for (int64_t begin = 0, n; begin < G; begin += n) {
        n = G - begin < HQQ_STAGE_STEPS ? G - begin : HQQ_STAGE_STEPS;
        const float *values = hqq_tile_at(t, begin);
        hqq_stage_codes(stage, values, (int)n, fit, levels, octets ? shift : 0);
        int64_t stretch = n == G ? t->live * G : n; /* short groups follow each other */
        for (int64_t at = 0, lane = 0; at < t->live * n; at += stretch, lane++) {
            int64_t word = (t->band + lane) * G + begin;
            if (octets)
                hqq_merge_bytes((uint8_t *)job->packed + word, stage + at, stretch,
                                t->slot == 0);
            else
                hqq_merge_words((uint32_t *)job->packed + word, stage + at, stretch, shift,
                                t->slot == 0);
        }
    }
}

/* ---- axis 0 ----------------------------------------------------------------------------- */

static inline void hqq_narrow_codes(uint8_t out[HQQ_LANES], hqq_uvec codes)
{
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
    __m128i low = _mm256_castsi256_si128((__m256i)codes);
    __m128i pairs = _mm_packus_epi32(low, _mm256_extracti128_si256((__m256i)codes, 1));
    _mm_storel_epi64((__m128i *)out, _mm_packus_epi16(pairs, pairs));
#else
    for (int i = 0; i < HQQ_LANES; i++) out[i] = (uint8_t)codes[i];
#endif
}

/* The words from `word` of the lanes that live. */
static inline void hqq_put_words(const hqq_tile *t, int64_t word, hqq_uvec codes)
{
    int bytes = t->job->layout.word_bytes;
    char *out = (char *)t->job->packed + word * bytes, words[HQQ_LANES * 4];
    if (bytes == 4)
        memcpy(words, &codes, sizeof codes);
    else
        hqq_narrow_codes((uint8_t *)words, codes);
    if (t->live < HQQ_LANES)
        memcpy(out, words, (size_t)(t->live * bytes));
    else if (bytes == 4)
        memcpy(out, words, HQQ_LANES * 4);
    else
        memcpy(out, words, HQQ_LANES);
}

static inline void hqq_tile_store_columns(const hqq_tile *t, hqq_fit fit, float levels)
{
    const hqq_layout *l = &t->job->layout;
    int64_t rows = l->words / l->groups;
    for (int64_t row = 0; row < rows; row++) {
        hqq_uvec codes = {0};
        for (int64_t slot = 0, i = row; slot < l->per && i < l->G; slot++, i += rows)
            codes |= hqq_code_of(hqq_tile_step(t, i), fit, levels)
                     << hqq_slot_shift(l->nbits, (int)slot);
        hqq_put_words(t, row * l->groups + t->first, codes);
    }
}

/* Stores the codes nearest to value * slope + offset. */
static inline void hqq_tile_store_codes(hqq_tile *t, hqq_fit fit, float levels)
{
    if (t->job->layout.axis == 1)
        hqq_tile_store_rows(t, fit, levels);
    else
        hqq_tile_store_columns(t, fit, levels);
}

#endif

/*
 * The tiled forward product at axis 0 where x takes the scales, in bf16:
 *
 *     y[m, n] = sum_k (x[m, k] scale[r, k]) q[n, k]  -  sum_k (x[m, k] scale[r, k]) zero[r, k]
 *
 * for all rows n = r mod N/G of W: G rows share the scaled x, and what is subtracted. Codes are
 * decoded by one table for all (8 bits: converted), and bf16 holds them exactly; so the product
 * of a lone weight is as exact as its scaled x. Included by tiled_linear.c.
 */
#ifndef HQQ_KERNELS_CPU_TILED_SCALED_H
#define HQQ_KERNELS_CPU_TILED_SCALED_H

#include "pairs.h"
#include "tiled_block.h"

/* out [32] = x scale, rounded; sum - that times zero, two by two. */
HQQ_ALWAYS_INLINE hqq_vec scale_32(uint16_t *out, const uint16_t *x, const hqq_vec scale[2],
                                   __m512i minus_zero, hqq_vec sum)
{
    __m512i scaled = hqq_round_to_pairs(hqq_vec_load_bf16(x) * scale[0],
                                        hqq_vec_load_bf16(x + 16) * scale[1]);
    _mm512_storeu_si512(out, scaled);
    return hqq_dot_pairs(sum, scaled, minus_zero);
}

/* out: rows ld_out apart. constants [8] = what begins the sums of up to 8 tokens. */
static void scale_tokens(uint16_t *out, int64_t ld_out, const uint16_t *x, int64_t ld_x,
                         int tokens, const uint16_t *zero, const uint16_t *scale,
                         int64_t columns, float *constants)
{
    const __m512i sign = _mm512_set1_epi16((short)0x8000);
    hqq_vec sums[8] = {{0}};
    for (int64_t k = 0; k < columns; k += 32) {
        hqq_vec scales[2] = {hqq_vec_load_bf16(scale + k), hqq_vec_load_bf16(scale + k + 16)};
        __m512i minus_zero = _mm512_xor_si512(_mm512_loadu_si512(zero + k), sign);
        for (int m = 0; m < tokens; m++)
            sums[m] =
                scale_32(out + m * ld_out + k, x + m * ld_x + k, scales, minus_zero, sums[m]);
    }
    for (int m = 0; m < tokens; m++) constants[m] = hqq_vec_sum(sums[m]);
}

/* The columns [begin, end) of x, scaled for the cycle of sets from `set` on, to input; and what
 * they are to begin with to the sums, which are added to if `add`. */
static void scale_input(const hqq_tiled_chunk *c, uint16_t *input, int64_t ld, int64_t begin,
                        int64_t end, int64_t set, int add)
{
    const hqq_tiled_job *job = c->job;
    const hqq_row_sets *sets = &job->sets;
    int64_t meta = set / sets->cycle * job->layout.K + begin;
    for (int64_t m = c->m_begin; m < c->m_end; m += 8) {
        int tokens = (int)hqq_least(c->m_end - m, 8);
        float constants[8];
        scale_tokens(input + (m - c->m_begin) * ld, ld,
                     (const uint16_t *)job->in + m * job->ld_in + begin, job->ld_in, tokens,
                     (const uint16_t *)job->weight->zero + meta,
                     (const uint16_t *)job->weight->scale + meta, end - begin, constants);
        for (int i = 0; i < tokens; i++)
            for (int j = 0; j < sets->slots; j++) {
                float *sums = c->sums + (m + i - c->m_begin) * c->ld_sums +
                              j * job->block_sets + set - c->begin;
                for (int64_t n = 0; n < sets->cycle; n++)
                    sums[n] = add ? sums[n] + constants[i] : constants[i];
            }
    }
}

/* Bytes of one packed row: 32 columns of each slot at a time. */
HQQ_ALWAYS_INLINE void decode_code_row(uint16_t *out, int64_t slot, const uint8_t *bytes,
                                       int64_t columns, __m512i table, const int nbits)
{
    for (int64_t k = 0; k < columns; k += 32) {
        if (nbits == 8)
            _mm512_storeu_si512(out + k, hqq_pairs_of_bytes(bytes + k, 0.0f, 1.0f));
        else
            bf16_columns(out + k, slot, bytes + k, &table, 0, nbits);
    }
}

/* hqq_decode_rows of the codes themselves, of sets in one cycle. */
static void decode_codes(void *out, int64_t ld, int64_t slot_rows, const hqq_tiled_job *job,
                         int64_t set_begin, int64_t set_end, int64_t begin, int64_t end)
{
    int64_t row = hqq_row_in_slot(&job->sets, set_begin), step = job->sets.step;
    if (job->layout.planes) {
        const float zero[HQQ_MAX_SLOTS] = {0.0f};
        const float scale[HQQ_MAX_SLOTS] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        hqq_weight codes = *job->weight;
        codes.axis = 1; /* a group a slot: the codes lie as they do */
        codes.group_size = job->layout.words;
        codes.zero = zero;
        codes.scale = scale;
        codes.meta_dtype = HQQ_F32;
        HQQ_ISA_NAME(hqq_dequantize_halves)
        (out, ld, slot_rows * ld, HQQ_BF16, &codes, row, step, set_end - set_begin, begin, end);
        return;
    }
    int nbits = job->weight->nbits;
    const __m512i table = nbits < 8 ? hqq_pair_table(nbits, 0.0f, 1.0f) : (__m512i){0};
    const uint8_t *bytes = (const uint8_t *)job->weight->packed + row * job->layout.K + begin;
    uint16_t *to = out;
    for (int64_t set = set_begin; set < set_end; set++) {
        switch (nbits) {
        case 8: decode_code_row(to, slot_rows * ld, bytes, end - begin, table, 8); break;
        case 4: decode_code_row(to, slot_rows * ld, bytes, end - begin, table, 4); break;
        case 2: decode_code_row(to, slot_rows * ld, bytes, end - begin, table, 2); break;
        case 1: decode_code_row(to, slot_rows * ld, bytes, end - begin, table, 1); break;
        }
        to += ld;
        bytes += step * job->layout.K;
    }
}

#endif

/* x and dy in tiles of bf16, in parts (amx.h). */
#include "amx_tile.h"

#include "amx_rows.h"
#include "transpose.h"

/* 32 elements in parts. */
HQQ_ALWAYS_INLINE void split(__m512i out[HQQ_AMX_PARTS], hqq_vec low, hqq_vec high,
                             const int parts)
{
#pragma GCC unroll 3
    for (int p = 0; p < parts; p++) {
        hqq_vec l = hqq_amx_take_part_of_any(&low), h = hqq_amx_take_part_of_any(&high);
        out[p] = hqq_round_to_pairs(l, h);
    }
}

/* `count` elements from index i, at most 32, and zeros. */
HQQ_ALWAYS_INLINE void load(__m512i out[HQQ_AMX_PARTS], const hqq_amx_job *job, int64_t i,
                            int64_t count, hqq_dtype dtype, const int parts)
{
    if (dtype == HQQ_BF16) {
        const uint16_t *from = (const uint16_t *)job->in + i;
        uint16_t last[32] = {0};
        if (count < 32) from = memcpy(last, from, (size_t)count * 2);
        out[0] = _mm512_loadu_si512(from);
        return;
    }
    hqq_vec low, high;
    if (count >= 32) {
        low = hqq_vec_load_dtype(job->in, dtype, i);
        high = hqq_vec_load_dtype(job->in, dtype, i + 16);
    } else {
        int n = (int)count;
        low = hqq_vec_load_dtype_part(job->in, dtype, i, n < 16 ? n : 16);
        high =
            n < 16 ? hqq_vec_zero() : hqq_vec_load_dtype_part(job->in, dtype, i + 16, n - 16);
    }
    split(out, low, high, parts);
}

/* Row i of a tile holds elements 2 i and 2 i + 1 of all 16 tokens. */
HQQ_ALWAYS_INLINE void pack_x(const hqq_amx_job *job, char *to, int64_t m, int64_t begin,
                              int64_t end, hqq_dtype dtype, const int parts)
{
    int64_t tokens = job->m_end - m < HQQ_AMX_TOKENS ? job->m_end - m : HQQ_AMX_TOKENS;
    for (int64_t k = begin; k < end; k += HQQ_AMX_STEP, to += parts * HQQ_AMX_BYTES) {
        hqq_vec tile[HQQ_AMX_PARTS][HQQ_LANES] = {0};
        for (int64_t i = 0; i < tokens; i++) {
            __m512i pairs[HQQ_AMX_PARTS];
            load(pairs, job, (m + i) * job->ld_in + k, end - k, dtype, parts);
            for (int p = 0; p < parts; p++) tile[p][i] = (hqq_vec)pairs[p];
        }
        for (int p = 0; p < parts; p++) {
            hqq_vec_transpose(tile[p]);
            memcpy(to + p * HQQ_AMX_BYTES, tile[p], HQQ_AMX_BYTES);
        }
    }
}

void hqq_amx_pack_x(const hqq_amx_job *job, int64_t token_tile, int64_t begin, int64_t end)
{
    int64_t m = job->m_begin + token_tile * HQQ_AMX_TOKENS;
    int64_t steps = (end - begin + HQQ_AMX_STEP - 1) / HQQ_AMX_STEP;
    char *to = hqq_amx_input(job, begin / HQQ_AMX_STEP, steps, token_tile);
    switch (job->dtype) {
    case HQQ_F32: pack_x(job, to, m, begin, end, HQQ_F32, 3); break;
    case HQQ_F16: pack_x(job, to, m, begin, end, HQQ_F16, 2); break;
    case HQQ_BF16: pack_x(job, to, m, begin, end, HQQ_BF16, 1); break;
    }
}

/* Half a row of a tile: one token's elements of up to 16 rows of W. */
HQQ_ALWAYS_INLINE void pack_half(const hqq_amx_job *job, char *to, int64_t m,
                                 const hqq_row_piece *piece, hqq_dtype dtype, const int parts)
{
    int64_t i = m * job->ld_in + piece->first;
    if (dtype == HQQ_BF16) {
        if (piece->count == 16) {
            memcpy(to, (const uint16_t *)job->in + i, 32);
            return;
        }
        memset(to, 0, 32);
        memcpy(to, (const uint16_t *)job->in + i, (size_t)piece->count * 2);
        return;
    }
    hqq_vec v = piece->count == 16
                    ? hqq_vec_load_dtype(job->in, dtype, i)
                    : hqq_vec_load_dtype_part(job->in, dtype, i, (int)piece->count);
    for (int p = 0; p < parts; p++) {
        hqq_vec part = hqq_amx_take_part_of_any(&v);
        hqq_vec_store_bf16((uint16_t *)(to + p * HQQ_AMX_BYTES), part);
    }
}

/* Row i of a tile is a token's: two runs of 16 rows of W. */
HQQ_ALWAYS_INLINE void pack_dy(const hqq_amx_job *job, char *to, int64_t m, int64_t begin,
                               int64_t end, hqq_dtype dtype, const int parts)
{
    int64_t tokens = job->m_end - m < HQQ_AMX_TOKENS ? job->m_end - m : HQQ_AMX_TOKENS;
    for (int64_t set = begin; set < end; set += job->group_sets)
        for (int64_t q = 0; q < job->group_rows / 16; q += 2, to += parts * HQQ_AMX_BYTES) {
            hqq_row_piece low = hqq_amx_rows(job, set, q), high = hqq_amx_rows(job, set, q + 1);
            for (int64_t i = 0; i < tokens; i++) {
                pack_half(job, to + i * 64, m + i, &low, dtype, parts);
                pack_half(job, to + i * 64 + 32, m + i, &high, dtype, parts);
            }
            for (int p = 0; p < parts; p++)
                memset(to + p * HQQ_AMX_BYTES + tokens * 64, 0,
                       (size_t)(HQQ_AMX_TOKENS - tokens) * 64);
        }
}

void hqq_amx_pack_dy(const hqq_amx_job *job, int64_t token_tile, int64_t begin, int64_t end)
{
    int64_t m = job->m_begin + token_tile * HQQ_AMX_TOKENS;
    char *to = hqq_amx_input(
        job, hqq_amx_steps_of_sets(job, begin),
        hqq_amx_steps_of_sets(job, end) - hqq_amx_steps_of_sets(job, begin), token_tile);
    switch (job->dtype) {
    case HQQ_F32: pack_dy(job, to, m, begin, end, HQQ_F32, 3); break;
    case HQQ_F16: pack_dy(job, to, m, begin, end, HQQ_F16, 2); break;
    case HQQ_BF16: pack_dy(job, to, m, begin, end, HQQ_BF16, 1); break;
    }
}

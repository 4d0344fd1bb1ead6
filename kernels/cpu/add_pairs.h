/*
 * The inner loops of the direct input gradient in bf16 (direct_dgrad_aligned.c): vdpbf16ps sums
 * the products of two rows of W, for 16 columns, with those rows' two elements of dy.
 *
 * Two packed rows are interleaved by words of 16 bits, so that the codes of both rows at one
 * column are shifted and looked up in the two halves of a 32-bit lane; bit 4 of the index says
 * which row's half of the table it means:
 *
 *     row p      k k+1  k+2 k+3 ...      lanes   [p: k k+1 | p+1: k k+1] ...
 *     row p+1    k k+1  k+2 k+3 ...      >> 0, 4: column k, slots 1 and 0;  >> 8, 12: k + 1
 *
 * Vectors hold every other column so, and sums stay in that order ("pair order") until a part
 * is done. Axis 0 multiplies the codes themselves, which bf16 holds exactly: its sums begin
 * with -zero * sum dy, and are multiplied by the scales at the end of a batch.
 *
 * Napkin, 4 bits, axis 1, G = 64, on a Zen 4 (dot_pairs.h), for 256 weights: 2 interleavings, 6
 * shifts, 8 indices, 8 look-ups, 2 tables of 5, 8 M multiplications; 42 operations at M = 1, 22
 * cycles, where fp32 takes 56, 30 cycles; at M = 4 66 against 104, at M = 8 98 and a second
 * round of tables against 168.
 */
#ifndef HQQ_KERNELS_CPU_ADD_PAIRS_H
#define HQQ_KERNELS_CPU_ADD_PAIRS_H

#include "add_block.h"
#include "pairs.h"

/* Of 64 columns: 16 of every other one, first half of each 16, then the second. */
static inline void hqq_to_pair_order(float *values, int64_t columns)
{
    for (float *at = values; at < values + columns; at += 64) {
        __m512 n0 = _mm512_loadu_ps(at), n1 = _mm512_loadu_ps(at + 16);
        __m512 n2 = _mm512_loadu_ps(at + 32), n3 = _mm512_loadu_ps(at + 48);
        /* quarters: of n0 and n1, of n2 and n3; then the q-th of each */
        __m512 l01 = _mm512_shuffle_f32x4(n0, n1, 0x44),
               h01 = _mm512_shuffle_f32x4(n0, n1, 0xee);
        __m512 l23 = _mm512_shuffle_f32x4(n2, n3, 0x44),
               h23 = _mm512_shuffle_f32x4(n2, n3, 0xee);
        __m512 q0 = _mm512_shuffle_f32x4(l01, l23, 0x88);
        __m512 q1 = _mm512_shuffle_f32x4(l01, l23, 0xdd);
        __m512 q2 = _mm512_shuffle_f32x4(h01, h23, 0x88);
        __m512 q3 = _mm512_shuffle_f32x4(h01, h23, 0xdd);
        _mm512_storeu_ps(at, _mm512_shuffle_ps(q0, q1, 0x88));
        _mm512_storeu_ps(at + 16, _mm512_shuffle_ps(q0, q1, 0xdd));
        _mm512_storeu_ps(at + 32, _mm512_shuffle_ps(q2, q3, 0x88));
        _mm512_storeu_ps(at + 48, _mm512_shuffle_ps(q2, q3, 0xdd));
    }
}

/* hqq_to_pair_order of bf16 values. */
static inline void hqq_load_pair_order(float *out, const uint16_t *values, int64_t columns)
{
    const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
    for (int64_t k = 0; k < columns; k += 64, out += 64) {
        __m512i low = _mm512_loadu_si512(values + k),
                high = _mm512_loadu_si512(values + k + 32);
        __m512i first = _mm512_shuffle_i64x2(low, high, 0x88); /* 8 of each 16 */
        __m512i second = _mm512_shuffle_i64x2(low, high, 0xdd);
        _mm512_storeu_si512(out, _mm512_slli_epi32(first, 16));
        _mm512_storeu_si512(out + 16, _mm512_and_si512(first, odd));
        _mm512_storeu_si512(out + 32, _mm512_slli_epi32(second, 16));
        _mm512_storeu_si512(out + 48, _mm512_and_si512(second, odd));
    }
}

static inline void hqq_from_pair_order(float *values, int64_t columns)
{
    for (float *at = values; at < values + columns; at += 64) {
        __m512 v0 = _mm512_loadu_ps(at), v1 = _mm512_loadu_ps(at + 16);
        __m512 v2 = _mm512_loadu_ps(at + 32), v3 = _mm512_loadu_ps(at + 48);
        __m512 q0 = _mm512_unpacklo_ps(v0, v1), q1 = _mm512_unpackhi_ps(v0, v1);
        __m512 q2 = _mm512_unpacklo_ps(v2, v3), q3 = _mm512_unpackhi_ps(v2, v3);
        __m512 l01 = _mm512_shuffle_f32x4(q0, q1, 0x44),
               h01 = _mm512_shuffle_f32x4(q0, q1, 0xee);
        __m512 l23 = _mm512_shuffle_f32x4(q2, q3, 0x44),
               h23 = _mm512_shuffle_f32x4(q2, q3, 0xee);
        _mm512_storeu_ps(at, _mm512_shuffle_f32x4(l01, l23, 0x88));
        _mm512_storeu_ps(at + 16, _mm512_shuffle_f32x4(l01, l23, 0xdd));
        _mm512_storeu_ps(at + 32, _mm512_shuffle_f32x4(h01, h23, 0x88));
        _mm512_storeu_ps(at + 48, _mm512_shuffle_f32x4(h01, h23, 0xdd));
    }
}

/* dy of the batch's rows, two by two; it is bf16, kept in fp32. Where the last row has no
 * second one it stands for itself, with zeros. */
static inline void gather_dy_pairs(add_block *b, int per)
{
    memset(b->dy_sums, 0, sizeof b->dy_sums);
    uint32_t *out = b->dy_pairs;
    for (int r = 0; r < b->rows; r += 2)
        for (int j = 0; j < per; j++)
            for (int m = 0; m < b->tokens; m++) {
                float first = b->dy[r][j * b->dy_slot + m], second = 0;
                if (r + 1 < b->rows) second = b->dy[r + 1][j * b->dy_slot + m];
                b->dy_sums[m] += first + second;
                uint32_t low, high;
                memcpy(&low, &first, 4);
                memcpy(&high, &second, 4);
                *out++ = low >> 16 | (high & 0xffff0000);
            }
}

/* 64 bytes of a packed row. */
typedef struct coded_row_64 {
    __m512i bytes;
    hqq_plane_vector twos[2], ones; /* of planes; bytes are then the 4-bit ones */
} coded_row_64;

HQQ_ALWAYS_INLINE coded_row_64 load_row_64(const add_block *b, int r, int64_t k,
                                           const int nbits)
{
    coded_row_64 row = {0};
    if (nbits == 3) {
        row.twos[0] = hqq_plane_load(b->planes[r].twos[0] + k);
        row.twos[1] = hqq_plane_load(b->planes[r].twos[1] + k);
        row.ones = hqq_plane_load(b->planes[r].ones + k);
    } else {
        row.bytes = _mm512_loadu_si512(b->words[r] + k);
    }
    return row;
}

HQQ_ALWAYS_INLINE __m512i bytes_of_turn(coded_row_64 *row, const int turn, const int nbits)
{
    if (nbits == 3 && turn % 2 == 0)
        row->bytes = (__m512i)hqq_plane_codes(row->twos, row->ones, 8, turn / 2, 0);
    return row->bytes;
}

/* Axis 1: of rows r and r + 1, at the slot that is taken in turn, in group g; behind the last
 * ones any. The first row's codes look up the lower half. */
HQQ_ALWAYS_INLINE __m512i table_of_turn(const add_block *b, int r, int turn, int64_t g,
                                        const int nbits)
{
    const int PER = nbits == 3 ? 8 : 8 / nbits;
    if (turn == PER) r += r + 2 < b->rows ? 2 : 0, turn = 0;
    int64_t at = (r * PER + add_slot(turn, nbits, PER)) * b->groups + g;
    int64_t second = r + 1 < b->rows ? at + PER * b->groups : at;
    return hqq_round_to_pairs(
        hqq_decoder_of(nbits, 1, b->zero[at], b->scale[at]).table,
        hqq_decoder_of(nbits, 1, b->zero[second], b->scale[second]).table);
}

/* Vectors `first` to first + VN of the 64 columns from k; VN is 4, or 2 for one half. */
HQQ_ALWAYS_INLINE void add_pair_vectors(const add_block *b, int64_t k, int64_t g,
                                        const int first, const int nbits, const int axis,
                                        const int MB, const int VN)
{
    const int PER = nbits == 3 ? 8 : 8 / nbits, AHEAD = axis == 1 && nbits != 3 && MB >= 2;
    const __m512i code = _mm512_set1_epi16(nbits == 3 ? 7 : 0xf),
                  second_row = _mm512_set1_epi32(0x100000);
    float *sums = b->sums + k + first * 16;
    hqq_vec acc[16];
#pragma GCC unroll 8
    for (int m = 0; m < MB; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++)
            acc[m * VN + v] = axis == 1 ? hqq_vec_load(sums + m * b->ld + v * 16)
                                        : hqq_vec_load(b->zero + k + (first + v) * 16) *
                                              hqq_vec_set1(-b->dy_sums[m]);
    __m512i table = hqq_pair_table(nbits, 0.0f, 1.0f), next = table;
    if (AHEAD) next = table_of_turn(b, 0, 0, g, nbits);
    for (int r = 0; r < b->rows; r += 2) {
        int s = r + 1 < b->rows ? r + 1 : r;
        coded_row_64 one = load_row_64(b, r, k, nbits), two = load_row_64(b, s, k, nbits);
        if (first == 0) {
            add_prefetch(b, r, k, nbits);
            add_prefetch(b, s, k, nbits);
        }
#pragma GCC unroll 8
        for (int turn = 0; turn < PER; turn++) {
            const int j = add_slot(turn, nbits, PER);
            const int right = nbits == 3 ? 4 - turn % 2 * 4 : 8 - nbits * (j + 1);
            const uint32_t *dy = b->dy_pairs + (r / 2 * PER + j) * MB;
            __m512i a = bytes_of_turn(&one, turn, nbits), c = bytes_of_turn(&two, turn, nbits);
            if (AHEAD) {
                table = next;
                next = table_of_turn(b, r, turn + 1, g, nbits);
            } else if (axis == 1) {
                table = table_of_turn(b, r, turn, g, nbits);
            }
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) {
                __m512i words =
                    first + v < 2 ? _mm512_unpacklo_epi16(a, c) : _mm512_unpackhi_epi16(a, c);
                __m512i index = _mm512_srli_epi16(words, v % 2 * 8 + right);
                if (axis == 1) index = _mm512_ternarylogic_epi32(index, code, second_row, 0xea);
                __m512i w = _mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 8
                for (int m = 0; m < MB; m++)
                    acc[m * VN + v] =
                        hqq_dot_pairs(acc[m * VN + v], w, _mm512_set1_epi32((int)dy[m]));
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MB; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) {
            float *at = sums + m * b->ld + v * 16;
            hqq_vec sum = acc[m * VN + v];
            if (axis == 0)
                sum = hqq_vec_load(at) + sum * hqq_vec_load(b->scale + k + (first + v) * 16);
            hqq_vec_store(at, sum);
        }
}

HQQ_ALWAYS_INLINE void add_pair_batch(const add_block *b, const int nbits, const int axis,
                                      const int MB)
{
    const int VN = MAX_SUMS / MB < 4 ? MAX_SUMS / MB : 4;
    int64_t end = axis == 1 ? b->group_left : b->columns;
    for (int64_t k = 0, g = 0; k < b->columns; g++, end += b->G)
        for (; k < end && k < b->columns; k += 64) {
            add_pair_vectors(b, k, g, 0, nbits, axis, MB, VN);
            if (VN == 2) add_pair_vectors(b, k, g, 2, nbits, axis, MB, VN);
        }
}

#define PAIR_ADD(nbits, axis, MB)                                    \
    static void pair_add_##nbits##_##axis##_##MB(const add_block *b) \
    {                                                                \
        add_pair_batch(b, nbits, axis, MB);                          \
    }
#define PAIR_ADDS(nbits, MB) PAIR_ADD(nbits, 0, MB) PAIR_ADD(nbits, 1, MB)
#define ALL_PAIR_ADDS(nbits) \
    PAIR_ADDS(nbits, 1) PAIR_ADDS(nbits, 2) PAIR_ADDS(nbits, 4) PAIR_ADDS(nbits, 8)
/* clang-format off */
ALL_PAIR_ADDS(4) ALL_PAIR_ADDS(3) ALL_PAIR_ADDS(2) ALL_PAIR_ADDS(1)
#define PAIR_ADD_OF(nbits, MB) {pair_add_##nbits##_0_##MB, pair_add_##nbits##_1_##MB}
#define PAIR_ROW(nbits) \
    {PAIR_ADD_OF(nbits, 1), PAIR_ADD_OF(nbits, 2), PAIR_ADD_OF(nbits, 4), PAIR_ADD_OF(nbits, 8)}

static add_table pair_adds = {{{NULL}}, PAIR_ROW(4), PAIR_ROW(2), PAIR_ROW(1)};
static const add_fn pair_planes[4][2] = PAIR_ROW(3);
/* clang-format on */

#endif

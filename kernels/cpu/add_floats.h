/* The inner loops of the direct input gradient in fp32 (direct_dgrad_aligned.c). */
#ifndef HQQ_KERNELS_CPU_ADD_FLOATS_H
#define HQQ_KERNELS_CPU_ADD_FLOATS_H

#include "add_block.h"
#include "decode.h"

/* Of a packed row, up to four vectors of columns: a byte a lane, or of planes the 4-bit bytes
 * of each two of its eight rows of W. As bytes they are made of four times as many columns a
 * vector as a lane at a time. */
typedef struct coded_columns {
    hqq_ivec words[4];
    uint8_t nibbles[4][HQQ_LANES * 4];
} coded_columns;

#define NIBBLES_OF(BYTES)                                                                  \
    HQQ_ALWAYS_INLINE void nibbles_of_##BYTES(coded_columns *c, const hqq_plane_bytes *p,  \
                                              int64_t k)                                   \
    {                                                                                      \
        typedef uint16_t lanes __attribute__((vector_size(BYTES)));                        \
        lanes twos[2], ones;                                                               \
        memcpy(&twos[0], p->twos[0] + k, BYTES);                                           \
        memcpy(&twos[1], p->twos[1] + k, BYTES);                                           \
        memcpy(&ones, p->ones + k, BYTES);                                                 \
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)                                \
        {                                                                                  \
            lanes two = i < 2 ? twos[i] >> 1 : twos[i - 2] << 1;                           \
            lanes all =                                                                    \
                (two & HQQ_TWOS_MASK * 0x101) | (ones >> (3 - i) & HQQ_ONES_MASK * 0x101); \
            memcpy(c->nibbles[i], &all, BYTES);                                            \
        }                                                                                  \
    }
/* clang-format off */
NIBBLES_OF(64) NIBBLES_OF(32) NIBBLES_OF(16) NIBBLES_OF(8) NIBBLES_OF(4)
    /* clang-format on */

    HQQ_ALWAYS_INLINE void load_columns(coded_columns *c, const add_block *b, int r, int64_t k,
                                        const int VN, const int nbits)
{
    if (nbits == 3) {
        const hqq_plane_bytes *p = &b->planes[r];
        switch (VN * HQQ_LANES) {
        case 64: nibbles_of_64(c, p, k); break;
        case 32: nibbles_of_32(c, p, k); break;
        case 16: nibbles_of_16(c, p, k); break;
        case 8: nibbles_of_8(c, p, k); break;
        case 4: nibbles_of_4(c, p, k); break;
        }
        return;
    }
#pragma GCC unroll 4
    for (int v = 0; v < VN; v++)
        c->words[v] = hqq_ivec_load_u8(b->words[r] + k + v * HQQ_LANES);
}

/* The codes of add_slot's slot, shifted down. */
HQQ_ALWAYS_INLINE hqq_ivec codes_of_turn(coded_columns *c, int v, const int turn,
                                         const int nbits)
{
    if (nbits != 3) return c->words[v] >> (8 - nbits * (turn + 1));
    if (turn % 2) return c->words[v];
    c->words[v] = hqq_ivec_load_u8(c->nibbles[turn / 2] + v * HQQ_LANES);
    return c->words[v] >> 4;
}

static inline void sum_dy(add_block *b, int per)
{
    memset(b->dy_sums, 0, sizeof b->dy_sums);
    for (int r = 0; r < b->rows; r++)
        for (int j = 0; j < per; j++)
            for (int m = 0; m < b->tokens; m++) b->dy_sums[m] += b->dy[r][j * b->dy_slot + m];
}

/* Axis 1: of the row that is taken in turn, in group g; behind the last one any. */
HQQ_ALWAYS_INLINE hqq_decoder decoder_of_turn(const add_block *b, int r, int turn, int64_t g,
                                              const int nbits)
{
    const int PER = nbits == 3 ? 8 : 8 / nbits;
    if (turn == PER) r += r + 1 < b->rows, turn = 0;
    int64_t at = (r * PER + add_slot(turn, nbits, PER)) * b->groups + g;
    return hqq_decoder_of(nbits, nbits <= HQQ_TABLE_BITS, b->zero[at], b->scale[at]);
}

/* sums[:, k:k + VN vectors] += the batch. g: axis 1, the group. Axis 0 multiplies the codes
 * themselves: its sums begin with -zero * sum dy, and are multiplied by the scales at the end.
 */
HQQ_ALWAYS_INLINE void add_vectors(const add_block *b, int64_t k, int64_t g, const int nbits,
                                   const int axis, const int MB, const int VN)
{
    const int PER = nbits == 3 ? 8 : 8 / nbits, BY_TABLE = nbits <= HQQ_TABLE_BITS;
    const int AHEAD = axis == 1 && BY_TABLE && MB >= 4; /* add_block.h */
    hqq_vec acc[16];
    for (int v = 0; v < VN; v++)
        for (int m = 0; m < MB; m++)
            acc[m * VN + v] = axis == 0 ? hqq_vec_load(b->zero + k + v * HQQ_LANES) *
                                              hqq_vec_set1(-b->dy_sums[m])
                                        : hqq_vec_load(b->sums + m * b->ld + k + v * HQQ_LANES);
    hqq_decoder d = hqq_decoder_of(nbits, BY_TABLE, 0.0f, 1.0f), next = d;
    if (AHEAD) next = decoder_of_turn(b, 0, 0, g, nbits);
    for (int r = 0; r < b->rows; r++) {
        coded_columns codes;
        add_prefetch(b, r, k, nbits);
        load_columns(&codes, b, r, k, VN, nbits);
#pragma GCC unroll 8
        for (int turn = 0; turn < PER; turn++) {
            const int j = add_slot(turn, nbits, PER);
            const float *dy = b->dy[r] + j * b->dy_slot;
            if (AHEAD) {
                d = next;
                next = decoder_of_turn(b, r, turn + 1, g, nbits);
            } else if (axis == 1) {
                d = decoder_of_turn(b, r, turn, g, nbits);
            }
            hqq_vec w[4];
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++)
                w[v] = hqq_decode(&d, BY_TABLE, codes_of_turn(&codes, v, turn, nbits));
#pragma GCC unroll 8
            for (int m = 0; m < MB; m++) {
                hqq_vec c = hqq_vec_set1(dy[m]);
#pragma GCC unroll 4
                for (int v = 0; v < VN; v++) acc[m * VN + v] += c * w[v];
            }
        }
    }
    for (int v = 0; v < VN; v++)
        for (int m = 0; m < MB; m++) {
            float *sums = b->sums + m * b->ld + k + v * HQQ_LANES;
            hqq_vec sum = acc[m * VN + v];
            if (axis == 0)
                sum = hqq_vec_load(sums) + sum * hqq_vec_load(b->scale + k + v * HQQ_LANES);
            hqq_vec_store(sums, sum);
        }
}

HQQ_ALWAYS_INLINE void add_batch(const add_block *b, const int nbits, const int axis,
                                 const int MB)
{
    const int VN = MAX_SUMS / MB < 4 ? MAX_SUMS / MB : 4;
    int64_t end = axis == 1 ? b->group_left : b->columns;
    for (int64_t k = 0, g = 0; k < b->columns; g++, end += b->G) {
        int64_t stop = end < b->columns ? end : b->columns;
        for (; k + VN * HQQ_LANES <= stop; k += VN * HQQ_LANES)
            add_vectors(b, k, g, nbits, axis, MB, VN);
        for (; k < stop; k += HQQ_LANES) add_vectors(b, k, g, nbits, axis, MB, 1);
    }
}

#define ADD(nbits, axis, MB)                                    \
    static void add_##nbits##_##axis##_##MB(const add_block *b) \
    {                                                           \
        add_batch(b, nbits, axis, MB);                          \
    }
#define ADDS(nbits, MB) ADD(nbits, 0, MB) ADD(nbits, 1, MB)
#define ALL_ADDS(nbits) ADDS(nbits, 1) ADDS(nbits, 2) ADDS(nbits, 4)
/* clang-format off */
ALL_ADDS(8) ALL_ADDS(4) ALL_ADDS(3) ALL_ADDS(2) ALL_ADDS(1)
#define PAIR(nbits, MB) {add_##nbits##_0_##MB, add_##nbits##_1_##MB}
#if MAX_TOKENS == 8
ADDS(8, 8) ADDS(4, 8) ADDS(3, 8) ADDS(2, 8) ADDS(1, 8)
#define ROW(nbits) {PAIR(nbits, 1), PAIR(nbits, 2), PAIR(nbits, 4), PAIR(nbits, 8)}
#else
#define ROW(nbits) {PAIR(nbits, 1), PAIR(nbits, 2), PAIR(nbits, 4)}
#endif

static add_table float_adds = {ROW(8), ROW(4), ROW(2), ROW(1)};
static const add_fn float_planes[4][2] = ROW(3);
/* clang-format on */

#endif

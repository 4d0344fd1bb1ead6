/* 3 bits in planes (kernels/format.h). For few tokens the bytes of both planes are loaded once
 * for all rows of W that they hold, up to eight, and made codes in registers; for a block that
 * is decoded, two loads, two shifts, two operations of logic and a store make the 4-bit bytes
 * of 128 weights, in the first cache. Included by ISA sources only.
 *
 * Napkin, forward, bf16, AVX-512, 512 weights of 8 rows: 192 bytes, 6 loads that widen, 14
 * shifts, 8 operations of logic, 8 shifts, 16 look-ups, 16 multiplications at one token; 4
 * bits: 256 bytes, 8 loads, 8 shifts, 16 look-ups, 16 multiplications.
 *
 * 4096 x 4096, G = 64, a Zen 5, two threads, cold: times the speed of 4 bits, axis 1, by
 * tokens; in brackets all through 4-bit bytes in the first cache:
 *
 *                            bf16: 1      4            fp32: 1      4
 *     axis 1 forward   1.09 (0.59)  0.94 (0.58)   0.92 (0.61)  1.09 (0.80)
 *            dgrad     0.97 (0.76)  1.06 (0.72)   0.93 (0.72)  0.86 (0.74)
 *     axis 0 forward   1.29 (0.64)  1.14 (0.71)   1.02 (0.55)  1.10 (0.76)
 *            dgrad     1.31 (0.74)  1.25 (0.87)   0.99 (0.58)  1.05 (0.83)
 *
 * With AVX2, fp32, M = 1 and 4: forward 0.99 to 1.04 and 0.77 to 0.86, dgrad 1.1 to 1.2 and 1.0
 * to 1.15.
 */
#ifndef HQQ_KERNELS_CPU_PLANES_H
#define HQQ_KERNELS_CPU_PLANES_H

#include "code_runs.h"
#include "simd.h"

/* Shifts of 16 bits: what passes from byte to byte is masked away. */
typedef uint16_t hqq_plane_vector __attribute__((vector_size(HQQ_LANES * 4)));

HQQ_ALWAYS_INLINE hqq_plane_vector hqq_plane_load(const uint8_t *p)
{
    hqq_plane_vector v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* What makes packed row p of hqq_layout_of_planes, from some column on. */
typedef struct hqq_plane_bytes {
    const uint8_t *twos[2], *ones; /* twos[1]: of 8 rows of W alone */
    int left;                      /* of 2 rows: whether the 2-bit codes are shifted left */
    int right;                     /* how far 1-bit codes are, before anything else */
} hqq_plane_bytes;

static inline hqq_plane_bytes hqq_plane_bytes_of(const void *packed, const hqq_layout *l,
                                                 int64_t p, int64_t column)
{
    hqq_plane_row row = hqq_plane_row_of(packed, l, p);
    const uint8_t *twos = row.twos + column;
    return (hqq_plane_bytes){.twos = {twos, l->per == 8 ? twos + l->N / 8 * l->K : twos},
                             .ones = row.ones + column,
                             .left = row.twos_left,
                             .right = row.ones_right - (l->per / 2 - 1) * (8 / l->per)};
}

HQQ_ALWAYS_INLINE void hqq_plane_prefetch(const hqq_plane_bytes *b, int64_t next, const int per)
{
    __builtin_prefetch(b->twos[0] + next);
    if (per == 8) __builtin_prefetch(b->twos[1] + next);
    __builtin_prefetch(b->ones + next);
}

/* Codes of row p + i * N/per, shifted 4 up, and of row p + i * N/per + N/2, in lanes of 16 bits
 * or more that begin with a byte of each plane; in the other bits is anything. per, i and left
 * (of 2 rows) are constants. */
HQQ_ALWAYS_INLINE hqq_plane_vector hqq_plane_codes(const hqq_plane_vector twos[2],
                                                   hqq_plane_vector ones, const int per,
                                                   const int i, const int left)
{
    hqq_plane_vector two = twos[per == 8 ? i % 2 : 0];
    two = (per == 2 ? left : i >= per / 4) ? two << 1 : two >> 1;
    ones = ones >> (per / 2 - 1 - i) * (8 / per);
#if defined(__AVX512F__)
    return (hqq_plane_vector)_mm512_ternarylogic_epi32(_mm512_set1_epi8(HQQ_TWOS_MASK),
                                                       (__m512i)two, (__m512i)ones, 0xca);
#else
    return (two & HQQ_TWOS_MASK) | (ones & HQQ_ONES_MASK);
#endif
}

/* nibbles [n] of columns k to k + n; `left` is a constant. next: bytes to what is wanted after
 * these. */
HQQ_ALWAYS_INLINE void hqq_nibbles_shifted(uint8_t *nibbles, const hqq_plane_row *row,
                                           int64_t k, int64_t n, int64_t next, const int left)
{
    const uint8_t *twos = row->twos + k, *ones = row->ones + k;
    const int right = row->ones_right, bytes = (int)sizeof(hqq_plane_vector);
    int64_t i = 0;
    for (; i + bytes <= n; i += bytes) {
        hqq_plane_vector two = hqq_plane_load(twos + i), one = hqq_plane_load(ones + i);
        __builtin_prefetch(twos + i + next);
        __builtin_prefetch(ones + i + next);
        two = left ? two << 1 : two >> 1;
        hqq_plane_vector all =
            (two & HQQ_TWOS_MASK * 0x101) | (one >> right & HQQ_ONES_MASK * 0x101);
        memcpy(nibbles + i, &all, sizeof all);
    }
    for (; i < n; i++) {
        int two = left ? twos[i] << 1 : twos[i] >> 1;
        nibbles[i] = (uint8_t)((two & HQQ_TWOS_MASK) | (ones[i] >> right & HQQ_ONES_MASK));
    }
}

static inline void hqq_nibbles_of_planes(uint8_t *nibbles, const hqq_plane_row *row, int64_t k,
                                         int64_t n, int64_t next)
{
    if (row->twos_left)
        hqq_nibbles_shifted(nibbles, row, k, n, next, 1);
    else
        hqq_nibbles_shifted(nibbles, row, k, n, next, 0);
}

#endif

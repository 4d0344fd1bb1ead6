/* Two by two tiles of sums over a block of the reduction, and floats in parts of bf16 (amx.h).
 * Included by the AMX sources only. */
#ifndef HQQ_KERNELS_CPU_AMX_TILE_H
#define HQQ_KERNELS_CPU_AMX_TILE_H

#include "amx.h"
#include "pairs.h"
#include "simd.h"

/* ---- floats in parts ----------------------------------------------------------------- */

/* v rounded to bf16, as a float; what is left is taken off v. */
HQQ_ALWAYS_INLINE hqq_vec hqq_amx_take_part(hqq_vec *v)
{
    hqq_uvec u = (hqq_uvec)*v;
    hqq_vec part = (hqq_vec)((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u);
    *v -= part;
    return part;
}

/* The same where v may be anything: what would round to infinity is cut off instead, and
 * nothing is left of what is not finite. */
HQQ_ALWAYS_INLINE hqq_vec hqq_amx_take_part_of_any(hqq_vec *v)
{
    hqq_vec whole = *v, part = hqq_amx_take_part(v);
    hqq_uvec exponent = {0};
    exponent += 0x7f800000u;
    hqq_ivec not_finite = (hqq_ivec)(((hqq_uvec)part & exponent) == exponent);
    __m512i some = (__m512i)not_finite;
    if (__builtin_expect(_mm512_test_epi32_mask(some, some) == 0, 1)) return part;
    hqq_vec cut = (hqq_vec)((hqq_uvec)whole & 0xffff0000u);
    hqq_ivec is_nan = (hqq_ivec)(whole != whole);
    cut = hqq_vec_select(is_nan, whole, cut); /* whose payload may be in the lower half */
    hqq_ivec lost = (hqq_ivec)(((hqq_uvec)whole & exponent) == exponent);
    part = hqq_vec_select(not_finite, cut, part);
    *v = hqq_vec_select(lost, hqq_vec_zero(), hqq_vec_select(not_finite, whole - cut, *v));
    return part;
}

/* ---- tiles --------------------------------------------------------------------------- */

/* All eight tiles: 16 rows of 64 bytes. */
static inline void hqq_amx_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

/* Two tiles side by side and all that follow them: rows `stride` bytes apart, the next step
 * `step`, the next part `part`. */
typedef struct hqq_amx_operand {
    const char *first, *second;
    int64_t stride, step, part;
} hqq_amx_operand;

/* Tiles 0 to 3 are sums, [a tile][b tile]; 4 and 5 are a, 6 and 7 are b. The numbers must be
 * constants of the language. Callers keep a and let b pass by, so b is loaded as a stream,
 * which a loop over 16 steps from the second cache was 1.14 times as fast with. */
#define HQQ_AMX_LOAD_A(p)                                                   \
    do {                                                                    \
        _tile_loadd(4, a.first + (p) * a.part, a.stride);                   \
        if (a_tiles > 1) _tile_loadd(5, a.second + (p) * a.part, a.stride); \
    } while (0)
#define HQQ_AMX_LOAD_B(p)                                                          \
    do {                                                                           \
        _tile_stream_loadd(6, b.first + (p) * b.part, b.stride);                   \
        if (b_tiles > 1) _tile_stream_loadd(7, b.second + (p) * b.part, b.stride); \
    } while (0)
#define HQQ_AMX_MULTIPLY()                                       \
    do {                                                         \
        _tile_dpbf16ps(0, 4, 6);                                 \
        if (b_tiles > 1) _tile_dpbf16ps(1, 4, 7);                \
        if (a_tiles > 1) _tile_dpbf16ps(2, 5, 6);                \
        if (a_tiles > 1 && b_tiles > 1) _tile_dpbf16ps(3, 5, 7); \
    } while (0)
#define HQQ_AMX_NEXT() \
    (a.first += a.step, a.second += a.step, b.first += b.step, b.second += b.step)

/* The products of parts, in an order in which each next one loads one operand alone. */
HQQ_ALWAYS_INLINE void hqq_amx_steps_16(hqq_amx_operand a, hqq_amx_operand b, int64_t steps,
                                        const int a_tiles, const int b_tiles)
{
    for (; steps > 0; steps--, HQQ_AMX_NEXT()) {
        HQQ_AMX_LOAD_A(0);
        HQQ_AMX_LOAD_B(1);
        HQQ_AMX_MULTIPLY();
        HQQ_AMX_LOAD_B(0);
        HQQ_AMX_MULTIPLY();
        HQQ_AMX_LOAD_A(1);
        HQQ_AMX_MULTIPLY();
    }
}

HQQ_ALWAYS_INLINE void hqq_amx_steps_32_small(hqq_amx_operand a, hqq_amx_operand b,
                                              int64_t steps, const int a_tiles,
                                              const int b_tiles)
{
    for (; steps > 0; steps--, HQQ_AMX_NEXT()) {
        HQQ_AMX_LOAD_A(0);
        HQQ_AMX_LOAD_B(2);
        HQQ_AMX_MULTIPLY();
        HQQ_AMX_LOAD_B(1);
        HQQ_AMX_MULTIPLY();
        HQQ_AMX_LOAD_A(1);
        HQQ_AMX_MULTIPLY();
        HQQ_AMX_LOAD_B(0);
        HQQ_AMX_MULTIPLY();
        HQQ_AMX_LOAD_A(2);
        HQQ_AMX_MULTIPLY();
    }
}

HQQ_ALWAYS_INLINE void hqq_amx_steps(hqq_amx_operand a, hqq_amx_operand b, int64_t steps,
                                     const int a_tiles, const int b_tiles)
{
    for (; steps > 0; steps--, HQQ_AMX_NEXT()) {
        HQQ_AMX_LOAD_A(0);
        HQQ_AMX_LOAD_B(0);
        HQQ_AMX_MULTIPLY();
    }
}

/* The tiles of sums of a tile pair lie `across` floats apart for the next b, `down` for the
 * next a. */
HQQ_ALWAYS_INLINE void hqq_amx_store(float *sums, int64_t down, int64_t across,
                                     const int a_tiles, const int b_tiles)
{
    _tile_stored(0, sums, 64);
    if (b_tiles > 1) _tile_stored(1, sums + across, 64);
    if (a_tiles > 1) _tile_stored(2, sums + down, 64);
    if (a_tiles > 1 && b_tiles > 1) _tile_stored(3, sums + down + across, 64);
}

HQQ_ALWAYS_INLINE void hqq_amx_load(const float *sums, int64_t down, int64_t across,
                                    const int a_tiles, const int b_tiles)
{
    _tile_loadd(0, sums, 64);
    if (b_tiles > 1) _tile_loadd(1, sums + across, 64);
    if (a_tiles > 1) _tile_loadd(2, sums + down, 64);
    if (a_tiles > 1 && b_tiles > 1) _tile_loadd(3, sums + down + across, 64);
}

static inline void hqq_amx_zero(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* to [256] += from [256] */
static inline void hqq_amx_add_tile(float *to, const float *from)
{
    for (int i = 0; i < 256; i += HQQ_LANES)
        hqq_vec_store(to + i, hqq_vec_load(to + i) + hqq_vec_load(from + i));
}

/* sums (+)= a b over a block of the reduction; the last three are constants. With three parts
 * a block's sum begins at zero, small products first. */
HQQ_ALWAYS_INLINE void hqq_amx_multiply(float *sums, int64_t down, int64_t across, float *carry,
                                        const hqq_amx_operand *a, const hqq_amx_operand *b,
                                        int64_t steps, int add, const int a_tiles,
                                        const int b_tiles, const int parts)
{
    /* what the tiles read was written by plain stores, which the compiler may not move past */
    __asm__ volatile("" ::: "memory");
    if (add && parts < 3)
        hqq_amx_load(sums, down, across, a_tiles, b_tiles);
    else
        hqq_amx_zero();
    if (parts == 2) hqq_amx_steps_16(*a, *b, steps, a_tiles, b_tiles);
    if (parts == 3) hqq_amx_steps_32_small(*a, *b, steps, a_tiles, b_tiles);
    if (parts != 2) hqq_amx_steps(*a, *b, steps, a_tiles, b_tiles);
    if (!add || parts < 3) {
        hqq_amx_store(sums, down, across, a_tiles, b_tiles);
        return;
    }
    hqq_amx_store(carry, 512, 256, a_tiles, b_tiles);
    for (int i = 0; i < a_tiles; i++)
        for (int j = 0; j < b_tiles; j++)
            hqq_amx_add_tile(sums + i * down + j * across, carry + i * 512 + j * 256);
}

#define HQQ_AMX_VARIANT(a_tiles, b_tiles, parts)                                           \
    static void multiply_##a_tiles##b_tiles##parts(                                        \
        float *sums, int64_t down, int64_t across, float *carry, const hqq_amx_operand *a, \
        const hqq_amx_operand *b, int64_t steps, int add)                                  \
    {                                                                                      \
        hqq_amx_multiply(sums, down, across, carry, a, b, steps, add, a_tiles, b_tiles,    \
                         parts);                                                           \
    }
#define HQQ_AMX_ROW(a_tiles, b_tiles)                                      \
    {NULL, multiply_##a_tiles##b_tiles##1, multiply_##a_tiles##b_tiles##2, \
     multiply_##a_tiles##b_tiles##3}
#define HQQ_AMX_VARIANTS(a_tiles, b_tiles) \
    HQQ_AMX_VARIANT(a_tiles, b_tiles, 1)   \
    HQQ_AMX_VARIANT(a_tiles, b_tiles, 2)   \
    HQQ_AMX_VARIANT(a_tiles, b_tiles, 3)

typedef void (*hqq_amx_multiply_fn)(float *sums, int64_t down, int64_t across, float *carry,
                                    const hqq_amx_operand *a, const hqq_amx_operand *b,
                                    int64_t steps, int add);

#endif

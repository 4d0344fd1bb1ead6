/*
 * The AVX-512 kernels on a processor that has only AVX2: the intrinsics that they use, as plain
 * loops, so that their logic is tested on any x86-64 machine. Included before everything else
 * (-include) when CMake is told -DHQQLORA_EMULATE_AVX512=ON; for tests, not for use.
 *
 * The compiler lowers vectors of 64 bytes to what there is. Arithmetic of vectors is the
 * compiler's own, so sums round as they do on the real thing; bf16.h has the instructions for
 * bf16.
 */
#ifndef HQQ_TESTS_AVX512_ON_AVX2_H
#define HQQ_TESTS_AVX512_ON_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "bf16.h"
#include "vectors.h"

#define __AVX512F__  1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if HQQ_EMULATE_BF16
#define __AVX512BF16__ 1
#define __AVX512VBMI__ 1
#endif

#define HQQ_EMULATED_AVX512 1

/* ---- loads and stores -------------------------------------------------------------------- */
EMU __m512i emu_loadu_512(const void *p)
{
    __m512i v;
    memcpy(&v, p, 64);
    return v;
}
EMU void emu_storeu_512(void *p, __m512i v)
{
    memcpy(p, &v, 64);
}
#define EMU_MASKZ_LOAD(name, vector, T, lanes)                                \
    EMU vector name(uint64_t mask, const void *p)                             \
    {                                                                         \
        union {                                                               \
            T at[lanes];                                                      \
            vector v;                                                         \
        } u;                                                                  \
        memset(&u, 0, sizeof u);                                              \
        for (int i = 0; i < lanes; i++)                                       \
            if (mask >> i & 1) memcpy(&u.at[i], (const T *)p + i, sizeof(T)); \
        return u.v;                                                           \
    }
#define EMU_MASK_STORE(name, vector, T, lanes)                          \
    EMU void name(void *p, uint64_t mask, vector v)                     \
    {                                                                   \
        union {                                                         \
            T at[lanes];                                                \
            vector v;                                                   \
        } u;                                                            \
        u.v = v;                                                        \
        for (int i = 0; i < lanes; i++)                                 \
            if (mask >> i & 1) memcpy((T *)p + i, &u.at[i], sizeof(T)); \
    }
EMU_MASKZ_LOAD(emu_maskz_loadu_epi8_128, __m128i, uint8_t, 16)
EMU_MASKZ_LOAD(emu_maskz_loadu_epi8_256, __m256i, uint8_t, 32)
EMU_MASKZ_LOAD(emu_maskz_loadu_epi16_256, __m256i, uint16_t, 16)
EMU_MASKZ_LOAD(emu_maskz_loadu_epi32, __m512i, uint32_t, 16)
EMU_MASKZ_LOAD(emu_maskz_loadu_ps, __m512, float, 16)
EMU_MASK_STORE(emu_mask_storeu_epi8_128, __m128i, uint8_t, 16)
EMU_MASK_STORE(emu_mask_storeu_epi16_256, __m256i, uint16_t, 16)
EMU_MASK_STORE(emu_mask_storeu_epi16, __m512i, uint16_t, 32)
EMU_MASK_STORE(emu_mask_storeu_ps, __m512, float, 16)

/* ---- conversions ------------------------------------------------------------------------- */
#define EMU_CONVERT(name, to, T, from, F, lanes)                 \
    EMU to name(from v)                                          \
    {                                                            \
        union {                                                  \
            T at[lanes];                                         \
            to v;                                                \
        } out;                                                   \
        union {                                                  \
            F at[lanes];                                         \
            from v;                                              \
        } in;                                                    \
        in.v = v;                                                \
        for (int i = 0; i < lanes; i++) out.at[i] = (T)in.at[i]; \
        return out.v;                                            \
    }
EMU_CONVERT(emu_cvtepu8_epi32, __m512i, uint32_t, __m128i, uint8_t, 16)
EMU_CONVERT(emu_cvtepu8_epi16, __m512i, uint16_t, __m256i, uint8_t, 32)
EMU_CONVERT(emu_cvtepu16_epi32, __m512i, uint32_t, __m256i, uint16_t, 16)
EMU_CONVERT(emu_cvtepi32_epi16, __m256i, uint16_t, __m512i, uint32_t, 16)
EMU_CONVERT(emu_cvtepi32_epi8, __m128i, uint8_t, __m512i, uint32_t, 16)

EMU void emu_mask_cvtepi32_storeu_epi16(void *p, uint64_t mask, __m512i v)
{
    emu_mask_storeu_epi16_256(p, mask, emu_cvtepi32_epi16(v));
}
EMU __m512i emu_cvtps_epi32(__m512 v)
{
    __m256 half[2];
    memcpy(half, &v, 64);
    __m256i ints[2] = {_mm256_cvtps_epi32(half[0]), _mm256_cvtps_epi32(half[1])};
    return emu_loadu_512(ints);
}
/* To whole numbers, half to even: all that is asked of it. */
EMU __m512 emu_round_ps(__m512 v)
{
    __m256 half[2];
    memcpy(half, &v, 64);
    for (int i = 0; i < 2; i++)
        half[i] = _mm256_round_ps(half[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(&v, half, 64);
    return v;
}
EMU __m512 emu_fmadd_ps(__m512 a, __m512 b, __m512 sum)
{
    __m256 ah[2], bh[2], sums[2];
    memcpy(ah, &a, 64);
    memcpy(bh, &b, 64);
    memcpy(sums, &sum, 64);
    for (int i = 0; i < 2; i++) sums[i] = _mm256_fmadd_ps(ah[i], bh[i], sums[i]);
    memcpy(&sum, sums, 64);
    return sum;
}
EMU __m512 emu_cvtph_ps(__m256i v)
{
    __m256 half[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                      _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
    __m512 out;
    memcpy(&out, half, 64);
    return out;
}
EMU __m256i emu_cvtps_ph(__m512 v)
{
    __m256 half[2];
    memcpy(half, &v, 64);
    return _mm256_set_m128i(_mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT));
}

/* ---- permutations ------------------------------------------------------------------------ */
#define EMU_PERMUTE(name, vector, T, lanes)                                          \
    EMU vector name(__m512i index, vector v)                                         \
    {                                                                                \
        union {                                                                      \
            T at[lanes];                                                             \
            vector v;                                                                \
        } in, i, out;                                                                \
        in.v = v;                                                                    \
        memcpy(&i, &index, 64);                                                      \
        for (int l = 0; l < lanes; l++) out.at[l] = in.at[i.at[l] & (T)(lanes - 1)]; \
        return out.v;                                                                \
    }
EMU_PERMUTE(emu_permutexvar_epi16, __m512i, uint16_t, 32)

EMU __m512 emu_permutexvar_ps(__m512i index, __m512 v)
{
    return (__m512)__builtin_shuffle((emu_uvec)v, (emu_uvec)index & 15);
}
EMU __m512i emu_permutex2var_epi16(__m512i a, __m512i index, __m512i b)
{
    return (__m512i)__builtin_shuffle((emu_u16vec)a, (emu_u16vec)b, (emu_u16vec)index & 63);
}
EMU __m512i emu_permutex2var_epi32(__m512i a, __m512i index, __m512i b)
{
    return (__m512i)__builtin_shuffle((emu_uvec)a, (emu_uvec)b, (emu_uvec)index & 31);
}
#define EMU_INTERLEAVE(name, vector, as, first)                          \
    EMU vector name(vector a, vector b)                                  \
    {                                                                    \
        as x = (as)a, y = (as)b, out = x;                                \
        const int n = 16 / (int)sizeof x[0]; /* in a quarter */          \
        for (int q = 0; q < 4; q++)                                      \
            for (int i = 0; i < n / 2; i++) {                            \
                out[q * n + 2 * i] = x[q * n + (first) * n / 2 + i];     \
                out[q * n + 2 * i + 1] = y[q * n + (first) * n / 2 + i]; \
            }                                                            \
        return (vector)out;                                              \
    }
EMU_INTERLEAVE(emu_unpacklo_ps, __m512, emu_uvec, 0)
EMU_INTERLEAVE(emu_unpackhi_ps, __m512, emu_uvec, 1)
EMU_INTERLEAVE(emu_unpacklo_epi16, __m512i, emu_u16vec, 0)
EMU_INTERLEAVE(emu_unpackhi_epi16, __m512i, emu_u16vec, 1)

EMU __m512 emu_shuffle_ps(__m512 a, __m512 b, int imm)
{
    emu_uvec x = (emu_uvec)a, y = (emu_uvec)b, out = x;
    for (int q = 0; q < 16; q += 4)
        for (int i = 0; i < 4; i++) out[q + i] = (i < 2 ? x : y)[q + (imm >> 2 * i & 3)];
    return (__m512)out;
}
/* quarters: the first two of a, the last two of b */
EMU __m512 emu_shuffle_f32x4(__m512 a, __m512 b, int imm)
{
    __m512 out;
    for (int q = 0; q < 4; q++) {
        const __m512 *from = q < 2 ? &a : &b;
        memcpy((char *)&out + q * 16, (const char *)from + (imm >> 2 * q & 3) * 16, 16);
    }
    return out;
}
EMU __m512i emu_shuffle_i64x2(__m512i a, __m512i b, int imm)
{
    return (__m512i)emu_shuffle_f32x4((__m512)a, (__m512)b, imm);
}
EMU __m512i emu_shuffle_epi32(__m512i a, int imm)
{
    return (__m512i)emu_shuffle_ps((__m512)a, (__m512)a, imm);
}
EMU __m512i emu_broadcast_256(__m256i v)
{
    __m512i out;
    memcpy(&out, &v, 32);
    memcpy((char *)&out + 32, &v, 32);
    return out;
}
EMU __m256 emu_half_512(__m512 v, int which)
{
    __m256 out;
    memcpy(&out, (const char *)&v + 32 * which, 32);
    return out;
}

/* ---- integers ---------------------------------------------------------------------------- */
EMU __m512i emu_srl_epi16(__m512i v, __m128i count)
{
    uint64_t by = (uint64_t)_mm_cvtsi128_si64(count);
    return by > 15 ? (__m512i){0} : (__m512i)((emu_u16vec)v >> (uint16_t)by);
}
EMU __m512i emu_mul_epu32(__m512i a, __m512i b)
{
    typedef uint64_t u64vec __attribute__((vector_size(64)));
    return (__m512i)(((u64vec)a & 0xffffffffu) * ((u64vec)b & 0xffffffffu));
}
EMU __m512i emu_set1_epi8(char x)
{
    return (__m512i)((emu_u16vec){0} + (uint16_t)((uint8_t)x * 0x101));
}
EMU __m512i emu_set1_epi16(short x)
{
    return (__m512i)((emu_u16vec){0} + (uint16_t)x);
}
EMU __m512i emu_set1_epi32(int x)
{
    return (__m512i)((emu_ivec){0} + x);
}
EMU __m512i emu_ternary(__m512i a, __m512i b, __m512i c, int table)
{
    __m512i out = {0};
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return out;
}
EMU __m512i emu_mask_or_epi32(__m512i v, uint64_t mask, __m512i a, __m512i b)
{
    emu_uvec out = (emu_uvec)v, either = (emu_uvec)(a | b);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) out[i] = either[i];
    return (__m512i)out;
}

/* ---- masks ------------------------------------------------------------------------------- */
EMU __mmask16 emu_mask_of(emu_ivec v)
{
    unsigned mask = 0;
    for (int i = 0; i < 16; i++) mask |= (unsigned)(v[i] != 0) << i;
    return (__mmask16)mask;
}
/* The two comparisons that are asked for: unordered, and above. */
EMU __mmask16 emu_cmp_ps_mask(__m512 a, __m512 b, int predicate)
{
    return predicate == _CMP_UNORD_Q ? emu_mask_of((emu_ivec)(a != a) | (emu_ivec)(b != b))
                                     : emu_mask_of((emu_ivec)(a > b));
}
EMU __mmask16 emu_is_subnormal(__m512 v)
{
    emu_uvec magnitude = (emu_uvec)v & 0x7fffffff;
    return emu_mask_of((emu_ivec)(magnitude - 1 < 0x7fffff));
}

/* ---- floats ------------------------------------------------------------------------------ */
/* a where a < b (a > b), else b: NaN gives b, as the instructions do */
EMU __m512 emu_select(emu_ivec mask, __m512 a, __m512 b)
{
    return (__m512)(((emu_ivec)a & mask) | ((emu_ivec)b & ~mask));
}
EMU __m512 emu_least(__m512 a, __m512 b)
{
    return emu_select((emu_ivec)(a < b), a, b);
}
EMU __m512 emu_most(__m512 a, __m512 b)
{
    return emu_select((emu_ivec)(a > b), a, b);
}

/* ---- under the intrinsics' names --------------------------------------------------------- */
#define _mm512_loadu_si512       emu_loadu_512
#define _mm512_storeu_si512      emu_storeu_512
#define _mm512_loadu_ps(p)       ((__m512)emu_loadu_512(p))
#define _mm512_storeu_ps(p, v)   emu_storeu_512(p, (__m512i)(v))
#define _mm_maskz_loadu_epi8     emu_maskz_loadu_epi8_128
#define _mm256_maskz_loadu_epi8  emu_maskz_loadu_epi8_256
#define _mm256_maskz_loadu_epi16 emu_maskz_loadu_epi16_256
#define _mm512_maskz_loadu_epi32 emu_maskz_loadu_epi32
#define _mm512_maskz_loadu_ps    emu_maskz_loadu_ps
#define _mm_mask_storeu_epi8     emu_mask_storeu_epi8_128
#define _mm256_mask_storeu_epi16 emu_mask_storeu_epi16_256
#define _mm512_mask_storeu_epi16 emu_mask_storeu_epi16
#define _mm512_mask_storeu_ps    emu_mask_storeu_ps
#define _mm512_cvtepu8_epi32     emu_cvtepu8_epi32
#define _mm512_cvtepu8_epi16     emu_cvtepu8_epi16
#define _mm512_cvtepu16_epi32    emu_cvtepu16_epi32
#define _mm512_cvtepi32_epi16    emu_cvtepi32_epi16
#define _mm512_cvtepi32_epi8     emu_cvtepi32_epi8
#define _mm512_cvtps_epi32       emu_cvtps_epi32
#undef _mm512_roundscale_ps
#undef _mm512_reduce_ps
#define _mm512_roundscale_ps(v, nearest)  emu_round_ps(v)
#define _mm512_reduce_ps(v, nearest)      ((v) - emu_round_ps(v))
#define _mm512_fmadd_ps                   emu_fmadd_ps
#define _mm512_mask_cvtepi32_storeu_epi16 emu_mask_cvtepi32_storeu_epi16
#undef _mm512_cvtps_ph
#define _mm512_cvtph_ps              emu_cvtph_ps
#define _mm512_cvtps_ph(v, rounding) emu_cvtps_ph(v)
#define _mm512_permutexvar_epi16     emu_permutexvar_epi16
#define _mm512_permutexvar_ps        emu_permutexvar_ps
#define _mm512_permutex2var_epi16    emu_permutex2var_epi16
#define _mm512_permutex2var_epi32    emu_permutex2var_epi32
#define _mm512_unpacklo_ps           emu_unpacklo_ps
#define _mm512_unpackhi_ps           emu_unpackhi_ps
#define _mm512_unpacklo_epi16        emu_unpacklo_epi16
#define _mm512_unpackhi_epi16        emu_unpackhi_epi16
#undef _mm512_shuffle_ps
#undef _mm512_shuffle_epi32
#undef _mm512_extractf32x8_ps
#undef _mm512_srli_epi16
#undef _mm512_slli_epi32
#undef _mm512_ternarylogic_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_fpclass_ps_mask
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_f32x4                 emu_shuffle_f32x4
#define _mm512_shuffle_i64x2                 emu_shuffle_i64x2
#define _mm512_and_si512(a, b)               ((__m512i)((emu_uvec)(a) & (emu_uvec)(b)))
#define _mm512_xor_si512(a, b)               ((__m512i)((emu_uvec)(a) ^ (emu_uvec)(b)))
#define _mm512_shuffle_ps                    emu_shuffle_ps
#define _mm512_shuffle_epi32                 emu_shuffle_epi32
#define _mm512_broadcast_i64x4               emu_broadcast_256
#define _mm512_castps512_ps256(v)            emu_half_512(v, 0)
#define _mm512_extractf32x8_ps               emu_half_512
#define _mm512_srl_epi16                     emu_srl_epi16
#define _mm512_srlv_epi16(v, by)             ((__m512i)((emu_u16vec)(v) >> (emu_u16vec)(by)))
#define _mm512_srli_epi16(v, by)             ((__m512i)((emu_u16vec)(v) >> (by)))
#define _mm512_slli_epi32(v, by)             ((__m512i)((emu_uvec)(v) << (by)))
#define _mm512_mul_epu32                     emu_mul_epu32
#define _mm512_set1_epi8                     emu_set1_epi8
#define _mm512_set1_epi16                    emu_set1_epi16
#define _mm512_set1_epi32                    emu_set1_epi32
#define _mm512_add_epi16(a, b)               ((__m512i)((emu_u16vec)(a) + (emu_u16vec)(b)))
#define _mm512_ternarylogic_epi32            emu_ternary
#define _mm512_mask_or_epi32                 emu_mask_or_epi32
#define _mm512_cmp_ps_mask                   emu_cmp_ps_mask
#define _mm512_test_epi32_mask(a, b)         emu_mask_of((emu_ivec)(a) & (emu_ivec)(b))
#define _mm512_fpclass_ps_mask(v, subnormal) emu_is_subnormal(v)
#define _mm512_add_ps(a, b)                  ((__m512)((a) + (b)))
#define _mm512_min_ps(a, b)                  emu_least(a, b)
#define _mm512_max_ps(a, b)                  emu_most(a, b)

#endif

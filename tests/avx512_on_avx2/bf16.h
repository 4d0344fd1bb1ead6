/* The instructions for bf16, imitated to the bit, subnormals for zero included (Intel's manual,
 * volume 2). */
#ifndef HQQ_TESTS_BF16_H
#define HQQ_TESTS_BF16_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "vectors.h"

EMU float emu_without_subnormals(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7f800000) == 0) u &= 0x80000000;
    memcpy(&x, &u, 4);
    return x;
}
EMU uint16_t emu_float_to_bf16(float x)
{
    uint32_t u;
    x = emu_without_subnormals(x);
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
EMU float emu_bf16_to_float(uint16_t x)
{
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return emu_without_subnormals(f);
}
EMU __m256bh emu_cvtneps_pbh(__m512 v)
{
    uint16_t out[16];
    for (int i = 0; i < 16; i++) out[i] = emu_float_to_bf16(v[i]);
    __m256bh packed;
    memcpy(&packed, out, 32);
    return packed;
}
/* b in the low half, a in the high one */
EMU __m512bh emu_cvtne2ps_pbh(__m512 a, __m512 b)
{
    __m256bh half[2] = {emu_cvtneps_pbh(b), emu_cvtneps_pbh(a)};
    __m512bh packed;
    memcpy(&packed, half, 64);
    return packed;
}
EMU __m512 emu_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b)
{
    emu_u16vec x, y;
    memcpy(&x, &a, 64);
    memcpy(&y, &b, 64);
    for (int i = 0; i < 16; i++) {
        float s = emu_without_subnormals(sum[i]);
        for (int half = 1; half >= 0; half--)
            s = emu_without_subnormals(fmaf(emu_bf16_to_float(x[2 * i + half]),
                                            emu_bf16_to_float(y[2 * i + half]), s));
        sum[i] = s;
    }
    return sum;
}

#define _mm512_cvtneps_pbh  emu_cvtneps_pbh
#define _mm512_cvtne2ps_pbh emu_cvtne2ps_pbh
#define _mm512_dpbf16_ps    emu_dpbf16_ps

#endif

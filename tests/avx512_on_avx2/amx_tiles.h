/*
 * AMX tiles as plain loops (Intel's manual, volume 2: TDPBF16PS), for the same tests as
 * avx512_on_avx2.h. Included after it, before everything else (-include).
 *
 * Tiles are 16 rows of 64 bytes: what the kernels configure. A pair of products is added in the
 * order of the manual: the even one, then the odd one, each rounded; subnormals are zero.
 */
#ifndef HQQ_TESTS_AMX_TILES_H
#define HQQ_TESTS_AMX_TILES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef union emu_tile {
    float f[16][16];
    uint16_t h[16][32];
    char bytes[16][64];
} emu_tile;
static _Thread_local emu_tile emu_tiles[8];
/* A kernel that forgets to configure its tiles, or to release them, is told at once. */
static _Thread_local int emu_configured;

static inline void emu_tile_config(const void *config)
{
    const uint8_t *bytes = config;
    emu_configured = bytes[0] == 1;
    for (int i = 0; i < 8; i++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        emu_configured &= row_bytes == 64 && bytes[48 + i] == 16;
        memset(&emu_tiles[i], 0, sizeof emu_tiles[i]);
    }
}

static inline emu_tile *emu_tile_at(int i)
{
    if (!emu_configured) __builtin_trap();
    return &emu_tiles[i];
}

static inline void emu_tile_load(int i, const void *from, int64_t stride)
{
    emu_tile *t = emu_tile_at(i);
    for (int r = 0; r < 16; r++) memcpy(t->bytes[r], (const char *)from + r * stride, 64);
}

static inline void emu_tile_store(int i, void *to, int64_t stride)
{
    emu_tile *t = emu_tile_at(i);
    for (int r = 0; r < 16; r++) memcpy((char *)to + r * stride, t->bytes[r], 64);
}

static inline float emu_tile_flush(float x)
{
    return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x;
}

static inline float emu_tile_bf16(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return emu_tile_flush(x);
}

static inline void emu_tile_multiply(int c, int a, int b)
{
    emu_tile *C = emu_tile_at(c), *A = emu_tile_at(a), *B = emu_tile_at(b);
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int half = 0; half < 2; half++) {
                    float x = emu_tile_bf16(A->h[m][2 * k + half]);
                    float y = emu_tile_bf16(B->h[k][2 * n + half]);
                    C->f[m][n] = emu_tile_flush(fmaf(x, y, C->f[m][n]));
                }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig            emu_tile_config
#define _tile_release()             (emu_configured = 0)
#define _tile_zero(i)               memset(emu_tile_at(i), 0, sizeof(emu_tile))
#define _tile_loadd(i, from, apart) emu_tile_load(i, from, apart)
#define _tile_stream_loadd          _tile_loadd
#define _tile_stored(i, to, apart)  emu_tile_store(i, to, apart)
#define _tile_dpbf16ps(c, a, b)     emu_tile_multiply(c, a, b)

#endif

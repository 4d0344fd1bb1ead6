/* ldmatrix and mma, as the PTX ISA defines their fragments. g = lane / 4, t = lane % 4. */
#include "machine.h"
#include "../ptx_on_cpu.h"

#include <string.h>

namespace on_cpu
{
/* ---- ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16 */

struct LdmatrixSlot {
    uint32_t *registers; /* 4 */
    const void *row;     /* lane 8 i + r names row r of matrix i */
};

static void read_row(uint16_t (&elements)[8], unsigned lane, const void *row)
{
    Site site = this_thread()->site;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fail("%s:%d: ldmatrix: lane %u's row %p is not a multiple of 16", base_name(site.file),
             site.line, lane, row);
    if (!machine->shared.find(row, 16))
        fail("%s:%d: ldmatrix: lane %u's row %p is not 16 bytes of shared memory",
             base_name(site.file), site.line, lane, row);
    machine->races.read_as(machine->threads[self->warp * 32 + lane].get(), row, 16);
    memcpy(elements, row, 16);
}

/* A lane's register i holds two elements of matrix i, the first in the low half. */
template <bool transposed> static void execute_ldmatrix(void **slots, unsigned)
{
    uint16_t matrix[8][8];
    for (unsigned i = 0; i < 4; i++) {
        for (unsigned r = 0; r < 8; r++) {
            unsigned lane = 8 * i + r;
            read_row(matrix[r], lane, static_cast<LdmatrixSlot *>(slots[lane])->row);
        }
        for (unsigned lane = 0; lane < 32; lane++) {
            unsigned g = lane / 4, t = lane % 4;
            uint32_t first = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
            uint32_t second = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            static_cast<LdmatrixSlot *>(slots[lane])->registers[i] = first | second << 16;
        }
    }
}

void ldmatrix_x4(uint32_t (&registers)[4], const void *row, bool transposed, Site site)
{
    LdmatrixSlot slot = {registers, row};
    collective(Collective::ldmatrix, 0xffffffffu, &slot,
               transposed ? execute_ldmatrix<true> : execute_ldmatrix<false>, site);
}

/* ---- mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32: D = A B + D.
 * Products are exact in fp32; they are added one after the other, where a tensor core adds
 * several at once: the last bits differ. */

struct MmaSlot {
    float *d;          /* 4 */
    const uint32_t *a; /* 4 */
    const uint32_t *b; /* 2 */
};

struct MmaTiles {
    float a[16][16], b[16][8], d[16][8];
};

template <class Format> static void unpack(float *first, ptrdiff_t step, uint32_t pair)
{
    first[0] = Format::to_float(static_cast<uint16_t>(pair));
    first[step] = Format::to_float(static_cast<uint16_t>(pair >> 16));
}

template <class Format> static void gather(MmaTiles &tiles, const MmaSlot &slot, unsigned lane)
{
    unsigned g = lane / 4, t = lane % 4;
    unpack<Format>(&tiles.a[g][2 * t], 1, slot.a[0]);
    unpack<Format>(&tiles.a[g + 8][2 * t], 1, slot.a[1]);
    unpack<Format>(&tiles.a[g][2 * t + 8], 1, slot.a[2]);
    unpack<Format>(&tiles.a[g + 8][2 * t + 8], 1, slot.a[3]);
    unpack<Format>(&tiles.b[2 * t][g], 8, slot.b[0]);
    unpack<Format>(&tiles.b[2 * t + 8][g], 8, slot.b[1]);
    memcpy(&tiles.d[g][2 * t], &slot.d[0], 8);
    memcpy(&tiles.d[g + 8][2 * t], &slot.d[2], 8);
}

static void multiply(MmaTiles &tiles)
{
    typedef float Row __attribute__((vector_size(32)));
    Row b[16];
    memcpy(b, tiles.b, sizeof b);
    for (unsigned m = 0; m < 16; m++) {
        Row sum;
        memcpy(&sum, tiles.d[m], sizeof sum);
        for (unsigned k = 0; k < 16; k++) sum += tiles.a[m][k] * b[k];
        memcpy(tiles.d[m], &sum, sizeof sum);
    }
}

static void scatter(const MmaTiles &tiles, const MmaSlot &slot, unsigned lane)
{
    unsigned g = lane / 4, t = lane % 4;
    memcpy(&slot.d[0], &tiles.d[g][2 * t], 8);
    memcpy(&slot.d[2], &tiles.d[g + 8][2 * t], 8);
}

template <class Format> static void execute_mma(void **slots, unsigned)
{
    MmaTiles tiles;
    for (unsigned lane = 0; lane < 32; lane++)
        gather<Format>(tiles, *static_cast<MmaSlot *>(slots[lane]), lane);
    multiply(tiles);
    for (unsigned lane = 0; lane < 32; lane++)
        scatter(tiles, *static_cast<MmaSlot *>(slots[lane]), lane);
    machine->counts.mma++;
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half,
                  Site site)
{
    MmaSlot slot = {d, a, b};
    collective(Collective::mma, 0xffffffffu, &slot, execute_mma<Half>, site);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16,
                  Site site)
{
    MmaSlot slot = {d, a, b};
    collective(Collective::mma, 0xffffffffu, &slot, execute_mma<Bfloat16>, site);
}
} // namespace on_cpu

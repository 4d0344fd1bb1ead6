/* The wrappers of kernels/cuda/ptx.cuh for the CPU: same names, same parameters, same meaning.
 * What the instructions do stands in machine/tensor_core.cpp and machine/cp_async.cpp. */
#ifndef HQQ_TESTS_PTX_ON_CPU_H
#define HQQ_TESTS_PTX_ON_CPU_H

#include "cuda_on_cpu.h"

namespace on_cpu
{
void ldmatrix_x4(uint32_t (&registers)[4], const void *row, bool transposed, Site site);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half,
                  Site site);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16,
                  Site site);
void cp_async_16(void *shared, const void *global, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(unsigned groups_left);
void cluster_arrive(Site site);
void cluster_wait(Site site);
/* Where in block `rank` of the cluster lies what lies at `own` in this one. */
const void *cluster_read(const void *own, unsigned rank, size_t bytes, Site site);

/* One of the 16 functions of two bits: bit 2a + b of table. */
template <int table> inline uint32_t lop2(uint32_t a, uint32_t b)
{
    /* clang-format off */
    switch (table) {
    case 0x0: return 0;
    case 0x1: return ~(a | b);
    case 0x2: return ~a & b;
    case 0x3: return ~a;
    case 0x4: return a & ~b;
    case 0x5: return ~b;
    case 0x6: return a ^ b;
    case 0x7: return ~(a & b);
    case 0x8: return a & b;
    case 0x9: return ~(a ^ b);
    case 0xa: return b;
    case 0xb: return ~a | b;
    case 0xc: return a;
    case 0xd: return a | ~b;
    case 0xe: return a | b;
    default: return 0xffffffffu;
    }
    /* clang-format on */
}
} // namespace on_cpu

inline void ptx_ldmatrix_x4(uint32_t (&r)[4], const void *row, ON_CPU_CALLER)
{
    on_cpu::ldmatrix_x4(r, row, false, ON_CPU_SITE);
}

inline void ptx_ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, ON_CPU_CALLER)
{
    on_cpu::ldmatrix_x4(r, row, true, ON_CPU_SITE);
}

template <class Format>
inline void ptx_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    on_cpu::Float16<Format>, ON_CPU_CALLER)
{
    on_cpu::mma_m16n8k16(d, a, b, Format(), ON_CPU_SITE);
}

inline void ptx_cp_async_16(void *shared, const void *global, bool valid = true, ON_CPU_CALLER)
{
    on_cpu::cp_async_16(shared, global, valid, ON_CPU_SITE);
}

inline void ptx_cp_async_commit()
{
    on_cpu::cp_async_commit();
}

template <int N> inline void ptx_cp_async_wait()
{
    on_cpu::cp_async_wait(N);
}

#define PTX_CLUSTERS 1
inline void ptx_cluster_arrive(ON_CPU_CALLER)
{
    on_cpu::cluster_arrive(ON_CPU_SITE);
}

inline void ptx_cluster_arrive_relaxed(ON_CPU_CALLER)
{
    on_cpu::cluster_arrive(ON_CPU_SITE);
}

inline void ptx_cluster_arrive_shared(ON_CPU_CALLER)
{
    on_cpu::cluster_arrive(ON_CPU_SITE);
}

inline void ptx_cluster_wait(ON_CPU_CALLER)
{
    on_cpu::cluster_wait(ON_CPU_SITE);
}

struct ptx_cluster_address {
    const char *own;
    unsigned rank;
};

inline ptx_cluster_address ptx_cluster_map(const void *own, unsigned rank)
{
    return {static_cast<const char *>(own), rank};
}

__attribute__((no_sanitize("thread"), noinline)) inline float4
ptx_cluster_load(ptx_cluster_address there, uint32_t bytes, ON_CPU_CALLER)
{
    return *static_cast<const float4 *>(
        on_cpu::cluster_read(there.own + bytes, there.rank, sizeof(float4), ON_CPU_SITE));
}

#define PTX_COMPARE_EXCHANGES_16 1
__attribute__((no_sanitize("thread"), noinline)) inline uint4
ptx_compare_exchange_16(uint4 *address, uint4 expected, uint4 next, ON_CPU_CALLER)
{
    on_cpu::atomic_access(address, sizeof *address, ON_CPU_SITE);
    uint4 found = *address;
    if (found.x == expected.x && found.y == expected.y && found.z == expected.z &&
        found.w == expected.w)
        *address = next;
    return found;
}

/* Bit (4a + 2b + c) of the table: c chooses between two functions of a and b, which a few plain
 * operations express. */
template <int table> inline uint32_t ptx_lop3(uint32_t a, uint32_t b, uint32_t c)
{
    constexpr int bit0 = table & 1, bit2 = table >> 2 & 1, bit4 = table >> 4 & 1;
    constexpr int bit6 = table >> 6 & 1, bit1 = table >> 1 & 1, bit3 = table >> 3 & 1;
    constexpr int bit5 = table >> 5 & 1, bit7 = table >> 7 & 1;
    constexpr int without_c = bit0 | bit2 << 1 | bit4 << 2 | bit6 << 3;
    constexpr int with_c = bit1 | bit3 << 1 | bit5 << 2 | bit7 << 3;
    return on_cpu::lop2<without_c>(a, b) ^ (on_cpu::lop2<without_c ^ with_c>(a, b) & c);
}

#endif

/* The wrappers of kernels/cuda/ptx_warpgroup.cuh for the CPU: see machine/warpgroup.cpp. */
#ifndef HQQ_TESTS_PTX_WARPGROUP_ON_CPU_H
#define HQQ_TESTS_PTX_WARPGROUP_ON_CPU_H

#include "ptx_on_cpu.h"

namespace on_cpu
{
void warpgroup_mma(float *d, unsigned rows, const uint32_t (&a)[4], const void *b, Half,
                   Site site);
void warpgroup_mma(float *d, unsigned rows, const uint32_t (&a)[4], const void *b, Bfloat16,
                   Site site);
void warpgroup_commit();
void warpgroup_wait(unsigned groups_left, Site site);
} // namespace on_cpu

template <class Format, int N>
inline void ptx_warpgroup_mma(float (&d)[N], const uint32_t (&a)[4], const void *b,
                              on_cpu::Float16<Format>, ON_CPU_CALLER)
{
    static_assert(N == 64 || N == 32, "128 or 64 rows");
    on_cpu::warpgroup_mma(d, 2 * N, a, b, Format(), ON_CPU_SITE);
}

inline void ptx_warpgroup_commit()
{
    on_cpu::warpgroup_commit();
}

template <int N> inline void ptx_warpgroup_wait(ON_CPU_CALLER)
{
    on_cpu::warpgroup_wait(N, ON_CPU_SITE);
}

/* Registers and proxies have no counterpart here. */
inline void ptx_warpgroup_begin() {}
template <int N> inline void ptx_warpgroup_arrived(float (&)[N]) {}
inline void ptx_warpgroup_publish() {}

#endif

/* The wrappers of kernels/cuda/ptx_warpgroup.cuh for the CPU: see machine/warpgroup.cpp. */
#ifndef HQQ_TESTS_PTX_WARPGROUP_ON_CPU_H
#define HQQ_TESTS_PTX_WARPGROUP_ON_CPU_H

#include "ptx_on_cpu.h"

namespace on_cpu
{
void warpgroup_mma(float (&d)[64], const uint32_t (&a)[4], const void *b, Half, Site site);
void warpgroup_mma(float (&d)[64], const uint32_t (&a)[4], const void *b, Bfloat16, Site site);
void warpgroup_commit();
void warpgroup_wait(unsigned groups_left, Site site);
} // namespace on_cpu

template <class Format>
inline void ptx_warpgroup_mma(float (&d)[64], const uint32_t (&a)[4], const void *b,
                              on_cpu::Float16<Format>, ON_CPU_CALLER)
{
    on_cpu::warpgroup_mma(d, a, b, Format(), ON_CPU_SITE);
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
inline void ptx_warpgroup_arrived(float (&)[64]) {}
inline void ptx_warpgroup_publish() {}

#endif

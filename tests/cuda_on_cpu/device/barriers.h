/* __syncthreads and its kin. Each remembers its line: threads that wait at different ones, or
 * have returned, end the launch with a text that names both. */
#ifndef HQQ_CUDA_ON_CPU_BARRIERS_H
#define HQQ_CUDA_ON_CPU_BARRIERS_H

#include "thread.h"

namespace on_cpu
{
/* Waits for the whole block; how many threads gave a predicate. */
unsigned block_barrier(bool predicate, Site site);
} // namespace on_cpu

inline void __syncthreads(ON_CPU_CALLER)
{
    on_cpu::block_barrier(false, ON_CPU_SITE);
}

inline int __syncthreads_count(int predicate, ON_CPU_CALLER)
{
    return static_cast<int>(on_cpu::block_barrier(predicate, ON_CPU_SITE));
}

inline int __syncthreads_and(int predicate, ON_CPU_CALLER)
{
    return on_cpu::block_barrier(!predicate, ON_CPU_SITE) == 0;
}

inline int __syncthreads_or(int predicate, ON_CPU_CALLER)
{
    return on_cpu::block_barrier(predicate, ON_CPU_SITE) != 0;
}

/* Blocks run one after the other on one host thread: every write is visible at once. */
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

#endif

/* Atomics, in shared and global memory. Fibers change only at barriers and collectives, so
 * plain code is atomic. It is kept from the race checker's instrumentation and reported as
 * atomic instead: atomics do not race with one another, but do with plain accesses. */
#ifndef HQQ_CUDA_ON_CPU_ATOMICS_H
#define HQQ_CUDA_ON_CPU_ATOMICS_H

#include <stddef.h>

#include "thread.h"

namespace on_cpu
{
/* Checks an atomic's alignment and, under the race checker, whom it races with. */
void atomic_access(const void *address, size_t bytes, Site site);
template <class T> struct not_deduced {
    typedef T type;
};
} // namespace on_cpu

/* old is what *address held, value the operand; all return old. */
#define ON_CPU_ATOMIC(name, new_value)                                          \
    template <class T>                                                          \
    __attribute__((no_sanitize("thread"), noinline)) T name(                    \
        T *address, typename on_cpu::not_deduced<T>::type value, ON_CPU_CALLER) \
    {                                                                           \
        on_cpu::atomic_access(address, sizeof(T), ON_CPU_SITE);                 \
        T old = *address;                                                       \
        *address = new_value;                                                   \
        return old;                                                             \
    }
ON_CPU_ATOMIC(atomicAdd, old + value)
ON_CPU_ATOMIC(atomicSub, old - value)
ON_CPU_ATOMIC(atomicMax, old < value ? value : old)
ON_CPU_ATOMIC(atomicMin, value < old ? value : old)
ON_CPU_ATOMIC(atomicExch, value)
ON_CPU_ATOMIC(atomicAnd, old &value)
ON_CPU_ATOMIC(atomicOr, old | value)
ON_CPU_ATOMIC(atomicXor, old ^ value)
ON_CPU_ATOMIC(atomicInc, old >= value ? 0u : old + 1)
ON_CPU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef ON_CPU_ATOMIC

template <class T>
__attribute__((no_sanitize("thread"), noinline))
T atomicCAS(T *address, typename on_cpu::not_deduced<T>::type expected,
            typename on_cpu::not_deduced<T>::type value, ON_CPU_CALLER)
{
    on_cpu::atomic_access(address, sizeof(T), ON_CPU_SITE);
    T old = *address;
    if (old == expected) *address = value;
    return old;
}

#endif

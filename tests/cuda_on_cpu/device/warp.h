/* What the lanes of a warp do together: __syncwarp, shuffles, votes, reductions. All are one
 * primitive, on_cpu::collective: each lane hands in a slot, the last to come computes for all.
 */
#ifndef HQQ_CUDA_ON_CPU_WARP_H
#define HQQ_CUDA_ON_CPU_WARP_H

#include "thread.h"

namespace on_cpu
{
enum class Collective { syncwarp, shuffle, vote, reduce, match, ldmatrix, mma, warpgroup };

typedef void (*Execute)(void **slot_of_lane, unsigned mask);

/* Waits for the lanes of mask. They must all call the same thing from the same line. */
void collective(Collective kind, unsigned mask, void *slot, Execute execute, Site site);

[[noreturn]] void fail_shuffle_source(unsigned lane, unsigned source, unsigned mask);

template <class T> struct ShuffleSlot {
    T in, out;
    unsigned source;
};

template <class T> void execute_shuffle(void **slots, unsigned mask)
{
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        auto *slot = static_cast<ShuffleSlot<T> *>(slots[lane]);
        if (!(mask >> slot->source & 1)) fail_shuffle_source(lane, slot->source, mask);
        slot->out = static_cast<ShuffleSlot<T> *>(slots[slot->source])->in;
    }
}

template <class T> T shuffle(unsigned mask, T value, unsigned source, Site site)
{
    ShuffleSlot<T> slot = {value, value, source};
    collective(Collective::shuffle, mask, &slot, execute_shuffle<T>, site);
    return slot.out;
}

template <class T, class Operation> void execute_reduction(void **slots, unsigned mask)
{
    T result = {};
    bool first = true;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        T value = *static_cast<T *>(slots[lane]);
        result = first ? value : Operation::apply(result, value);
        first = false;
    }
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) *static_cast<T *>(slots[lane]) = result;
}

template <class Operation, class T> T reduce(Collective kind, unsigned mask, T value, Site site)
{
    collective(kind, mask, &value, execute_reduction<T, Operation>, site);
    return value;
}

/* clang-format off */
struct Sum { template <class T> static T apply(T a, T b) { return a + b; } };
struct Smallest { template <class T> static T apply(T a, T b) { return b < a ? b : a; } };
struct Largest { template <class T> static T apply(T a, T b) { return a < b ? b : a; } };
struct BitAnd { template <class T> static T apply(T a, T b) { return a & b; } };
struct BitOr { template <class T> static T apply(T a, T b) { return a | b; } };
struct BitXor { template <class T> static T apply(T a, T b) { return a ^ b; } };
/* clang-format on */

inline unsigned ballot(unsigned mask, int predicate, Site site)
{
    unsigned bit = predicate ? 1u << self->lane : 0u;
    return reduce<BitOr>(Collective::vote, mask, bit, site);
}
} // namespace on_cpu

inline void __syncwarp(unsigned mask = 0xffffffffu, ON_CPU_CALLER)
{
    on_cpu::collective(on_cpu::Collective::syncwarp, mask, nullptr, nullptr, ON_CPU_SITE);
}

/* A width below 32 (a power of two) cuts the warp into segments of that many lanes. */
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, ON_CPU_CALLER)
{
    unsigned within = static_cast<unsigned>(width - 1);
    unsigned source = (on_cpu::self->lane & ~within) | (static_cast<unsigned>(lane) & within);
    return on_cpu::shuffle(mask, value, source, ON_CPU_SITE);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, ON_CPU_CALLER)
{
    unsigned me = on_cpu::self->lane, source = me ^ static_cast<unsigned>(bits);
    unsigned end = (me & ~static_cast<unsigned>(width - 1)) + static_cast<unsigned>(width);
    return on_cpu::shuffle(mask, value, source < end ? source : me, ON_CPU_SITE);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, ON_CPU_CALLER)
{
    unsigned me = on_cpu::self->lane, size = static_cast<unsigned>(width);
    bool inside = (me & (size - 1)) + distance < size;
    return on_cpu::shuffle(mask, value, inside ? me + distance : me, ON_CPU_SITE);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, ON_CPU_CALLER)
{
    unsigned me = on_cpu::self->lane, size = static_cast<unsigned>(width);
    bool inside = (me & (size - 1)) >= distance;
    return on_cpu::shuffle(mask, value, inside ? me - distance : me, ON_CPU_SITE);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, ON_CPU_CALLER)
{
    return on_cpu::ballot(mask, predicate, ON_CPU_SITE);
}

inline int __any_sync(unsigned mask, int predicate, ON_CPU_CALLER)
{
    return on_cpu::ballot(mask, predicate, ON_CPU_SITE) != 0;
}

inline int __all_sync(unsigned mask, int predicate, ON_CPU_CALLER)
{
    return on_cpu::ballot(mask, !predicate, ON_CPU_SITE) == 0;
}

/* As on the device: sums, minima and maxima of int or unsigned, bitwise ones of unsigned. */
#define ON_CPU_REDUCTION(name, T, Operation)                                              \
    inline T name(unsigned mask, T value, ON_CPU_CALLER)                                  \
    {                                                                                     \
        return on_cpu::reduce<on_cpu::Operation>(on_cpu::Collective::reduce, mask, value, \
                                                 ON_CPU_SITE);                            \
    }
ON_CPU_REDUCTION(__reduce_add_sync, unsigned, Sum)
ON_CPU_REDUCTION(__reduce_min_sync, unsigned, Smallest)
ON_CPU_REDUCTION(__reduce_max_sync, unsigned, Largest)
ON_CPU_REDUCTION(__reduce_min_sync, int, Smallest)
ON_CPU_REDUCTION(__reduce_max_sync, int, Largest)
ON_CPU_REDUCTION(__reduce_and_sync, unsigned, BitAnd)
ON_CPU_REDUCTION(__reduce_or_sync, unsigned, BitOr)
ON_CPU_REDUCTION(__reduce_xor_sync, unsigned, BitXor)
#undef ON_CPU_REDUCTION

inline int __reduce_add_sync(unsigned mask, int value, ON_CPU_CALLER)
{
    return static_cast<int>(
        __reduce_add_sync(mask, static_cast<unsigned>(value), file_, line_));
}

#endif

/* In which order the threads of a block take turns, and when cp.async's bytes arrive: whatever
 * CUDA leaves open, so that a kernel that relies on one order fails under another. */
#ifndef HQQ_CUDA_ON_CPU_SCHEDULE_H
#define HQQ_CUDA_ON_CPU_SCHEDULE_H

#include <stdint.h>

namespace on_cpu
{
enum class Order {
    fifo,     /* warps take turns, one collective each; lanes and blocks upwards */
    lifo,     /* the last warp runs as far as it can; lanes and blocks downwards */
    random,   /* any lane of any warp next; blocks shuffled */
    priority, /* one random warp runs as far as it can, then another; redrawn at each barrier */
};

enum class CpAsync {
    late,  /* bytes arrive at the wait, and are 0xFF until then */
    early, /* bytes arrive at once */
    mixed, /* either, at random */
};

/* A launch under the same schedule repeats exactly. */
struct Schedule {
    Order order;
    CpAsync cp_async;
    uint64_t seed;
};

/* What control.h or the environment chose. */
Schedule current_schedule();

class Random /* splitmix64 */
{
  public:
    explicit Random(uint64_t seed = 0) : state(seed) {}

    uint64_t next()
    {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }

    unsigned below(unsigned end) { return static_cast<unsigned>((next() >> 32) * end >> 32); }

    template <class T> void shuffle(T *items, unsigned count)
    {
        for (unsigned i = count; i > 1; i--) {
            unsigned j = below(i);
            T kept = items[i - 1];
            items[i - 1] = items[j];
            items[j] = kept;
        }
    }

  private:
    uint64_t state;
};
} // namespace on_cpu

#endif

/* Fibers: threads of control that change only where they say so. One carries one CUDA thread.
 */
#ifndef HQQ_CUDA_ON_CPU_FIBER_H
#define HQQ_CUDA_ON_CPU_FIBER_H

#include <stddef.h>

#if defined(__SANITIZE_ADDRESS__)
#define ON_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ON_CPU_ASAN 1
#endif
#endif
#ifndef ON_CPU_ASAN
#define ON_CPU_ASAN 0
#endif

namespace on_cpu
{
struct Fiber {
    void *stack_pointer = nullptr; /* while another runs */
    char *stack = nullptr;         /* lowest usable byte; below it lies a guard page */
    size_t stack_bytes = 0;
    bool owned = false;         /* the stack was allocated here, not adopted */
    void *fake_stack = nullptr; /* AddressSanitizer's */

    Fiber() = default;
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;
    ~Fiber();

    bool allocate_stack(); /* once; false: no memory */

    /* The next switch to this fiber calls entry() on an empty stack. `number` staggers the
     * stacks, which would else all compete for the same cache sets. entry() must not return,
     * and must first call fiber_entered(). */
    void prepare(void (*entry)(), unsigned number);

    /* Becomes the fiber of the calling host thread, with the stack it already has. */
    void adopt_this_thread();
};

void fiber_entered();

enum class Leaving { for_now, for_good };

/* Returns when somebody switches back to `from`; for_good: never. */
void switch_fiber(Fiber &from, Fiber &to, Leaving leaving);
} // namespace on_cpu

#endif

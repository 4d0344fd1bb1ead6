#include "fiber.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

/* void hqq_on_cpu_switch(void **save, void *load): pushes the registers that a call must
 * preserve, leaves the stack pointer in *save, takes `load` for it and pops. prepare() below
 * lays out a new stack as if such a switch had just left it. */
extern "C" void hqq_on_cpu_switch(void **save, void *load);

#if defined(__x86_64__)
asm(R"(
    .text
    .globl hqq_on_cpu_switch
    .hidden hqq_on_cpu_switch
    .type hqq_on_cpu_switch, @function
hqq_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size hqq_on_cpu_switch, . - hqq_on_cpu_switch
)");
/* six registers, the return address, and a word that leaves the stack as a call would */
enum { FRAME_WORDS = 8, ENTRY_WORD = 6 };

#elif defined(__aarch64__)
asm(R"(
    .text
    .globl hqq_on_cpu_switch
    .hidden hqq_on_cpu_switch
    .type hqq_on_cpu_switch, %function
hqq_on_cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size hqq_on_cpu_switch, . - hqq_on_cpu_switch
)");
enum { FRAME_WORDS = 20, ENTRY_WORD = 11 }; /* x30 holds the return address */

#else
#error "hqq_on_cpu_switch is missing for this processor"
#endif

namespace on_cpu
{
/* A kernel's frames are small; instrumented ones are not. Only touched pages take memory. */
static const size_t STACK_BYTES = (ON_CPU_ASAN ? 256 : 64) << 10;

static size_t page_bytes()
{
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

bool Fiber::allocate_stack()
{
    size_t guard = page_bytes();
    void *memory = mmap(nullptr, STACK_BYTES + guard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    mprotect(memory, guard, PROT_NONE);
    stack = static_cast<char *>(memory) + guard;
    stack_bytes = STACK_BYTES;
#if ON_CPU_ASAN
    /* a stack that was here before may have left marks */
    ASAN_UNPOISON_MEMORY_REGION(stack, stack_bytes);
#endif
    owned = true;
    return true;
}

Fiber::~Fiber()
{
    if (owned) munmap(stack - page_bytes(), STACK_BYTES + page_bytes());
}

void Fiber::prepare(void (*entry)(), unsigned number)
{
    char *end = stack + stack_bytes, *top = end - number % 64 * 256;
#if ON_CPU_ASAN
    /* The frames in which it was left for good are still marked: those from the stack pointer
     * on. (To unmark the whole stack instead took three quarters of the time of the tests.) */
    if (stack_pointer) {
        char *left_at = static_cast<char *>(stack_pointer);
        ASAN_UNPOISON_MEMORY_REGION(left_at, end - left_at);
    }
    fake_stack = nullptr;
#endif
    void **frame = reinterpret_cast<void **>(top) - FRAME_WORDS;
    memset(frame, 0, FRAME_WORDS * sizeof(void *));
    frame[ENTRY_WORD] = reinterpret_cast<void *>(entry);
    stack_pointer = frame;
}

#if ON_CPU_ASAN
void Fiber::adopt_this_thread()
{
    pthread_attr_t attributes;
    void *lowest = nullptr;
    if (stack || pthread_getattr_np(pthread_self(), &attributes) != 0) return;
    pthread_attr_getstack(&attributes, &lowest, &stack_bytes);
    pthread_attr_destroy(&attributes);
    stack = static_cast<char *>(lowest);
}

void fiber_entered()
{
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

void switch_fiber(Fiber &from, Fiber &to, Leaving leaving)
{
    __sanitizer_start_switch_fiber(leaving == Leaving::for_good ? nullptr : &from.fake_stack,
                                   to.stack, to.stack_bytes);
    hqq_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}
#else
void Fiber::adopt_this_thread() {}

void fiber_entered() {}

void switch_fiber(Fiber &from, Fiber &to, Leaving)
{
    hqq_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
}
#endif
} // namespace on_cpu

/* The text of a race, and the functions that -fsanitize=thread makes kernels call. */
#include "machine.h"

#include <dlfcn.h>
#include <string.h>

namespace on_cpu
{
static const char *verb(Touch kind)
{
    switch (kind) {
    case Touch::read: return "reads";
    case Touch::write: return "writes";
    default: return "updates";
    }
}

/* "libkernels.so+0x1234", which addr2line -e libkernels.so 0x1234 turns into a line. */
static void append_place(const void *pc)
{
    Dl_info info;
    if (!pc || !dladdr(pc, &info) || !info.dli_fname) return;
    append_error(" (%s+0x%zx)", base_name(info.dli_fname),
                 static_cast<size_t>(static_cast<const char *>(pc) -
                                     static_cast<const char *>(info.dli_fbase)) -
                     1);
}

static void append_last_site(unsigned thread)
{
    const Site &site = machine->threads[thread]->site;
    if (site.line)
        append_error("; thread %u was last at %s:%d", thread, base_name(site.file), site.line);
}

void fail_race(const Thread *thread, Touch kind, unsigned other, const char *other_did,
               const Region &region, size_t offset, const void *pc)
{
    append_error("shared memory race: thread %u %s byte %zu of %s", thread->linear, verb(kind),
                 offset, region.name);
    append_place(pc);
    append_error(", thread %u %s, nothing orders them", other, other_did);
    append_last_site(thread->linear);
    if (other != thread->linear) append_last_site(other);
    end_launch();
}

void fail_cluster_race(const char *what, const Region &region, size_t offset, unsigned rank)
{
    append_error("shared memory race in a cluster: thread %u of block %u %s byte %zu of %s of "
                 "block %u, no cluster barrier orders them",
                 self->linear, machine->rank(), what, offset, region.name, rank);
    append_last_site(self->linear);
    end_launch();
}

/* An access of the kernel's code. */
static void kernel_touches(const void *address, size_t bytes, Touch kind, const void *pc)
{
    if (!self || !machine->shared.may_hold(address)) return;
    machine->races.touch(this_thread(), address, bytes, kind, pc);
}

/* The same of a type whose alignment is its size: what the device demands, too. */
static void kernel_touches_aligned(const void *address, size_t bytes, Touch kind,
                                   const void *pc)
{
    if (!self) return;
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        append_error("misaligned access: thread %u %s %zu bytes at %p", self->linear,
                     verb(kind), bytes, address);
        append_place(pc);
        end_launch();
    }
    kernel_touches(address, bytes, kind, pc);
}
} // namespace on_cpu

extern "C" {
#define ON_CPU_TSAN(bytes)                                                                   \
    void __tsan_read##bytes(void *p)                                                         \
    {                                                                                        \
        on_cpu::kernel_touches_aligned(p, bytes, on_cpu::Touch::read,                        \
                                       __builtin_return_address(0));                         \
    }                                                                                        \
    void __tsan_write##bytes(void *p)                                                        \
    {                                                                                        \
        on_cpu::kernel_touches_aligned(p, bytes, on_cpu::Touch::write,                       \
                                       __builtin_return_address(0));                         \
    }                                                                                        \
    void __tsan_unaligned_read##bytes(void *p)                                               \
    {                                                                                        \
        on_cpu::kernel_touches(p, bytes, on_cpu::Touch::read, __builtin_return_address(0));  \
    }                                                                                        \
    void __tsan_unaligned_write##bytes(void *p)                                              \
    {                                                                                        \
        on_cpu::kernel_touches(p, bytes, on_cpu::Touch::write, __builtin_return_address(0)); \
    }                                                                                        \
    void __tsan_volatile_read##bytes(void *p)                                                \
    {                                                                                        \
        __tsan_read##bytes(p);                                                               \
    }                                                                                        \
    void __tsan_volatile_write##bytes(void *p)                                               \
    {                                                                                        \
        __tsan_write##bytes(p);                                                              \
    }
ON_CPU_TSAN(1)
ON_CPU_TSAN(2)
ON_CPU_TSAN(4)
ON_CPU_TSAN(8)
ON_CPU_TSAN(16)

/* gcc knows these with the parameters written here */
void __tsan_read_range(void *p, long bytes)
{
    on_cpu::kernel_touches(p, static_cast<size_t>(bytes), on_cpu::Touch::read,
                           __builtin_return_address(0));
}
void __tsan_write_range(void *p, long bytes)
{
    on_cpu::kernel_touches(p, static_cast<size_t>(bytes), on_cpu::Touch::write,
                           __builtin_return_address(0));
}

/* clang's, for calls of the C library */
void *__tsan_memcpy(void *to, const void *from, size_t bytes)
{
    on_cpu::kernel_touches(from, bytes, on_cpu::Touch::read, __builtin_return_address(0));
    on_cpu::kernel_touches(to, bytes, on_cpu::Touch::write, __builtin_return_address(0));
    return memcpy(to, from, bytes);
}
void *__tsan_memmove(void *to, const void *from, size_t bytes)
{
    on_cpu::kernel_touches(from, bytes, on_cpu::Touch::read, __builtin_return_address(0));
    on_cpu::kernel_touches(to, bytes, on_cpu::Touch::write, __builtin_return_address(0));
    return memmove(to, from, bytes);
}
void *__tsan_memset(void *to, int byte, size_t bytes)
{
    on_cpu::kernel_touches(to, bytes, on_cpu::Touch::write, __builtin_return_address(0));
    return memset(to, byte, bytes);
}

/* called by a constructor of every instrumented file */
void __tsan_init(void)
{
    on_cpu::races_are_checked = true;
}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void *) {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
}

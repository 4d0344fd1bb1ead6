/* What a kernel's thread knows of itself, and how it fails. */
#ifndef HQQ_CUDA_ON_CPU_THREAD_H
#define HQQ_CUDA_ON_CPU_THREAD_H

#include "vector_types.h"

namespace on_cpu
{
struct Position {
    uint3 index;     /* threadIdx */
    unsigned linear; /* threadIdx as one number */
    unsigned warp, lane;
};

/* A fiber never leaves the host thread that launched it, so a plain thread-local pointer is the
 * device's idea of "me". initial-exec: one instruction, and small enough for a dlopened
 * library. */
#define ON_CPU_THREAD_LOCAL __thread __attribute__((tls_model("initial-exec")))
extern ON_CPU_THREAD_LOCAL const Position *self;

/* Ends the launch, which then returns cudaErrorLaunchFailure with this text. */
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);

/* Where a kernel calls something. The defaults are evaluated at the caller's line only if they
 * are two plain parameters; inside braces, __builtin_LINE would name this header. */
struct Site {
    const char *file;
    int line;
};
#define ON_CPU_CALLER const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define ON_CPU_SITE   (on_cpu::Site{file_, line_})

const char *base_name(const char *path);
} // namespace on_cpu

#define threadIdx (on_cpu::self->index)
/* Variables, not macros: cudaLaunchConfig_t has members of these names. */
extern ON_CPU_THREAD_LOCAL uint3 blockIdx;
extern ON_CPU_THREAD_LOCAL dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __trap(ON_CPU_CALLER)
{
    on_cpu::fail("%s:%d: __trap()", on_cpu::base_name(file_), line_);
}

#endif

/* What the runtime's calls keep between them. */
#ifndef HQQ_CUDA_ON_CPU_RUNTIME_STATE_H
#define HQQ_CUDA_ON_CPU_RUNTIME_STATE_H

#include <stddef.h>

#include "../device/runtime_api.h"

namespace on_cpu
{
/* Notes error and its text for this thread, and returns it. */
__attribute__((format(printf, 2, 3))) cudaError_t set_error(cudaError_t error,
                                                            const char *format, ...);

/* 48 KiB, or what cudaFuncSetAttribute opted in to. */
size_t allowed_dynamic_shared(const void *kernel);
} // namespace on_cpu

#endif

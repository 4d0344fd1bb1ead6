/*
 * CUDA C++ for a plain C++ compiler: kernels/cuda/cuda.cuh includes this instead of CUDA's
 * headers when there is no nvcc, and the very same kernels then run on the CPU. README.md says
 * what the emulator checks and what it does not cover.
 *
 *   device/   what kernels see: types, intrinsics, barriers, shared memory, the runtime's calls
 *   machine/  what runs them: fibers, schedules, warp collectives, the race checker
 */
#ifndef HQQ_TESTS_CUDA_ON_CPU_H
#define HQQ_TESTS_CUDA_ON_CPU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "device/keywords.h"
#include "device/vector_types.h"
#include "device/thread.h"
#include "device/shared_memory.h"
#include "device/barriers.h"
#include "device/warp.h"
#include "device/atomics.h"
#include "device/intrinsics.h"
#include "device/float16.h"
#include "device/runtime_api.h"

#endif

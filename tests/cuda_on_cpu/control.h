/*
 * What a test-suite may set, in C, for ctypes as well. For the whole process, from the next
 * launch on. The environment sets the first schedule:
 *
 *   HQQLORA_EMULATED_ORDER     FIFO (default), LIFO, RANDOM, PRIORITY
 *   HQQLORA_EMULATED_CP_ASYNC  LATE (default), EARLY, MIXED
 *   HQQLORA_EMULATED_SEED      1 by default
 */
#ifndef HQQ_TESTS_CUDA_ON_CPU_CONTROL_H
#define HQQ_TESTS_CUDA_ON_CPU_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HQQ_EMULATED_EXPORT __attribute__((visibility("default")))

/* By the names above. 0, or 1 if there is no such schedule. */
HQQ_EMULATED_EXPORT int hqqlora_emulated_set_schedule(const char *order, const char *cp_async,
                                                      uint64_t seed);

/* What cudaDeviceGetAttribute says of cudaDeviceAttr `attribute`; an H100's values at first.
 * The shared memory per block that a launch may have follows it. 0, or 1 if there is no such
 * attribute. */
HQQ_EMULATED_EXPORT int hqqlora_emulated_set_device_attribute(int attribute, int value);
HQQ_EMULATED_EXPORT void hqqlora_emulated_reset_device(void);

/* What cudaFuncGetAttributes says that kernels were compiled for: 80 for code that knows
 * nothing newer than an A100. 0, and after a reset: the device's own. */
HQQ_EMULATED_EXPORT void hqqlora_emulated_set_ptx_version(int version);

/* Counted over all launches of the process. */
typedef struct hqqlora_emulated_counts {
    uint64_t launches, blocks, switches, mma, clusters; /* those of several blocks */
} hqqlora_emulated_counts;
HQQ_EMULATED_EXPORT void hqqlora_emulated_get_counts(hqqlora_emulated_counts *counts);

/* What a CUDA graph does with a captured stream. From begin on, what this host thread enqueues
 * (launches, memsets, copies, GEMMs) is kept with its arguments instead of run; end gives all
 * of it, and a replay runs it once more, in order. A replay gives 0, or the cudaError_t of what
 * failed. */
typedef struct hqqlora_emulated_graph hqqlora_emulated_graph;
HQQ_EMULATED_EXPORT void hqqlora_emulated_begin_capture(void);
HQQ_EMULATED_EXPORT hqqlora_emulated_graph *hqqlora_emulated_end_capture(void);
HQQ_EMULATED_EXPORT int hqqlora_emulated_replay(hqqlora_emulated_graph *graph);
HQQ_EMULATED_EXPORT void hqqlora_emulated_destroy_graph(hqqlora_emulated_graph *graph);

/* Enqueues work of the host's that stands in for a kernel: it gets a copy of the arguments. */
HQQ_EMULATED_EXPORT void hqqlora_emulated_enqueue(void (*work)(void *arguments),
                                                  const void *arguments, size_t bytes);

/* Whether the linked kernels were compiled for the race checker. */
HQQ_EMULATED_EXPORT int hqqlora_emulated_checks_races(void);

#ifdef __cplusplus
}
#endif
#endif

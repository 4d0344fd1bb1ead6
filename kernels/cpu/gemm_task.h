/*
 * A product of gemm.h as stages of a larger loop (parallel.h): so the adapter's products run
 * beside each other and beside that with the frozen weight, with no barrier between them.
 */
#ifndef HQQ_KERNELS_CPU_GEMM_TASK_H
#define HQQ_KERNELS_CPU_GEMM_TASK_H

#include "gemm_tile.h"
#include "parallel.h"

typedef struct hqq_gemm_task {
    hqq_gemm_plan plan;
    hqq_isa isa;
    int64_t parts;  /* of a slab, in packing; 0: nothing is packed beforehand */
    int64_t chunks; /* 0: there is nothing to compute */
} hqq_gemm_task;

/* What g points to, dropout included, has to live until the stages are run; task is not to be
 * moved. */
void hqq_gemm_prepare(hqq_gemm_task *task, const hqq_gemm *g, const hqq_context *context);

/* Memory for what `count` tasks pack, which may be {0}: *memory is to be freed when the stages
 * have run. One piece for all: several that are freed
 * together the C library may give back to the system, and then each call waits for new pages
 * (backward at R = 64, K = 1536: 0.5 ms). */
hqq_status hqq_gemm_allocate(void **memory, hqq_gemm_task *tasks, int count);

/* Adds the stage that packs, and the one that multiplies, which is to wait for it. */
void hqq_gemm_add_packing(hqq_stages *stages, hqq_gemm_task *task, int after);
void hqq_gemm_add_product(hqq_stages *stages, hqq_gemm_task *task, int after);

#endif

#include "gemm.h"

#include <stdlib.h>

#include "dtype.h"
#include "gemm_task.h"
#include "status.h"
#include "workspace.h"

static hqq_status pack_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_gemm_task *task = data;
    (void)scratch;
    HQQ_ISA_SELECT(task->isa, hqq_gemm_pack_shared)
    (&task->plan, chunk / task->parts, chunk % task->parts, task->parts);
    return HQQ_OK;
}

static hqq_status multiply_chunk(int64_t chunk, void *scratch, void *data)
{
    const hqq_gemm_task *task = data;
    HQQ_ISA_SELECT(task->isa, hqq_gemm_chunk)(&task->plan, chunk, scratch);
    return HQQ_OK;
}

/* Elements that one chunk packs for all: some ten microseconds. */
#define HQQ_PACK_ELEMENTS (INT64_C(1) << 16)

/* A product over nothing: C = bias + beta * C. */
static void finish_empty(const hqq_gemm *g)
{
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->n; j++) {
            float value = g->bias ? hqq_load(g->bias, g->bias_dtype, j) : 0.0f;
            if (g->beta != 0.0f) value += g->beta * hqq_load(g->C, g->C_dtype, i * g->ldc + j);
            hqq_store(g->C, g->C_dtype, i * g->ldc + j, value);
        }
}

void hqq_gemm_prepare(hqq_gemm_task *task, const hqq_gemm *g, const hqq_context *context)
{
    *task = (hqq_gemm_task){.isa = hqq_isa_in_use(context)};
    if (g->m == 0 || g->n == 0) return;
    if (g->k == 0) {
        finish_empty(g);
        return;
    }
    hqq_gemm_plan *plan = &task->plan;
    HQQ_ISA_SELECT(task->isa, hqq_gemm_plan_for)(plan, g);
    task->chunks = plan->row_chunks * plan->column_chunks;
    int64_t elements = (int64_t)(plan->packed_bytes / sizeof(float)) / plan->slabs;
    task->parts = (elements + HQQ_PACK_ELEMENTS - 1) / HQQ_PACK_ELEMENTS;
}

hqq_status hqq_gemm_allocate(void **memory, hqq_gemm_task *tasks, int count)
{
    hqq_arena measured = {0};
    for (int i = 0; i < count; i++) hqq_arena_take(&measured, tasks[i].plan.packed_bytes);
    *memory = NULL;
    if (measured.used == 0) return HQQ_OK;
    *memory = aligned_alloc(64, measured.used);
    if (!*memory)
        return hqq_fail(HQQ_NO_MEMORY, "could not allocate %zu bytes for packed operands",
                        measured.used);
    hqq_arena arena = {.base = *memory};
    for (int i = 0; i < count; i++)
        tasks[i].plan.packed = hqq_arena_take(&arena, tasks[i].plan.packed_bytes);
    return HQQ_OK;
}

void hqq_gemm_add_packing(hqq_stages *stages, hqq_gemm_task *task, int after)
{
    hqq_add_stage(stages, pack_chunk, task, 0, task->plan.slabs * task->parts, 0, after);
}

void hqq_gemm_add_product(hqq_stages *stages, hqq_gemm_task *task, int after)
{
    hqq_add_stage(stages, multiply_chunk, task, 0, task->chunks, task->plan.scratch_bytes,
                  after);
}

hqq_status hqq_gemm_run(const hqq_gemm *g, const hqq_context *context)
{
    hqq_gemm_task task;
    void *packed;
    hqq_stages stages = {0};
    hqq_gemm_prepare(&task, g, context);
    HQQ_TRY(hqq_gemm_allocate(&packed, &task, 1));
    hqq_gemm_add_packing(&stages, &task, 0);
    hqq_gemm_add_product(&stages, &task, stages.count);
    hqq_status status = hqq_run_stages(&stages, context);
    free(packed);
    return status;
}

hqq_status hqq_gemm_of_context(void *C, int64_t ldc, const void *A, int64_t lda,
                               int32_t transpose_a, const void *B, int64_t ldb,
                               int32_t transpose_b, int64_t m, int64_t n, int64_t k, float beta,
                               hqq_dtype dtype, const hqq_context *context)
{
    if (context && context->gemm) {
        int32_t code = context->gemm(C, ldc, A, lda, transpose_a, B, ldb, transpose_b, m, n, k,
                                     beta, dtype, context->gemm_data);
        if (code == 0) return HQQ_OK;
        return hqq_fail(HQQ_CALLBACK, "gemm returned %d for a product of %lld x %lld x %lld",
                        (int)code, (long long)m, (long long)n, (long long)k);
    }
    hqq_gemm g = {.C = C,
                  .ldc = ldc,
                  .C_dtype = dtype,
                  .m = m,
                  .n = n,
                  .k = k,
                  .alpha = 1.0f,
                  .beta = beta};
    g.A = hqq_view_rows(A, dtype, lda);
    g.B = hqq_view_rows(B, dtype, ldb);
    if (transpose_a) g.A = hqq_view_transposed(g.A);
    if (transpose_b) g.B = hqq_view_transposed(g.B);
    return hqq_gemm_run(&g, context);
}

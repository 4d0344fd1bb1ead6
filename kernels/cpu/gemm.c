#include "gemm.h"

#include <stdlib.h>

#include "dtype.h"
#include "gemm_tile.h"
#include "parallel.h"
#include "status.h"

typedef struct gemm_job {
    hqq_gemm_plan plan;
    hqq_isa isa;
    int64_t parts; /* of a slab, in packing */
} gemm_job;

static hqq_status pack_chunk(int64_t chunk, void *scratch, void *data)
{
    const gemm_job *job = data;
    (void)scratch;
    HQQ_ISA_SELECT(job->isa, hqq_gemm_pack_shared)
    (&job->plan, chunk / job->parts, chunk % job->parts, job->parts);
    return HQQ_OK;
}

static hqq_status multiply_chunk(int64_t chunk, void *scratch, void *data)
{
    const gemm_job *job = data;
    HQQ_ISA_SELECT(job->isa, hqq_gemm_chunk)(&job->plan, chunk, scratch);
    return HQQ_OK;
}

/* Elements that one chunk packs for all: some ten microseconds. */
#define HQQ_PACK_ELEMENTS (INT64_C(1) << 16)
/* As many are packed in the time that other threads take to begin. */
#define HQQ_PACK_ALONE (INT64_C(1) << 14)

static hqq_status run_chunks(gemm_job *job, const hqq_context *context)
{
    hqq_gemm_plan *plan = &job->plan;
    if (plan->packed) {
        int64_t elements = (int64_t)(plan->packed_bytes / sizeof(float)) / plan->slabs;
        job->parts = (elements + HQQ_PACK_ELEMENTS - 1) / HQQ_PACK_ELEMENTS;
        int alone = plan->slabs * elements <= HQQ_PACK_ALONE;
        HQQ_TRY(hqq_for_each_chunk(plan->slabs * job->parts, pack_chunk, job, 0,
                                   alone ? NULL : context));
    }
    return hqq_for_each_chunk(plan->row_chunks * plan->column_chunks, multiply_chunk, job,
                              plan->scratch_bytes, context);
}

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

hqq_status hqq_gemm_run(const hqq_gemm *g, const hqq_context *context)
{
    if (g->m == 0 || g->n == 0) return HQQ_OK;
    if (g->k == 0) {
        finish_empty(g);
        return HQQ_OK;
    }
    gemm_job job = {.isa = hqq_isa_in_use(context)};
    HQQ_ISA_SELECT(job.isa, hqq_gemm_plan_for)(&job.plan, g);
    if (job.plan.packed_bytes) {
        job.plan.packed = aligned_alloc(64, (job.plan.packed_bytes + 63) / 64 * 64);
        if (!job.plan.packed)
            return hqq_fail(HQQ_NO_MEMORY, "could not allocate %zu bytes for packed operands",
                            job.plan.packed_bytes);
    }
    hqq_status status = run_chunks(&job, context);
    free(job.plan.packed);
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

/*
 * From a request to its kernels: choose, compute the LoRA addend, multiply with the frozen
 * weight.
 *
 *   direct    bias + LoRA are an addend in fp32, [M,N] for the few rows M: y is rounded once
 *   tiled     LoRA is where each tile's sums in fp32 begin: y is rounded once
 *   blocked   they are rounded to y's dtype before the GEMM adds to them (see blocked.h)
 */
#include <stdlib.h>
#include <string.h>

#include "backend.h"

#include "blocked.h"
#include "direct_dgrad.h"
#include "direct_linear.h"
#include "dtype.h"
#include "gemm_task.h"
#include "lora.h"
#include "reference.h"
#include "status.h"
#include "tiled.h"
#include "workspace.h"

/* How one call is served, and where in the workspace its parts are. Parts that a call turns
 * out not to need are there all the same, so that its size is known beforehand. */
typedef struct product_plan {
    hqq_kernel kernel;
    float *xa;     /* [M,R], if the caller has none */
    float *dyb;    /* [M,R], backward */
    float *addend; /* [M,N] or [M,K], direct */
    void *inner;   /* of the kernel */
} product_plan;

static float *take_floats(hqq_arena *arena, int64_t count)
{
    return hqq_arena_take(arena, (size_t)count * sizeof(float));
}

static product_plan make_plan(hqq_arena *arena, const hqq_weight *weight, const hqq_lora *lora,
                              int64_t M, hqq_dtype dtype, int transpose,
                              const hqq_context *context)
{
    product_plan plan = {.kernel = context ? context->kernel : HQQ_KERNEL_AUTO};
    if (plan.kernel == HQQ_KERNEL_AUTO)
        plan.kernel = hqq_choose_kernel(weight, M, dtype, transpose, hqq_isa_in_use(context));
    if (plan.kernel == HQQ_KERNEL_REFERENCE) return plan;
    if (lora) {
        plan.xa = take_floats(arena, M * lora->rank);
        if (transpose) plan.dyb = take_floats(arena, M * lora->rank);
    }
    size_t inner;
    if (plan.kernel == HQQ_KERNEL_DIRECT) {
        plan.addend =
            take_floats(arena, M * (transpose ? weight->in_features : weight->out_features));
        inner = transpose ? hqq_direct_dgrad_workspace(weight, M, dtype)
                          : hqq_direct_linear_workspace(weight, M, dtype);
    } else if (plan.kernel == HQQ_KERNEL_TILED) {
        inner = hqq_tiled_workspace(weight, M, dtype, transpose, hqq_isa_in_use(context));
    } else {
        inner = hqq_blocked_workspace(weight, dtype);
    }
    plan.inner = hqq_arena_take(arena, inner);
    return plan;
}

hqq_status hqq_backend_workspace_size(size_t *bytes, const hqq_weight *weight,
                                      const hqq_lora *lora, int64_t M, hqq_dtype dtype,
                                      const hqq_context *context)
{
    hqq_arena forward = {0}, backward = {0};
    *bytes = 0;
    if (M == 0 || weight->out_features == 0 || weight->in_features == 0) return HQQ_OK;
    make_plan(&forward, weight, lora, M, dtype, 0, context);
    make_plan(&backward, weight, lora, M, dtype, 1, context);
    *bytes = forward.used > backward.used ? forward.used : backward.used;
    return HQQ_OK;
}

/* The adapter's products that read x or dy, in one loop, with that of the frozen weight where
 * its kernel can join them. Begins as {0}. */
enum { XA, DYB, DB, DA, TASKS };
typedef struct adapter_loop {
    hqq_gemm_task tasks[TASKS]; /* {0} where not needed */
    hqq_dropout mask;           /* of x */
    hqq_stages stages;
    void *packed;
} adapter_loop;

/* In such an order that what a stage waits for is not the one just before it, where another can
 * be between them. */
static hqq_status add_stages(adapter_loop *adapter)
{
    HQQ_TRY(hqq_gemm_allocate(&adapter->packed, adapter->tasks, TASKS));
    hqq_stages *stages = &adapter->stages;
    hqq_gemm_task *tasks = adapter->tasks;
    hqq_gemm_add_packing(stages, &tasks[DYB], 0);
    hqq_gemm_add_packing(stages, &tasks[XA], 0);
    int packed = stages->count;
    hqq_gemm_add_product(stages, &tasks[XA], packed);
    hqq_gemm_add_packing(stages, &tasks[DB], stages->count);
    int ready_for_dB = stages->count;
    hqq_gemm_add_product(stages, &tasks[DYB], packed);
    hqq_gemm_add_packing(stages, &tasks[DA], stages->count);
    int ready_for_dA = stages->count;
    hqq_gemm_add_product(stages, &tasks[DB], ready_for_dB);
    hqq_gemm_add_product(stages, &tasks[DA], ready_for_dA);
    return HQQ_OK;
}

/* y of xa [M,R], which the stages `before` compute; NULL without LoRA. */
static hqq_status multiply_forward(const hqq_forward *f, const float *xa, hqq_stages *before,
                                   const product_plan *plan, const hqq_context *context)
{
    int64_t M = f->M, N = f->weight->out_features;
    if (plan->kernel == HQQ_KERNEL_TILED)
        return hqq_tiled_linear(f, xa, before, plan->inner, context);
    HQQ_TRY(hqq_run_stages(before, context));
    if (plan->kernel == HQQ_KERNEL_BLOCKED)
        return hqq_blocked_linear(f, xa, plan->inner, context);
    float *addend = f->lora || f->bias ? plan->addend : NULL;
    if (addend)
        HQQ_TRY(hqq_lora_addend(addend, N, HQQ_F32, xa, f->bias, f->bias_dtype, f->lora, M, 0,
                                N, context));
    return hqq_direct_linear(f->y, f->x, f->ldx, f->weight, addend, M, f->dtype, plan->inner,
                             hqq_isa_in_use(context), context);
}

hqq_status hqq_backend_forward(const hqq_forward *f, void *workspace,
                               const hqq_context *context)
{
    int64_t M = f->M, N = f->weight->out_features, K = f->weight->in_features;
    if (N == 0 || K == 0) {
        hqq_reference_forward(f); /* K = 0: y is the bias, xa zero; N = 0: xa alone */
        return HQQ_OK;
    }
    hqq_arena arena = {.base = workspace};
    product_plan plan = make_plan(&arena, f->weight, f->lora, M, f->dtype, 0, context);
    if (plan.kernel == HQQ_KERNEL_REFERENCE) {
        hqq_reference_forward(f);
        return HQQ_OK;
    }
    const float *xa = f->given_xa;
    adapter_loop adapter = {0};
    if (f->lora && !xa) {
        float *computed = f->xa ? f->xa : plan.xa;
        hqq_gemm g =
            hqq_lora_xa(&adapter.mask, computed, f->x, f->ldx, f->dtype, f->lora, M, K);
        hqq_gemm_prepare(&adapter.tasks[XA], &g, context);
        HQQ_TRY(add_stages(&adapter));
        xa = computed;
    }
    hqq_status status =
        multiply_forward(f, f->lora ? xa : NULL, &adapter.stages, &plan, context);
    free(adapter.packed);
    return status;
}

/* dx = dy W + scaling drop'(dyb A), after the stages `before`, which compute dyb */
static hqq_status multiply_backward(const hqq_backward *b, const float *dyb, hqq_stages *before,
                                    const product_plan *plan, const hqq_context *context)
{
    int64_t M = b->M, K = b->weight->in_features;
    if (b->dx && plan->kernel == HQQ_KERNEL_TILED)
        return hqq_tiled_dgrad(b, dyb, before, plan->inner, context);
    HQQ_TRY(hqq_run_stages(before, context));
    if (!b->dx) return HQQ_OK;
    if (plan->kernel == HQQ_KERNEL_BLOCKED)
        return hqq_blocked_dgrad(b, dyb, plan->inner, context);
    float *addend = b->lora ? plan->addend : NULL;
    if (addend)
        HQQ_TRY(hqq_lora_dx_addend(addend, K, HQQ_F32, dyb, b->lora, M, K, 0, K, context));
    return hqq_direct_dgrad(b->dx, b->dy, b->lddy, b->weight, addend, M, b->dtype, plan->inner,
                            hqq_isa_in_use(context), context);
}

/* Plans what of dyb, dB and dA is wanted, and xa where it has not been kept. */
static void prepare_gradients(adapter_loop *adapter, const hqq_backward *b, const float *dyb,
                              const product_plan *plan, const hqq_context *context)
{
    int64_t M = b->M, N = b->weight->out_features, K = b->weight->in_features;
    hqq_gemm_task *tasks = adapter->tasks;
    hqq_gemm g;
    if (b->lora && !b->given_dyb && (b->dx || b->dA)) {
        g = hqq_lora_dyb(plan->dyb, b->dy, b->lddy, b->dtype, b->lora, M, N);
        hqq_gemm_prepare(&tasks[DYB], &g, context);
    }
    const float *xa = b->xa;
    if (b->dB && !xa) {
        xa = plan->xa;
        g = hqq_lora_xa(&adapter->mask, plan->xa, b->x, b->ldx, b->dtype, b->lora, M, K);
        hqq_gemm_prepare(&tasks[XA], &g, context);
    }
    if (b->dB) {
        g = hqq_lora_dB(b->dB, b->dy, b->lddy, b->dtype, xa, b->lora, M, N);
        hqq_gemm_prepare(&tasks[DB], &g, context);
    }
    if (b->dA) {
        g = hqq_lora_dA(&adapter->mask, b->dA, dyb, b->x, b->ldx, b->dtype, b->lora, M, K);
        hqq_gemm_prepare(&tasks[DA], &g, context);
    }
}

static void fill_zero(void *data, int64_t elements, hqq_dtype dtype)
{
    if (data && elements > 0) memset(data, 0, (size_t)(elements * hqq_dtype_bytes(dtype)));
}

/* Gradients over nothing. */
static void fill_gradients_with_zero(const hqq_backward *b)
{
    int64_t R = b->lora ? b->lora->rank : 0;
    fill_zero(b->dx, b->M * b->weight->in_features, b->dtype);
    if (!b->lora) return;
    fill_zero(b->dA, R * b->weight->in_features, b->lora->dtype);
    fill_zero(b->dB, b->weight->out_features * R, b->lora->dtype);
}

hqq_status hqq_backend_backward(const hqq_backward *b, void *workspace,
                                const hqq_context *context)
{
    int64_t M = b->M, N = b->weight->out_features, K = b->weight->in_features;
    if (M == 0 || K == 0 || (N == 0 && !b->given_dyb)) {
        fill_gradients_with_zero(b);
        return HQQ_OK;
    }
    if (N == 0) { /* the adapter's part alone */
        hqq_reference_backward(b);
        return HQQ_OK;
    }
    hqq_arena arena = {.base = workspace};
    product_plan plan = make_plan(&arena, b->weight, b->lora, M, b->dtype, 1, context);
    if (plan.kernel == HQQ_KERNEL_REFERENCE) {
        hqq_reference_backward(b);
        return HQQ_OK;
    }
    const float *dyb = b->given_dyb ? b->given_dyb : plan.dyb;
    adapter_loop adapter = {0};
    prepare_gradients(&adapter, b, dyb, &plan, context);
    HQQ_TRY(add_stages(&adapter));
    hqq_status status = multiply_backward(b, dyb, &adapter.stages, &plan, context);
    free(adapter.packed);
    return status;
}

hqq_status hqq_backend_lora_workspace_size(size_t *bytes, const hqq_lora *lora, int64_t M,
                                           int64_t N, int64_t K)
{
    (void)lora, (void)M, (void)N, (void)K;
    *bytes = 0;
    return HQQ_OK;
}

hqq_status hqq_backend_lora_project(float *xa, const void *x, int64_t ldx, const hqq_lora *lora,
                                    int64_t M, int64_t K, hqq_dtype dtype, void *workspace,
                                    const hqq_context *context)
{
    (void)workspace;
    hqq_dropout mask;
    hqq_gemm g = hqq_lora_xa(&mask, xa, x, ldx, dtype, lora, M, K);
    return hqq_gemm_run(&g, context);
}

hqq_status hqq_backend_lora_factor_gradients(float *dyb, void *dB, const void *dy, int64_t lddy,
                                             const float *xa, const hqq_lora *lora, int64_t M,
                                             int64_t N, hqq_dtype dtype, void *workspace,
                                             const hqq_context *context)
{
    (void)workspace;
    adapter_loop adapter = {0};
    hqq_gemm g;
    if (dyb) {
        g = hqq_lora_dyb(dyb, dy, lddy, dtype, lora, M, N);
        hqq_gemm_prepare(&adapter.tasks[DYB], &g, context);
    }
    if (dB) {
        g = hqq_lora_dB(dB, dy, lddy, dtype, xa, lora, M, N);
        hqq_gemm_prepare(&adapter.tasks[DB], &g, context);
    }
    HQQ_TRY(add_stages(&adapter));
    hqq_status status = hqq_run_stages(&adapter.stages, context);
    free(adapter.packed);
    return status;
}

void *hqq_backend_allocate(size_t bytes)
{
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

void hqq_backend_free(void *memory)
{
    free(memory);
}

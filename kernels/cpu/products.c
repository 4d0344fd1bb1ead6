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
    if (f->lora && !xa) {
        float *computed = f->xa ? f->xa : plan.xa;
        HQQ_TRY(hqq_lora_xa(computed, f->x, f->ldx, f->dtype, f->lora, M, K, context));
        xa = computed;
    }

    if (plan.kernel == HQQ_KERNEL_BLOCKED)
        return hqq_blocked_linear(f, f->lora ? xa : NULL, plan.inner, context);
    if (plan.kernel == HQQ_KERNEL_TILED)
        return hqq_tiled_linear(f, f->lora ? xa : NULL, plan.inner, context);
    float *addend = f->lora || f->bias ? plan.addend : NULL;
    if (addend)
        HQQ_TRY(hqq_lora_addend(addend, N, HQQ_F32, xa, f->bias, f->bias_dtype, f->lora, M, 0,
                                N, context));
    return hqq_direct_linear(f->y, f->x, f->ldx, f->weight, addend, M, f->dtype, plan.inner,
                             hqq_isa_in_use(context), context);
}

/* dx = dy W + scaling drop'(dyb A) */
static hqq_status backward_dx(const hqq_backward *b, const float *dyb, const product_plan *plan,
                              const hqq_context *context)
{
    int64_t M = b->M, K = b->weight->in_features;
    if (plan->kernel == HQQ_KERNEL_BLOCKED)
        return hqq_blocked_dgrad(b, dyb, plan->inner, context);
    if (plan->kernel == HQQ_KERNEL_TILED) return hqq_tiled_dgrad(b, dyb, plan->inner, context);
    float *addend = b->lora ? plan->addend : NULL;
    if (addend)
        HQQ_TRY(hqq_lora_dx_addend(addend, K, HQQ_F32, dyb, b->lora, M, K, 0, K, context));
    return hqq_direct_dgrad(b->dx, b->dy, b->lddy, b->weight, addend, M, b->dtype, plan->inner,
                            hqq_isa_in_use(context), context);
}

static hqq_status backward_dB(const hqq_backward *b, const product_plan *plan,
                              const hqq_context *context)
{
    int64_t M = b->M, N = b->weight->out_features, K = b->weight->in_features;
    const float *xa = b->xa;
    if (!xa) {
        HQQ_TRY(hqq_lora_xa(plan->xa, b->x, b->ldx, b->dtype, b->lora, M, K, context));
        xa = plan->xa;
    }
    return hqq_lora_dB(b->dB, b->dy, b->lddy, b->dtype, xa, b->lora, M, N, context);
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
    if (b->lora && !b->given_dyb && (b->dx || b->dA))
        HQQ_TRY(hqq_lora_dyb(plan.dyb, b->dy, b->lddy, b->dtype, b->lora, M, N, context));
    if (b->dB) HQQ_TRY(backward_dB(b, &plan, context));
    if (b->dA) HQQ_TRY(hqq_lora_dA(b->dA, dyb, b->x, b->ldx, b->dtype, b->lora, M, K, context));
    if (b->dx) HQQ_TRY(backward_dx(b, dyb, &plan, context));
    return HQQ_OK;
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
    return hqq_lora_xa(xa, x, ldx, dtype, lora, M, K, context);
}

hqq_status hqq_backend_lora_factor_gradients(float *dyb, void *dB, const void *dy, int64_t lddy,
                                             const float *xa, const hqq_lora *lora, int64_t M,
                                             int64_t N, hqq_dtype dtype, void *workspace,
                                             const hqq_context *context)
{
    (void)workspace;
    if (dyb) HQQ_TRY(hqq_lora_dyb(dyb, dy, lddy, dtype, lora, M, N, context));
    if (dB) HQQ_TRY(hqq_lora_dB(dB, dy, lddy, dtype, xa, lora, M, N, context));
    return HQQ_OK;
}

void *hqq_backend_allocate(size_t bytes)
{
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

void hqq_backend_free(void *memory)
{
    free(memory);
}

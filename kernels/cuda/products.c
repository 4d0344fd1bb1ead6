/*
 * From a request to its kernels: choose, compute the LoRA sides, multiply with the frozen
 * weight.
 *
 *     forward    xa = drop(x) A^T;   y  = x W^T + addend(bias, xa, B)
 *     backward   dyb = dy B;   dB = s dy^T xa;   dA = s dyb^T drop(x);
 *                dx = dy W + addend(dyb, A, drop')
 *
 * Small products add the addend themselves, in fp32; others find it in memory, rounded to
 * y's dtype. All is enqueued on the context's stream: nothing waits or allocates, so a CUDA
 * graph can capture it.
 */
#include "backend.h"

#include "addend.h"
#include "dequantize.h"
#include "device.h"
#include "large_product.h"
#include "lora.h"
#include "pack.h"
#include "plan.h"
#include "quantize.h"
#include "reference.h"
#include "small_product.h"
#include "status.h"
#include "wide_product.h"
#include "workspace.h"

static void *stream_of(const hqq_context *context)
{
    return context ? context->stream : NULL;
}

/* How one call is served, and where in the workspace its parts are. Parts that a call turns
 * out not to need are there all the same, so that its size is known beforehand. */
typedef struct product_plan {
    hqq_cuda_device device;
    hqq_kernel kernel;
    float *xa;     /* [M,R], if the caller has none */
    float *dyb;    /* [M,R], backward */
    void *scratch; /* of the LoRA sums, and after them of the product */
} product_plan;

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static product_plan make_plan(hqq_arena *arena, const hqq_cuda_device *device,
                              const hqq_weight *weight, const hqq_lora *lora, int64_t M,
                              hqq_dtype dtype, int transpose, const hqq_context *context)
{
    product_plan plan = {.device = *device};
    plan.kernel = hqq_cuda_kernel_for(weight, M, dtype, transpose,
                                      context ? context->kernel : HQQ_KERNEL_AUTO, device);
    if (plan.kernel == HQQ_KERNEL_REFERENCE) return plan;
    size_t scratch = 0;
    if (lora) {
        plan.xa = hqq_arena_take(arena, (size_t)(M * lora->rank) * sizeof(float));
        if (transpose)
            plan.dyb = hqq_arena_take(arena, (size_t)(M * lora->rank) * sizeof(float));
        scratch =
            hqq_cuda_lora_workspace(lora, M, weight->out_features, weight->in_features, device);
    }
    if (plan.kernel == HQQ_KERNEL_DIRECT)
        scratch =
            larger(scratch, hqq_cuda_small_workspace(weight, M, dtype, transpose, device));
    if (plan.kernel == HQQ_KERNEL_TILED)
        scratch = larger(scratch, hqq_cuda_wide_workspace(weight, M, transpose, device));
    if (plan.kernel == HQQ_KERNEL_BLOCKED)
        scratch = larger(
            scratch, hqq_cuda_large_workspace(weight, M, dtype, transpose, device, context));
    plan.scratch = hqq_arena_take(arena, scratch);
    return plan;
}

hqq_status hqq_backend_workspace_size(size_t *bytes, const hqq_weight *weight,
                                      const hqq_lora *lora, int64_t M, hqq_dtype dtype,
                                      const hqq_context *context)
{
    hqq_cuda_device device;
    hqq_arena forward = {0}, backward = {0};
    HQQ_TRY(hqq_cuda_current_device(&device));
    make_plan(&forward, &device, weight, lora, M, dtype, 0, context);
    make_plan(&backward, &device, weight, lora, M, dtype, 1, context);
    *bytes = larger(forward.used, backward.used);
    return HQQ_OK;
}

/* out = in op(W) + addend, by the kernel of the plan. */
static hqq_status multiply(void *out, const void *in, int64_t ld_in, const hqq_weight *weight,
                           const hqq_addend *addend, int64_t M, hqq_dtype dtype, int transpose,
                           const product_plan *plan, const hqq_context *context)
{
    if (plan->kernel == HQQ_KERNEL_DIRECT)
        return hqq_cuda_small_product(out, in, ld_in, weight, addend, M, dtype, transpose,
                                      plan->scratch, &plan->device, stream_of(context));
    if (plan->kernel == HQQ_KERNEL_TILED)
        return hqq_cuda_wide_product(out, in, ld_in, weight, addend, M, dtype, transpose,
                                     plan->scratch, &plan->device, stream_of(context));
    return hqq_cuda_large_product(out, in, ld_in, weight, addend, M, dtype, transpose,
                                  plan->scratch, &plan->device, context);
}

/* ---- forward ---------------------------------------------------------------------------- */

/* bias + scaling xa B^T */
static hqq_addend forward_addend(const hqq_forward *f, const float *xa)
{
    hqq_addend addend = {.bias = f->bias, .bias_dtype = f->bias_dtype};
    if (!f->lora) return addend;
    addend.left = xa;
    addend.rank = f->lora->rank;
    addend.right = f->lora->B; /* [N,R] */
    addend.right_dtype = f->lora->dtype;
    addend.right_rank_stride = 1;
    addend.right_output_stride = f->lora->rank;
    addend.scaling = f->lora->scaling;
    return addend;
}

hqq_status hqq_backend_forward(const hqq_forward *f, void *workspace,
                               const hqq_context *context)
{
    int64_t M = f->M, N = f->weight->out_features, K = f->weight->in_features;
    if (N == 0 || K == 0) /* K = 0: y is the bias, xa zero; N = 0: xa alone */
        return hqq_cuda_reference_forward(f, stream_of(context));
    hqq_cuda_device device;
    HQQ_TRY(hqq_cuda_current_device(&device));
    hqq_arena arena = {.base = workspace};
    product_plan plan = make_plan(&arena, &device, f->weight, f->lora, M, f->dtype, 0, context);
    if (plan.kernel == HQQ_KERNEL_REFERENCE)
        return hqq_cuda_reference_forward(f, stream_of(context));

    const float *xa = f->given_xa;
    if (f->lora && !xa) {
        float *computed = f->xa ? f->xa : plan.xa;
        HQQ_TRY(hqq_cuda_lora_xa(computed, f->x, f->ldx, f->dtype, f->lora, M, K, plan.scratch,
                                 &device, stream_of(context)));
        xa = computed;
    }
    hqq_addend addend = forward_addend(f, xa);
    return multiply(f->y, f->x, f->ldx, f->weight, &addend, M, f->dtype, 0, &plan, context);
}

/* ---- backward --------------------------------------------------------------------------- */

/* scaling drop'(dyb A) */
static hqq_addend backward_addend(const hqq_lora *lora, const float *dyb, int64_t K)
{
    hqq_addend addend = {0};
    if (!lora) return addend;
    addend.left = dyb;
    addend.rank = lora->rank;
    addend.right = lora->A; /* [R,K] */
    addend.right_dtype = lora->dtype;
    addend.right_rank_stride = K;
    addend.right_output_stride = 1;
    addend.scaling = lora->scaling;
    addend.drops = lora->dropout > 0.0f;
    addend.dropout = hqq_dropout_source_of(lora);
    return addend;
}

static hqq_status backward_dB(const hqq_backward *b, const product_plan *plan, void *stream)
{
    int64_t M = b->M, N = b->weight->out_features, K = b->weight->in_features;
    const float *xa = b->xa;
    if (!xa) {
        HQQ_TRY(hqq_cuda_lora_xa(plan->xa, b->x, b->ldx, b->dtype, b->lora, M, K, plan->scratch,
                                 &plan->device, stream));
        xa = plan->xa;
    }
    return hqq_cuda_lora_dB(b->dB, b->dy, b->lddy, b->dtype, xa, b->lora, M, N, plan->scratch,
                            &plan->device, stream);
}

static hqq_status fill_zero(void *data, int64_t elements, hqq_dtype dtype, void *stream)
{
    if (!data) return HQQ_OK;
    return hqq_cuda_fill_zero(data, (size_t)elements * (size_t)hqq_dtype_bytes(dtype), stream);
}

/* Gradients over nothing. */
static hqq_status fill_gradients_with_zero(const hqq_backward *b, void *stream)
{
    int64_t N = b->weight->out_features, K = b->weight->in_features;
    HQQ_TRY(fill_zero(b->dx, b->M * K, b->dtype, stream));
    if (!b->lora) return HQQ_OK;
    HQQ_TRY(fill_zero(b->dA, b->lora->rank * K, b->lora->dtype, stream));
    return fill_zero(b->dB, N * b->lora->rank, b->lora->dtype, stream);
}

hqq_status hqq_backend_backward(const hqq_backward *b, void *workspace,
                                const hqq_context *context)
{
    int64_t M = b->M, N = b->weight->out_features, K = b->weight->in_features;
    void *stream = stream_of(context);
    if (M == 0 || K == 0 || (N == 0 && !b->given_dyb))
        return fill_gradients_with_zero(b, stream);
    if (N == 0) return hqq_cuda_reference_backward(b, stream); /* the adapter's part alone */
    hqq_cuda_device device;
    HQQ_TRY(hqq_cuda_current_device(&device));
    hqq_arena arena = {.base = workspace};
    product_plan plan = make_plan(&arena, &device, b->weight, b->lora, M, b->dtype, 1, context);
    if (plan.kernel == HQQ_KERNEL_REFERENCE) return hqq_cuda_reference_backward(b, stream);

    const float *dyb = b->given_dyb ? b->given_dyb : plan.dyb;
    if (b->lora && !b->given_dyb && (b->dx || b->dA))
        HQQ_TRY(hqq_cuda_lora_dyb(plan.dyb, b->dy, b->lddy, b->dtype, b->lora, M, N,
                                  plan.scratch, &device, stream));
    if (b->dB) HQQ_TRY(backward_dB(b, &plan, stream));
    if (b->dA)
        HQQ_TRY(hqq_cuda_lora_dA(b->dA, dyb, b->x, b->ldx, b->dtype, b->lora, M, K,
                                 plan.scratch, &device, stream));
    if (!b->dx) return HQQ_OK;
    hqq_addend addend = backward_addend(b->lora, dyb, K);
    return multiply(b->dx, b->dy, b->lddy, b->weight, &addend, M, b->dtype, 1, &plan, context);
}

/* ---- the adapter alone ------------------------------------------------------------------ */

hqq_status hqq_backend_lora_workspace_size(size_t *bytes, const hqq_lora *lora, int64_t M,
                                           int64_t N, int64_t K)
{
    hqq_cuda_device device;
    HQQ_TRY(hqq_cuda_current_device(&device));
    *bytes = hqq_cuda_lora_workspace(lora, M, N, K, &device);
    return HQQ_OK;
}

hqq_status hqq_backend_lora_project(float *xa, const void *x, int64_t ldx, const hqq_lora *lora,
                                    int64_t M, int64_t K, hqq_dtype dtype, void *workspace,
                                    const hqq_context *context)
{
    hqq_cuda_device device;
    HQQ_TRY(hqq_cuda_current_device(&device));
    return hqq_cuda_lora_xa(xa, x, ldx, dtype, lora, M, K, workspace, &device,
                            stream_of(context));
}

hqq_status hqq_backend_lora_factor_gradients(float *dyb, void *dB, const void *dy, int64_t lddy,
                                             const float *xa, const hqq_lora *lora, int64_t M,
                                             int64_t N, hqq_dtype dtype, void *workspace,
                                             const hqq_context *context)
{
    hqq_cuda_device device;
    HQQ_TRY(hqq_cuda_current_device(&device));
    void *stream = stream_of(context);
    if (dyb)
        HQQ_TRY(
            hqq_cuda_lora_dyb(dyb, dy, lddy, dtype, lora, M, N, workspace, &device, stream));
    if (dB)
        HQQ_TRY(
            hqq_cuda_lora_dB(dB, dy, lddy, dtype, xa, lora, M, N, workspace, &device, stream));
    return HQQ_OK;
}

/* ---- the weight alone ------------------------------------------------------------------- */

hqq_status hqq_backend_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                                  const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                                  int64_t column_begin, int64_t column_end,
                                  const hqq_context *context)
{
    return hqq_cuda_dequantize(out, ld_out, out_dtype, weight, row_begin, row_end, column_begin,
                               column_end, stream_of(context));
}

hqq_status hqq_backend_pack(void *packed, const uint8_t *codes, const hqq_weight *weight,
                            const hqq_context *context)
{
    return hqq_cuda_pack(packed, codes, weight, stream_of(context));
}

hqq_status hqq_backend_unpack(uint8_t *codes, const hqq_weight *weight,
                              const hqq_context *context)
{
    return hqq_cuda_unpack(codes, weight, stream_of(context));
}

hqq_status hqq_backend_repack(void *packed, hqq_packing packing, const hqq_weight *weight,
                              const hqq_context *context)
{
    return hqq_cuda_repack(packed, packing, weight, stream_of(context));
}

hqq_status hqq_backend_quantize(void *packed, void *scale, void *zero, const void *W,
                                hqq_dtype W_dtype, const hqq_weight *weight,
                                const hqq_quantize_options *options, const hqq_context *context)
{
    return hqq_cuda_quantize(packed, scale, zero, W, W_dtype, weight, options,
                             stream_of(context));
}

/* Device memory is the caller's business: an allocation would wait for the device. */
void *hqq_backend_allocate(size_t bytes)
{
    (void)bytes;
    return NULL;
}

void hqq_backend_free(void *memory)
{
    (void)memory;
}

/* Entry points of the products of mixtures of experts: check all rows at once, as if they had
 * one weight, find workspace for the largest expert, call. */
#include "products.h"

#include "checks.h"
#include "experts.h"
#include "status.h"

static hqq_status check_routing(const hqq_routing *routing)
{
    if (!routing) return hqq_fail(HQQ_INVALID, "routing is NULL");
    if (routing->experts < 1)
        return hqq_fail(HQQ_INVALID, "routing.experts is %lld; expected at least 1",
                        (long long)routing->experts);
    const int64_t *offsets = routing->offsets;
    if (!offsets) return hqq_fail(HQQ_INVALID, "routing.offsets is NULL");
    HQQ_TRY(hqq_check_aligned("routing.offsets", offsets, sizeof *offsets));
    if (offsets[0] != 0)
        return hqq_fail(HQQ_INVALID, "routing.offsets[0] is %lld; expected 0",
                        (long long)offsets[0]);
    for (int64_t e = 0; e < routing->experts; e++)
        if (offsets[e + 1] < offsets[e])
            return hqq_fail(
                HQQ_INVALID, "routing.offsets[%lld] is %lld, less than the %lld before it",
                (long long)(e + 1), (long long)offsets[e + 1], (long long)offsets[e]);
    return HQQ_OK;
}

/* All experts' arrays, one behind the other. */
static hqq_status check_experts(const hqq_routing *routing, const hqq_weight *weight,
                                const hqq_lora *lora)
{
    int64_t N = weight->out_features, K = weight->in_features;
    int64_t of_lora = lora ? lora->rank * (N > K ? N : K) : 0;
    if (!hqq_too_many(routing->experts, N * K) && !hqq_too_many(routing->experts, of_lora))
        return HQQ_OK;
    return hqq_fail(HQQ_INVALID,
                    "routing.experts is %lld, of %lld x %lld and rank %lld; that is more than "
                    "2^56 elements",
                    (long long)routing->experts, (long long)N, (long long)K,
                    (long long)(lora ? lora->rank : 0));
}

static int64_t rows_of(const hqq_routing *routing)
{
    return routing->offsets[routing->experts];
}

/* Experts take turns, so the most that one of them needs. Its codes' alignment counts. */
static hqq_status bytes_of_largest(size_t *bytes, const hqq_weight *weight,
                                   const hqq_lora *lora, const hqq_routing *routing,
                                   hqq_dtype dtype, const hqq_context *context)
{
    *bytes = 0;
    for (int64_t e = 0; e < routing->experts; e++) {
        hqq_weight of_expert;
        size_t needed;
        hqq_weight_of_expert(&of_expert, weight, e);
        HQQ_TRY(hqq_bytes_needed(&needed, &of_expert, lora, hqq_rows_of_expert(routing, e),
                                 dtype, context));
        if (needed > *bytes) *bytes = needed;
    }
    return HQQ_OK;
}

hqq_status hqq_grouped_workspace_size(size_t *bytes, const hqq_weight *weight,
                                      const hqq_lora *lora, const hqq_routing *routing,
                                      hqq_dtype dtype, const hqq_context *context)
{
    hqq_clear_error();
    HQQ_TRY(check_routing(routing));
    HQQ_TRY(hqq_prepare_workspace_size(bytes, weight, &lora, rows_of(routing), dtype, context));
    HQQ_TRY(check_experts(routing, weight, lora));
    return bytes_of_largest(bytes, weight, lora, routing, dtype, context);
}

static hqq_status forward(hqq_forward *f, const hqq_routing *routing, void *workspace,
                          size_t workspace_bytes, const hqq_context *context)
{
    HQQ_TRY(check_routing(routing));
    f->M = rows_of(routing);
    HQQ_TRY(hqq_prepare_forward(f, context));
    HQQ_TRY(check_experts(routing, f->weight, f->lora));
    if (hqq_is_empty_forward(f)) return HQQ_OK;
    hqq_borrowed_workspace w;
    size_t needed;
    HQQ_TRY(bytes_of_largest(&needed, f->weight, f->lora, routing, f->dtype, context));
    HQQ_TRY(hqq_borrow_workspace(&w, needed, workspace, workspace_bytes));
    hqq_status status = hqq_backend_grouped_forward(f, routing, w.memory, context);
    hqq_return_workspace(&w);
    return status;
}

hqq_status hqq_grouped_linear(void *y, const void *x, int64_t ldx, const hqq_weight *weight,
                              const hqq_routing *routing, hqq_dtype dtype, void *workspace,
                              size_t workspace_bytes, const hqq_context *context)
{
    hqq_clear_error();
    hqq_forward f = {.y = y, .x = x, .ldx = ldx, .weight = weight, .dtype = dtype};
    return forward(&f, routing, workspace, workspace_bytes, context);
}

hqq_status hqq_grouped_lora_linear(void *y, float *xa, const void *x, int64_t ldx,
                                   const hqq_weight *weight, const hqq_lora *lora,
                                   const hqq_routing *routing, hqq_dtype dtype, void *workspace,
                                   size_t workspace_bytes, const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_forward f = {
        .y = y, .xa = xa, .x = x, .ldx = ldx, .weight = weight, .lora = lora, .dtype = dtype};
    return forward(&f, routing, workspace, workspace_bytes, context);
}

static hqq_status backward(hqq_backward *b, const hqq_routing *routing, void *workspace,
                           size_t workspace_bytes, const hqq_context *context)
{
    HQQ_TRY(check_routing(routing));
    b->M = rows_of(routing);
    HQQ_TRY(hqq_prepare_backward(b, context));
    HQQ_TRY(check_experts(routing, b->weight, b->lora));
    if (!b->dx && !b->dA && !b->dB) return HQQ_OK;
    hqq_borrowed_workspace w;
    size_t needed;
    HQQ_TRY(bytes_of_largest(&needed, b->weight, b->lora, routing, b->dtype, context));
    HQQ_TRY(hqq_borrow_workspace(&w, needed, workspace, workspace_bytes));
    hqq_status status = hqq_backend_grouped_backward(b, routing, w.memory, context);
    hqq_return_workspace(&w);
    return status;
}

hqq_status hqq_grouped_linear_dgrad(void *dx, const void *dy, int64_t lddy,
                                    const hqq_weight *weight, const hqq_routing *routing,
                                    hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                                    const hqq_context *context)
{
    hqq_clear_error();
    hqq_backward b = {.dx = dx, .dy = dy, .lddy = lddy, .weight = weight, .dtype = dtype};
    HQQ_TRY(check_routing(routing));
    if (!dx && rows_of(routing) > 0 && weight && weight->in_features > 0)
        return hqq_fail(HQQ_INVALID, "dx is NULL");
    return backward(&b, routing, workspace, workspace_bytes, context);
}

hqq_status hqq_grouped_lora_linear_backward(void *dx, void *dA, void *dB, const void *dy,
                                            int64_t lddy, const void *x, int64_t ldx,
                                            const float *xa, const hqq_weight *weight,
                                            const hqq_lora *lora, const hqq_routing *routing,
                                            hqq_dtype dtype, void *workspace,
                                            size_t workspace_bytes, const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_backward b = {.dx = dx,
                      .dA = dA,
                      .dB = dB,
                      .dy = dy,
                      .lddy = lddy,
                      .x = x,
                      .ldx = ldx,
                      .xa = xa,
                      .weight = weight,
                      .lora = lora,
                      .dtype = dtype};
    return backward(&b, routing, workspace, workspace_bytes, context);
}

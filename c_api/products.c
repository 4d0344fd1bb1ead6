/* Entry points of the products: check, settle the empty shapes, find workspace, call. */
#include "products.h"

#include "checks.h"
#include "dtype.h"
#include "status.h"

hqq_status hqq_borrow_workspace(hqq_borrowed_workspace *w, size_t needed, void *given,
                                size_t given_bytes)
{
    w->owned = 0;
    w->memory = given;
    if (given) {
        if (given_bytes < needed)
            return hqq_fail(HQQ_NO_MEMORY, "workspace is %zu bytes; %zu are needed",
                            given_bytes, needed);
        if ((uintptr_t)given % 64 != 0)
            return hqq_fail(HQQ_INVALID, "workspace at %p is not 64-byte aligned", given);
        return HQQ_OK;
    }
    if (needed == 0) return HQQ_OK;
    w->memory = hqq_backend_allocate(needed);
    if (!w->memory)
        return hqq_fail(HQQ_NO_MEMORY,
                        "workspace is NULL; %zu bytes are needed, and the library could not "
                        "allocate them (on an accelerator it never does: give them)",
                        needed);
    w->owned = 1;
    return HQQ_OK;
}

void hqq_return_workspace(hqq_borrowed_workspace *w)
{
    if (w->owned) hqq_backend_free(w->memory);
}

/* An adapter of rank 0 adds nothing: below this room it does not exist. */
static const hqq_lora *effective(const hqq_lora *lora)
{
    return lora && lora->rank > 0 ? lora : NULL;
}

hqq_status hqq_bytes_needed(size_t *bytes, const hqq_weight *weight, const hqq_lora *lora,
                            int64_t M, hqq_dtype dtype, const hqq_context *context)
{
    *bytes = 0;
    if (M == 0 || weight->out_features == 0 || weight->in_features == 0) return HQQ_OK;
    return hqq_backend_workspace_size(bytes, weight, lora, M, dtype, context);
}

/* The largest things that a product can have: [M,K], [M,N] and [M,R]. */
static hqq_status check_tokens(int64_t M, const hqq_weight *weight, const hqq_lora *lora)
{
    int64_t width = weight->out_features + weight->in_features + (lora ? lora->rank : 0);
    if (!hqq_too_many(M, width)) return HQQ_OK;
    return hqq_fail(HQQ_INVALID,
                    "M is %lld; that many rows of %lld are more than 2^56 elements",
                    (long long)M, (long long)width);
}

void hqq_settle_stride(int64_t *ld, int64_t rows, int64_t columns)
{
    if (rows <= 1 || columns == 0) *ld = columns;
}

hqq_status hqq_prepare_workspace_size(const size_t *bytes, const hqq_weight *weight,
                                      const hqq_lora **lora, int64_t M, hqq_dtype dtype,
                                      const hqq_context *context)
{
    if (!bytes) return hqq_fail(HQQ_INVALID, "bytes is NULL");
    HQQ_TRY(hqq_check_aligned("bytes", bytes, sizeof *bytes));
    HQQ_TRY(hqq_check_shape(weight));
    HQQ_TRY(hqq_check_dtype("dtype", dtype));
    HQQ_TRY(hqq_check_context(context));
    if (M < 0) return hqq_fail(HQQ_INVALID, "M is %lld; expected at least 0", (long long)M);
    if (*lora) HQQ_TRY(hqq_check_lora(*lora, weight, dtype));
    HQQ_TRY(check_tokens(M, weight, *lora));
    *lora = effective(*lora);
    return HQQ_OK;
}

hqq_status hqq_workspace_size(size_t *bytes, const hqq_weight *weight, const hqq_lora *lora,
                              int64_t M, hqq_dtype dtype, const hqq_context *context)
{
    hqq_clear_error();
    HQQ_TRY(hqq_prepare_workspace_size(bytes, weight, &lora, M, dtype, context));
    return hqq_bytes_needed(bytes, weight, lora, M, dtype, context);
}

hqq_status hqq_prepare_forward(hqq_forward *f, const hqq_context *context)
{
    HQQ_TRY(hqq_check_weight(f->weight));
    HQQ_TRY(hqq_check_dtype("dtype", f->dtype));
    HQQ_TRY(hqq_check_context(context));
    int64_t N = f->weight->out_features, K = f->weight->in_features;
    HQQ_TRY(hqq_check_matrix("x", f->x, f->M, K, f->ldx, f->dtype));
    HQQ_TRY(hqq_check_matrix("y", f->y, f->M, N, N, f->dtype));
    if (f->bias) {
        HQQ_TRY(hqq_check_dtype("bias_dtype", f->bias_dtype));
        HQQ_TRY(hqq_check_aligned("bias", f->bias, hqq_dtype_bytes(f->bias_dtype)));
    }
    HQQ_TRY(hqq_check_aligned("xa", f->xa, sizeof(float)));
    if (f->lora) HQQ_TRY(hqq_check_factors(f->lora, f->weight, f->dtype, !f->given_xa, 1));
    HQQ_TRY(check_tokens(f->M, f->weight, f->lora));
    hqq_settle_stride(&f->ldx, f->M, K);
    f->lora = effective(f->lora);
    return HQQ_OK;
}

int hqq_is_empty_forward(const hqq_forward *f)
{
    int wants_xa = f->xa && f->lora;
    return f->M == 0 || (f->weight->out_features == 0 && !wants_xa);
}

hqq_status hqq_run_forward(hqq_forward *f, void *workspace, size_t workspace_bytes,
                           const hqq_context *context)
{
    HQQ_TRY(hqq_prepare_forward(f, context));
    if (hqq_is_empty_forward(f)) return HQQ_OK;
    hqq_borrowed_workspace w;
    size_t needed;
    HQQ_TRY(hqq_bytes_needed(&needed, f->weight, f->lora, f->M, f->dtype, context));
    HQQ_TRY(hqq_borrow_workspace(&w, needed, workspace, workspace_bytes));
    hqq_status status = hqq_backend_forward(f, w.memory, context);
    hqq_return_workspace(&w);
    return status;
}

hqq_status hqq_linear(void *y, const void *x, int64_t ldx, const hqq_weight *weight,
                      const void *bias, hqq_dtype bias_dtype, int64_t M, hqq_dtype dtype,
                      void *workspace, size_t workspace_bytes, const hqq_context *context)
{
    hqq_clear_error();
    hqq_forward f = {.y = y,
                     .x = x,
                     .ldx = ldx,
                     .weight = weight,
                     .bias = bias,
                     .bias_dtype = bias_dtype,
                     .M = M,
                     .dtype = dtype};
    return hqq_run_forward(&f, workspace, workspace_bytes, context);
}

hqq_status hqq_lora_linear(void *y, float *xa, const void *x, int64_t ldx,
                           const hqq_weight *weight, const void *bias, hqq_dtype bias_dtype,
                           const hqq_lora *lora, int64_t M, hqq_dtype dtype, void *workspace,
                           size_t workspace_bytes, const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_forward f = {.y = y,
                     .xa = xa,
                     .x = x,
                     .ldx = ldx,
                     .weight = weight,
                     .bias = bias,
                     .bias_dtype = bias_dtype,
                     .lora = lora,
                     .M = M,
                     .dtype = dtype};
    return hqq_run_forward(&f, workspace, workspace_bytes, context);
}

hqq_status hqq_prepare_backward(hqq_backward *b, const hqq_context *context)
{
    HQQ_TRY(hqq_check_weight(b->weight));
    HQQ_TRY(hqq_check_dtype("dtype", b->dtype));
    HQQ_TRY(hqq_check_context(context));
    int64_t N = b->weight->out_features, K = b->weight->in_features;
    if (b->dx || !b->given_dyb)
        HQQ_TRY(hqq_check_matrix("dy", b->dy, b->M, N, b->lddy, b->dtype));
    if (b->lora) HQQ_TRY(hqq_check_factors(b->lora, b->weight, b->dtype, 1, !b->given_dyb));
    HQQ_TRY(check_tokens(b->M, b->weight, b->lora));
    hqq_settle_stride(&b->lddy, b->M, N);
    b->lora = effective(b->lora);
    if (!b->lora) b->dA = b->dB = NULL;
    HQQ_TRY(hqq_check_aligned("dx", b->dx, hqq_dtype_bytes(b->dtype)));
    if (b->lora) {
        HQQ_TRY(hqq_check_aligned("dA", b->dA, hqq_dtype_bytes(b->lora->dtype)));
        HQQ_TRY(hqq_check_aligned("dB", b->dB, hqq_dtype_bytes(b->lora->dtype)));
        HQQ_TRY(hqq_check_aligned("xa", b->xa, sizeof(float)));
    }
    if (b->dA || (b->dB && !b->xa))
        HQQ_TRY(hqq_check_matrix("x", b->x, b->M, K, b->ldx, b->dtype));
    else
        b->ldx = K; /* nobody reads x: its stride may be anything */
    hqq_settle_stride(&b->ldx, b->M, K);
    return HQQ_OK;
}

hqq_status hqq_run_backward(hqq_backward *b, void *workspace, size_t workspace_bytes,
                            const hqq_context *context)
{
    HQQ_TRY(hqq_prepare_backward(b, context));
    if (!b->dx && !b->dA && !b->dB) return HQQ_OK;
    hqq_borrowed_workspace w;
    size_t needed;
    HQQ_TRY(hqq_bytes_needed(&needed, b->weight, b->lora, b->M, b->dtype, context));
    HQQ_TRY(hqq_borrow_workspace(&w, needed, workspace, workspace_bytes));
    hqq_status status = hqq_backend_backward(b, w.memory, context);
    hqq_return_workspace(&w);
    return status;
}

hqq_status hqq_linear_dgrad(void *dx, const void *dy, int64_t lddy, const hqq_weight *weight,
                            int64_t M, hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                            const hqq_context *context)
{
    hqq_clear_error();
    hqq_backward b = {
        .dx = dx, .dy = dy, .lddy = lddy, .weight = weight, .M = M, .dtype = dtype};
    if (!dx && M > 0 && weight && weight->in_features > 0)
        return hqq_fail(HQQ_INVALID, "dx is NULL");
    return hqq_run_backward(&b, workspace, workspace_bytes, context);
}

hqq_status hqq_lora_linear_backward(void *dx, void *dA, void *dB, const void *dy, int64_t lddy,
                                    const void *x, int64_t ldx, const float *xa,
                                    const hqq_weight *weight, const hqq_lora *lora, int64_t M,
                                    hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                                    const hqq_context *context)
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
                      .M = M,
                      .dtype = dtype};
    return hqq_run_backward(&b, workspace, workspace_bytes, context);
}

/* Entry points of the products of layers that share their input: each half of an adapter by
 * itself. What they compute is in hqqlora.h; the halves meet the weight in products.c. */
#include "checks.h"
#include "dtype.h"
#include "products.h"
#include "status.h"

/* The shape of a weight of which N = 0 or K = 0: there is none to read. */
static hqq_weight shape_of(int64_t N, int64_t K)
{
    return (hqq_weight){
        .out_features = N, .in_features = K, .group_size = 1, .nbits = 8, .axis = 1};
}

/* The adapter without dropout, which these products do not have. */
static hqq_lora without_dropout(const hqq_lora *lora)
{
    hqq_lora plain = *lora;
    plain.dropout = 0.0f;
    return plain;
}

/* Of no rows, or of rank 0, there need be no memory: but that it is given stays said. */
static const float *given_or_empty(const float *matrix)
{
    static const float empty;
    return matrix ? matrix : &empty;
}

static hqq_status check_given(const char *name, const float *matrix, int64_t M, int64_t R)
{
    return hqq_check_matrix(name, matrix, M, R, R, HQQ_F32);
}

static hqq_status lora_bytes_needed(size_t *bytes, const hqq_weight *weight,
                                    const hqq_lora *lora, int64_t M)
{
    *bytes = 0;
    if (M == 0 || !lora || lora->rank == 0) return HQQ_OK;
    return hqq_backend_lora_workspace_size(bytes, lora, M, weight->out_features,
                                           weight->in_features);
}

hqq_status hqq_shared_input_workspace_size(size_t *bytes, const hqq_weight *weight,
                                           const hqq_lora *lora, int64_t M, hqq_dtype dtype,
                                           const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_lora shape = without_dropout(lora);
    shape.A = shape.B = &shape; /* (not read) */
    const hqq_lora *effective = &shape;
    HQQ_TRY(hqq_prepare_workspace_size(bytes, weight, &effective, M, dtype, context));
    if (weight->out_features == 0 || weight->in_features == 0)
        return lora_bytes_needed(bytes, weight, effective, M);
    return hqq_bytes_needed(bytes, weight, effective, M, dtype, context);
}

hqq_status hqq_lora_project(float *xa, const void *x, int64_t ldx, const hqq_lora *lora,
                            int64_t M, int64_t K, hqq_dtype dtype, void *workspace,
                            size_t workspace_bytes, const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_weight none = shape_of(0, K);
    hqq_lora plain = without_dropout(lora);
    HQQ_TRY(hqq_check_shape(&none));
    HQQ_TRY(hqq_check_dtype("dtype", dtype));
    HQQ_TRY(hqq_check_context(context));
    HQQ_TRY(hqq_check_matrix("x", x, M, K, ldx, dtype));
    HQQ_TRY(hqq_check_factors(&plain, &none, dtype, 1, 0));
    HQQ_TRY(check_given("xa", xa, M, plain.rank));
    hqq_settle_stride(&ldx, M, K);
    if (M == 0 || plain.rank == 0) return HQQ_OK;
    if (K == 0) { /* zero */
        hqq_forward f = {.xa = xa, .weight = &none, .lora = &plain, .M = M, .dtype = dtype};
        return hqq_backend_forward(&f, NULL, context);
    }
    hqq_borrowed_workspace w;
    size_t needed;
    HQQ_TRY(lora_bytes_needed(&needed, &none, &plain, M));
    HQQ_TRY(hqq_borrow_workspace(&w, needed, workspace, workspace_bytes));
    hqq_status status =
        hqq_backend_lora_project(xa, x, ldx, &plain, M, K, dtype, w.memory, context);
    hqq_return_workspace(&w);
    return status;
}

hqq_status hqq_lora_linear_from_xa(void *y, const float *xa, const void *x, int64_t ldx,
                                   const hqq_weight *weight, const void *bias,
                                   hqq_dtype bias_dtype, const hqq_lora *lora, int64_t M,
                                   hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                                   const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_lora plain = without_dropout(lora);
    if (!xa && M > 0 && plain.rank > 0) return hqq_fail(HQQ_INVALID, "xa is NULL");
    HQQ_TRY(hqq_check_aligned("xa", xa, sizeof(float)));
    hqq_forward f = {.y = y,
                     .x = x,
                     .ldx = ldx,
                     .weight = weight,
                     .bias = bias,
                     .bias_dtype = bias_dtype,
                     .lora = &plain,
                     .M = M,
                     .dtype = dtype,
                     .given_xa = given_or_empty(xa)};
    return hqq_run_forward(&f, workspace, workspace_bytes, context);
}

/* Gradients over no rows, or of no outputs. */
static hqq_status empty_factor_gradients(float *dyb, void *dB, const hqq_lora *lora, int64_t M,
                                         int64_t N, hqq_dtype dtype, const hqq_context *context)
{
    hqq_weight none = shape_of(N, 0);
    if (M == 0) {
        hqq_backward b = {.dB = dB, .weight = &none, .lora = lora, .dtype = dtype};
        return hqq_backend_backward(&b, NULL, context);
    }
    if (!dyb) return HQQ_OK;
    hqq_forward f = {.xa = dyb, .weight = &none, .lora = lora, .M = M, .dtype = dtype};
    return hqq_backend_forward(&f, NULL, context);
}

hqq_status hqq_lora_factor_gradients(float *dyb, void *dB, const void *dy, int64_t lddy,
                                     const float *xa, const hqq_lora *lora, int64_t M,
                                     int64_t N, hqq_dtype dtype, void *workspace,
                                     size_t workspace_bytes, const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_weight none = shape_of(N, 0);
    hqq_lora plain = without_dropout(lora);
    HQQ_TRY(hqq_check_shape(&none));
    HQQ_TRY(hqq_check_dtype("dtype", dtype));
    HQQ_TRY(hqq_check_context(context));
    HQQ_TRY(hqq_check_matrix("dy", dy, M, N, lddy, dtype));
    HQQ_TRY(hqq_check_factors(&plain, &none, dtype, 0, dyb != NULL));
    if (dyb) HQQ_TRY(check_given("dyb", dyb, M, plain.rank));
    HQQ_TRY(hqq_check_aligned("dyb", dyb, sizeof(float)));
    HQQ_TRY(hqq_check_aligned("dB", dB, hqq_dtype_bytes(plain.dtype)));
    if (dB) HQQ_TRY(check_given("xa", xa, M, plain.rank));
    hqq_settle_stride(&lddy, M, N);
    if (plain.rank == 0 || (!dyb && !dB)) return HQQ_OK;
    if (M == 0 || N == 0) return empty_factor_gradients(dyb, dB, &plain, M, N, dtype, context);
    hqq_borrowed_workspace w;
    size_t needed;
    HQQ_TRY(lora_bytes_needed(&needed, &none, &plain, M));
    HQQ_TRY(hqq_borrow_workspace(&w, needed, workspace, workspace_bytes));
    hqq_status status = hqq_backend_lora_factor_gradients(dyb, dB, dy, lddy, xa, &plain, M, N,
                                                          dtype, w.memory, context);
    hqq_return_workspace(&w);
    return status;
}

hqq_status hqq_lora_input_gradients(void *dx, void *dA, const void *dy, int64_t lddy,
                                    const float *dyb, const void *x, int64_t ldx,
                                    const hqq_weight *weight, const hqq_lora *lora, int64_t M,
                                    hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                                    const hqq_context *context)
{
    hqq_clear_error();
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    hqq_lora plain = without_dropout(lora);
    if (!dyb && M > 0 && plain.rank > 0) return hqq_fail(HQQ_INVALID, "dyb is NULL");
    HQQ_TRY(hqq_check_aligned("dyb", dyb, sizeof(float)));
    hqq_backward b = {.dx = dx,
                      .dA = dA,
                      .dy = dy,
                      .lddy = lddy,
                      .x = x,
                      .ldx = ldx,
                      .weight = weight,
                      .lora = &plain,
                      .M = M,
                      .dtype = dtype,
                      .given_dyb = given_or_empty(dyb)};
    return hqq_run_backward(&b, workspace, workspace_bytes, context);
}

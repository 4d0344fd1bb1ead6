#include "lora.h"

#include "dtype.h"
#include "gemm.h"

/* NULL where nothing is dropped, so that no mask is computed. */
static const hqq_dropout *dropout_of(const hqq_lora *lora, hqq_dropout *storage)
{
    if (lora->dropout == 0.0f) return NULL;
    *storage = hqq_dropout_of(lora);
    return storage;
}

hqq_gemm hqq_lora_xa(hqq_dropout *dropout, float *xa, const void *x, int64_t ldx,
                     hqq_dtype dtype, const hqq_lora *lora, int64_t M, int64_t K)
{
    hqq_gemm g = {.C = xa,
                  .ldc = lora->rank,
                  .C_dtype = HQQ_F32,
                  .m = M,
                  .n = lora->rank,
                  .k = K,
                  .alpha = 1.0f};
    g.A = hqq_view_dropped(x, dtype, ldx, K, dropout_of(lora, dropout));
    g.B = hqq_view_transposed(hqq_view_rows(lora->A, lora->dtype, K));
    return g;
}

hqq_status hqq_lora_addend(void *out, int64_t ld_out, hqq_dtype out_dtype, const float *xa,
                           const void *bias, hqq_dtype bias_dtype, const hqq_lora *lora,
                           int64_t M, int64_t n_begin, int64_t n_end,
                           const hqq_context *context)
{
    hqq_gemm g = {.C = out, .ldc = ld_out, .C_dtype = out_dtype, .m = M, .n = n_end - n_begin};
    if (bias) {
        g.bias = hqq_at(bias, bias_dtype, n_begin);
        g.bias_dtype = bias_dtype;
    }
    if (lora) {
        int64_t R = lora->rank;
        g.k = R;
        g.alpha = lora->scaling;
        g.A = hqq_view_rows(xa, HQQ_F32, R);
        g.B = hqq_view_transposed(
            hqq_view_rows(hqq_at(lora->B, lora->dtype, n_begin * R), lora->dtype, R));
    }
    return hqq_gemm_run(&g, context);
}

hqq_status hqq_lora_addend_turned(float *out, int64_t ld_out, const float *xa,
                                  const hqq_lora *lora, int64_t M, int64_t n_begin,
                                  int64_t n_end, const hqq_context *context)
{
    int64_t R = lora->rank;
    hqq_gemm g = {.C = out,
                  .ldc = ld_out,
                  .C_dtype = HQQ_F32,
                  .m = n_end - n_begin,
                  .n = M,
                  .k = R,
                  .alpha = lora->scaling};
    g.A = hqq_view_rows(hqq_at(lora->B, lora->dtype, n_begin * R), lora->dtype, R);
    g.B = hqq_view_transposed(hqq_view_rows(xa, HQQ_F32, R));
    return hqq_gemm_run(&g, context);
}

hqq_gemm hqq_lora_dyb(float *dyb, const void *dy, int64_t lddy, hqq_dtype dtype,
                      const hqq_lora *lora, int64_t M, int64_t N)
{
    hqq_gemm g = {.C = dyb,
                  .ldc = lora->rank,
                  .C_dtype = HQQ_F32,
                  .m = M,
                  .n = lora->rank,
                  .k = N,
                  .alpha = 1.0f};
    g.A = hqq_view_rows(dy, dtype, lddy);
    g.B = hqq_view_rows(lora->B, lora->dtype, lora->rank);
    return g;
}

hqq_status hqq_lora_dx_addend_rows(void *out, int64_t ld_out, hqq_dtype out_dtype,
                                   const float *dyb, const hqq_lora *lora, int64_t m_begin,
                                   int64_t m_end, int64_t K, int64_t k_begin, int64_t k_end,
                                   const hqq_context *context)
{
    hqq_dropout storage;
    hqq_gemm g = {.C = out,
                  .ldc = ld_out,
                  .C_dtype = out_dtype,
                  .m = m_end - m_begin,
                  .n = k_end - k_begin,
                  .k = lora->rank,
                  .alpha = lora->scaling};
    g.dropout = dropout_of(lora, &storage);
    g.mask_first = m_begin * K + k_begin;
    g.mask_stride = K;
    g.A = hqq_view_rows(dyb, HQQ_F32, lora->rank);
    g.B = hqq_view_rows(hqq_at(lora->A, lora->dtype, k_begin), lora->dtype, K);
    return hqq_gemm_run(&g, context);
}

hqq_status hqq_lora_dx_addend(void *out, int64_t ld_out, hqq_dtype out_dtype, const float *dyb,
                              const hqq_lora *lora, int64_t M, int64_t K, int64_t k_begin,
                              int64_t k_end, const hqq_context *context)
{
    return hqq_lora_dx_addend_rows(out, ld_out, out_dtype, dyb, lora, 0, M, K, k_begin, k_end,
                                   context);
}

hqq_gemm hqq_lora_dA(hqq_dropout *dropout, void *dA, const float *dyb, const void *x,
                     int64_t ldx, hqq_dtype dtype, const hqq_lora *lora, int64_t M, int64_t K)
{
    hqq_gemm g = {.C = dA,
                  .ldc = K,
                  .C_dtype = lora->dtype,
                  .m = lora->rank,
                  .n = K,
                  .k = M,
                  .alpha = lora->scaling};
    g.A = hqq_view_transposed(hqq_view_rows(dyb, HQQ_F32, lora->rank));
    g.B = hqq_view_dropped(x, dtype, ldx, K, dropout_of(lora, dropout));
    return g;
}

hqq_gemm hqq_lora_dB(void *dB, const void *dy, int64_t lddy, hqq_dtype dtype, const float *xa,
                     const hqq_lora *lora, int64_t M, int64_t N)
{
    hqq_gemm g = {.C = dB,
                  .ldc = lora->rank,
                  .C_dtype = lora->dtype,
                  .m = N,
                  .n = lora->rank,
                  .k = M,
                  .alpha = lora->scaling};
    g.A = hqq_view_transposed(hqq_view_rows(dy, dtype, lddy));
    g.B = hqq_view_rows(xa, HQQ_F32, lora->rank);
    return g;
}

#include "reference.h"

void hqq_reference_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                              const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                              int64_t column_begin, int64_t column_end)
{
    for (int64_t n = row_begin; n < row_end; n++)
        for (int64_t k = column_begin; k < column_end; k++)
            hqq_store(out, out_dtype, (n - row_begin) * ld_out + k - column_begin,
                      hqq_reference_element(weight, n, k));
}

void hqq_reference_forward(const hqq_forward *f)
{
    int64_t N = f->weight->out_features, R = f->lora ? f->lora->rank : 0;
    for (int64_t m = 0; m < f->M; m++) {
        double xa[HQQ_MAX_RANK];
        for (int64_t r = 0; r < R; r++) {
            xa[r] = hqq_reference_forward_xa(f, m, r);
            if (f->xa) f->xa[m * R + r] = (float)xa[r];
        }
        for (int64_t n = 0; n < N; n++)
            hqq_store(f->y, f->dtype, m * N + n, (float)hqq_reference_y(f, xa, m, n));
    }
}

static void reference_dx(const hqq_backward *b)
{
    int64_t K = b->weight->in_features, R = b->lora ? b->lora->rank : 0;
    for (int64_t m = 0; m < b->M; m++) {
        double dyb[HQQ_MAX_RANK];
        for (int64_t r = 0; r < R; r++) dyb[r] = hqq_reference_dyb(b, m, r);
        for (int64_t k = 0; k < K; k++)
            hqq_store(b->dx, b->dtype, m * K + k, (float)hqq_reference_dx(b, dyb, m, k));
    }
}

static void reference_dA(const hqq_backward *b)
{
    int64_t K = b->weight->in_features, R = b->lora->rank;
    hqq_dropout dropout = hqq_dropout_of(b->lora);
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < K; k++) {
            double sum = 0;
            for (int64_t m = 0; m < b->M; m++)
                sum += hqq_reference_dyb(b, m, r) *
                       hqq_reference_dropped(b->x, b->dtype, b->ldx, m, k, K, &dropout);
            hqq_store(b->dA, b->lora->dtype, r * K + k,
                      (float)(sum * (double)b->lora->scaling));
        }
}

static void reference_dB(const hqq_backward *b)
{
    int64_t N = b->weight->out_features, R = b->lora->rank;
    for (int64_t n = 0; n < N; n++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0;
            for (int64_t m = 0; m < b->M; m++)
                sum += (double)hqq_load(b->dy, b->dtype, m * b->lddy + n) *
                       hqq_reference_saved_xa(b, m, r);
            hqq_store(b->dB, b->lora->dtype, n * R + r,
                      (float)(sum * (double)b->lora->scaling));
        }
}

void hqq_reference_backward(const hqq_backward *b)
{
    if (b->dx) reference_dx(b);
    if (b->dA) reference_dA(b);
    if (b->dB) reference_dB(b);
}

#include "reference.h"

#include "dropout.h"
#include "dtype.h"

float hqq_reference_element(const hqq_weight *w, int64_t n, int64_t k)
{
    hqq_layout layout =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    int64_t e = n * layout.K + k;
    int64_t group = hqq_group_of(&layout, e);
    float zero = hqq_load(w->zero, w->meta_dtype, group);
    float scale = hqq_load(w->scale, w->meta_dtype, group);
    return ((float)hqq_code_at(w->packed, &layout, e) - zero) * scale;
}

void hqq_reference_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                              const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                              int64_t column_begin, int64_t column_end)
{
    for (int64_t n = row_begin; n < row_end; n++)
        for (int64_t k = column_begin; k < column_end; k++)
            hqq_store(out, out_dtype, (n - row_begin) * ld_out + k - column_begin,
                      hqq_reference_element(weight, n, k));
}

/* drop(x)[m,k] */
static double dropped(const void *x, hqq_dtype dtype, int64_t ldx, int64_t m, int64_t k,
                      int64_t K, const hqq_dropout *dropout)
{
    float factor = hqq_dropout_factor(dropout, (uint64_t)(m * K + k));
    return (double)(hqq_load(x, dtype, m * ldx + k) * factor);
}

/* (drop(x) A^T)[m,r] */
static double xa_element(const void *x, hqq_dtype dtype, int64_t ldx, const hqq_lora *lora,
                         int64_t K, int64_t m, int64_t r)
{
    hqq_dropout dropout = hqq_dropout_make(lora->dropout, lora->seed);
    double sum = 0;
    for (int64_t k = 0; k < K; k++)
        sum += dropped(x, dtype, ldx, m, k, K, &dropout) *
               (double)hqq_load(lora->A, lora->dtype, r * K + k);
    return sum;
}

/* (dy B)[m,r] */
static double dyb_element(const hqq_backward *b, int64_t m, int64_t r)
{
    double sum = 0;
    for (int64_t n = 0; n < b->weight->out_features; n++)
        sum += (double)hqq_load(b->dy, b->dtype, m * b->lddy + n) *
               (double)hqq_load(b->lora->B, b->lora->dtype, n * b->lora->rank + r);
    return sum;
}

void hqq_reference_forward(const hqq_forward *f)
{
    int64_t N = f->weight->out_features, K = f->weight->in_features;
    int64_t R = f->lora ? f->lora->rank : 0;
    for (int64_t m = 0; m < f->M; m++) {
        double xa[256];
        for (int64_t r = 0; r < R; r++) {
            xa[r] = xa_element(f->x, f->dtype, f->ldx, f->lora, K, m, r);
            if (f->xa) f->xa[m * R + r] = (float)xa[r];
        }
        for (int64_t n = 0; n < N; n++) {
            double sum = f->bias ? (double)hqq_load(f->bias, f->bias_dtype, n) : 0;
            for (int64_t k = 0; k < K; k++)
                sum += (double)hqq_load(f->x, f->dtype, m * f->ldx + k) *
                       (double)hqq_reference_element(f->weight, n, k);
            for (int64_t r = 0; r < R; r++)
                sum += (double)f->lora->scaling * xa[r] *
                       (double)hqq_load(f->lora->B, f->lora->dtype, n * R + r);
            hqq_store(f->y, f->dtype, m * N + n, (float)sum);
        }
    }
}

static void reference_dx(const hqq_backward *b)
{
    int64_t N = b->weight->out_features, K = b->weight->in_features;
    int64_t R = b->lora ? b->lora->rank : 0;
    hqq_dropout dropout =
        hqq_dropout_make(b->lora ? b->lora->dropout : 0, b->lora ? b->lora->seed : 0);
    for (int64_t m = 0; m < b->M; m++) {
        double dyb[256];
        for (int64_t r = 0; r < R; r++) dyb[r] = dyb_element(b, m, r);
        for (int64_t k = 0; k < K; k++) {
            double sum = 0, lora = 0;
            for (int64_t n = 0; n < N; n++)
                sum += (double)hqq_load(b->dy, b->dtype, m * b->lddy + n) *
                       (double)hqq_reference_element(b->weight, n, k);
            for (int64_t r = 0; r < R; r++)
                lora += dyb[r] * (double)hqq_load(b->lora->A, b->lora->dtype, r * K + k);
            if (R)
                sum += (double)b->lora->scaling * lora *
                       (double)hqq_dropout_factor(&dropout, (uint64_t)(m * K + k));
            hqq_store(b->dx, b->dtype, m * K + k, (float)sum);
        }
    }
}

static void reference_dA(const hqq_backward *b)
{
    int64_t K = b->weight->in_features, R = b->lora->rank;
    hqq_dropout dropout = hqq_dropout_make(b->lora->dropout, b->lora->seed);
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < K; k++) {
            double sum = 0;
            for (int64_t m = 0; m < b->M; m++)
                sum +=
                    dyb_element(b, m, r) * dropped(b->x, b->dtype, b->ldx, m, k, K, &dropout);
            hqq_store(b->dA, b->lora->dtype, r * K + k,
                      (float)(sum * (double)b->lora->scaling));
        }
}

static void reference_dB(const hqq_backward *b)
{
    int64_t N = b->weight->out_features, K = b->weight->in_features, R = b->lora->rank;
    for (int64_t n = 0; n < N; n++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0;
            for (int64_t m = 0; m < b->M; m++) {
                double xa = b->xa ? (double)b->xa[m * R + r]
                                  : xa_element(b->x, b->dtype, b->ldx, b->lora, K, m, r);
                sum += (double)hqq_load(b->dy, b->dtype, m * b->lddy + n) * xa;
            }
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

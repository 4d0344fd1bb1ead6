/* One element of each result, in plain loops with sums in double: what the reference kernels of
 * every backend compute, and so what all other kernels are measured against. */
#ifndef HQQ_KERNELS_REFERENCE_ELEMENTS_H
#define HQQ_KERNELS_REFERENCE_ELEMENTS_H

#include "backend.h"
#include "dropout.h"
#include "dtype.h"
#include "weight_layout.h"

/* W[n,k] in fp32: (q - zero) * scale, each step rounded. */
HQQ_INLINE float hqq_reference_element(const hqq_weight *w, int64_t n, int64_t k)
{
    hqq_layout layout = hqq_stored_layout(w);
    int64_t e = n * layout.K + k;
    int64_t group = hqq_group_of(&layout, e);
    float zero = hqq_load(w->zero, w->meta_dtype, group);
    float scale = hqq_load(w->scale, w->meta_dtype, group);
    return ((float)hqq_code_at(w->packed, &layout, e) - zero) * scale;
}

/* drop(x)[m,k] */
HQQ_INLINE double hqq_reference_dropped(const void *x, hqq_dtype dtype, int64_t ldx, int64_t m,
                                        int64_t k, int64_t K, const hqq_dropout *dropout)
{
    float factor = hqq_dropout_factor(dropout, (uint64_t)(m * K + k));
    return (double)(hqq_load(x, dtype, m * ldx + k) * factor);
}

/* (drop(x) A^T)[m,r] */
HQQ_INLINE double hqq_reference_xa(const void *x, hqq_dtype dtype, int64_t ldx,
                                   const hqq_lora *lora, int64_t K, int64_t m, int64_t r)
{
    hqq_dropout dropout = hqq_dropout_of(lora);
    double sum = 0;
    for (int64_t k = 0; k < K; k++)
        sum += hqq_reference_dropped(x, dtype, ldx, m, k, K, &dropout) *
               (double)hqq_load(lora->A, lora->dtype, r * K + k);
    return sum;
}

/* xa[m,r] of a forward pass: computed, or given. */
HQQ_INLINE double hqq_reference_forward_xa(const hqq_forward *f, int64_t m, int64_t r)
{
    if (f->given_xa) return (double)f->given_xa[m * f->lora->rank + r];
    return hqq_reference_xa(f->x, f->dtype, f->ldx, f->lora, f->weight->in_features, m, r);
}

/* (dy B)[m,r]: computed, or given. */
HQQ_INLINE double hqq_reference_dyb(const hqq_backward *b, int64_t m, int64_t r)
{
    if (b->given_dyb) return (double)b->given_dyb[m * b->lora->rank + r];
    double sum = 0;
    for (int64_t n = 0; n < b->weight->out_features; n++)
        sum += (double)hqq_load(b->dy, b->dtype, m * b->lddy + n) *
               (double)hqq_load(b->lora->B, b->lora->dtype, n * b->lora->rank + r);
    return sum;
}

/* xa[m,r] as the backward pass finds it: given, or computed again. */
HQQ_INLINE double hqq_reference_saved_xa(const hqq_backward *b, int64_t m, int64_t r)
{
    if (b->xa) return (double)b->xa[m * b->lora->rank + r];
    return hqq_reference_xa(b->x, b->dtype, b->ldx, b->lora, b->weight->in_features, m, r);
}

/* y[m,n]; xa [R] is row m of drop(x) A^T. */
HQQ_INLINE double hqq_reference_y(const hqq_forward *f, const double *xa, int64_t m, int64_t n)
{
    int64_t R = f->lora ? f->lora->rank : 0;
    double sum = f->bias ? (double)hqq_load(f->bias, f->bias_dtype, n) : 0;
    for (int64_t k = 0; k < f->weight->in_features; k++)
        sum += (double)hqq_load(f->x, f->dtype, m * f->ldx + k) *
               (double)hqq_reference_element(f->weight, n, k);
    for (int64_t r = 0; r < R; r++)
        sum += (double)f->lora->scaling * xa[r] *
               (double)hqq_load(f->lora->B, f->lora->dtype, n * R + r);
    return sum;
}

/* dx[m,k]; dyb [R] is row m of dy B. */
HQQ_INLINE double hqq_reference_dx(const hqq_backward *b, const double *dyb, int64_t m,
                                   int64_t k)
{
    int64_t K = b->weight->in_features;
    double sum = 0, adapter = 0;
    for (int64_t n = 0; n < b->weight->out_features; n++)
        sum += (double)hqq_load(b->dy, b->dtype, m * b->lddy + n) *
               (double)hqq_reference_element(b->weight, n, k);
    if (!b->lora) return sum;
    hqq_dropout dropout = hqq_dropout_of(b->lora);
    for (int64_t r = 0; r < b->lora->rank; r++)
        adapter += dyb[r] * (double)hqq_load(b->lora->A, b->lora->dtype, r * K + k);
    return sum + (double)b->lora->scaling * adapter *
                     (double)hqq_dropout_factor(&dropout, (uint64_t)(m * K + k));
}

#endif

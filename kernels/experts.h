/* One expert's part of a grouped product: its rows, its weight and its adapter. */
#ifndef HQQ_KERNELS_EXPERTS_H
#define HQQ_KERNELS_EXPERTS_H

#include "backend.h"
#include "dtype.h"
#include "weight_layout.h"

/* The weight and adapter that `forward` and `backward` point to; so it must not be copied. */
typedef struct hqq_expert {
    hqq_weight weight;
    hqq_lora lora;
    hqq_forward forward;
    hqq_backward backward;
} hqq_expert;

static inline int64_t hqq_rows_of_expert(const hqq_routing *routing, int64_t e)
{
    return routing->offsets[e + 1] - routing->offsets[e];
}

/* Element i of data, or NULL where there is no data. */
static inline const void *hqq_element(const void *data, hqq_dtype dtype, int64_t i)
{
    return data ? hqq_at(data, dtype, i) : NULL;
}

static inline void *hqq_element_mut(void *data, hqq_dtype dtype, int64_t i)
{
    return data ? hqq_at_mut(data, dtype, i) : NULL;
}

static inline void hqq_weight_of_expert(hqq_weight *out, const hqq_weight *first, int64_t e)
{
    *out = *first;
    hqq_layout layout = hqq_stored_layout(first);
    if (!first->packed) return;
    out->packed = (const char *)first->packed + e * layout.words * layout.word_bytes;
    out->scale = hqq_element(first->scale, first->meta_dtype, e * layout.groups);
    out->zero = hqq_element(first->zero, first->meta_dtype, e * layout.groups);
}

static inline const hqq_lora *hqq_lora_of_expert(hqq_lora *out, const hqq_lora *first,
                                                 const hqq_weight *weight, int64_t e)
{
    if (!first) return NULL;
    *out = *first;
    out->A = hqq_element(first->A, first->dtype, e * first->rank * weight->in_features);
    out->B = hqq_element(first->B, first->dtype, e * weight->out_features * first->rank);
    out->seed_offset += (uint64_t)e;
    return out;
}

/* out->forward = expert e's part of f. */
static inline void hqq_expert_forward(hqq_expert *out, const hqq_forward *f,
                                      const hqq_routing *routing, int64_t e)
{
    int64_t row = routing->offsets[e];
    hqq_weight_of_expert(&out->weight, f->weight, e);
    out->forward = *f;
    out->forward.weight = &out->weight;
    out->forward.lora = hqq_lora_of_expert(&out->lora, f->lora, f->weight, e);
    out->forward.M = hqq_rows_of_expert(routing, e);
    out->forward.y = hqq_element_mut(f->y, f->dtype, row * f->weight->out_features);
    out->forward.x = hqq_element(f->x, f->dtype, row * f->ldx);
    if (f->xa && f->lora) out->forward.xa = f->xa + row * f->lora->rank;
}

/* out->backward = expert e's part of b. */
static inline void hqq_expert_backward(hqq_expert *out, const hqq_backward *b,
                                       const hqq_routing *routing, int64_t e)
{
    int64_t row = routing->offsets[e], N = b->weight->out_features, K = b->weight->in_features;
    hqq_weight_of_expert(&out->weight, b->weight, e);
    out->backward = *b;
    out->backward.weight = &out->weight;
    out->backward.lora = hqq_lora_of_expert(&out->lora, b->lora, b->weight, e);
    out->backward.M = hqq_rows_of_expert(routing, e);
    out->backward.dx = hqq_element_mut(b->dx, b->dtype, row * K);
    out->backward.dy = hqq_element(b->dy, b->dtype, row * b->lddy);
    out->backward.x = hqq_element(b->x, b->dtype, row * b->ldx);
    if (!b->lora) return;
    int64_t R = b->lora->rank;
    out->backward.dA = hqq_element_mut(b->dA, b->lora->dtype, e * R * K);
    out->backward.dB = hqq_element_mut(b->dB, b->lora->dtype, e * N * R);
    out->backward.xa = b->xa ? b->xa + row * R : NULL;
}

#endif

/* A quantized weight in buffers of exactly its size, and what must hold of any of them. */
#ifndef HQQ_TESTS_QUANTIZED_SAMPLE_H
#define HQQ_TESTS_QUANTIZED_SAMPLE_H

#include <float.h>

#include "format.h"
#include "sample_weight.h"

static const char *const solver_names[] = {"default", "reference", "minmax"};

/* A quantized copy of W, in buffers of exactly its size. */
typedef struct result {
    hqq_weight weight;
    hqq_layout layout;
    hqq_status status;
} result;

static inline result quantize(const void *W, hqq_dtype dtype, hqq_weight shape,
                              const hqq_quantize_options *options, const hqq_context *context)
{
    result r = {.weight = shape};
    r.layout = hqq_layout_make(shape.out_features, shape.in_features, shape.group_size,
                               shape.nbits, shape.axis);
    size_t packed_bytes = (size_t)(r.layout.words * r.layout.word_bytes);
    size_t meta_bytes = (size_t)(r.layout.groups * hqq_dtype_bytes(shape.meta_dtype));
    void *packed = exact_alloc(packed_bytes);
    void *scale = exact_alloc(meta_bytes), *zero = exact_alloc(meta_bytes);
    memset(packed, 0xa5, packed_bytes);
    memset(scale, 0xa5, meta_bytes);
    memset(zero, 0xa5, meta_bytes);
    r.weight.packed = packed;
    r.weight.scale = scale;
    r.weight.zero = zero;
    r.status = hqq_quantize(packed, scale, zero, W, dtype, &shape, options, context);
    return r;
}

static inline int same_result(const result *a, const result *b)
{
    size_t meta_bytes = (size_t)(a->layout.groups * hqq_dtype_bytes(a->weight.meta_dtype));
    return memcmp(a->weight.packed, b->weight.packed,
                  (size_t)(a->layout.words * a->layout.word_bytes)) == 0 &&
           memcmp(a->weight.scale, b->weight.scale, meta_bytes) == 0 &&
           memcmp(a->weight.zero, b->weight.zero, meta_bytes) == 0;
}

static inline int64_t element_of(const hqq_layout *l, int64_t group, int64_t i)
{
    return l->axis == 1 ? group * l->G + i : i * l->groups + group;
}

static inline double clip(double t, double levels)
{
    return t < 0 ? 0 : t > levels ? levels : t;
}

/* Finite scales above 0, finite zeros, zero bits where no code is, and each code within half a
 * step (and rounding) of its weight. `slack` is the relative error of scale and zero that is
 * allowed for: of solvers that choose codes before they round the two. */
static inline int check_result(const result *r, const void *W, hqq_dtype dtype, double slack)
{
    const hqq_layout *l = &r->layout;
    double levels = hqq_max_code(l->nbits);
    int wrong = r->status != HQQ_OK;
    if (wrong) fprintf(stderr, "%s\n", hqq_last_error());
    for (int64_t g = 0; g < l->groups && !wrong; g++) {
        double scale = (double)hqq_load(r->weight.scale, r->weight.meta_dtype, g);
        double zero = (double)hqq_load(r->weight.zero, r->weight.meta_dtype, g);
        if (!(scale > 0 && isfinite(scale) && isfinite(zero))) {
            fprintf(stderr, "group %lld: scale %g, zero %g\n", (long long)g, scale, zero);
            return 1;
        }
        for (int64_t i = 0; i < l->G; i++) {
            int64_t e = element_of(l, g, i);
            double position = (double)hqq_load(W, dtype, e) / scale;
            double rounding =
                (4 * (double)FLT_EPSILON + slack) * (fabs(position) + fabs(zero) + levels);
            double off = clip(position + zero, levels) - hqq_code_at(r->weight.packed, l, e);
            if (fabs(off) <= 0.5 + rounding) continue;
            if (!wrong++)
                fprintf(stderr, "element %lld: %g is %g steps off its code %d\n", (long long)e,
                        (double)hqq_load(W, dtype, e), off,
                        hqq_code_at(r->weight.packed, l, e));
        }
    }
    for (int64_t word = 0; word < l->words; word++) {
        uint32_t used = 0;
        for (int slot = 0; slot < l->per; slot++)
            if (slot * l->words + word < l->elements)
                used |= (uint32_t)hqq_max_code(l->nbits) << hqq_slot_shift(l->nbits, slot);
        wrong += (hqq_word_at(r->weight.packed, l->nbits, word) & ~used) != 0;
    }
    return wrong;
}

#endif

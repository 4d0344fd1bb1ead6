#include "checks.h"

#include <math.h>

#include "dtype.h"
#include "integers.h"
#include "status.h"
#include "weight_layout.h"

typedef long long ll;

int hqq_too_many(int64_t rows, int64_t columns)
{
    int64_t elements;
    return __builtin_mul_overflow(rows, columns, &elements) || elements > (INT64_C(1) << 56);
}

hqq_status hqq_check_dtype(const char *name, hqq_dtype dtype)
{
    if ((int)dtype >= HQQ_F32 && (int)dtype <= HQQ_BF16) return HQQ_OK;
    return hqq_fail(HQQ_INVALID, "%s is %d; expected HQQ_F32 (0), HQQ_F16 (1) or HQQ_BF16 (2)",
                    name, (int)dtype);
}

hqq_status hqq_check_shape(const hqq_weight *w)
{
    if (!w) return hqq_fail(HQQ_INVALID, "weight is NULL");
    if (hqq_slots_per_word(w->nbits) == 0)
        return hqq_fail(HQQ_INVALID, "nbits is %d; expected 8, 4, 3, 2 or 1", w->nbits);
    if (w->axis != 0 && w->axis != 1)
        return hqq_fail(HQQ_INVALID, "axis is %d; expected 0 or 1", w->axis);
    if (w->out_features < 0 || w->in_features < 0)
        return hqq_fail(HQQ_INVALID, "weight is %lld x %lld; sizes must not be negative",
                        (ll)w->out_features, (ll)w->in_features);
    /* an empty weight has no more rows, or columns, than one that is not */
    if (hqq_too_many(hqq_most(w->out_features, 1), hqq_most(w->in_features, 1)))
        return hqq_fail(HQQ_INVALID, "weight is %lld x %lld; that is more than 2^56 elements",
                        (ll)w->out_features, (ll)w->in_features);
    if (w->group_size <= 0)
        return hqq_fail(HQQ_INVALID, "group_size is %lld; expected at least 1",
                        (ll)w->group_size);
    if (hqq_too_many(w->group_size, 1)) /* it divides an empty weight's 0 elements */
        return hqq_fail(HQQ_INVALID, "group_size is %lld; that is more than 2^56 elements",
                        (ll)w->group_size);
    int64_t elements = w->out_features * w->in_features;
    if (elements % w->group_size != 0)
        return hqq_fail(HQQ_INVALID,
                        "group_size %lld does not divide the %lld elements of a %lld x %lld "
                        "weight",
                        (ll)w->group_size, (ll)elements, (ll)w->out_features,
                        (ll)w->in_features);
    HQQ_TRY(hqq_check_packing("weight.packing", w->packing, w));
    return hqq_check_dtype("weight.meta_dtype", w->meta_dtype);
}

hqq_status hqq_check_packing(const char *name, hqq_packing packing, const hqq_weight *w)
{
    if (packing == HQQ_PACKING_HQQ) return HQQ_OK;
    if (packing != HQQ_PACKING_PLANES)
        return hqq_fail(HQQ_INVALID,
                        "%s is %d; expected HQQ_PACKING_HQQ (0) or HQQ_PACKING_PLANES (1)",
                        name, (int)packing);
    hqq_layout l = hqq_layout_packed_as(w, HQQ_PACKING_HQQ);
    if (hqq_planes_fit(&l)) return HQQ_OK;
    if (w->nbits != 3)
        return hqq_fail(HQQ_INVALID, "%s is HQQ_PACKING_PLANES (1) with nbits %d; expected 3",
                        name, w->nbits);
    return hqq_fail(HQQ_INVALID,
                    "%s is HQQ_PACKING_PLANES (1), for which 8 must divide out_features %lld "
                    "and %s %lld",
                    name, (ll)w->out_features,
                    w->axis == 1 ? "the number of groups" : "group_size",
                    (ll)(w->axis == 1 ? l.groups : l.G));
}

hqq_status hqq_check_aligned(const char *name, const void *data, int64_t bytes)
{
    if ((uintptr_t)data % (uintptr_t)bytes == 0) return HQQ_OK;
    return hqq_fail(HQQ_INVALID, "%s at %p is not aligned to its elements of %lld bytes", name,
                    data, (ll)bytes);
}

hqq_status hqq_check_packed(const hqq_weight *w)
{
    return hqq_check_aligned("weight.packed", w->packed, hqq_stored_layout(w).word_bytes);
}

hqq_status hqq_check_weight(const hqq_weight *w)
{
    HQQ_TRY(hqq_check_shape(w));
    if (w->out_features == 0 || w->in_features == 0) return HQQ_OK;
    if (!w->packed || !w->scale || !w->zero)
        return hqq_fail(HQQ_INVALID, "weight.%s is NULL",
                        !w->packed  ? "packed"
                        : !w->scale ? "scale"
                                    : "zero");
    HQQ_TRY(hqq_check_packed(w));
    HQQ_TRY(hqq_check_aligned("weight.scale", w->scale, hqq_dtype_bytes(w->meta_dtype)));
    return hqq_check_aligned("weight.zero", w->zero, hqq_dtype_bytes(w->meta_dtype));
}

hqq_status hqq_check_lora(const hqq_lora *lora, const hqq_weight *w, hqq_dtype dtype)
{
    return hqq_check_factors(lora, w, dtype, 1, 1);
}

hqq_status hqq_check_factors(const hqq_lora *lora, const hqq_weight *w, hqq_dtype dtype,
                             int reads_A, int reads_B)
{
    if (!lora) return hqq_fail(HQQ_INVALID, "lora is NULL");
    if (lora->rank < 0 || lora->rank > HQQ_MAX_RANK)
        return hqq_fail(HQQ_INVALID, "lora.rank is %lld; expected 0 to %d", (ll)lora->rank,
                        HQQ_MAX_RANK);
    if (hqq_too_many(lora->rank, hqq_most(w->out_features, w->in_features)))
        return hqq_fail(HQQ_INVALID,
                        "lora.rank is %lld on a weight of %lld x %lld; that is more than 2^56 "
                        "elements",
                        (ll)lora->rank, (ll)w->out_features, (ll)w->in_features);
    HQQ_TRY(hqq_check_dtype("lora.dtype", lora->dtype));
    if (lora->dtype != HQQ_F32 && lora->dtype != dtype)
        return hqq_fail(HQQ_INVALID,
                        "lora.dtype is %d; expected HQQ_F32 (0) or x's own dtype (%d)",
                        (int)lora->dtype, (int)dtype);
    if (!(lora->dropout >= 0.0f && lora->dropout < 1.0f))
        return hqq_fail(HQQ_INVALID, "lora.dropout is %g; expected 0 <= dropout < 1",
                        (double)lora->dropout);
    if (!isfinite(lora->scaling))
        return hqq_fail(HQQ_INVALID, "lora.scaling is %g; expected a finite value",
                        (double)lora->scaling);
    int lacks_A = reads_A && !lora->A && w->in_features;
    int lacks_B = reads_B && !lora->B && w->out_features;
    if (lora->rank > 0 && (lacks_A || lacks_B))
        return hqq_fail(HQQ_INVALID, "lora.%s is NULL with rank %lld", lacks_A ? "A" : "B",
                        (ll)lora->rank);
    if (reads_A) HQQ_TRY(hqq_check_aligned("lora.A", lora->A, hqq_dtype_bytes(lora->dtype)));
    if (reads_B) HQQ_TRY(hqq_check_aligned("lora.B", lora->B, hqq_dtype_bytes(lora->dtype)));
    if (lora->dropout == 0.0f) return HQQ_OK;
    if (!lora->seed && lora->rank > 0)
        return hqq_fail(HQQ_INVALID, "lora.seed is NULL with dropout %g",
                        (double)lora->dropout);
    return hqq_check_aligned("lora.seed", lora->seed, sizeof *lora->seed);
}

hqq_status hqq_check_matrix(const char *name, const void *data, int64_t rows, int64_t columns,
                            int64_t ld, hqq_dtype dtype)
{
    if (rows < 0)
        return hqq_fail(HQQ_INVALID, "%s has %lld rows; expected at least 0", name, (ll)rows);
    if (rows > 1 && ld < columns)
        return hqq_fail(HQQ_INVALID,
                        "%s has a row stride of %lld; expected at least its %lld "
                        "columns",
                        name, (ll)ld, (ll)columns);
    if (rows == 0 || columns == 0) return HQQ_OK;
    if (!data) return hqq_fail(HQQ_INVALID, "%s is NULL", name);
    if (hqq_too_many(rows, rows > 1 ? ld : columns))
        return hqq_fail(HQQ_INVALID, "%s is %lld x %lld; that is more than 2^56 elements", name,
                        (ll)rows, (ll)columns);
    return hqq_check_aligned(name, data, hqq_dtype_bytes(dtype));
}

hqq_status hqq_check_context(const hqq_context *context)
{
    if (!context) return HQQ_OK;
    if ((int)context->isa < HQQ_ISA_AUTO || (int)context->isa > HQQ_ISA_AMX)
        return hqq_fail(HQQ_INVALID, "context.isa is %d; expected 0 to %d", (int)context->isa,
                        HQQ_ISA_AMX);
    if ((int)context->kernel < HQQ_KERNEL_AUTO || (int)context->kernel > HQQ_KERNEL_TILED)
        return hqq_fail(HQQ_INVALID, "context.kernel is %d; expected 0 to %d",
                        (int)context->kernel, HQQ_KERNEL_TILED);
    return HQQ_OK;
}

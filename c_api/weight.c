/* Entry points of the weight alone: format, quantizer, dequantize. */
#include <math.h>

#include "checks.h"
#include "backend.h"
#include "status.h"
#include "weight_layout.h"

#define HQQ_STRING_(x) #x
#define HQQ_STRING(x)  HQQ_STRING_(x)

const char *hqq_version(void)
{
    return HQQ_STRING(HQQ_VERSION_MAJOR) "." HQQ_STRING(HQQ_VERSION_MINOR) "." HQQ_STRING(
        HQQ_VERSION_PATCH);
}

hqq_status hqq_layout_of(int64_t *words, int64_t *word_bytes, int64_t *groups,
                         const hqq_weight *weight)
{
    hqq_clear_error();
    HQQ_TRY(hqq_check_shape(weight));
    HQQ_TRY(hqq_check_aligned("words", words, sizeof *words));
    HQQ_TRY(hqq_check_aligned("word_bytes", word_bytes, sizeof *word_bytes));
    HQQ_TRY(hqq_check_aligned("groups", groups, sizeof *groups));
    hqq_layout layout = hqq_stored_layout(weight);
    if (words) *words = layout.words;
    if (word_bytes) *word_bytes = layout.word_bytes;
    if (groups) *groups = layout.groups;
    return HQQ_OK;
}

hqq_quantize_options hqq_quantize_defaults(void)
{
    return (hqq_quantize_options){
        .solver = HQQ_SOLVER_DEFAULT,
        .iters = 20,
        .early_stop = 1,
        .round_zero = 0,
        .lp_norm = 0.7f,
        .beta = 10.0f,
        .kappa = 1.0f,
        .importance = NULL,
    };
}

static hqq_status check_options(const hqq_quantize_options *o, int32_t nbits)
{
    if (!o) return hqq_fail(HQQ_INVALID, "options is NULL");
    if ((int)o->solver < HQQ_SOLVER_DEFAULT || (int)o->solver > HQQ_SOLVER_MINMAX)
        return hqq_fail(HQQ_INVALID, "options.solver is %d; expected 0 to %d", (int)o->solver,
                        HQQ_SOLVER_MINMAX);
    if (o->iters < 1 || o->iters > 10000)
        return hqq_fail(HQQ_INVALID, "options.iters is %d; expected 1 to 10000", o->iters);
    if (!(o->lp_norm > 0.0f && o->lp_norm <= 1.0f))
        return hqq_fail(HQQ_INVALID, "options.lp_norm is %g; expected 0 < lp_norm <= 1",
                        (double)o->lp_norm);
    if (!(o->beta > 0.0f && isfinite(o->beta)))
        return hqq_fail(HQQ_INVALID, "options.beta is %g; expected a finite value above 0",
                        (double)o->beta);
    if (!(o->kappa > 0.0f && isfinite(o->kappa)))
        return hqq_fail(HQQ_INVALID, "options.kappa is %g; expected a finite value above 0",
                        (double)o->kappa);
    (void)nbits;
    if (o->importance && o->solver != HQQ_SOLVER_DEFAULT)
        return hqq_fail(
            HQQ_INVALID,
            "options.importance needs the default solver (%d); options.solver is %d",
            HQQ_SOLVER_DEFAULT, (int)o->solver);
    return hqq_check_aligned("options.importance", o->importance, sizeof *o->importance);
}

hqq_status hqq_quantize(void *packed, void *scale, void *zero, const void *W, hqq_dtype W_dtype,
                        const hqq_weight *weight, const hqq_quantize_options *options,
                        const hqq_context *context)
{
    hqq_clear_error();
    HQQ_TRY(hqq_check_shape(weight));
    HQQ_TRY(hqq_check_dtype("W_dtype", W_dtype));
    HQQ_TRY(check_options(options, weight->nbits));
    if (weight->packing != HQQ_PACKING_HQQ)
        return hqq_fail(HQQ_UNSUPPORTED,
                        "weight.packing is %d; hqq_quantize writes hqq's own words (%d), which "
                        "hqq_repack then puts into another packing",
                        (int)weight->packing, HQQ_PACKING_HQQ);
    HQQ_TRY(hqq_check_context(context));
    if (weight->out_features == 0 || weight->in_features == 0) return HQQ_OK;
    HQQ_TRY(hqq_check_matrix("W", W, weight->out_features, weight->in_features,
                             weight->in_features, W_dtype));
    hqq_weight result = *weight;
    result.packed = packed;
    result.scale = scale;
    result.zero = zero;
    HQQ_TRY(hqq_check_weight(&result));
    return hqq_backend_quantize(packed, scale, zero, W, W_dtype, weight, options, context);
}

hqq_status hqq_pack(void *packed, const uint8_t *codes, const hqq_weight *weight,
                    const hqq_context *context)
{
    hqq_clear_error();
    HQQ_TRY(hqq_check_shape(weight));
    HQQ_TRY(hqq_check_context(context));
    hqq_layout layout = hqq_stored_layout(weight);
    if (layout.elements == 0) return HQQ_OK;
    if (!packed || !codes)
        return hqq_fail(HQQ_INVALID, "%s is NULL", packed ? "codes" : "packed");
    HQQ_TRY(hqq_check_aligned("packed", packed, layout.word_bytes));
    return hqq_backend_pack(packed, codes, weight, context);
}

hqq_status hqq_unpack(uint8_t *codes, const hqq_weight *weight, const hqq_context *context)
{
    hqq_clear_error();
    HQQ_TRY(hqq_check_shape(weight));
    HQQ_TRY(hqq_check_context(context));
    if (weight->out_features == 0 || weight->in_features == 0) return HQQ_OK;
    if (!codes || !weight->packed)
        return hqq_fail(HQQ_INVALID, "%s is NULL", codes ? "weight.packed" : "codes");
    HQQ_TRY(hqq_check_packed(weight));
    return hqq_backend_unpack(codes, weight, context);
}

hqq_status hqq_repack(void *packed, hqq_packing packing, const hqq_weight *weight,
                      const hqq_context *context)
{
    hqq_clear_error();
    HQQ_TRY(hqq_check_shape(weight));
    HQQ_TRY(hqq_check_packing("packing", packing, weight));
    HQQ_TRY(hqq_check_context(context));
    hqq_layout layout = hqq_layout_packed_as(weight, packing);
    if (layout.elements == 0) return HQQ_OK;
    if (!packed || !weight->packed)
        return hqq_fail(HQQ_INVALID, "%s is NULL", packed ? "weight.packed" : "packed");
    HQQ_TRY(hqq_check_aligned("packed", packed, layout.word_bytes));
    HQQ_TRY(hqq_check_packed(weight));
    return hqq_backend_repack(packed, packing, weight, context);
}

static hqq_status check_range(const char *name, int64_t begin, int64_t end, int64_t size)
{
    if (0 <= begin && begin <= end && end <= size) return HQQ_OK;
    return hqq_fail(HQQ_INVALID, "%s %lld to %lld are not within 0 to %lld", name,
                    (long long)begin, (long long)end, (long long)size);
}

hqq_status hqq_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                          const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                          int64_t column_begin, int64_t column_end, const hqq_context *context)
{
    hqq_clear_error();
    HQQ_TRY(hqq_check_weight(weight));
    HQQ_TRY(hqq_check_dtype("out_dtype", out_dtype));
    HQQ_TRY(hqq_check_context(context));
    HQQ_TRY(check_range("rows", row_begin, row_end, weight->out_features));
    HQQ_TRY(check_range("columns", column_begin, column_end, weight->in_features));
    int64_t rows = row_end - row_begin, columns = column_end - column_begin;
    HQQ_TRY(hqq_check_matrix("out", out, rows, columns, ld_out, out_dtype));
    if (rows == 0 || columns == 0) return HQQ_OK;
    if (rows == 1) ld_out = columns; /* never used, so it may have been anything */
    return hqq_backend_dequantize(out, ld_out, out_dtype, weight, row_begin, row_end,
                                  column_begin, column_end, context);
}

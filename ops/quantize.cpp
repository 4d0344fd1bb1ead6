/* Quantizing a weight, getting it back, and packing its codes in another way. */
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "finite.h"
#include "torch_context.h"

namespace hqqlora
{
namespace
{

/* hqq's two-dimensional shapes: a line of words or of groups along each axis. Planes are two
 * such tensors, one under the other. */
std::vector<int64_t> packed_shape(const hqq_weight &weight, const PackedSizes &sizes)
{
    int64_t columns = weight.axis == 1 ? weight.group_size : sizes.groups;
    return {columns ? sizes.words / columns : 0, columns};
}

std::vector<int64_t> meta_shape(const hqq_weight &weight, const PackedSizes &sizes)
{
    return weight.axis == 1 ? std::vector<int64_t>{sizes.groups, 1}
                            : std::vector<int64_t>{1, sizes.groups};
}

void check_importance(const Tensor &importance, int64_t in_features, const Device &device)
{
    check_device("importance", importance, device);
    HQQ_CHECK(importance.scalar_type() == ScalarType::Float, "importance must be float32, got ",
              name_of(importance.scalar_type()));
    HQQ_CHECK(importance.dim() == 1 && importance.size(0) == in_features,
              "importance must have shape [in_features] = [", in_features, "], got ",
              shape_of(importance));
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor &W, int64_t nbits, int64_t group_size,
                                            int64_t axis, ScalarType meta_dtype, int64_t solver,
                                            int64_t iters, bool early_stop, bool round_zero,
                                            double lp_norm, double beta, double kappa,
                                            const OptionalTensor &importance)
{
    Device device = device_of(W);
    hqq_dtype dtype = dtype_of("weight", W);
    HQQ_CHECK(W.dim() == 2, "weight must have shape [out_features, in_features], got ",
              shape_of(W));
    hqq_weight weight = check_format(W.size(0), W.size(1), nbits, group_size, axis);
    weight.meta_dtype = dtype_of("meta_dtype", meta_dtype);
    HQQ_CHECK(solver >= HQQ_SOLVER_DEFAULT && solver <= HQQ_SOLVER_MINMAX,
              "solver must be 0 (default), 1 (reference) or 2 (minmax), got ", solver);
    HQQ_CHECK(iters >= 0 && iters <= INT32_MAX, "iters must be 0 to 2147483647, got ", iters);
    hqq_quantize_options options = hqq_quantize_defaults();
    options.solver = static_cast<hqq_solver>(solver);
    options.iters = static_cast<int32_t>(iters);
    options.early_stop = early_stop;
    options.round_zero = round_zero;
    options.lp_norm = static_cast<float>(lp_norm);
    options.beta = static_cast<float>(beta);
    options.kappa = static_cast<float>(kappa);

    OptionalTensor columns;
    if (importance) {
        check_importance(*importance, W.size(1), device);
        columns = as_contiguous(*importance);
        options.importance = static_cast<const float *>(columns->const_data_ptr());
    }

    PackedSizes sizes = packed_sizes(weight);
    Tensor source = as_contiguous(W);
    Tensor W_q = empty(packed_shape(weight, sizes), sizes.word_dtype, device);
    Tensor scale = empty(meta_shape(weight, sizes), meta_dtype, device);
    Tensor zero = empty(meta_shape(weight, sizes), meta_dtype, device);
    TorchContext context(device);
    context.check(hqq_quantize(W_q.mutable_data_ptr(), scale.mutable_data_ptr(),
                               zero.mutable_data_ptr(), source.const_data_ptr(), dtype, &weight,
                               &options, context));
    if (context.enqueues()) check_finite(source, scale, columns);
    return {W_q, scale, zero};
}

Tensor dequantize(const Tensor &W_q, const Tensor &scale, const Tensor &zero,
                  int64_t out_features, int64_t in_features, int64_t nbits, int64_t group_size,
                  int64_t axis, ScalarType dtype)
{
    Device device = device_of(W_q);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device);
    hqq_dtype out_dtype = dtype_of("dtype", dtype);
    Tensor W = empty({out_features, in_features}, dtype, device);
    TorchContext context(device);
    context.check(hqq_dequantize(W.mutable_data_ptr(), in_features, out_dtype, &weight, 0,
                                 out_features, 0, in_features, context));
    return W;
}

Tensor repack(const Tensor &W_q, int64_t out_features, int64_t in_features, int64_t nbits,
              int64_t group_size, int64_t axis, bool planes)
{
    Device device = device_of(W_q);
    hqq_weight weight = check_format(out_features, in_features, nbits, group_size, axis);
    check_packed(weight, W_q, device);
    HQQ_CHECK(nbits == 3, "nbits must be 3 to be packed in another way, got ", nbits);
    hqq_weight result = weight;
    result.packing = planes ? HQQ_PACKING_PLANES : HQQ_PACKING_HQQ;
    if (planes) check_planes("the result", weight);
    PackedSizes sizes = packed_sizes(result);
    Tensor packed = empty(packed_shape(result, sizes), sizes.word_dtype, device);
    TorchContext context(device);
    context.check(hqq_repack(packed.mutable_data_ptr(), result.packing, &weight, context));
    return packed;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hqqlora, HQQ_DISPATCH_KEY, m)
{
    m.impl("quantize", TORCH_BOX(&quantize));
    m.impl("dequantize", TORCH_BOX(&dequantize));
    m.impl("repack", TORCH_BOX(&repack));
}

} // namespace hqqlora

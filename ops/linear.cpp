/* y = x W^T + bias and dx = dy W. */
#include <torch/csrc/stable/library.h>

#include "torch_context.h"

namespace hqqlora
{
namespace
{

Tensor linear(const Tensor &x, const Tensor &W_q, const Tensor &scale, const Tensor &zero,
              const OptionalTensor &bias, int64_t out_features, int64_t in_features,
              int64_t nbits, int64_t group_size, int64_t axis)
{
    Device device = device_of(x);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device);
    hqq_dtype dtype = check_rows("x", x, in_features, "in_features", device);
    hqq_dtype bias_dtype = check_bias(bias, out_features, x.scalar_type(), device);

    OptionalTensor b;
    if (bias) b = as_contiguous(*bias);
    Rows rows(x);
    Tensor y = empty(with_width(x, out_features), x.scalar_type(), device);
    TorchContext context(device);
    Workspace workspace(weight, nullptr, rows.count, dtype, context);
    context.check(hqq_linear(y.mutable_data_ptr(), rows.data, rows.stride, &weight,
                             b ? b->const_data_ptr() : nullptr, bias_dtype, rows.count, dtype,
                             workspace.data(), workspace.bytes(), context));
    return y;
}

Tensor linear_dgrad(const Tensor &dy, const Tensor &W_q, const Tensor &scale,
                    const Tensor &zero, int64_t out_features, int64_t in_features,
                    int64_t nbits, int64_t group_size, int64_t axis)
{
    Device device = device_of(dy);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device);
    hqq_dtype dtype = check_rows("dy", dy, out_features, "out_features", device);

    Rows rows(dy);
    Tensor dx = empty(with_width(dy, in_features), dy.scalar_type(), device);
    TorchContext context(device);
    Workspace workspace(weight, nullptr, rows.count, dtype, context);
    context.check(hqq_linear_dgrad(dx.mutable_data_ptr(), rows.data, rows.stride, &weight,
                                   rows.count, dtype, workspace.data(), workspace.bytes(),
                                   context));
    return dx;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hqqlora, HQQ_DISPATCH_KEY, m)
{
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("linear_dgrad", TORCH_BOX(&linear_dgrad));
}

} // namespace hqqlora

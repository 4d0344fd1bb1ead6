/* The product with a LoRA adapter, and its gradients. */
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "adapter.h"

namespace hqqlora
{
namespace
{

std::tuple<Tensor, Tensor>
lora_linear(const Tensor &x, const Tensor &W_q, const Tensor &scale, const Tensor &zero,
            const OptionalTensor &bias, const Tensor &A, const Tensor &B,
            const OptionalTensor &seed, double scaling, double dropout, int64_t out_features,
            int64_t in_features, int64_t nbits, int64_t group_size, int64_t axis)
{
    Device device = device_of(x);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device);
    hqq_dtype dtype = check_rows("x", x, in_features, "in_features", device);
    hqq_dtype bias_dtype = check_bias(bias, out_features, x.scalar_type(), device);
    Adapter adapter(A, B, weight, seed, scaling, dropout, "x", x.scalar_type(), device);

    OptionalTensor b;
    if (bias) b = as_contiguous(*bias);
    Rows rows(x);
    Tensor y = empty(with_width(x, out_features), x.scalar_type(), device);
    Tensor xa = empty({rows.count, adapter.lora.rank}, ScalarType::Float, device);
    TorchContext context(device);
    Workspace workspace(weight, &adapter.lora, rows.count, dtype, context);
    context.check(hqq_lora_linear(
        y.mutable_data_ptr(), static_cast<float *>(xa.mutable_data_ptr()), rows.data,
        rows.stride, &weight, b ? b->const_data_ptr() : nullptr, bias_dtype, &adapter.lora,
        rows.count, dtype, workspace.data(), workspace.bytes(), context));
    return {y, xa};
}

std::tuple<Tensor, Tensor, Tensor>
lora_linear_backward(const Tensor &dy, const OptionalTensor &x, const OptionalTensor &xa,
                     const Tensor &W_q, const Tensor &scale, const Tensor &zero,
                     const Tensor &A, const Tensor &B, const OptionalTensor &seed,
                     double scaling, double dropout, int64_t out_features, int64_t in_features,
                     int64_t nbits, int64_t group_size, int64_t axis, bool needs_dx,
                     bool needs_dA, bool needs_dB)
{
    Device device = device_of(dy);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device);
    hqq_dtype dtype = check_rows("dy", dy, out_features, "out_features", device);
    Adapter adapter(A, B, weight, seed, scaling, dropout, "dy", dy.scalar_type(), device);
    const hqq_lora &lora = adapter.lora;
    check_saved(dy, x, xa, weight, lora, needs_dA, needs_dB, device);

    Tensor dx = gradient(needs_dx, with_width(dy, in_features), dy.scalar_type(), device);
    Tensor dA = gradient(needs_dA, {lora.rank, in_features}, A.scalar_type(), device);
    Tensor dB = gradient(needs_dB, {out_features, lora.rank}, A.scalar_type(), device);
    Rows dy_rows(dy);
    std::optional<Rows> x_rows;
    if (x) x_rows.emplace(*x);
    OptionalTensor xa_rows;
    if (xa) xa_rows = as_contiguous(*xa);
    TorchContext context(device);
    Workspace workspace(weight, &lora, dy_rows.count, dtype, context);
    context.check(hqq_lora_linear_backward(
        needs_dx ? dx.mutable_data_ptr() : nullptr, needs_dA ? dA.mutable_data_ptr() : nullptr,
        needs_dB ? dB.mutable_data_ptr() : nullptr, dy_rows.data, dy_rows.stride,
        x ? x_rows->data : nullptr, x ? x_rows->stride : in_features,
        xa ? xa_rows->const_data_ptr<float>() : nullptr, &weight, &lora, dy_rows.count, dtype,
        workspace.data(), workspace.bytes(), context));
    return {dx, dA, dB};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hqqlora, HQQ_DISPATCH_KEY, m)
{
    m.impl("lora_linear", TORCH_BOX(&lora_linear));
    m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

} // namespace hqqlora

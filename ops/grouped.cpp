/* Products of rows that are routed to experts, each with the weight of its own. */
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "adapter.h"

namespace hqqlora
{
namespace
{

Tensor grouped_linear(const Tensor &x, const Tensor &W_q, const Tensor &scale,
                      const Tensor &zero, const Tensor &offsets, int64_t out_features,
                      int64_t in_features, int64_t nbits, int64_t group_size, int64_t axis)
{
    Device device = device_of(x);
    hqq_dtype dtype = check_rows("x", x, in_features, "in_features", device);
    hqq_routing routing = check_routing(offsets, "x", x);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device, routing.experts);

    Rows rows(x);
    Tensor y = empty(with_width(x, out_features), x.scalar_type(), device);
    TorchContext context(device);
    Workspace workspace(weight, nullptr, routing, dtype, context);
    context.check(hqq_grouped_linear(y.mutable_data_ptr(), rows.data, rows.stride, &weight,
                                     &routing, dtype, workspace.data(), workspace.bytes(),
                                     context));
    return y;
}

Tensor grouped_linear_dgrad(const Tensor &dy, const Tensor &W_q, const Tensor &scale,
                            const Tensor &zero, const Tensor &offsets, int64_t out_features,
                            int64_t in_features, int64_t nbits, int64_t group_size,
                            int64_t axis)
{
    Device device = device_of(dy);
    hqq_dtype dtype = check_rows("dy", dy, out_features, "out_features", device);
    hqq_routing routing = check_routing(offsets, "dy", dy);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device, routing.experts);

    Rows rows(dy);
    Tensor dx = empty(with_width(dy, in_features), dy.scalar_type(), device);
    TorchContext context(device);
    Workspace workspace(weight, nullptr, routing, dtype, context);
    context.check(hqq_grouped_linear_dgrad(dx.mutable_data_ptr(), rows.data, rows.stride,
                                           &weight, &routing, dtype, workspace.data(),
                                           workspace.bytes(), context));
    return dx;
}

std::tuple<Tensor, Tensor> grouped_lora_linear(const Tensor &x, const Tensor &W_q,
                                               const Tensor &scale, const Tensor &zero,
                                               const Tensor &offsets, const Tensor &A,
                                               const Tensor &B, const OptionalTensor &seed,
                                               double scaling, double dropout,
                                               int64_t out_features, int64_t in_features,
                                               int64_t nbits, int64_t group_size, int64_t axis)
{
    Device device = device_of(x);
    hqq_dtype dtype = check_rows("x", x, in_features, "in_features", device);
    hqq_routing routing = check_routing(offsets, "x", x);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device, routing.experts);
    Adapter adapter(A, B, weight, seed, scaling, dropout, "x", x.scalar_type(), device,
                    routing.experts);

    Rows rows(x);
    Tensor y = empty(with_width(x, out_features), x.scalar_type(), device);
    Tensor xa = empty({rows.count, adapter.lora.rank}, ScalarType::Float, device);
    TorchContext context(device);
    Workspace workspace(weight, &adapter.lora, routing, dtype, context);
    context.check(hqq_grouped_lora_linear(
        y.mutable_data_ptr(), static_cast<float *>(xa.mutable_data_ptr()), rows.data,
        rows.stride, &weight, &adapter.lora, &routing, dtype, workspace.data(),
        workspace.bytes(), context));
    return {y, xa};
}

std::tuple<Tensor, Tensor, Tensor> grouped_lora_linear_backward(
    const Tensor &dy, const OptionalTensor &x, const OptionalTensor &xa, const Tensor &W_q,
    const Tensor &scale, const Tensor &zero, const Tensor &offsets, const Tensor &A,
    const Tensor &B, const OptionalTensor &seed, double scaling, double dropout,
    int64_t out_features, int64_t in_features, int64_t nbits, int64_t group_size, int64_t axis,
    bool needs_dx, bool needs_dA, bool needs_dB)
{
    Device device = device_of(dy);
    hqq_dtype dtype = check_rows("dy", dy, out_features, "out_features", device);
    hqq_routing routing = check_routing(offsets, "dy", dy);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device, routing.experts);
    Adapter adapter(A, B, weight, seed, scaling, dropout, "dy", dy.scalar_type(), device,
                    routing.experts);
    const hqq_lora &lora = adapter.lora;
    check_saved(dy, x, xa, weight, lora, needs_dA, needs_dB, device);

    int64_t E = routing.experts;
    Tensor dx = gradient(needs_dx, with_width(dy, in_features), dy.scalar_type(), device);
    Tensor dA = gradient(needs_dA, {E, lora.rank, in_features}, A.scalar_type(), device);
    Tensor dB = gradient(needs_dB, {E, out_features, lora.rank}, A.scalar_type(), device);
    Rows dy_rows(dy);
    std::optional<Rows> x_rows;
    if (x) x_rows.emplace(*x);
    OptionalTensor xa_rows;
    if (xa) xa_rows = as_contiguous(*xa);
    TorchContext context(device);
    Workspace workspace(weight, &lora, routing, dtype, context);
    context.check(hqq_grouped_lora_linear_backward(
        needs_dx ? dx.mutable_data_ptr() : nullptr, needs_dA ? dA.mutable_data_ptr() : nullptr,
        needs_dB ? dB.mutable_data_ptr() : nullptr, dy_rows.data, dy_rows.stride,
        x ? x_rows->data : nullptr, x ? x_rows->stride : in_features,
        xa ? xa_rows->const_data_ptr<float>() : nullptr, &weight, &lora, &routing, dtype,
        workspace.data(), workspace.bytes(), context));
    return {dx, dA, dB};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hqqlora, HQQ_DISPATCH_KEY, m)
{
    m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
    m.impl("grouped_linear_dgrad", TORCH_BOX(&grouped_linear_dgrad));
    m.impl("grouped_lora_linear", TORCH_BOX(&grouped_lora_linear));
    m.impl("grouped_lora_linear_backward", TORCH_BOX(&grouped_lora_linear_backward));
}

} // namespace hqqlora

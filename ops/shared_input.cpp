/* The products of layers that share their input: each half of an adapter by itself. */
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "adapter.h"

namespace hqqlora
{
namespace
{

/* One factor of an adapter, contiguous, held for the time of the call. */
struct Factor {
    /* A [R,width] or B [width,R]. */
    Factor(const char *name, const Tensor &factor, int64_t width, double scaling,
           const char *x_name, ScalarType x_dtype, const Device &device)
        : factor_(factor)
    {
        const bool is_A = name[0] == 'A';
        check_device(name, factor, device);
        lora.dtype = dtype_beside(name, factor, x_name, x_dtype);
        HQQ_CHECK(factor.dim() == 2 && factor.size(is_A ? 1 : 0) == width, name,
                  " must have shape [", is_A ? "R, in_features = " : "out_features = ", width,
                  is_A ? "], got " : ", R], got ", shape_of(factor));
        lora.rank = factor.size(is_A ? 0 : 1);
        check_rank(name, lora.rank);
        check_scaling(scaling);
        lora.scaling = static_cast<float>(scaling);
        factor_ = as_contiguous(factor);
        (is_A ? lora.A : lora.B) = factor_.const_data_ptr();
    }
    hqq_lora lora = {};

  private:
    Tensor factor_;
};

/* What A [R,K] or B [N,R] says of its own size. */
int64_t factor_size(const char *name, const Tensor &factor, int64_t dimension)
{
    HQQ_CHECK(factor.dim() == 2, name, " must have shape [",
              name[0] == 'A' ? "R, in_features" : "out_features, R", "], got ",
              shape_of(factor));
    return factor.size(dimension);
}

const float *floats_of(const Tensor &t)
{
    return static_cast<const float *>(t.const_data_ptr());
}

Tensor lora_project(const Tensor &x, const Tensor &A)
{
    Device device = device_of(x);
    int64_t K = factor_size("A", A, 1);
    hqq_dtype dtype = check_rows("x", x, K, "in_features", device);
    Factor factor("A", A, K, 1.0, "x", x.scalar_type(), device);

    Rows rows(x);
    Tensor xa = empty({rows.count, factor.lora.rank}, ScalarType::Float, device);
    TorchContext context(device);
    Workspace workspace = Workspace::of_shared_input(check_format(0, K, 8, 1, 1), factor.lora,
                                                     rows.count, dtype, context);
    context.check(hqq_lora_project(static_cast<float *>(xa.mutable_data_ptr()), rows.data,
                                   rows.stride, &factor.lora, rows.count, K, dtype,
                                   workspace.data(), workspace.bytes(), context));
    return xa;
}

Tensor lora_linear_from_xa(const Tensor &x, const Tensor &W_q, const Tensor &scale,
                           const Tensor &zero, const OptionalTensor &bias, const Tensor &xa,
                           const Tensor &B, double scaling, int64_t out_features,
                           int64_t in_features, int64_t nbits, int64_t group_size, int64_t axis)
{
    Device device = device_of(x);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device);
    hqq_dtype dtype = check_rows("x", x, in_features, "in_features", device);
    hqq_dtype bias_dtype = check_bias(bias, out_features, x.scalar_type(), device);
    Factor factor("B", B, out_features, scaling, "x", x.scalar_type(), device);
    check_given("xa", xa, rows_of(x), factor.lora.rank, device);

    OptionalTensor b;
    if (bias) b = as_contiguous(*bias);
    Tensor xa_rows = as_contiguous(xa);
    Rows rows(x);
    Tensor y = empty(with_width(x, out_features), x.scalar_type(), device);
    TorchContext context(device);
    Workspace workspace =
        Workspace::of_shared_input(weight, factor.lora, rows.count, dtype, context);
    context.check(hqq_lora_linear_from_xa(
        y.mutable_data_ptr(), floats_of(xa_rows), rows.data, rows.stride, &weight,
        b ? b->const_data_ptr() : nullptr, bias_dtype, &factor.lora, rows.count, dtype,
        workspace.data(), workspace.bytes(), context));
    return y;
}

std::tuple<Tensor, Tensor> lora_factor_gradients(const Tensor &dy, const OptionalTensor &xa,
                                                 const Tensor &B, double scaling,
                                                 bool needs_dyb, bool needs_dB)
{
    Device device = device_of(dy);
    int64_t N = factor_size("B", B, 0);
    hqq_dtype dtype = check_rows("dy", dy, N, "out_features", device);
    Factor factor("B", B, N, scaling, "dy", dy.scalar_type(), device);
    int64_t R = factor.lora.rank;
    HQQ_CHECK(!needs_dB || xa, "dB needs xa");
    if (xa) check_given("xa", *xa, rows_of(dy), R, device);

    Rows rows(dy);
    Tensor dyb = gradient(needs_dyb, {rows.count, R}, ScalarType::Float, device);
    Tensor dB = gradient(needs_dB, {N, R}, B.scalar_type(), device);
    OptionalTensor xa_rows;
    if (xa) xa_rows = as_contiguous(*xa);
    TorchContext context(device);
    Workspace workspace = Workspace::of_shared_input(check_format(N, 0, 8, 1, 1), factor.lora,
                                                     rows.count, dtype, context);
    context.check(hqq_lora_factor_gradients(
        needs_dyb ? static_cast<float *>(dyb.mutable_data_ptr()) : nullptr,
        needs_dB ? dB.mutable_data_ptr() : nullptr, rows.data, rows.stride,
        xa ? floats_of(*xa_rows) : nullptr, &factor.lora, rows.count, N, dtype,
        workspace.data(), workspace.bytes(), context));
    return {dyb, dB};
}

std::tuple<Tensor, Tensor> lora_input_gradients(const Tensor &dy, const Tensor &dyb,
                                                const OptionalTensor &x, const Tensor &W_q,
                                                const Tensor &scale, const Tensor &zero,
                                                const Tensor &A, double scaling,
                                                int64_t out_features, int64_t in_features,
                                                int64_t nbits, int64_t group_size, int64_t axis,
                                                bool needs_dx, bool needs_dA)
{
    Device device = device_of(dy);
    hqq_weight weight = check_weight(W_q, scale, zero, out_features, in_features, nbits,
                                     group_size, axis, device);
    hqq_dtype dtype = check_rows("dy", dy, out_features, "out_features", device);
    Factor factor("A", A, in_features, scaling, "dy", dy.scalar_type(), device);
    check_given("dyb", dyb, rows_of(dy), factor.lora.rank, device);
    check_saved(dy, x, std::nullopt, weight, factor.lora, needs_dA, false, device);

    Tensor dx = gradient(needs_dx, with_width(dy, in_features), dy.scalar_type(), device);
    Tensor dA = gradient(needs_dA, {factor.lora.rank, in_features}, A.scalar_type(), device);
    Rows dy_rows(dy);
    std::optional<Rows> x_rows;
    if (x) x_rows.emplace(*x);
    Tensor dyb_rows = as_contiguous(dyb);
    TorchContext context(device);
    Workspace workspace =
        Workspace::of_shared_input(weight, factor.lora, dy_rows.count, dtype, context);
    context.check(hqq_lora_input_gradients(
        needs_dx ? dx.mutable_data_ptr() : nullptr, needs_dA ? dA.mutable_data_ptr() : nullptr,
        dy_rows.data, dy_rows.stride, floats_of(dyb_rows), x ? x_rows->data : nullptr,
        x ? x_rows->stride : in_features, &weight, &factor.lora, dy_rows.count, dtype,
        workspace.data(), workspace.bytes(), context));
    return {dx, dA};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hqqlora, HQQ_DISPATCH_KEY, m)
{
    m.impl("lora_project", TORCH_BOX(&lora_project));
    m.impl("lora_linear_from_xa", TORCH_BOX(&lora_linear_from_xa));
    m.impl("lora_factor_gradients", TORCH_BOX(&lora_factor_gradients));
    m.impl("lora_input_gradients", TORCH_BOX(&lora_input_gradients));
}

} // namespace hqqlora

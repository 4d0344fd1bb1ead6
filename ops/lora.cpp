/* The product with a LoRA adapter, and its gradients. */
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "torch_context.h"

namespace hqqlora
{
namespace
{

/* A and B as the library reads them: contiguous, held for the time of the call. */
struct Adapter {
    Adapter(const Tensor &A, const Tensor &B, const hqq_weight &weight,
            const OptionalTensor &seed, double scaling, double dropout, const char *x_name,
            ScalarType x_dtype, const Device &device)
        : lora(check_adapter(A, B, weight, seed, scaling, dropout, x_name, x_dtype, device)),
          A_(as_contiguous(A)), B_(as_contiguous(B))
    {
        lora.A = A_.const_data_ptr();
        lora.B = B_.const_data_ptr();
    }
    hqq_lora lora;

  private:
    Tensor A_, B_;
};

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

/* The forward's input and by-product, as far as the wanted gradients need them. */
void check_saved(const Tensor &dy, const OptionalTensor &x, const OptionalTensor &xa,
                 const hqq_weight &weight, const hqq_lora &lora, bool needs_dA, bool needs_dB,
                 const Device &device)
{
    HQQ_CHECK(!needs_dA || x, "dA needs x");
    HQQ_CHECK(!needs_dB || x || xa, "dB needs xa or x");
    if (x) {
        check_rows("x", *x, weight.in_features, "in_features", device);
        HQQ_CHECK(x->scalar_type() == dy.scalar_type(), "x must have the dtype of dy, ",
                  name_of(dy.scalar_type()), ", got ", name_of(x->scalar_type()));
        HQQ_CHECK(rows_of(*x) == rows_of(dy), "x must have as many rows as dy, ", rows_of(dy),
                  ", got shape ", shape_of(*x));
    }
    if (xa) {
        check_device("xa", *xa, device);
        HQQ_CHECK(xa->scalar_type() == ScalarType::Float, "xa must be float32, got ",
                  name_of(xa->scalar_type()));
        HQQ_CHECK(has_shape(*xa, {rows_of(dy), lora.rank}), "xa must have shape [", rows_of(dy),
                  ", ", lora.rank, "], got ", shape_of(*xa));
    }
}

Tensor gradient(bool needed, std::vector<int64_t> shape, ScalarType dtype, const Device &device)
{
    return empty(needed ? std::move(shape) : std::vector<int64_t>{0}, dtype, device);
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

/* What the ops with a LoRA adapter have in common. */
#ifndef HQQLORA_OPS_ADAPTER_H
#define HQQLORA_OPS_ADAPTER_H

#include "torch_context.h"

namespace hqqlora
{

/* A and B as the library reads them: contiguous, held for the time of the call. */
struct Adapter {
    Adapter(const Tensor &A, const Tensor &B, const hqq_weight &weight,
            const OptionalTensor &seed, double scaling, double dropout, const char *x_name,
            ScalarType x_dtype, const Device &device, int64_t experts = 0)
        : lora(check_adapter(A, B, weight, seed, scaling, dropout, x_name, x_dtype, device,
                             experts)),
          A_(as_contiguous(A)), B_(as_contiguous(B))
    {
        lora.A = A_.const_data_ptr();
        lora.B = B_.const_data_ptr();
    }
    hqq_lora lora;

  private:
    Tensor A_, B_;
};

/* xa or dyb [M,R], as another call has computed it. */
inline void check_given(const char *name, const Tensor &given, int64_t rows, int64_t rank,
                        const Device &device)
{
    check_device(name, given, device);
    HQQ_CHECK(given.scalar_type() == ScalarType::Float, name, " must be float32, got ",
              name_of(given.scalar_type()));
    HQQ_CHECK(has_shape(given, {rows, rank}), name, " must have shape [", rows, ", ", rank,
              "], got ", shape_of(given));
}

/* Checks the forward's input and by-product, as far as the wanted gradients need them. */
inline void check_saved(const Tensor &dy, const OptionalTensor &x, const OptionalTensor &xa,
                        const hqq_weight &weight, const hqq_lora &lora, bool needs_dA,
                        bool needs_dB, const Device &device)
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
    if (xa) check_given("xa", *xa, rows_of(dy), lora.rank, device);
}

inline Tensor gradient(bool needed, std::vector<int64_t> shape, ScalarType dtype,
                       const Device &device)
{
    return empty(needed ? std::move(shape) : std::vector<int64_t>{0}, dtype, device);
}

} // namespace hqqlora

#endif

/* What the ops with a LoRA adapter have in common. */
#ifndef HQQLORA_OPS_ADAPTER_H
#define HQQLORA_OPS_ADAPTER_H

#include <cmath>

#include "torch_context.h"

namespace hqqlora
{

inline void check_rank(const char *name, int64_t rank)
{
    HQQ_CHECK(rank <= HQQ_MAX_RANK, "the rank of ", name, " must be at most ", HQQ_MAX_RANK,
              ", got ", rank);
}

inline void check_scaling(double scaling)
{
    HQQ_CHECK(std::isfinite(scaling), "scaling must be finite, got ", scaling);
}

/* The descriptor of an adapter but for its pointers, which the caller sets once A and B are
 * contiguous. */
inline hqq_lora check_adapter(const Tensor &A, const Tensor &B, const hqq_weight &weight,
                              const OptionalTensor &seed, double scaling, double dropout,
                              const char *x_name, ScalarType x_dtype, const Device &device,
                              int64_t experts = 0)
{
    const std::string first = experts ? std::to_string(experts) + ", " : "";
    const int64_t stacked = experts ? 1 : 0;
    check_device("A", A, device);
    check_device("B", B, device);
    hqq_dtype dtype = dtype_beside("A", A, x_name, x_dtype);
    HQQ_CHECK(B.scalar_type() == A.scalar_type(), "B must have the dtype of A, ",
              name_of(A.scalar_type()), ", got ", name_of(B.scalar_type()));
    HQQ_CHECK(A.dim() == 2 + stacked && A.size(1 + stacked) == weight.in_features &&
                  (!stacked || A.size(0) == experts),
              "A must have shape [", first, "R, in_features = ", weight.in_features, "], got ",
              shape_of(A));
    int64_t rank = A.size(stacked);
    check_rank("A", rank);
    HQQ_CHECK(stacked ? has_shape(B, {experts, weight.out_features, rank})
                      : has_shape(B, {weight.out_features, rank}),
              "B must have shape [", first, weight.out_features, ", ", rank, "], got ",
              shape_of(B));
    check_scaling(scaling);
    HQQ_CHECK(dropout >= 0 && dropout < 1, "dropout must be at least 0 and below 1, got ",
              dropout);
    hqq_lora lora = {};
    lora.rank = rank;
    lora.dtype = dtype;
    lora.scaling = static_cast<float>(scaling);
    lora.dropout = static_cast<float>(dropout);
    if (seed) check_device("seed", *seed, device);
    if (dropout > 0) {
        HQQ_CHECK(seed.has_value(), "dropout = ", dropout, " needs a seed");
        HQQ_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed must be an int64 tensor of one element, got ",
                  name_of(seed->scalar_type()), " of shape ", shape_of(*seed));
        /* on a GPU not to be read here; its bits are those of the int64 */
        lora.seed = static_cast<const uint64_t *>(seed->const_data_ptr());
    }
    return lora;
}

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

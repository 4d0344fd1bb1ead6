/* What torch lends to the C library on the CPU: its threads, its GEMM, its allocator. */
#ifndef HQQLORA_OPS_TORCH_CONTEXT_H
#define HQQLORA_OPS_TORCH_CONTEXT_H

#include <string>
#include <vector>

#include "arguments.h"

namespace hqqlora
{

/* Where the kernels of this half run, for the checks in arguments.h. */
Device cpu_device();

/* An uninitialised contiguous CPU tensor. */
Tensor empty(const std::vector<int64_t> &shape, ScalarType dtype);

/* The shape of t with its last dimension replaced. */
std::vector<int64_t> with_width(const Tensor &t, int64_t width);

/* t itself if it is contiguous, else a contiguous copy. */
Tensor as_contiguous(const Tensor &t);

/* A [..., width] tensor as the C library reads it: rows `stride` elements apart. Holds the
 * tensor, which is t itself or, where t's strides do not fit, a copy. */
struct Rows {
    explicit Rows(const Tensor &t);
    Tensor tensor;
    int64_t count;
    int64_t stride;
    const void *data;
};

/* The context of one call into the C library, and the error texts of that call. */
class TorchContext
{
  public:
    TorchContext();
    TorchContext(const TorchContext &) = delete;
    TorchContext &operator=(const TorchContext &) = delete;

    operator const hqq_context *() const { return &context_; }

    /* Throws, with the library's message, unless status is HQQ_OK. */
    void check(hqq_status status) const;

  private:
    std::string gemm_error_; /* why the GEMM callback failed, if it did */
    hqq_context context_ = {};
};

/* Memory for one product, aligned to 64 bytes, freed with this object. */
class Workspace
{
  public:
    Workspace(const hqq_weight &weight, const hqq_lora *lora, int64_t M, hqq_dtype dtype,
              const TorchContext &context);
    void *data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    std::optional<Tensor> memory_;
    void *data_ = nullptr;
    size_t bytes_ = 0;
};

} // namespace hqqlora

#endif

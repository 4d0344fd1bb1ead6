/* What torch lends to the C library, and takes back.
 *
 * The shim has two halves, one over the CPU library and one over the CUDA library, which have
 * the same C interface. All ops are written once and compiled for each half; what differs is
 * in torch_context_cpu.cpp and torch_context_cuda.cpp. */
#ifndef HQQLORA_OPS_TORCH_CONTEXT_H
#define HQQLORA_OPS_TORCH_CONTEXT_H

#include <string>
#include <vector>

#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"

/* The half that is being compiled: CPU or CUDA, a dispatch key of torch. */
#ifndef HQQ_DISPATCH_KEY
#error "compile with -DHQQ_DISPATCH_KEY=CPU or =CUDA"
#endif

namespace hqqlora
{

/* Throws "<what> failed: <torch's reason>" unless a call into torch succeeded. */
void torch_check(AOTITorchError error, const char *what);

/* An uninitialised contiguous tensor. */
Tensor empty(const std::vector<int64_t> &shape, ScalarType dtype, const Device &device);

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

/* The context of one call into the C library, and the error texts of that call. On a GPU, the
 * tensors' device is the current one as long as this lives. */
class TorchContext
{
  public:
    explicit TorchContext(const Device &device);
    TorchContext(const TorchContext &) = delete;
    TorchContext &operator=(const TorchContext &) = delete;

    operator const hqq_context *() const { return &context_; }
    const Device &device() const { return device_; }

    /* Throws, with the library's message, unless status is HQQ_OK. */
    void check(hqq_status status) const;

    /* Whether the library's calls return before the work is done, and so without knowing
     * what it will meet in the data. */
    bool enqueues() const;

  private:
    void apply_overrides(); /* of the environment: HQQLORA_ISA, HQQLORA_KERNEL */

    Device device_;
    std::string gemm_error_; /* why the GEMM callback failed, if it did */
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    hqq_context context_ = {};
};

/* Memory for one product, aligned to 64 bytes, freed with this object. */
class Workspace
{
  public:
    Workspace(const hqq_weight &weight, const hqq_lora *lora, int64_t M, hqq_dtype dtype,
              const TorchContext &context);
    Workspace(const hqq_weight &weight, const hqq_lora *lora, const hqq_routing &routing,
              hqq_dtype dtype, const TorchContext &context);
    /* of a call of layers that share their input; weight may be a shape alone */
    static Workspace of_shared_input(const hqq_weight &weight, const hqq_lora &lora, int64_t M,
                                     hqq_dtype dtype, const TorchContext &context);
    void *data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    Workspace() = default;
    void allocate(const TorchContext &context); /* bytes_ of it */

    std::optional<Tensor> memory_;
    void *data_ = nullptr;
    size_t bytes_ = 0;
};

} // namespace hqqlora

#endif

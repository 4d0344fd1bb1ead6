/* What torch lends on a GPU: the device and the current stream of the tensors. Memory comes
 * from torch's caching allocator (`empty`), which hands it out again in the order of that
 * stream: what a call borrows may go back while its kernels still wait. The GEMM is the
 * library's own (cuBLASLt).
 *
 * Of CUDA, only torch's entry points are used: this file needs no CUDA toolkit. */
#ifndef USE_CUDA
#error "compile with -DUSE_CUDA, as torch's headers want it"
#endif
#include "torch_context.h"

namespace hqqlora
{

TorchContext::TorchContext(const Device &device) : device_(device)
{
    HQQ_CHECK(device.is_cuda(), "the tensors must be on cuda, got tensors on ",
              name_of(device));
    apply_overrides();
    guard_.emplace(device.index);
    torch_check(aoti_torch_get_current_cuda_stream(device.index, &context_.stream),
                "asking for torch's current CUDA stream");
}

bool TorchContext::enqueues() const
{
    return true;
}

} // namespace hqqlora

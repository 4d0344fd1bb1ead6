/* What torch lends on the CPU: its threads and its GEMM. */
#include "torch_context.h"

#include <torch/csrc/stable/c/shim.h>

/* torch's generated CPU entry points: stable, but outside the promise of the stable ABI, so
 * weak; without them the library's own GEMM serves. (The dispatcher would be another way, but
 * takes no Scalar, such as beta, from the stable ABI.) */
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out,
                                                           AtenTensorHandle self,
                                                           AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out,
                                                              AtenTensorHandle self,
                                                              AtenTensorHandle mat1,
                                                              AtenTensorHandle mat2,
                                                              double beta, double alpha);
}

namespace hqqlora
{
namespace
{

int32_t torch_dtype(hqq_dtype dtype)
{
    return dtype == HQQ_F32   ? aoti_torch_dtype_float32()
           : dtype == HQQ_F16 ? aoti_torch_dtype_float16()
                              : aoti_torch_dtype_bfloat16();
}

/* A [rows, columns] window on memory that torch does not own. */
Tensor window(const void *data, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride, hqq_dtype dtype)
{
    int64_t shape[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
    AtenTensorHandle handle = nullptr;
    torch_check(aoti_torch_create_tensor_from_blob(const_cast<void *>(data), 2, shape, strides,
                                                   0, torch_dtype(dtype),
                                                   aoti_torch_device_type_cpu(), 0, &handle),
                "a window for torch's GEMM");
    return Tensor(handle);
}

Tensor operand(const void *data, int64_t ld, int32_t transpose, int64_t rows, int64_t columns,
               hqq_dtype dtype)
{
    return transpose ? window(data, rows, columns, 1, ld, dtype)
                     : window(data, rows, columns, ld, 1, dtype);
}

/* out = a b + beta * out; beta 0 or 1. */
void multiply(const Tensor &out, const Tensor &a, const Tensor &b, float beta)
{
    if (beta == 0)
        torch_check(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()), "torch's mm");
    else
        torch_check(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1),
                    "torch's addmm");
}

/* hqq_gemm_fn. Called from C, so nothing may be thrown through it. */
int32_t torch_gemm(void *C, int64_t ldc, const void *A, int64_t lda, int32_t transpose_a,
                   const void *B, int64_t ldb, int32_t transpose_b, int64_t m, int64_t n,
                   int64_t k, float beta, hqq_dtype dtype, void *gemm_data)
{
    try {
        multiply(window(C, m, n, ldc, 1, dtype), operand(A, lda, transpose_a, m, k, dtype),
                 operand(B, ldb, transpose_b, k, n, dtype), beta);
        return 0;
    } catch (const std::exception &failure) {
        try {
            *static_cast<std::string *>(gemm_data) = failure.what();
        } catch (...) { /* out of memory: the status alone must do */
        }
        return 1;
    } catch (...) {
        return 1;
    }
}

} // namespace

TorchContext::TorchContext(const Device &device) : device_(device)
{
    HQQ_CHECK(device.is_cpu(), "the tensors must be on cpu, got tensors on ", name_of(device));
    apply_overrides();
    context_.parallel_for = &torch_parallel_for;
    if (aoti_torch_cpu_mm_out && aoti_torch_cpu_addmm_out) context_.gemm = &torch_gemm;
    context_.gemm_data = &gemm_error_;
}

bool TorchContext::enqueues() const
{
    return false;
}

} // namespace hqqlora

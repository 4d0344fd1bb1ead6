#include "torch_context.h"

#include <cstdlib>
#include <cstring>

#include <torch/csrc/stable/c/shim.h>

/* torch's generated CPU entry points: stable, but outside the promise of the stable ABI, so
 * weak; without them the library's own GEMM serves. (The dispatcher would be another way, but
 * takes no Scalar, such as beta, from the stable ABI.) The last one tells why an entry point
 * failed, from torch 2.13 on. */
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out,
                                                           AtenTensorHandle self,
                                                           AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out,
                                                              AtenTensorHandle self,
                                                              AtenTensorHandle mat1,
                                                              AtenTensorHandle mat2,
                                                              double beta, double alpha);
__attribute__((weak)) const char *torch_exception_get_what_without_backtrace();
}

namespace hqqlora
{
namespace
{

void torch_check(AOTITorchError error, const char *what)
{
    if (C10_LIKELY(error == AOTI_TORCH_SUCCESS)) return;
    const char *why = torch_exception_get_what_without_backtrace
                          ? torch_exception_get_what_without_backtrace()
                          : "torch gives no reason";
    throw std::runtime_error(message(what, " failed: ", why));
}

int32_t torch_dtype(ScalarType dtype)
{
    switch (dtype) {
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    default: return aoti_torch_dtype_float32();
    }
}

int32_t torch_dtype(hqq_dtype dtype)
{
    return dtype == HQQ_F32   ? aoti_torch_dtype_float32()
           : dtype == HQQ_F16 ? aoti_torch_dtype_float16()
                              : aoti_torch_dtype_bfloat16();
}

/* ---- HQQLORA_ISA and HQQLORA_KERNEL, read once ------------------------------------- */

struct Choice {
    const char *name;
    int value;
};

struct Overrides {
    hqq_isa isa = HQQ_ISA_AUTO;
    hqq_kernel kernel = HQQ_KERNEL_AUTO;
    std::string error; /* shown by the first op: an exception at load would end the process */
};

template <size_t count>
int choice_from_env(const char *variable, const Choice (&choices)[count], std::string &error)
{
    const char *value = std::getenv(variable);
    if (value == nullptr || *value == '\0') return 0;
    std::string names;
    for (const Choice &choice : choices) {
        if (std::strcmp(choice.name, value) == 0) return choice.value;
        names += names.empty() ? choice.name : std::string(", ") + choice.name;
    }
    error = message(variable, " must be one of ", names, ", got '", value, "'");
    return 0;
}

Overrides read_overrides()
{
    static const Choice isas[] = {{"portable", HQQ_ISA_PORTABLE},
                                  {"avx2", HQQ_ISA_AVX2},
                                  {"avx512", HQQ_ISA_AVX512},
                                  {"avx512_bf16", HQQ_ISA_AVX512_BF16}};
    static const Choice kernels[] = {{"reference", HQQ_KERNEL_REFERENCE},
                                     {"direct", HQQ_KERNEL_DIRECT},
                                     {"blocked", HQQ_KERNEL_BLOCKED}};
    Overrides overrides;
    overrides.isa = static_cast<hqq_isa>(choice_from_env("HQQLORA_ISA", isas, overrides.error));
    overrides.kernel =
        static_cast<hqq_kernel>(choice_from_env("HQQLORA_KERNEL", kernels, overrides.error));
    return overrides;
}

const Overrides overrides = read_overrides();

/* ---- GEMM -------------------------------------------------------------------------- */

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

/* ---- context ----------------------------------------------------------------------- */

Device cpu_device()
{
    return {aoti_torch_device_type_cpu(), "cpu"};
}

TorchContext::TorchContext()
{
    HQQ_CHECK(overrides.error.empty(), overrides.error.substr(std::strlen("hqqlora: ")));
    context_.parallel_for = &torch_parallel_for;
    if (aoti_torch_cpu_mm_out && aoti_torch_cpu_addmm_out) context_.gemm = &torch_gemm;
    context_.gemm_data = &gemm_error_;
    context_.isa = overrides.isa;
    context_.kernel = overrides.kernel;
}

void TorchContext::check(hqq_status status) const
{
    if (C10_LIKELY(status == HQQ_OK)) return;
    const char *why = hqq_last_error();
    std::string text = message(*why ? why : hqq_status_name(status));
    if (!gemm_error_.empty()) text += " (" + gemm_error_ + ")";
    throw std::runtime_error(text);
}

/* ---- memory ------------------------------------------------------------------------ */

Tensor empty(const std::vector<int64_t> &shape, ScalarType dtype)
{
    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= shape[i] > 1 ? shape[i] : 1;
    }
    AtenTensorHandle handle = nullptr;
    torch_check(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                         strides.data(), torch_dtype(dtype),
                                         aoti_torch_device_type_cpu(), 0, &handle),
                "an allocation");
    return Tensor(handle);
}

std::vector<int64_t> with_width(const Tensor &t, int64_t width)
{
    const int64_t *sizes = t.sizes().data();
    std::vector<int64_t> shape(sizes, sizes + t.dim());
    shape.back() = width;
    return shape;
}

Tensor as_contiguous(const Tensor &t)
{
    if (t.is_contiguous()) return t;
    const int64_t *sizes = t.sizes().data();
    Tensor copy = empty(std::vector<int64_t>(sizes, sizes + t.dim()), t.scalar_type());
    torch_check(aoti_torch_copy_(copy.get(), t.get(), 0), "a contiguous copy");
    return copy;
}

Rows::Rows(const Tensor &t) : tensor(t), count(rows_of(t)), stride(row_stride(t))
{
    if (stride < 0) {
        tensor = as_contiguous(t);
        stride = row_stride(tensor);
    }
    data = tensor.const_data_ptr();
}

Workspace::Workspace(const hqq_weight &weight, const hqq_lora *lora, int64_t M, hqq_dtype dtype,
                     const TorchContext &context)
{
    constexpr uintptr_t alignment = 64;
    context.check(hqq_workspace_size(&bytes_, &weight, lora, M, dtype, context));
    if (bytes_ == 0) return;
    /* torch aligns to 64 bytes, but a replaced allocator need not */
    memory_ = empty({static_cast<int64_t>(bytes_ + alignment - 1)}, ScalarType::Byte);
    uintptr_t address = reinterpret_cast<uintptr_t>(memory_->mutable_data_ptr());
    data_ = reinterpret_cast<void *>((address + alignment - 1) / alignment * alignment);
}

} // namespace hqqlora

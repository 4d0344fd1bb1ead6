/* What both halves of the shim ask of torch in the same way. */
#include "torch_context.h"

#include <cstdlib>
#include <cstring>

/* Tells why an entry point of torch failed, from torch 2.13 on. */
extern "C" __attribute__((weak)) const char *torch_exception_get_what_without_backtrace();

namespace hqqlora
{
namespace
{

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
                                  {"avx512_bf16", HQQ_ISA_AVX512_BF16},
                                  {"amx", HQQ_ISA_AMX}};
    static const Choice kernels[] = {{"reference", HQQ_KERNEL_REFERENCE},
                                     {"direct", HQQ_KERNEL_DIRECT},
                                     {"blocked", HQQ_KERNEL_BLOCKED},
                                     {"tiled", HQQ_KERNEL_TILED}};
    Overrides overrides;
    overrides.isa = static_cast<hqq_isa>(choice_from_env("HQQLORA_ISA", isas, overrides.error));
    overrides.kernel =
        static_cast<hqq_kernel>(choice_from_env("HQQLORA_KERNEL", kernels, overrides.error));
    return overrides;
}

const Overrides overrides = read_overrides();

} // namespace

/* ---- errors ------------------------------------------------------------------------ */

void torch_check(AOTITorchError error, const char *what)
{
    if (C10_LIKELY(error == AOTI_TORCH_SUCCESS)) return;
    const char *why = torch_exception_get_what_without_backtrace
                          ? torch_exception_get_what_without_backtrace()
                          : "torch gives no reason";
    throw std::runtime_error(message(what, " failed: ", why));
}

void TorchContext::check(hqq_status status) const
{
    if (C10_LIKELY(status == HQQ_OK)) return;
    const char *why = hqq_last_error();
    std::string text = message(*why ? why : hqq_status_name(status));
    if (!gemm_error_.empty()) text += " (" + gemm_error_ + ")";
    throw std::runtime_error(text);
}

void TorchContext::apply_overrides()
{
    HQQ_CHECK(overrides.error.empty(), overrides.error.substr(std::strlen("hqqlora: ")));
    context_.isa = overrides.isa;
    context_.kernel = overrides.kernel;
}

/* ---- memory ------------------------------------------------------------------------ */

Tensor empty(const std::vector<int64_t> &shape, ScalarType dtype, const Device &device)
{
    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= shape[i] > 1 ? shape[i] : 1;
    }
    AtenTensorHandle handle = nullptr;
    torch_check(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                         strides.data(), torch_dtype(dtype), device.type,
                                         device.is_cpu() ? 0 : device.index, &handle),
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
    Tensor copy =
        empty(std::vector<int64_t>(sizes, sizes + t.dim()), t.scalar_type(), device_of(t));
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
    context.check(hqq_workspace_size(&bytes_, &weight, lora, M, dtype, context));
    allocate(context);
}

Workspace::Workspace(const hqq_weight &weight, const hqq_lora *lora, const hqq_routing &routing,
                     hqq_dtype dtype, const TorchContext &context)
{
    context.check(hqq_grouped_workspace_size(&bytes_, &weight, lora, &routing, dtype, context));
    allocate(context);
}

Workspace Workspace::of_shared_input(const hqq_weight &weight, const hqq_lora &lora, int64_t M,
                                     hqq_dtype dtype, const TorchContext &context)
{
    Workspace workspace;
    context.check(
        hqq_shared_input_workspace_size(&workspace.bytes_, &weight, &lora, M, dtype, context));
    workspace.allocate(context);
    return workspace;
}

void Workspace::allocate(const TorchContext &context)
{
    constexpr uintptr_t alignment = 64;
    if (bytes_ == 0) return;
    /* torch aligns to 64 bytes, but a replaced allocator need not */
    memory_ = empty({static_cast<int64_t>(bytes_ + alignment - 1)}, ScalarType::Byte,
                    context.device());
    uintptr_t address = reinterpret_cast<uintptr_t>(memory_->mutable_data_ptr());
    data_ = reinterpret_cast<void *>((address + alignment - 1) / alignment * alignment);
}

} // namespace hqqlora

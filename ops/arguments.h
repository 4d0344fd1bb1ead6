/*
 * From torch tensors to the C library's descriptors: the checks of an op's arguments and
 * their error texts (those of an adapter: adapter.h). Header-only, and the same for the CPU
 * half and the CUDA half. checks.py and adapter_checks.py make the same checks, with the same
 * words, for tensors without data.
 *
 * Shapes are written as in hqqlora.h: x [..., K], dy and y [..., N], A [R,K], B [N,R].
 */
#ifndef HQQLORA_OPS_ARGUMENTS_H
#define HQQLORA_OPS_ARGUMENTS_H

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "hqqlora.h"

namespace hqqlora
{

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Args> std::string message(const Args &...args)
{
    std::ostringstream text;
    text << "hqqlora: ";
    (text << ... << args);
    return text.str();
}

/* STD_TORCH_CHECK without its prefix of function, file and line: these messages are for the
 * user of the op, not for its author. */
#define HQQ_CHECK(condition, ...)                                                       \
    do {                                                                                \
        if (C10_UNLIKELY(!(condition))) throw std::runtime_error(message(__VA_ARGS__)); \
    } while (0)

/* ---- what messages show ------------------------------------------------------------ */

/* A list as Python writes it: [2, 3]. */
inline std::string list(const int64_t *values, int64_t count)
{
    std::ostringstream text;
    text << '[';
    for (int64_t i = 0; i < count; i++) text << (i ? ", " : "") << values[i];
    text << ']';
    return text.str();
}

inline std::string shape_of(const Tensor &t)
{
    return list(t.sizes().data(), t.dim());
}

inline std::string strides_of(const Tensor &t)
{
    return list(t.strides().data(), t.dim());
}

/* Python's name of a dtype, without "torch.". */
inline const char *name_of(ScalarType dtype)
{
    switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(dtype);
    }
}

/* ---- devices ----------------------------------------------------------------------- */

/* All tensors of a call must be on one device. */
struct Device {
    int32_t type;
    int32_t index; /* which one of its type; meaningless for cpu */
    bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
    bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
};

inline bool operator==(const Device &a, const Device &b)
{
    return a.type == b.type && (a.index == b.index || a.is_cpu());
}

inline Device device_of(const Tensor &t)
{
    Device device = {};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
    return device;
}

/* A device as Python writes it. Tensors on any other kind than these do not get here: torch
 * finds no kernel for them. */
inline std::string name_of(const Device &device)
{
    if (device.is_cpu()) return "cpu";
    if (device.type == aoti_torch_device_type_meta()) return "meta";
    std::string type = device.is_cuda() ? "cuda" : "type " + std::to_string(device.type);
    return type + ":" + std::to_string(device.index);
}

inline void check_device(const char *name, const Tensor &t, const Device &device)
{
    Device found = device_of(t);
    HQQ_CHECK(found == device, name, " must be on ", name_of(device), ", got a tensor on ",
              name_of(found));
}

/* ---- one tensor -------------------------------------------------------------------- */

inline bool is_floating(ScalarType dtype)
{
    return dtype == ScalarType::Float || dtype == ScalarType::Half ||
           dtype == ScalarType::BFloat16;
}

inline hqq_dtype dtype_of(const char *name, ScalarType dtype)
{
    HQQ_CHECK(is_floating(dtype), name, " must be float32, float16 or bfloat16, got ",
              name_of(dtype));
    return dtype == ScalarType::Float  ? HQQ_F32
           : dtype == ScalarType::Half ? HQQ_F16
                                       : HQQ_BF16;
}

inline hqq_dtype dtype_of(const char *name, const Tensor &t)
{
    return dtype_of(name, t.scalar_type());
}

inline bool has_shape(const Tensor &t, std::initializer_list<int64_t> shape)
{
    if (t.dim() != static_cast<int64_t>(shape.size())) return false;
    int64_t i = 0;
    for (int64_t size : shape)
        if (t.size(i++) != size) return false;
    return true;
}

/* ---- x and dy: rows ---------------------------------------------------------------- */

/* M: the product of all dimensions but the last. */
inline int64_t rows_of(const Tensor &t)
{
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < t.dim(); i++) rows *= t.size(i);
    return rows;
}

/* The row stride with which t [..., width] is read as [M, width], or -1 where its strides
 * allow no such view: elements of a row adjacent, rows apart by one stride of at least a
 * row. Broadcast rows (stride 0) do not qualify: the kernels expect distinct rows. */
inline int64_t row_stride(const Tensor &t)
{
    const int64_t *sizes = t.sizes().data(), *strides = t.strides().data();
    int64_t last = t.dim() - 1, width = sizes[last];
    if (width > 1 && strides[last] != 1) return -1;
    int64_t stride = width, expected = -1;
    for (int64_t i = last - 1; i >= 0; i--) {
        if (sizes[i] == 0) return width;
        if (sizes[i] == 1) continue;
        if (expected < 0)
            stride = strides[i];
        else if (strides[i] != expected)
            return -1;
        expected = strides[i] * sizes[i];
    }
    return stride < width ? -1 : stride;
}

/* Checks x [..., width] and its dtype; width_name says which argument gave width. */
inline hqq_dtype check_rows(const char *name, const Tensor &t, int64_t width,
                            const char *width_name, const Device &device)
{
    check_device(name, t, device);
    hqq_dtype dtype = dtype_of(name, t);
    HQQ_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == width, name,
              " must have a last dimension of ", width_name, " = ", width, ", got shape ",
              shape_of(t));
    return dtype;
}

/* ---- the frozen weight ------------------------------------------------------------- */

/* N, K, G, nbits and axis; the rest is left empty. */
inline hqq_weight check_format(int64_t out_features, int64_t in_features, int64_t nbits,
                               int64_t group_size, int64_t axis)
{
    HQQ_CHECK(nbits == 8 || (nbits >= 1 && nbits <= 4), "nbits must be 8, 4, 3, 2 or 1, got ",
              nbits);
    HQQ_CHECK(axis == 0 || axis == 1, "axis must be 0 or 1, got ", axis);
    HQQ_CHECK(out_features >= 0 && in_features >= 0,
              "out_features and in_features must not be negative, got ", out_features, " and ",
              in_features);
    int64_t elements = 0;
    HQQ_CHECK(!__builtin_mul_overflow(out_features, in_features, &elements),
              "out_features * in_features = ", out_features, " * ", in_features,
              " does not fit in 64 bits");
    HQQ_CHECK(group_size > 0, "group_size must be positive, got ", group_size);
    HQQ_CHECK(elements % group_size == 0, "group_size ", group_size,
              " does not divide out_features * in_features = ", out_features, " * ",
              in_features);
    hqq_weight weight = {};
    weight.out_features = out_features;
    weight.in_features = in_features;
    weight.group_size = group_size;
    weight.nbits = static_cast<int32_t>(nbits);
    weight.axis = static_cast<int32_t>(axis);
    return weight;
}

struct PackedSizes {
    int64_t words, groups;
    ScalarType word_dtype;
};

inline PackedSizes packed_sizes(const hqq_weight &weight)
{
    PackedSizes sizes = {};
    int64_t word_bytes = 0;
    hqq_status status = hqq_layout_of(&sizes.words, &word_bytes, &sizes.groups, &weight);
    HQQ_CHECK(status == HQQ_OK, hqq_last_error());
    sizes.word_dtype = word_bytes == 4 ? ScalarType::Int : ScalarType::Byte;
    return sizes;
}

inline void check_contiguous(const char *name, const Tensor &t)
{
    HQQ_CHECK(t.is_contiguous(), name, " must be contiguous, got shape ", shape_of(t),
              " and strides ", strides_of(t));
}

/* "", or what a message says of the experts whose tensors are stacked (0: none are). */
inline std::string of_experts(int64_t experts)
{
    return experts ? " for each of " + std::to_string(experts) + " experts" : "";
}

inline void check_meta(const char *name, const Tensor &t, int64_t groups, const Device &device,
                       int64_t experts)
{
    check_device(name, t, device);
    HQQ_CHECK(t.numel() == groups * (experts ? experts : 1), name,
              " must have one element for each of the ", groups, " groups", of_experts(experts),
              ", got shape ", shape_of(t));
    check_contiguous(name, t);
}

/* 3 bits in planes, which `name` is or is to be, must fit the weight. */
inline void check_planes(const char *name, const hqq_weight &weight)
{
    bool rows_are_groups = weight.axis == 1;
    int64_t rows = rows_are_groups
                       ? weight.out_features * weight.in_features / weight.group_size
                       : weight.group_size;
    HQQ_CHECK(
        weight.out_features % 8 == 0 && rows % 8 == 0, name,
        " is 3 bits in planes, for which 8 must divide out_features = ", weight.out_features,
        " and ", rows_are_groups ? "the number of groups" : "group_size", " = ", rows,
        "; int32 words hold any weight");
}

/* The codes alone: `weight`, of check_format, gets them and how they are packed, which is in
 * planes where 3 bits are uint8. It borrows the tensor's memory. */
inline PackedSizes check_packed(hqq_weight &weight, const Tensor &W_q, const Device &device,
                                int64_t experts = 0)
{
    check_device("W_q", W_q, device);
    bool planes = weight.nbits == 3 && W_q.scalar_type() == ScalarType::Byte;
    if (planes) {
        check_planes("W_q", weight);
        weight.packing = HQQ_PACKING_PLANES;
    }
    PackedSizes sizes = packed_sizes(weight);
    HQQ_CHECK(W_q.scalar_type() == sizes.word_dtype, "W_q must be ", name_of(sizes.word_dtype),
              weight.nbits == 3 ? ", or uint8 in planes," : "", " for nbits = ", weight.nbits,
              ", got ", name_of(W_q.scalar_type()));
    HQQ_CHECK(W_q.numel() == sizes.words * (experts ? experts : 1), "W_q must have ",
              sizes.words, " elements", of_experts(experts),
              " for out_features = ", weight.out_features,
              ", in_features = ", weight.in_features, ", nbits = ", weight.nbits,
              ", group_size = ", weight.group_size, ", axis = ", weight.axis,
              planes ? ", in planes" : "", ", got shape ", shape_of(W_q));
    check_contiguous("W_q", W_q);
    weight.packed = W_q.const_data_ptr();
    return sizes;
}

/* The descriptor of a packed weight, or of the first of those of several experts. It borrows
 * the tensors' memory. */
inline hqq_weight check_weight(const Tensor &W_q, const Tensor &scale, const Tensor &zero,
                               int64_t out_features, int64_t in_features, int64_t nbits,
                               int64_t group_size, int64_t axis, const Device &device,
                               int64_t experts = 0)
{
    hqq_weight weight = check_format(out_features, in_features, nbits, group_size, axis);
    PackedSizes sizes = check_packed(weight, W_q, device, experts);
    weight.meta_dtype = dtype_of("scale", scale);
    HQQ_CHECK(zero.scalar_type() == scale.scalar_type(), "zero must have the dtype of scale, ",
              name_of(scale.scalar_type()), ", got ", name_of(zero.scalar_type()));
    check_meta("scale", scale, sizes.groups, device, experts);
    check_meta("zero", zero, sizes.groups, device, experts);
    weight.scale = scale.const_data_ptr();
    weight.zero = zero.const_data_ptr();
    return weight;
}

/* ---- bias -------------------------------------------------------------------------- */

/* The dtype of what is multiplied with x, or added to the product: fp32 or x's. x_name is "x"
 * or "dy", whichever gave x_dtype. */
inline hqq_dtype dtype_beside(const char *name, const Tensor &t, const char *x_name,
                              ScalarType x_dtype)
{
    ScalarType dtype = t.scalar_type();
    HQQ_CHECK(dtype == x_dtype || dtype == ScalarType::Float, name, " must be float32 or ",
              name_of(x_dtype), " as ", x_name, ", got ", name_of(dtype));
    return dtype_of(name, dtype);
}

/* bias [N], in x's dtype or fp32. Returns its dtype (fp32 where there is none). */
inline hqq_dtype check_bias(const OptionalTensor &bias, int64_t out_features,
                            ScalarType x_dtype, const Device &device)
{
    if (!bias) return HQQ_F32;
    check_device("bias", *bias, device);
    hqq_dtype dtype = dtype_beside("bias", *bias, "x", x_dtype);
    HQQ_CHECK(has_shape(*bias, {out_features}), "bias must have shape [", out_features,
              "], got ", shape_of(*bias));
    return dtype;
}

/* ---- experts ----------------------------------------------------------------------- */

/* Which rows of x [M,width], or of dy, belong to which expert. It borrows the offsets' memory;
 * their order is the C library's to check. */
inline hqq_routing check_routing(const Tensor &offsets, const char *x_name, const Tensor &x)
{
    HQQ_CHECK(x.dim() == 2, x_name, " must have two dimensions, got shape ", shape_of(x));
    HQQ_CHECK(device_of(offsets).is_cpu(), "offsets must be on cpu, got a tensor on ",
              name_of(device_of(offsets)));
    HQQ_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 &&
                  offsets.size(0) >= 2 && offsets.is_contiguous(),
              "offsets must be a contiguous int64 tensor of shape [experts + 1], got ",
              name_of(offsets.scalar_type()), " of shape ", shape_of(offsets));
    hqq_routing routing = {};
    routing.experts = offsets.size(0) - 1;
    routing.offsets = offsets.const_data_ptr<int64_t>();
    HQQ_CHECK(routing.offsets[routing.experts] == x.size(0), "offsets must end with the ",
              x.size(0), " rows of ", x_name, ", got ", routing.offsets[routing.experts]);
    return routing;
}

} // namespace hqqlora

#endif

/* Runs of elements of one dtype to and from registers, in fp32, by loads and stores of up to 16
 * bytes. Rounding is to nearest even, as in dtype.h. */
#ifndef HQQ_KERNELS_CUDA_ELEMENTS_CUH
#define HQQ_KERNELS_CUDA_ELEMENTS_CUH

#include "cuda.cuh"
#include "dtype.h"

/* Calls f<T>(arguments) with the C type of a dtype. */
#define HQQ_BY_DTYPE(dtype, f, ...)                        \
    ((dtype) == HQQ_F16    ? f<__half>(__VA_ARGS__)        \
     : (dtype) == HQQ_BF16 ? f<__nv_bfloat16>(__VA_ARGS__) \
                           : f<float>(__VA_ARGS__))

HQQ_DEVICE_INLINE float hqq_to_float(float value)
{
    return value;
}
HQQ_DEVICE_INLINE float hqq_to_float(__half value)
{
    return __half2float(value);
}
HQQ_DEVICE_INLINE float hqq_to_float(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

HQQ_DEVICE_INLINE void hqq_from_float(float &to, float value)
{
    to = value;
}
HQQ_DEVICE_INLINE void hqq_from_float(__half &to, float value)
{
    to = __float2half_rn(value);
}
HQQ_DEVICE_INLINE void hqq_from_float(__nv_bfloat16 &to, float value)
{
    to = __float2bfloat16_rn(value);
}

/* `count` words from or to memory aligned to them (to 16 bytes, from four words on). */
template <int count>
HQQ_DEVICE_INLINE void hqq_load_words(uint32_t (&words)[count], const void *from)
{
    static_assert(count == 1 || count == 2 || count % 4 == 0, "no such load");
    if constexpr (count == 1) {
        words[0] = *static_cast<const uint32_t *>(from);
    } else if constexpr (count == 2) {
        uint2 pair = *static_cast<const uint2 *>(from);
        words[0] = pair.x, words[1] = pair.y;
    } else {
#pragma unroll
        for (int i = 0; i < count; i += 4) {
            uint4 four = static_cast<const uint4 *>(from)[i / 4];
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z,
            words[i + 3] = four.w;
        }
    }
}

template <int count>
HQQ_DEVICE_INLINE void hqq_store_words(void *to, const uint32_t (&words)[count])
{
    static_assert(count == 1 || count == 2 || count % 4 == 0, "no such store");
    if constexpr (count == 1) {
        *static_cast<uint32_t *>(to) = words[0];
    } else if constexpr (count == 2) {
        *static_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
        for (int i = 0; i < count; i += 4)
            static_cast<uint4 *>(to)[i / 4] =
                make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
}

/* The two elements of a word, the first in its low half. */
HQQ_DEVICE_INLINE void hqq_split_word(float &a, float &b, uint32_t word, __nv_bfloat16)
{
    a = hqq_bit_cast<float>(word << 16);
    b = hqq_bit_cast<float>(word & 0xffff0000u);
}
HQQ_DEVICE_INLINE void hqq_split_word(float &a, float &b, uint32_t word, __half)
{
    float2 pair = __half22float2(hqq_bit_cast<__half2>(word));
    a = pair.x, b = pair.y;
}

HQQ_DEVICE_INLINE uint32_t hqq_join_word(float a, float b, __nv_bfloat16)
{
    return hqq_bit_cast<uint32_t>(__floats2bfloat162_rn(a, b));
}
HQQ_DEVICE_INLINE uint32_t hqq_join_word(float a, float b, __half)
{
    return hqq_bit_cast<uint32_t>(__floats2half2_rn(a, b));
}

/* n elements from an address aligned to them (to 16 bytes, if they are more). */
template <class T, int n> HQQ_DEVICE_INLINE void hqq_load_run(float (&values)[n], const T *from)
{
    uint32_t words[n * sizeof(T) / 4];
    hqq_load_words(words, from);
#pragma unroll
    for (int i = 0; i < n * static_cast<int>(sizeof(T)) / 4; i++) {
        if constexpr (sizeof(T) == 4)
            values[i] = hqq_bit_cast<float>(words[i]);
        else
            hqq_split_word(values[2 * i], values[2 * i + 1], words[i], T());
    }
}

template <class T, int n> HQQ_DEVICE_INLINE void hqq_store_run(T *to, const float (&values)[n])
{
    uint32_t words[n * sizeof(T) / 4];
#pragma unroll
    for (int i = 0; i < n * static_cast<int>(sizeof(T)) / 4; i++) {
        if constexpr (sizeof(T) == 4)
            words[i] = hqq_bit_cast<uint32_t>(values[i]);
        else
            words[i] = hqq_join_word(values[2 * i], values[2 * i + 1], T());
    }
    hqq_store_words(to, words);
}

/* The same where the dtype is known at run time alone (one for the whole launch). */
template <int n>
HQQ_DEVICE_INLINE void hqq_load_run(float (&values)[n], const void *data, hqq_dtype dtype,
                                    int64_t i)
{
    if (dtype == HQQ_F32)
        hqq_load_run(values, static_cast<const float *>(data) + i);
    else if (dtype == HQQ_BF16)
        hqq_load_run(values, static_cast<const __nv_bfloat16 *>(data) + i);
    else
        hqq_load_run(values, static_cast<const __half *>(data) + i);
}

HQQ_DEVICE_INLINE float hqq_load_one(const void *data, hqq_dtype dtype, int64_t i)
{
    if (dtype == HQQ_F32) return static_cast<const float *>(data)[i];
    if (dtype == HQQ_BF16) return hqq_to_float(static_cast<const __nv_bfloat16 *>(data)[i]);
    return hqq_to_float(static_cast<const __half *>(data)[i]);
}

/* Whether rows that begin at `data`, `ld` elements of `bytes` apart, all begin at 16 bytes. */
static inline int hqq_rows_aligned(const void *data, int64_t ld, int64_t bytes)
{
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * bytes % 16 == 0;
}

#endif

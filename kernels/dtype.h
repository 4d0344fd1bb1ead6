/* fp32 <-> fp16 and bf16, one value at a time, rounding to nearest even. Bit arithmetic, so
 * that every processor gives the same bits. */
#ifndef HQQ_KERNELS_DTYPE_H
#define HQQ_KERNELS_DTYPE_H

#include <string.h>

#include "format.h"
#include "hqqlora.h"

HQQ_INLINE float hqq_bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

HQQ_INLINE uint32_t hqq_float_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

HQQ_INLINE float hqq_bf16_to_float(uint16_t h)
{
    return hqq_bits_to_float((uint32_t)h << 16);
}

HQQ_INLINE uint16_t hqq_float_to_bf16(float value)
{
    uint32_t u = hqq_float_to_bits(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40); /* quiet NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

HQQ_INLINE float hqq_f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return hqq_bits_to_float(sign | 0x7f800000u | magnitude << 13);
    if (magnitude < 0x400) /* subnormal: exact, and immune to flush-to-zero modes */
        return hqq_bits_to_float(sign | hqq_float_to_bits((float)magnitude * 0x1p-24f));
    return hqq_bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
}

HQQ_INLINE uint16_t hqq_float_to_f16(float value)
{
    uint32_t u = hqq_float_to_bits(value);
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7e00;  /* NaN */
    if (u >= 0x477ff000u) return sign | 0x7c00; /* rounds to 65536 or more */
    if (u < 0x38800000u) {                      /* subnormal: let the adder round */
        float shifted = hqq_bits_to_float(u) + 0.5f;
        return sign | (uint16_t)(hqq_float_to_bits(shifted) - 0x3f000000u);
    }
    return sign | (uint16_t)((u - 0x38000000u + 0xfffu + (u >> 13 & 1)) >> 13);
}

HQQ_INLINE int hqq_dtype_bytes(hqq_dtype dtype)
{
    return dtype == HQQ_F32 ? 4 : 2;
}

HQQ_INLINE float hqq_load(const void *data, hqq_dtype dtype, int64_t i)
{
    switch (dtype) {
    case HQQ_F16: return hqq_f16_to_float(((const uint16_t *)data)[i]);
    case HQQ_BF16: return hqq_bf16_to_float(((const uint16_t *)data)[i]);
    default: return ((const float *)data)[i];
    }
}

HQQ_INLINE void hqq_store(void *data, hqq_dtype dtype, int64_t i, float value)
{
    switch (dtype) {
    case HQQ_F16: ((uint16_t *)data)[i] = hqq_float_to_f16(value); break;
    case HQQ_BF16: ((uint16_t *)data)[i] = hqq_float_to_bf16(value); break;
    default: ((float *)data)[i] = value; break;
    }
}

/* The element at index i of an array of dtype. */
HQQ_INLINE const void *hqq_at(const void *data, hqq_dtype dtype, int64_t i)
{
    return (const char *)data + i * hqq_dtype_bytes(dtype);
}

HQQ_INLINE void *hqq_at_mut(void *data, hqq_dtype dtype, int64_t i)
{
    return (char *)data + i * hqq_dtype_bytes(dtype);
}

#endif

/*
 * Codes as T, exactly, in pairs, without a conversion instruction: or-ing q into the mantissa
 * of a power of two gives 2^7 + q in bf16 and 2^10 + q in fp16; subtracting the power leaves q.
 *
 *     word           byte 3 | byte 2 | byte 1 | byte 0
 *     pair {0, 2}    byte 0 in the low half, byte 2 in the high one
 *     (word >> shift) & mask | power           a shift, a LOP3; then a HADD2
 *
 * bf16 has 7 bits of mantissa, a code of 8 bits 8: its low 7 bits go into the mantissa of 128,
 * its top bit into the exponent (128 or 256), and low + (power - 256) is exact.
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_CODES_CUH
#define HQQ_KERNELS_CUDA_SMALL_CODES_CUH

#include "ptx.cuh"

/* Two values of T in a register. */
HQQ_DEVICE_INLINE uint32_t hqq_pair_sub(uint32_t a, uint32_t b, __nv_bfloat16)
{
    return hqq_bit_cast<uint32_t>(
        __hsub2(hqq_bit_cast<__nv_bfloat162>(a), hqq_bit_cast<__nv_bfloat162>(b)));
}
HQQ_DEVICE_INLINE uint32_t hqq_pair_sub(uint32_t a, uint32_t b, __half)
{
    return hqq_bit_cast<uint32_t>(__hsub2(hqq_bit_cast<__half2>(a), hqq_bit_cast<__half2>(b)));
}
HQQ_DEVICE_INLINE uint32_t hqq_pair_mul(uint32_t a, uint32_t b, __nv_bfloat16)
{
    return hqq_bit_cast<uint32_t>(
        __hmul2(hqq_bit_cast<__nv_bfloat162>(a), hqq_bit_cast<__nv_bfloat162>(b)));
}
HQQ_DEVICE_INLINE uint32_t hqq_pair_mul(uint32_t a, uint32_t b, __half)
{
    return hqq_bit_cast<uint32_t>(__hmul2(hqq_bit_cast<__half2>(a), hqq_bit_cast<__half2>(b)));
}
HQQ_DEVICE_INLINE float2 hqq_pair_to_floats(uint32_t a, __nv_bfloat16)
{
    return make_float2(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u));
}
HQQ_DEVICE_INLINE float2 hqq_pair_to_floats(uint32_t a, __half)
{
    return __half22float2(hqq_bit_cast<__half2>(a));
}
HQQ_DEVICE_INLINE __nv_bfloat16 hqq_from_float(float a, __nv_bfloat16)
{
    return __float2bfloat16_rn(a);
}
HQQ_DEVICE_INLINE __half hqq_from_float(float a, __half)
{
    return __float2half_rn(a);
}

/* (word & mask) | bits */
template <uint32_t mask, uint32_t bits> HQQ_DEVICE_INLINE uint32_t hqq_and_or(uint32_t word)
{
    return ptx_lop3<(0xf0 & 0xcc) | 0xaa>(word, mask, bits);
}

/* The codes of slot `slot` in bytes odd and odd + 2 of a word. */
template <int BITS>
HQQ_DEVICE_INLINE uint32_t hqq_code_pair(uint32_t word, int slot, int odd, __half half)
{
    const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u;
    uint32_t shifted = word >> (8 * odd + 8 - BITS * (slot + 1));
    return hqq_pair_sub(hqq_and_or<mask, 0x64006400u>(shifted), 0x64006400u, half);
}
template <int BITS>
HQQ_DEVICE_INLINE uint32_t hqq_code_pair(uint32_t word, int slot, int odd, __nv_bfloat16 bf16)
{
    uint32_t shifted = word >> (8 * odd + 8 - BITS * (slot + 1));
    if (BITS == 8) {
        uint32_t low = hqq_and_or<0x007f007fu, 0x43004300u>(shifted);
        uint32_t high = hqq_and_or<0x00800080u, 0x43004300u>(shifted);
        uint32_t minus = hqq_pair_sub(0x43804380u, high, bf16); /* 256 - (128 or 256) */
        return hqq_pair_sub(low, minus, bf16);
    }
    const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u;
    return hqq_pair_sub(hqq_and_or<mask, 0x43004300u>(shifted), 0x43004300u, bf16);
}

#endif

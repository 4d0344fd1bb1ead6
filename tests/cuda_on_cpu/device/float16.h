/*
 * __half and __nv_bfloat16, with NVIDIA's names and, in every bit, NVIDIA's results: rounding
 * to nearest even, once; subnormals kept; an arithmetic NaN is 0x7fff. (CUDA's own headers
 * would not do: outside nvcc they have no __hfma and no intrinsics.)
 *
 * Both are on_cpu::Float16<Format>; a Format is its two conversions. Sums and quotients are
 * formed in fp32, whose 24 bits are more than twice the 11 (8) of the result plus two: rounding
 * twice then is rounding once. Where fp32 would be too narrow (products of bf16 below 2^-126,
 * fma), they are formed in fp64 and brought to fp32 by rounding to odd, which never disturbs a
 * later rounding.
 */
#ifndef HQQ_CUDA_ON_CPU_FLOAT16_H
#define HQQ_CUDA_ON_CPU_FLOAT16_H

#include <stdint.h>

#include "intrinsics.h"
#include "vector_types.h"

namespace on_cpu
{
struct Half {
    static float to_float(uint16_t h)
    {
        uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
        uint32_t magnitude = h & 0x7fff;
        if (magnitude > 0x7c00) return bits_as<float>(0x7fffffffu); /* NaN */
        if (magnitude == 0x7c00) return bits_as<float>(sign | 0x7f800000u);
        if (magnitude < 0x400) /* subnormal: normal in fp32 */
            return bits_as<float>(sign |
                                  bits_as<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
        return bits_as<float>(sign | ((magnitude << 13) + (112u << 23))); /* another bias */
    }

    static uint16_t from_float(float value)
    {
        uint32_t u = bits_as<uint32_t>(value);
        uint32_t sign = u >> 16 & 0x8000;
        u &= 0x7fffffffu;
        if (u > 0x7f800000u) return 0x7fff;                                /* NaN */
        if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00); /* 65520 and above */
        if (u < 0x38800000u) { /* subnormal: adding 0.5 puts its last place at fp32's */
            uint32_t sum = bits_as<uint32_t>(bits_as<float>(u) + 0.5f);
            return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
        }
        u = u - (112u << 23) + 0xfff + (u >> 13 & 1);
        return static_cast<uint16_t>(sign | u >> 13);
    }
};

struct Bfloat16 {
    static float to_float(uint16_t h) { return bits_as<float>(static_cast<uint32_t>(h) << 16); }

    static uint16_t from_float(float value)
    {
        uint32_t u = bits_as<uint32_t>(value);
        if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff; /* NaN */
        return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
};

template <class Format> struct Float16 {
    uint16_t bits;

    Float16() = default;
    Float16(float value) : bits(Format::from_float(value)) {}
    operator float() const { return Format::to_float(bits); }
    static Float16 of_bits(uint16_t bits)
    {
        Float16 x;
        x.bits = bits;
        return x;
    }
};

template <class Format> struct alignas(4) Float16Pair {
    Float16<Format> x, y;

    Float16Pair() = default;
    Float16Pair(Float16<Format> x_, Float16<Format> y_) : x(x_), y(y_) {}
};

/* value in fp32, towards zero; the last bit says whether anything was cut off. */
inline float round_to_odd(double value)
{
    float nearest = static_cast<float>(value);
    double back = nearest;
    if (back == value || value != value) return nearest;
    uint32_t bits = bits_as<uint32_t>(nearest);
    if (fabs(back) > fabs(value)) bits--; /* also back from infinity */
    return bits_as<float>(bits | 1);
}

/* a + b in fp64, rounded to odd. (Knuth's sum: error is what `sum` leaves out, exactly.) */
inline double add_to_odd(double a, double b)
{
    double sum = a + b;
    double b_part = sum - a;
    double error = (a - (sum - b_part)) + (b - b_part);
    uint64_t bits = bits_as<uint64_t>(sum);
    if (error == 0.0 || error != error || (bits & 1)) return sum;
    bool away = (error > 0.0) == (sum > 0.0); /* the true sum is larger in magnitude */
    return bits_as<double>(away ? bits + 1 : bits - 1);
}

template <class Format> Float16<Format> product(Float16<Format> a, Float16<Format> b)
{
    return round_to_odd(static_cast<double>(float(a)) * static_cast<double>(float(b)));
}

template <class Format>
Float16<Format> fused(Float16<Format> a, Float16<Format> b, Float16<Format> c)
{
    double exact = static_cast<double>(float(a)) * static_cast<double>(float(b));
    return round_to_odd(add_to_odd(exact, static_cast<double>(float(c))));
}

/* An arithmetic NaN is 0x7fff, also where fp32 would hand on an operand's own. */
template <class Format> Float16<Format> canonical(Float16<Format> x)
{
    float value = x;
    return value != value ? Float16<Format>::of_bits(0x7fff) : x;
}
} // namespace on_cpu

typedef on_cpu::Float16<on_cpu::Half> __half;
typedef on_cpu::Float16Pair<on_cpu::Half> __half2;
typedef on_cpu::Float16<on_cpu::Bfloat16> __nv_bfloat16;
typedef on_cpu::Float16Pair<on_cpu::Bfloat16> __nv_bfloat162;

#include "float16_arithmetic.h"
#include "float16_conversions.h"

#endif

/* CUDA's scalar intrinsics. Approximate ones (__expf, __fdividef, rsqrtf ...) are computed
 * exactly here: their bits are not the device's. */
#ifndef HQQ_CUDA_ON_CPU_INTRINSICS_H
#define HQQ_CUDA_ON_CPU_INTRINSICS_H

#include <limits>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>

namespace on_cpu
{
template <class To, class From> To bits_as(From from)
{
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

/* float to integer as the device does it: out of range saturates, NaN becomes 0. */
template <class Integer> Integer saturate(float integral)
{
    if (integral != integral) return 0;
    double value = integral;
    if (value <= static_cast<double>(std::numeric_limits<Integer>::min()))
        return std::numeric_limits<Integer>::min();
    if (value >= static_cast<double>(std::numeric_limits<Integer>::max()))
        return std::numeric_limits<Integer>::max();
    return static_cast<Integer>(value);
}
} // namespace on_cpu

/* clang-format off */

/* bits */
inline unsigned __float_as_uint(float x) { return on_cpu::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return on_cpu::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return on_cpu::bits_as<float>(x); }
inline float __int_as_float(int x) { return on_cpu::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return on_cpu::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return on_cpu::bits_as<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }

inline unsigned __brev(unsigned x)
{
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; bit++) reversed |= (x >> bit & 1) << (31 - bit);
    return reversed;
}

/* Byte i of the result is byte (selector >> 4i & 7) of b:a; with bit 3, its sign, eight times. */
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector)
{
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> (4 * i);
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (s & 7))) & 0xff;
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift)
{
    return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift)
{
    return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

/* integers */
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

/* fp32, rounded to nearest even; kernels are compiled with -ffp-contract=off */
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __saturatef(float a) { return !(a > 0.0f) ? 0.0f : a > 1.0f ? 1.0f : a; }

/* fp32, approximate on the device */
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return static_cast<float>(pow(10.0, static_cast<double>(a))); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }

/* conversions */
inline int __float2int_rn(float x) { return on_cpu::saturate<int>(rintf(x)); }
inline int __float2int_rz(float x) { return on_cpu::saturate<int>(truncf(x)); }
inline int __float2int_rd(float x) { return on_cpu::saturate<int>(floorf(x)); }
inline int __float2int_ru(float x) { return on_cpu::saturate<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return on_cpu::saturate<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return on_cpu::saturate<unsigned>(truncf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

/* loads and stores whose cache hints mean nothing here */
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldca(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldlu(const T *p) { return *p; }
template <class T> void __stwb(T *p, T value) { *p = value; }
template <class T> void __stcg(T *p, T value) { *p = value; }
template <class T> void __stcs(T *p, T value) { *p = value; }
template <class T> void __stwt(T *p, T value) { *p = value; }
/* clang-format on */

/* min and max of any two arithmetic types; a NaN loses, as on the device. */
template <class A, class B> auto min(A a, B b) -> decltype(a + b)
{
    typedef decltype(a + b) T;
    T x = static_cast<T>(a), y = static_cast<T>(b);
    if constexpr (std::is_floating_point<T>::value)
        return fmin(x, y);
    else
        return y < x ? y : x;
}

template <class A, class B> auto max(A a, B b) -> decltype(a + b)
{
    typedef decltype(a + b) T;
    T x = static_cast<T>(a), y = static_cast<T>(b);
    if constexpr (std::is_floating_point<T>::value)
        return fmax(x, y);
    else
        return x < y ? y : x;
}

#endif

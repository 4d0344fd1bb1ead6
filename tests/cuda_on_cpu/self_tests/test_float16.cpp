/*
 * __half and __nv_bfloat16: conversions of all 65,536 values, and around the middle between any
 * two of them, against the library's own; arithmetic against exact sums and products rounded
 * once, by searching the nearest of all values.
 */
#include "cuda_on_cpu.h"

#include <random>

#include "check.h"

extern "C" {
#include "dtype.h"
}

#if defined(__x86_64__)
typedef __float128 Wide;
#else
typedef long double Wide; /* 128 bits on AArch64 */
#endif

template <class T> struct Library;
template <> struct Library<__half> {
    static constexpr const char *name = "half";
    static constexpr unsigned infinity = 0x7c00;
    static float to_float(uint16_t h) { return hqq_f16_to_float(h); }
    static uint16_t from_float(float f) { return hqq_float_to_f16(f); }
};
template <> struct Library<__nv_bfloat16> {
    static constexpr const char *name = "bf16";
    static constexpr unsigned infinity = 0x7f80;
    static float to_float(uint16_t h) { return hqq_bf16_to_float(h); }
    static uint16_t from_float(float f) { return hqq_float_to_bf16(f); }
};

static uint32_t bits_of(float x)
{
    return __float_as_uint(x);
}

template <class T> static void check_narrowing(float x)
{
    unsigned got = T(x).bits, expected = x == x ? Library<T>::from_float(x) : 0x7fffu;
    check(got == expected, "%s of %a: %#x, not %#x", Library<T>::name, static_cast<double>(x),
          got, expected);
}

template <class T> static void test_conversions()
{
    typedef Library<T> L;
    for (unsigned h = 0; h < 65536; h++) {
        uint16_t bits = static_cast<uint16_t>(h);
        float wide = T::of_bits(bits), expected = L::to_float(bits);
        bool nan = (h & 0x7fff) > L::infinity;
        check(nan ? wide != wide : bits_of(wide) == bits_of(expected), "%s %#x: %a, not %a",
              L::name, h, static_cast<double>(wide), static_cast<double>(expected));
        check_narrowing<T>(wide);
        if ((h & 0x7fff) >= L::infinity) continue;
        /* the middle between this value and the next larger in magnitude, and its neighbours */
        uint32_t next = (h & 0x7fff) + 1 == L::infinity
                            ? bits_of(expected) + (L::infinity == 0x7c00 ? 1u << 13 : 1u << 16)
                            : bits_of(L::to_float(static_cast<uint16_t>(h + 1)));
        float middle = static_cast<float>(
            (static_cast<double>(expected) + static_cast<double>(__uint_as_float(next))) / 2);
        if (middle != middle || next == 0x7f800000u || next == 0xff800000u)
            middle = __uint_as_float(bits_of(expected) | 0x8000); /* bf16's largest: by hand */
        for (uint32_t near = bits_of(middle) - 1; near != bits_of(middle) + 2; near++)
            check_narrowing<T>(__uint_as_float(near));
    }
}

/* The value nearest to x, the even one of two. */
template <class T> static unsigned nearest(Wide x)
{
    unsigned sign = x < 0 ? 0x8000 : 0;
    if (x < 0) x = -x;
    auto value = [](unsigned h) -> Wide {
        unsigned last = Library<T>::infinity - 1;
        if (h <= last) return Library<T>::to_float(static_cast<uint16_t>(h));
        Wide largest = Library<T>::to_float(static_cast<uint16_t>(last)); /* as if it went on */
        return largest + (largest - static_cast<Wide>(
                                        Library<T>::to_float(static_cast<uint16_t>(last - 1))));
    };
    unsigned low = 0, high = Library<T>::infinity; /* value(low) <= x < value(high) */
    if (x >= value(high)) return sign | high;
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        (value(middle) <= x ? low : high) = middle;
    }
    Wide below = x - value(low), above = value(high) - x;
    return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}

template <class T>
static void check_result(const char *operation, T got, Wide exact, T a, T b, T c)
{
    unsigned expected = nearest<T>(exact);
    bool zero =
        exact == 0 && (got.bits & 0x7fff) == 0; /* the sign of zero is checked elsewhere */
    check(zero || got.bits == expected, "%s %s(%#x, %#x, %#x): %#x, not %#x", Library<T>::name,
          operation, a.bits, b.bits, c.bits, got.bits, expected);
}

/* Any finite value; exponents near one another, so that sums are seldom one of their terms, and
 * often at the subnormal end. */
template <class T> static T any_value(std::mt19937 &random, unsigned base)
{
    unsigned step = Library<T>::infinity == 0x7c00 ? 1024 : 128;
    unsigned h = base + static_cast<unsigned>(random()) % (14 * step);
    return T::of_bits(static_cast<uint16_t>(h % Library<T>::infinity | (random() & 0x8000)));
}

template <class T> static void test_arithmetic()
{
    std::mt19937 random(3);
    for (int trial = 0; trial < 200000; trial++) {
        unsigned base = trial % 3 == 0 ? 0 : static_cast<unsigned>(random()) % 0x7000;
        /* every third: a product of about the least magnitude, or of c's */
        T a = any_value<T>(random, base), c = any_value<T>(random, base);
        T b = any_value<T>(random, Library<T>::infinity == 0x7c00 ? 0x3000 : 0x3c00);
        Wide x = float(a), y = float(b), z = float(c);
        check_result("add", __hadd(a, c), x + z, a, c, c);
        check_result("sub", __hsub(a, c), x - z, a, c, c);
        check_result("mul", __hmul(a, b), x * y, a, b, b);
        check_result("fma", __hfma(a, b, c), x * y + z, a, b, c);
        if (float(b) != 0) check_result("div", __hdiv(a, b), x / y, a, b, b);
    }
}

template <class T> static void test_special_values()
{
    T one = 1.0f, zero = 0.0f, minus_zero = -0.0f, infinity = INFINITY;
    T nan = T::of_bits(static_cast<uint16_t>(Library<T>::infinity + 1));
    check(__hadd(nan, one).bits == 0x7fff && __hmul(infinity, zero).bits == 0x7fff &&
              __hsub(infinity, infinity).bits == 0x7fff && __hfma(one, nan, one).bits == 0x7fff,
          "%s: an arithmetic NaN is 0x7fff", Library<T>::name);
    check(__hneg(zero).bits == 0x8000 && __hmul(minus_zero, one).bits == 0x8000 &&
              __hadd(minus_zero, zero).bits == 0 && __hadd(one, __hneg(one)).bits == 0,
          "%s: signs of zero", Library<T>::name);
    check(__hmax(zero, minus_zero).bits == 0 && __hmin(zero, minus_zero).bits == 0x8000 &&
              __hmax(nan, one).bits == one.bits && __hmin(one, nan).bits == one.bits &&
              __hmax(nan, nan).bits == 0x7fff,
          "%s: max and min", Library<T>::name);
    check(__hadd(infinity, one).bits == infinity.bits && __hisinf(infinity) && __hisnan(nan) &&
              !__hne(nan, nan) && !__heq(nan, nan),
          "%s: infinity, NaN", Library<T>::name);
    /* the largest value plus half a unit in the last place, which rounds to infinity */
    T largest = T::of_bits(static_cast<uint16_t>(Library<T>::infinity - 1));
    check(__hadd(largest, largest).bits == infinity.bits, "%s: overflow", Library<T>::name);
}

static void test_pairs()
{
    __half2 a(1.0f, 2.0f), b(3.0f, -5.0f);
    float2 sum = __half22float2(__hadd2(a, b)), fused = __half22float2(__hfma2(a, b, a));
    check(sum.x == 4 && sum.y == -3 && fused.x == 4 && fused.y == -8, "pairs of halves");
    check(float(__high2half(b)) == -5 && __low2float(b) == 3, "halves of a pair");
    uint32_t word;
    memcpy(&word, &a, 4);
    check(word == 0x40003c00u, "the first of a pair is the low half of the word");
}

/* Products below bf16's normal numbers: fp32 would round them first to its own subnormals. */
static void test_no_double_rounding()
{
    /* (1 + 2^-7)(1 + 2^-7) 2^-134 = (1 + 2^-6 + 2^-14) 2^-134: just above half of 2^-133 */
    __nv_bfloat16 a = __nv_bfloat16(0x1.02p-67f);
    check(__hmul(a, a).bits == 1, "bf16 product just above a tie: %#x", __hmul(a, a).bits);
    /* 1.125 + 2^-8 and 1.25 + 3 2^-8 are ties for bf16: what lies far below fp64 decides */
    __nv_bfloat16 b = 1.0625f, c = 1.1875f, far_below = 0x1p-100f;
    check(float(__hfma(b, b, far_below)) == 1.125f + 0x1p-7f, "bf16 fma: just above a tie");
    check(float(__hfma(b, c, __hneg(far_below))) == 1.25f + 0x1p-7f,
          "bf16 fma: just below a tie");
    /* 2048 + 1 is a tie for half; a little more must go up, also through fma */
    __half big = 2048.0f, one = 1.0f, tiny = 0x1p-24f;
    check(float(__hfma(one, one, big)) == 2048.0f, "fma: a tie goes to even");
    __half just_above = 1.0f + 0x1p-10f;
    check(float(__hfma(just_above, one, big)) == 2050.0f, "fma: above a tie");
    check(float(__hfma(tiny, tiny, __half(1.0f + 0x1p-10f))) == 1.0f + 0x1p-10f,
          "fma: far below");
}

int main()
{
    test_conversions<__half>();
    test_conversions<__nv_bfloat16>();
    test_arithmetic<__half>();
    test_arithmetic<__nv_bfloat16>();
    test_special_values<__half>();
    test_special_values<__nv_bfloat16>();
    test_pairs();
    test_no_double_rounding();
    return report_checks();
}

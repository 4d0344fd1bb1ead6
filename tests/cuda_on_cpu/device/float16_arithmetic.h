/* __hadd, __hfma2 and the like, for both 16-bit formats at once. Included by float16.h. */
#ifndef HQQ_CUDA_ON_CPU_FLOAT16_ARITHMETIC_H
#define HQQ_CUDA_ON_CPU_FLOAT16_ARITHMETIC_H

/* clang-format off */
#define ON_CPU_SCALAR template <class F> on_cpu::Float16<F>
#define ON_CPU_PAIR template <class F> on_cpu::Float16Pair<F>

ON_CPU_SCALAR __hadd(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) + float(b); }
ON_CPU_SCALAR __hsub(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) - float(b); }
ON_CPU_SCALAR __hmul(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return on_cpu::product(a, b); }
ON_CPU_SCALAR __hdiv(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return on_cpu::round_to_odd(static_cast<double>(float(a)) / static_cast<double>(float(b))); }
ON_CPU_SCALAR __hfma(on_cpu::Float16<F> a, on_cpu::Float16<F> b, on_cpu::Float16<F> c) { return on_cpu::fused(a, b, c); }
/* the sign bit alone changes; a NaN becomes the arithmetic one */
ON_CPU_SCALAR __hneg(on_cpu::Float16<F> a) { return on_cpu::canonical(on_cpu::Float16<F>::of_bits(static_cast<uint16_t>(a.bits ^ 0x8000))); }
ON_CPU_SCALAR __habs(on_cpu::Float16<F> a) { return on_cpu::canonical(on_cpu::Float16<F>::of_bits(static_cast<uint16_t>(a.bits & 0x7fff))); }
template <class F> bool __hisnan(on_cpu::Float16<F> a) { return float(a) != float(a); }
template <class F> int __hisinf(on_cpu::Float16<F> a) { return float(a) == INFINITY ? 1 : float(a) == -INFINITY ? -1 : 0; }

/* -0 is below +0, and a NaN loses */
ON_CPU_SCALAR __hmax(on_cpu::Float16<F> a, on_cpu::Float16<F> b)
{
    if (__hisnan(a) || __hisnan(b)) return on_cpu::canonical(__hisnan(a) ? b : a);
    if (float(a) == float(b)) return on_cpu::Float16<F>::of_bits(a.bits & b.bits);
    return float(a) > float(b) ? a : b;
}
ON_CPU_SCALAR __hmin(on_cpu::Float16<F> a, on_cpu::Float16<F> b)
{
    if (__hisnan(a) || __hisnan(b)) return on_cpu::canonical(__hisnan(a) ? b : a);
    if (float(a) == float(b)) return on_cpu::Float16<F>::of_bits(a.bits | b.bits);
    return float(a) < float(b) ? a : b;
}

/* the _rn names: the same, never fused with a neighbour by the compiler */
ON_CPU_SCALAR __hadd_rn(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return __hadd(a, b); }
ON_CPU_SCALAR __hsub_rn(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return __hsub(a, b); }
ON_CPU_SCALAR __hmul_rn(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return __hmul(a, b); }

template <class F> bool __heq(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) == float(b); }
template <class F> bool __hne(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) < float(b) || float(a) > float(b); }
template <class F> bool __hlt(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) < float(b); }
template <class F> bool __hle(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) <= float(b); }
template <class F> bool __hgt(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) > float(b); }
template <class F> bool __hge(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return float(a) >= float(b); }

/* two at a time */
#define ON_CPU_TWICE(pair, scalar) \
    ON_CPU_PAIR pair(on_cpu::Float16Pair<F> a, on_cpu::Float16Pair<F> b) { return {scalar(a.x, b.x), scalar(a.y, b.y)}; }
ON_CPU_TWICE(__hadd2, __hadd)
ON_CPU_TWICE(__hsub2, __hsub)
ON_CPU_TWICE(__hmul2, __hmul)
ON_CPU_TWICE(__h2div, __hdiv)
ON_CPU_TWICE(__hmax2, __hmax)
ON_CPU_TWICE(__hmin2, __hmin)
ON_CPU_TWICE(__hadd2_rn, __hadd)
ON_CPU_TWICE(__hsub2_rn, __hsub)
ON_CPU_TWICE(__hmul2_rn, __hmul)
#undef ON_CPU_TWICE
ON_CPU_PAIR __hfma2(on_cpu::Float16Pair<F> a, on_cpu::Float16Pair<F> b, on_cpu::Float16Pair<F> c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
ON_CPU_PAIR __hneg2(on_cpu::Float16Pair<F> a) { return {__hneg(a.x), __hneg(a.y)}; }
ON_CPU_PAIR __habs2(on_cpu::Float16Pair<F> a) { return {__habs(a.x), __habs(a.y)}; }

/* operators round like the functions; without these, a + b would be a float */
ON_CPU_SCALAR operator+(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return __hadd(a, b); }
ON_CPU_SCALAR operator-(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return __hsub(a, b); }
ON_CPU_SCALAR operator*(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return __hmul(a, b); }
ON_CPU_SCALAR operator/(on_cpu::Float16<F> a, on_cpu::Float16<F> b) { return __hdiv(a, b); }
ON_CPU_SCALAR operator-(on_cpu::Float16<F> a) { return __hneg(a); }
ON_CPU_PAIR operator+(on_cpu::Float16Pair<F> a, on_cpu::Float16Pair<F> b) { return __hadd2(a, b); }
ON_CPU_PAIR operator-(on_cpu::Float16Pair<F> a, on_cpu::Float16Pair<F> b) { return __hsub2(a, b); }
ON_CPU_PAIR operator*(on_cpu::Float16Pair<F> a, on_cpu::Float16Pair<F> b) { return __hmul2(a, b); }
ON_CPU_PAIR operator-(on_cpu::Float16Pair<F> a) { return __hneg2(a); }

#undef ON_CPU_SCALAR
#undef ON_CPU_PAIR
/* clang-format on */

#endif

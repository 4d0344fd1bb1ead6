/*
 * One source, several instruction sets. The files of HQQ_CPU_ISA_SOURCES in CMakeLists.txt are
 * compiled once for each instruction set, with HQQ_ISA_SUFFIX set to its name; functions that
 * they define are named HQQ_ISA_NAME(f), so f_portable, f_avx2, f_avx512, f_avx512_bf16.
 * Outside, HQQ_ISA_DECLARE declares all of them and HQQ_ISA_SELECT picks one. With AMX, what is
 * not made of its tiles (amx.h) is as for AVX-512 BF16.
 *
 *     HQQ_ISA_DECLARE(void, hqq_tile, (float *out, const float *in));    in a header
 *     void HQQ_ISA_NAME(hqq_tile)(float *out, const float *in) { ... }   in an ISA source
 *     HQQ_ISA_SELECT(isa, hqq_tile)(out, in);                            in a driver
 */
#ifndef HQQ_KERNELS_CPU_ISA_H
#define HQQ_KERNELS_CPU_ISA_H

#include "hqqlora.h"

/* Whether the products made of AMX tiles are there. */
#if defined(__x86_64__) && !defined(HQQ_WITHOUT_AMX)
#define HQQ_HAS_AMX 1
#else
#define HQQ_HAS_AMX 0
#endif

#define HQQ_PASTE_(a, b) a##_##b
#define HQQ_PASTE(a, b)  HQQ_PASTE_(a, b)
#ifdef HQQ_ISA_SUFFIX
#define HQQ_ISA_NAME(f) HQQ_PASTE(f, HQQ_ISA_SUFFIX)
#endif

#if defined(__x86_64__) && defined(HQQ_WITHOUT_AVX512) /* builds that compile sooner */
#define HQQ_ISA_DECLARE(type, f, arguments) \
    type f##_portable arguments;            \
    type f##_avx2 arguments
#define HQQ_ISA_SELECT(isa, f) ((isa) == HQQ_ISA_AVX2 ? f##_avx2 : f##_portable)
#elif defined(__x86_64__)
#define HQQ_ISA_DECLARE(type, f, arguments) \
    type f##_portable arguments;            \
    type f##_avx2 arguments;                \
    type f##_avx512 arguments;              \
    type f##_avx512_bf16 arguments
#define HQQ_ISA_SELECT(isa, f)                      \
    ((isa) >= HQQ_ISA_AVX512_BF16 ? f##_avx512_bf16 \
     : (isa) == HQQ_ISA_AVX512    ? f##_avx512      \
     : (isa) == HQQ_ISA_AVX2      ? f##_avx2        \
                                  : f##_portable)
#else
#define HQQ_ISA_DECLARE(type, f, arguments) type f##_portable arguments
#define HQQ_ISA_SELECT(isa, f)              ((void)(isa), f##_portable)
#endif

#endif

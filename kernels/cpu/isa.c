#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* What the processor and the operating system offer. __builtin_cpu_supports reads tables that
 * the compiler's run time fills once at load: no state of ours. */
static hqq_isa best_isa(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
    int bf16 =
        avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
#if defined(HQQLORA_EMULATE_AVX512) /* tests/avx512_on_avx2 */
    bf16 = avx2;
#endif
#if defined(HQQ_WITHOUT_AVX512)
    avx512 = bf16 = 0;
#endif
    return bf16     ? HQQ_ISA_AVX512_BF16
           : avx512 ? HQQ_ISA_AVX512
           : avx2   ? HQQ_ISA_AVX2
                    : HQQ_ISA_PORTABLE;
#else
    return HQQ_ISA_PORTABLE;
#endif
}

hqq_isa hqq_isa_in_use(const hqq_context *context)
{
    hqq_isa best = best_isa();
    hqq_isa cap = context ? context->isa : HQQ_ISA_AUTO;
    return cap == HQQ_ISA_AUTO || cap > best ? best : cap;
}

int hqq_has_amx_bf16(void)
{
#if defined(__x86_64__) && !defined(HQQLORA_EMULATE_AVX512)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
#else
    return 0;
#endif
}

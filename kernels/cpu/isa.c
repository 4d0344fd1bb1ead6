#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdatomic.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__x86_64__)
#if defined(HQQLORA_EMULATE_AVX512) /* tests/avx512_on_avx2 */
static int has_amx(void)
{
    return 1;
}
#elif !HQQ_HAS_AMX || !defined(__linux__)
static int has_amx(void)
{
    return 0;
}
#else
/* Linux lends the registers of the tiles (8 KB a thread) to processes that ask. It refuses
 * where a thread has an alternate signal stack too small to hold them. */
static int ask_for_amx(void)
{
    const long ask_for_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
    return tiles && bf16 && syscall(SYS_arch_prctl, ask_for_permission, tile_data) == 0;
}

/* Asked once: a permission lasts, also across a fork. */
static int has_amx(void)
{
    enum { UNKNOWN, NO, YES };
    static atomic_int answer;
    int known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (known == UNKNOWN) {
        known = ask_for_amx() ? YES : NO;
        atomic_store_explicit(&answer, known, memory_order_relaxed);
    }
    return known == YES;
}
#endif
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
    return bf16     ? (has_amx() ? HQQ_ISA_AMX : HQQ_ISA_AVX512_BF16)
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

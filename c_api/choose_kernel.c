/* Which kernel serves which shape: the one place. Thresholds are rows of x, measured on two
 * cores with benchmarks/linear.py. */
#include "dtype.h"
#include "format.h"
#include "hqqlora.h"

typedef struct threshold {
    hqq_isa isa;
    hqq_dtype dtype;
    int64_t forward, dgrad; /* direct up to this many rows, blocked above */
} threshold;

static const threshold thresholds[] = {
    {HQQ_ISA_AVX512_BF16, HQQ_BF16, 8, 8}, {HQQ_ISA_AVX512_BF16, HQQ_F16, 8, 8},
    {HQQ_ISA_AVX512_BF16, HQQ_F32, 8, 8},  {HQQ_ISA_AVX512, HQQ_BF16, 8, 8},
    {HQQ_ISA_AVX512, HQQ_F16, 8, 8},       {HQQ_ISA_AVX512, HQQ_F32, 8, 8},
    {HQQ_ISA_AVX2, HQQ_BF16, 8, 8},        {HQQ_ISA_AVX2, HQQ_F16, 8, 8},
    {HQQ_ISA_AVX2, HQQ_F32, 8, 8},
};

hqq_kernel hqq_choose_kernel(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                             int32_t transpose, hqq_isa isa)
{
    (void)weight;
    int64_t direct = 8;
    for (size_t i = 0; i < sizeof thresholds / sizeof *thresholds; i++)
        if (thresholds[i].isa == isa && thresholds[i].dtype == dtype)
            direct = transpose ? thresholds[i].dgrad : thresholds[i].forward;
    return M <= direct ? HQQ_KERNEL_DIRECT : HQQ_KERNEL_BLOCKED;
}

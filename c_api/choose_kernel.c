/*
 * Which kernel serves which shape: the one place.
 *
 * The direct kernels read each code once a few rows of x, so their time grows with M; a blocked
 * product pays for the dequantized block and the GEMM's own overhead whatever M is. The table
 * says up to how many rows of x direct was the faster one, 4 bits, G = 64, 4096 x 4096, one
 * thread of a Xeon with AVX-512 BF16 (and AMX, which torch's bf16 GEMM uses); at 48 rows, the
 * most that were tried, fp16 and fp32 had not crossed. AVX2's fp16 is a guess from its bf16;
 * portable was not measured.
 */
#include "hqqlora.h"

typedef struct thresholds {
    int64_t bf16, f16, f32;
} thresholds;

static const thresholds forward_avx512 = {20, 48, 48}, dgrad_avx512 = {20, 48, 48};
static const thresholds forward_avx2 = {16, 16, 24}, dgrad_avx2 = {12, 12, 16};
static const thresholds portable = {8, 8, 8};

static const thresholds *thresholds_of(hqq_isa isa, int transpose)
{
    switch (isa) {
    case HQQ_ISA_AVX512_BF16:
    case HQQ_ISA_AVX512: return transpose ? &dgrad_avx512 : &forward_avx512;
    case HQQ_ISA_AVX2: return transpose ? &dgrad_avx2 : &forward_avx2;
    default: return &portable;
    }
}

hqq_kernel hqq_choose_kernel(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                             int32_t transpose, hqq_isa isa)
{
    const thresholds *rows = thresholds_of(isa, transpose);
    int64_t direct = dtype == HQQ_BF16 ? rows->bf16 : dtype == HQQ_F16 ? rows->f16 : rows->f32;
    (void)weight; /* 8 and 3 bits cross at 14 to 16 rows in bf16: not worth a table of their own
                   */
    return M <= direct ? HQQ_KERNEL_DIRECT : HQQ_KERNEL_BLOCKED;
}

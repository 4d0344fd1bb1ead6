/* The lanes of solver.h on the device: one float, one group a thread. The files that include
 * this are compiled without contraction (nvcc -fmad=false, elsewhere -ffp-contract=off): the
 * results are then the CPU's, bit for bit. */
#ifndef HQQ_KERNELS_CUDA_QUANTIZE_LANES_CUH
#define HQQ_KERNELS_CUDA_QUANTIZE_LANES_CUH

#include <math.h>

#include "cuda.cuh"
#include "dtype.h"

typedef float hqq_lane;
typedef int hqq_lane_mask;

HQQ_INLINE hqq_lane hqq_lane_set(float x)
{
    return x;
}

/* One instruction each. They differ from the CPU's where b is NaN, which solver.h never has,
 * and in the sign of a zero, which its uses do not keep. */
HQQ_INLINE hqq_lane hqq_lane_min(hqq_lane a, hqq_lane b)
{
    return fminf(a, b);
}
HQQ_INLINE hqq_lane hqq_lane_max(hqq_lane a, hqq_lane b)
{
    return fmaxf(a, b);
}

HQQ_INLINE hqq_lane hqq_lane_abs(hqq_lane a)
{
    return fabsf(a);
}

HQQ_INLINE hqq_lane hqq_lane_select(hqq_lane_mask mask, hqq_lane a, hqq_lane b)
{
    return mask ? a : b;
}

HQQ_INLINE int hqq_lane_any(hqq_lane_mask mask)
{
    return mask != 0;
}

HQQ_INLINE hqq_lane hqq_lane_round_to(hqq_lane a, hqq_dtype dtype)
{
    switch (dtype) {
    case HQQ_F16: return hqq_f16_to_float(hqq_float_to_f16(a));
    case HQQ_BF16: return hqq_bf16_to_float(hqq_float_to_bf16(a));
    default: return a;
    }
}

#include "solver.h"

#endif

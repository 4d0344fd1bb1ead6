/* out (+)= what the splits of a product of many tokens have left, added up in their order. A
 * thread has eight neighbouring outputs of a token: 32 bytes of each split, 16 of out. */
#include "wide_finish.cuh"

#include "integers.h"

enum { THREADS = 256 };

template <class T>
__global__ void __launch_bounds__(THREADS)
    hqq_wide_sum(const hqq_wide_arguments a, int64_t pieces)
{
    int64_t piece = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (piece >= pieces) return;
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = 0.0f;
#pragma unroll 1
    for (int split = 0; split < a.splits; split++) {
        const float4 *from =
            reinterpret_cast<const float4 *>(a.partial + (split * pieces + piece) * 8);
        float4 low = __ldcg(from), high = __ldcg(from + 1);
        float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] += part[i];
    }
    hqq_wide_store<T>(static_cast<unsigned short *>(a.out) + 8 * piece, sums, a);
}

hqq_status hqq_wide_launch_sum(const hqq_wide_arguments *a, hqq_dtype dtype, int64_t outputs,
                               void *stream)
{
    int64_t pieces = a->M * outputs / 8;
    dim3 grid((unsigned)hqq_ceil_div(pieces, THREADS)), block(THREADS);
    if (dtype == HQQ_BF16)
        return hqq_launch(hqq_wide_sum<__nv_bfloat16>, grid, block, 0, stream, *a, pieces);
    return hqq_launch(hqq_wide_sum<__half>, grid, block, 0, stream, *a, pieces);
}

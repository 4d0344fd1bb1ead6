/*
 * Two splits of the same outputs as a cluster of two blocks (compute capability 9.0): each
 * finishes half of the tokens, and reads the other's sums for them from its shared memory.
 *
 *                     split 2i        split 2i + 1
 *     tokens  0..31   keeps <-------- gives
 *     tokens 32..63   gives --------> keeps
 *
 * So a pair leaves half as many parts in the workspace, or none where it is alone, and what the
 * last ones read of them passes two multiprocessors. Why not more splits: see README.md.
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_PAIR_CUH
#define HQQ_KERNELS_CUDA_SMALL_PAIR_CUH

#include "small_finish.cuh"

#ifdef PTX_CLUSTERS
/* acc[.][i] += the other block's, for tile i of the half that this block keeps; way 0's. All
 * threads of the block call it, and have waited for the cluster again before they return: the
 * other block has then read what this one gives. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_meet(const hqq_small_arguments &a, float (&acc)[4][C::MT][4],
                                      unsigned char *shared, int way)
{
    enum { KEPT = C::MT / 2 };
    const int rank = blockIdx.y % 2, stride = 32 << a.unit_bits;
    float4 *given = reinterpret_cast<float4 *>(shared) + threadIdx.x;
    __syncthreads(); /* no warp needs what was there */
#pragma unroll
    for (int f = 0; f < 4; f++)
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            float gives[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float low = acc[f][i][j], high = acc[f][KEPT + i][j];
                gives[j] = rank ? low : high;
                acc[f][i][j] = rank ? high : low;
            }
            if (way == 0)
                given[(f * KEPT + i) * stride] =
                    make_float4(gives[0], gives[1], gives[2], gives[3]);
        }
    ptx_cluster_arrive_shared();
    ptx_cluster_wait();
    if (way == 0) {
        const ptx_cluster_address there = ptx_cluster_map(given, 1 - rank);
        float4 got[4][KEPT];
#pragma unroll
        for (int f = 0; f < 4; f++)
#pragma unroll
            for (int i = 0; i < KEPT; i++)
                got[f][i] = ptx_cluster_load(there, 16 * (f * KEPT + i) * stride);
#pragma unroll
        for (int f = 0; f < 4; f++)
#pragma unroll
            for (int i = 0; i < KEPT; i++) {
                acc[f][i][0] += got[f][i].x;
                acc[f][i][1] += got[f][i].y;
                acc[f][i][2] += got[f][i].z;
                acc[f][i][3] += got[f][i].w;
            }
    }
}

/* The sum of all pairs, where there are several; whether this block finishes. Way 0 then has
 * `tiles` tiles of tokens from `first` on. For all threads of the block, which have arrived at
 * the cluster's barrier. */
template <class C>
HQQ_DEVICE_INLINE bool hqq_small_gather_pairs(const hqq_small_arguments &a,
                                              float (&acc)[4][C::MT][4], int way, int *first,
                                              int *tiles)
{
    enum { KEPT = C::MT / 2 };
    *first = blockIdx.y % 2 * KEPT;
    *tiles = way == 0 ? KEPT : 0;
    if (gridDim.y == 2) {
        ptx_cluster_arrive(); /* its loads are done; no stores yet that this would wait for */
        return true;
    }
    if (way == 0) hqq_small_leave<C, KEPT>(a, acc);
    const bool last = hqq_small_is_last(a, 2);
    ptx_cluster_arrive_relaxed();
    if (!last) return false;
    if (way == 0)
        hqq_small_gather_parts<C, KEPT, C::MT == 8 ? 1 : 4, true, 2>(a, acc, 0, threadIdx.x);
    return true;
}
#endif

#endif

/*
 * From accumulators to out, by way of shared memory: lanes hold neighbouring outputs of a
 * token, and two tokens each; threads then write eight outputs of one token at a time.
 */
#ifndef HQQ_KERNELS_CUDA_WIDE_FINISH_CUH
#define HQQ_KERNELS_CUDA_WIDE_FINISH_CUH

#include "small_codes.cuh"
#include "wide_layout.cuh"

/* Which of the block's outputs row g (+ 8 upper) of a warp's tile f is, in the order in which
 * they lie in out: slot by slot; or column by column. */
template <class C> HQQ_DEVICE_INLINE int hqq_wide_output_of(int warp, int f, int upper, int g)
{
    if (C::TRANSPOSE) return 32 * warp + 4 * g + 2 * f + upper;
    int half = 4 * warp + 2 * f + upper;
    return half % C::P * (C::OUTPUTS / C::P) + half / C::P * 8 + g;
}

/* Where the block's outputs from number `number` on are in a row of out; -1: there are none. */
template <class C>
HQQ_DEVICE_INLINE int hqq_wide_place_of(const hqq_wide_arguments &a, int first, int number)
{
    if (C::TRANSPOSE) return first + number < a.K ? first + number : -1;
    int row = first + number % (C::OUTPUTS / C::P), per_slot = a.N / C::P;
    return row < per_slot ? number / (C::OUTPUTS / C::P) * per_slot + row : -1;
}

/* Eight sums (and what is there) to out. */
template <class T>
HQQ_DEVICE_INLINE void hqq_wide_store(unsigned short *out, const float *sums,
                                      const hqq_wide_arguments &a)
{
    uint32_t pairs[4] = {0, 0, 0, 0};
    if (a.adds && a.out_aligned) {
        uint4 x = *reinterpret_cast<const uint4 *>(out);
        pairs[0] = x.x;
        pairs[1] = x.y;
        pairs[2] = x.z;
        pairs[3] = x.w;
    } else if (a.adds) {
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = out[2 * i] | (uint32_t)out[2 * i + 1] << 16;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 there = a.adds ? hqq_pair_to_floats(pairs[i], T()) : make_float2(0.0f, 0.0f);
        uint32_t low = hqq_bit_cast<unsigned short>(hqq_from_float(sums[2 * i] + there.x, T()));
        uint32_t high =
            hqq_bit_cast<unsigned short>(hqq_from_float(sums[2 * i + 1] + there.y, T()));
        pairs[i] = low | high << 16;
    }
    if (a.out_aligned) {
        *reinterpret_cast<uint4 *>(out) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = (unsigned short)(pairs[i / 2] >> 16 * (i % 2));
}

/* Eight sums of one split. */
HQQ_DEVICE_INLINE void hqq_wide_leave(float *partial, const float *sums)
{
#pragma unroll
    for (int i = 0; i < 8; i += 4)
        *reinterpret_cast<float4 *>(partial + i) = *reinterpret_cast<const float4 *>(sums + i);
}

/* Sums of the block's tokens from `part` on to sums[token][output]. */
template <class C>
HQQ_DEVICE_INLINE void hqq_wide_share_sums(float *sums, const float (&acc)[2][C::SUMS],
                                           int part, int thread)
{
    const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
#pragma unroll
    for (int i = 0; i < C::TOKENS_AT_END / 2; i++) { /* of each tile */
        int j = i / 4 * 8 + 2 * t + i % 2, upper = i / 2 % 2;
#pragma unroll
        for (int f = 0; f < 2; f++)
            sums[j * C::SUM_STRIDE + hqq_wide_output_of<C>(warp, f, upper, g)] =
                acc[f][part / 2 + i];
    }
}

/* acc: of tiles f. For all threads of the block, once nothing else is read from `sums`' place.
 */
template <class C>
HQQ_DEVICE_INLINE void hqq_wide_finish(float *sums, const hqq_wide_arguments &a,
                                       const float (&acc)[2][C::SUMS], int first_token,
                                       int first, int thread)
{
    unsigned short *out = static_cast<unsigned short *>(a.out);
    const int64_t outputs = C::TRANSPOSE ? a.K : a.N;
#pragma unroll
    for (int part = 0; part < C::TOKENS; part += C::TOKENS_AT_END) {
        __syncthreads();
        hqq_wide_share_sums<C>(sums, acc, part, thread);
        __syncthreads();
#pragma unroll 1
        for (int i = thread; i < C::TOKENS_AT_END * C::OUTPUTS / 8; i += C::THREADS) {
            int token = i / (C::OUTPUTS / 8), number = i % (C::OUTPUTS / 8) * 8;
            int at = hqq_wide_place_of<C>(a, first, number);
            int m = first_token + part + token;
            const float *from = sums + token * C::SUM_STRIDE + number;
            if (at < 0 || m >= a.M) continue;
            if (a.splits > 1)
                hqq_wide_leave(a.partial + (blockIdx.y * (int64_t)a.M + m) * outputs + at,
                               from);
            else
                hqq_wide_store<typename C::T>(out + m * outputs + at, from, a);
        }
    }
}

#ifdef PTX_CLUSTERS
/* Eight of the block's tokens' outputs, of all splits in their order. */
HQQ_DEVICE_INLINE void hqq_wide_add_splits(float (&sum)[8], const float *from, int splits)
{
    for (int split = 0; split < splits; split++) {
        const ptx_cluster_address there = ptx_cluster_map(from, (unsigned)split);
        float4 low = ptx_cluster_load(there, 0), high = ptx_cluster_load(there, 16);
        float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += part[j];
    }
}

/* The same where the tile's splits are a cluster: each of its blocks adds up a part of the
 * tokens. That others have read what it gives it need not know before it stores. */
template <class C>
HQQ_DEVICE_INLINE void hqq_wide_meet(float *sums, const hqq_wide_arguments &a,
                                     const float (&acc)[2][C::SUMS], int first_token, int first,
                                     int thread)
{
    enum {
        PIECES = C::OUTPUTS / 8, /* of a token's outputs */
        MINE = C::TOKENS * PIECES / 2 / C::THREADS
    };
    static_assert(C::TOKENS == C::TOKENS_AT_END, "all tokens at a time");
    unsigned short *out = static_cast<unsigned short *>(a.out);
    const int64_t outputs = C::TRANSPOSE ? a.K : a.N;
    const int split = blockIdx.y, tokens = min((int)C::TOKENS, a.M - first_token);
    const int begin = tokens * split / a.splits * PIECES + thread;
    const int end = tokens * (split + 1) / a.splits * PIECES;
    __syncthreads();
    hqq_wide_share_sums<C>(sums, acc, 0, thread);
    ptx_cluster_arrive_shared();
    ptx_cluster_wait();
    float sum[MINE][8] = {};
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int piece = begin + i * C::THREADS;
        if (piece < end)
            hqq_wide_add_splits(
                sum[i], sums + piece / PIECES * C::SUM_STRIDE + piece % PIECES * 8, a.splits);
    }
    ptx_cluster_arrive(); /* its loads are done; no stores yet that the fence would wait for */
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int piece = begin + i * C::THREADS;
        const int at = hqq_wide_place_of<C>(a, first, piece % PIECES * 8);
        if (piece < end && at >= 0)
            hqq_wide_store<typename C::T>(out + (first_token + piece / PIECES) * outputs + at,
                                          sum[i], a);
    }
    ptx_cluster_wait();
}
#endif

#endif

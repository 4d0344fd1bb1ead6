/*
 * From accumulators to out, where the reduction was split or not.
 *
 * A split block leaves its accumulators in `partial`, lane by lane (all accesses 128 bytes a
 * warp), and counts itself in; the block that arrives last adds the parts in the order of the
 * splits, so the result does not depend on who that was. No block waits for another.
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_FINISH_CUH
#define HQQ_KERNELS_CUDA_SMALL_FINISH_CUH

#include "small_codes.cuh"
#include "small_layout.cuh"

/* Of the outputs and tokens of a block, whichever its split. */
HQQ_DEVICE_INLINE int hqq_small_tile()
{
    return blockIdx.z * gridDim.x + blockIdx.x;
}

/* Element `i` of this thread's accumulators in the part of `split`. */
template <class C>
HQQ_DEVICE_INLINE float *hqq_small_partial(const hqq_small_arguments &a, int split, int i)
{
    int64_t part = (int64_t)split * (gridDim.x * gridDim.z) + hqq_small_tile();
    return a.partial + (part * C::ACCUMULATORS + i) * C::THREADS + threadIdx.x;
}

template <class C>
HQQ_DEVICE_INLINE void hqq_small_leave(const hqq_small_arguments &a,
                                       const float (&acc)[4][C::MT][4])
{
#pragma unroll
    for (int f = 0; f < 4; f++)
#pragma unroll
        for (int mt = 0; mt < C::MT; mt++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                *hqq_small_partial<C>(a, blockIdx.y, (f * C::MT + mt) * 4 + j) = acc[f][mt][j];
}

/* Whether all splits of this block's outputs have left their parts. For all threads of the
 * block. */
HQQ_DEVICE_INLINE bool hqq_small_is_last(const hqq_small_arguments &a)
{
    HQQ_SHARED(unsigned, before);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(a.arrived + hqq_small_tile(), 1u);
    __syncthreads();
    __threadfence();
    return before == gridDim.y - 1;
}

template <class C>
HQQ_DEVICE_INLINE void hqq_small_gather_parts(const hqq_small_arguments &a,
                                              float (&acc)[4][C::MT][4])
{
#pragma unroll
    for (int f = 0; f < 4; f++)
#pragma unroll
        for (int mt = 0; mt < C::MT; mt++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[f][mt][j] = 0.0f;
    /* several splits on their way at once, or each would cost the whole latency of L2 */
    for (int split = 0; split < (int)gridDim.y; split += C::SPLITS_AT_ONCE) {
        float part[C::SPLITS_AT_ONCE][C::ACCUMULATORS];
#pragma unroll
        for (int s = 0; s < C::SPLITS_AT_ONCE; s++)
#pragma unroll
            for (int i = 0; i < C::ACCUMULATORS; i++)
                part[s][i] = split + s < (int)gridDim.y
                                 ? __ldcg(hqq_small_partial<C>(a, split + s, i))
                                 : 0.0f;
#pragma unroll
        for (int s = 0; s < C::SPLITS_AT_ONCE; s++)
#pragma unroll
            for (int i = 0; i < C::ACCUMULATORS; i++)
                acc[i / 4 / C::MT][i / 4 % C::MT][i % 4] += part[s][i];
    }
}

/* Which of outputs `output` .. + 7 dropout keeps, for tokens m and m + 1: bit 8 b + i. The loop
 * is not unrolled: Philox is long, and only LoRA's dx needs it. */
template <class C>
HQQ_DEVICE_INLINE unsigned hqq_small_kept(const hqq_small_arguments &a, int m, int output)
{
    unsigned kept = 0;
#pragma unroll 1
    for (int quad = 0; quad < 4; quad++) {
        uint32_t words[4];
        uint64_t element = (uint64_t)(m + quad / 2) * hqq_small_outputs<C>(a) + output;
        hqq_dropout_words(words, a.addend.dropout.seed, element / 4 + quad % 2);
#pragma unroll
        for (int i = 0; i < 4; i++)
            kept |= (unsigned)(words[i] <= a.addend.dropout.last) << (4 * quad + i);
    }
    return kept;
}

/* Adds bias and LoRA to the 8 outputs x 2 tokens of one tile of tokens. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_add(const hqq_small_arguments &a, float (&acc)[4][C::MT][4],
                                     int mt, int first_token, const int (&output)[8])
{
    const hqq_addend &d = a.addend;
    int m = first_token + 8 * mt + 2 * (threadIdx.x % 4);
    float sum[8][2] = {};
    if (d.rank > 0 && m < a.M) {
        const float *left = d.left + (int64_t)m * d.rank;
        int64_t next = m + 1 < a.M ? d.rank : 0;
        for (int64_t r = 0; r < d.rank; r++) {
            float l0 = __ldg(left + r), l1 = __ldg(left + r + next);
#pragma unroll
            for (int half = 0; half < 8; half++) {
                if (output[half] < 0) continue;
                float right =
                    hqq_load(d.right, d.right_dtype,
                             r * d.right_rank_stride + output[half] * d.right_output_stride);
                sum[half][0] += l0 * right;
                sum[half][1] += l1 * right;
            }
        }
    }
    unsigned kept = 0xffff;
    float scaling = d.scaling;
    if (C::TRANSPOSE && d.drops) { /* K is a multiple of 64: eight outputs are two quads */
        kept = hqq_small_kept<C>(a, m, output[0]);
        scaling *= d.dropout.keep_scale;
    }
#pragma unroll
    for (int half = 0; half < 8; half++) {
        float bias =
            d.bias && output[half] >= 0 ? hqq_load(d.bias, d.bias_dtype, output[half]) : 0.0f;
#pragma unroll
        for (int b = 0; b < 2; b++)
            acc[half / 2][mt][half % 2 * 2 + b] +=
                (kept >> (8 * b + half) & 1 ? scaling * sum[half][b] : 0.0f) + bias;
    }
}

/* Rounds and stores the tile of 8 outputs x 2 tokens. Transpose 1: the 8 are neighbours, 16
 * bytes where out allows. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_store(const hqq_small_arguments &a,
                                       const float (&acc)[4][C::MT][4], int mt, int first_token,
                                       const int (&output)[8])
{
    typedef typename C::T T;
#pragma unroll
    for (int b = 0; b < 2; b++) {
        int m = first_token + 8 * mt + 2 * (threadIdx.x % 4) + b;
        if (m >= a.M) continue;
        T *row = static_cast<T *>(a.out) + (int64_t)m * hqq_small_outputs<C>(a);
        T value[8];
#pragma unroll
        for (int half = 0; half < 8; half++)
            value[half] = hqq_from_float(acc[half / 2][mt][half % 2 * 2 + b], T());
        if (C::TRANSPOSE && a.out_aligned) { /* K is a multiple of 64 */
            struct alignas(16) eight {
                T value[8];
            } all;
#pragma unroll
            for (int half = 0; half < 8; half++) all.value[half] = value[half];
            *reinterpret_cast<uint4 *>(row + output[0]) = hqq_bit_cast<uint4>(all);
        } else {
#pragma unroll
            for (int half = 0; half < 8; half++)
                if (output[half] >= 0) row[output[half]] = value[half];
        }
    }
}

template <class C>
HQQ_DEVICE_INLINE void hqq_small_finish(const hqq_small_arguments &a, float (&acc)[4][C::MT][4],
                                        int unit, int first_token, int lane)
{
    if (unit >= a.units) return;
    int output[8];
#pragma unroll
    for (int half = 0; half < 8; half++)
        output[half] = hqq_small_output<C>(a, unit, lane / 4, half);
#pragma unroll
    for (int mt = 0; mt < C::MT; mt++) {
        if (a.addend.bias || a.addend.rank > 0)
            hqq_small_add<C>(a, acc, mt, first_token, output);
        hqq_small_store<C>(a, acc, mt, first_token, output);
    }
}

#endif

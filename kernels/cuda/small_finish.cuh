/*
 * From accumulators to out, where the reduction went several ways or was split.
 *
 * The ways of a block meet in shared memory: way 0 adds the others' accumulators in order.
 *
 * A split block leaves its accumulators in `partial`, lane by lane (all accesses 512 bytes a
 * warp), and says so in `arrived`; a block that finds all splits there adds the parts in the
 * order of the splits, so the result does not depend on who that was. Its ways share the
 * tokens then. No block waits for another.
 *
 * The workspace holds anything at first, and clearing it would be a launch of its own. So a
 * split says that it arrived by bits that nothing else writes, and who finds all there clears
 * them for the next launch. Two ways:
 *
 *     counted   96 bits of a mark and how many are there, changed together by a 16-byte compare
 *               and exchange (compute capability 9.0). Without the mark nobody is there yet.
 *
 *                   split s    parts | fence | arrived: n -> n + 1, or cleared if n + 1 =
 * splits
 *
 *     marked    128 bits for each split. Two blocks may find all there: both then write the
 *               same bits.
 *
 *                   split s    parts | fence | arrived[s] = MARK | fence | are all MARK?
 *
 *               Of the second fences one is the last: its block sees all marks, or somebody has
 *               cleared them, who saw them all before.
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

/* acc += those of the block's other ways, in way 0; for all threads of the block. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_join_ways(const hqq_small_arguments &a,
                                           float (&acc)[4][C::MT][4], float *parts, int way)
{
    const int threads = 32 << a.unit_bits, thread = threadIdx.x & (threads - 1);
    __syncthreads(); /* no warp needs what was there */
    if (way > 0)
#pragma unroll
        for (int i = 0; i < C::ACCUMULATORS; i++)
            parts[((way - 1) * C::ACCUMULATORS + i) * threads + thread] =
                acc[i / 4 / C::MT][i / 4 % C::MT][i % 4];
    __syncthreads();
    if (way > 0) return;
#pragma unroll 1
    for (int other = 0; other < a.ways - 1; other++)
#pragma unroll
        for (int i = 0; i < C::ACCUMULATORS; i++)
            acc[i / 4 / C::MT][i / 4 % C::MT][i % 4] +=
                parts[(other * C::ACCUMULATORS + i) * threads + thread];
}

/* Four accumulators, of tile f's token tile mt, of way 0's thread `thread` in the part of
 * `split`. */
template <class C>
HQQ_DEVICE_INLINE float4 *hqq_small_partial(const hqq_small_arguments &a, int split, int f,
                                            int mt, int thread)
{
    int64_t part = (int64_t)split * (gridDim.x * gridDim.z) + hqq_small_tile();
    return reinterpret_cast<float4 *>(a.partial) +
           ((part * (C::ACCUMULATORS / 4) + f * C::MT + mt) << (5 + a.unit_bits)) + thread;
}

/* The first `tiles` tiles of tokens. */
template <class C, int tiles>
HQQ_DEVICE_INLINE void hqq_small_leave(const hqq_small_arguments &a,
                                       const float (&acc)[4][C::MT][4])
{
#pragma unroll
    for (int f = 0; f < 4; f++)
#pragma unroll
        for (int mt = 0; mt < tiles; mt++) {
            const float (&from)[4] = acc[f][mt];
            *hqq_small_partial<C>(a, blockIdx.y, f, mt, threadIdx.x) =
                make_float4(from[0], from[1], from[2], from[3]);
        }
}

HQQ_DEVICE_INLINE uint4 hqq_small_mark()
{
    return make_uint4(0x7fa96d3bu, 0xffd1c4e7u, 0x7fe2953fu, 0xffb80a6du);
}

#ifdef PTX_COMPARE_EXCHANGES_16
/* Counts this block in; whether it is the last of its outputs' splits. By one thread. */
HQQ_DEVICE_INLINE bool hqq_small_count_in(uint4 *arrived, int splits)
{
    const uint4 mark = hqq_small_mark();
    uint4 seen = __ldcg(arrived); /* perhaps outdated, or of two minds: then tried again */
    for (;;) {
        bool counts = seen.x == mark.x && seen.y == mark.y && seen.z == mark.z;
        unsigned there = counts ? seen.w + 1 : 1;
        bool last = there >= (unsigned)splits;
        uint4 next = last ? make_uint4(0, 0, 0, 0) : make_uint4(mark.x, mark.y, mark.z, there);
        uint4 found = ptx_compare_exchange_16(arrived, seen, next);
        if (found.x == seen.x && found.y == seen.y && found.z == seen.z && found.w == seen.w)
            return last;
        seen = found; /* another split came first: there are as many of those as splits */
    }
}
#endif

/* Whether all splits of this block's outputs have left their parts. For all threads of the
 * block. every: 2 in a pair (where splits are counted), whose blocks have different tokens. */
HQQ_DEVICE_INLINE bool hqq_small_is_last(const hqq_small_arguments &a, int every)
{
    HQQ_SHARED(int, all_there);
#ifdef PTX_COMPARE_EXCHANGES_16
    if (a.counts_splits) {
        __threadfence(); /* this thread's parts, before the block is counted in */
        __syncthreads();
        if (threadIdx.x == 0)
            all_there = hqq_small_count_in(static_cast<uint4 *>(a.arrived) +
                                               hqq_small_tile() * every + blockIdx.y % every,
                                           (int)gridDim.y / every);
        __syncthreads();
        __threadfence();
        return all_there;
    }
#endif
    uint4 *arrived = static_cast<uint4 *>(a.arrived) + (int64_t)hqq_small_tile() * gridDim.y;
    const uint4 mark = hqq_small_mark();
    const int lane = threadIdx.x;
    __threadfence();
    __syncthreads();
    if (threadIdx.x < 32) {
        /* by one lane, or a late store of another could follow somebody's clearing */
        if (lane == 0) __stcg(arrived + blockIdx.y, mark);
        __syncwarp();
        __threadfence(); /* by every lane, before its own loads */
        int there = 1;
        for (int split = lane; split < (int)gridDim.y; split += 32) {
            uint4 found = __ldcg(arrived + split);
            there &= found.x == mark.x && found.y == mark.y && found.z == mark.z &&
                     found.w == mark.w;
        }
        there = __all_sync(0xffffffffu, there);
        if (there)
            for (int split = lane; split < (int)gridDim.y; split += 32)
                __stcg(arrived + split, make_uint4(0, 0, 0, 0));
        if (lane == 0) all_there = there;
    }
    __syncthreads();
    __threadfence();
    return all_there;
}

/* acc[.][i] = the sum of the parts of every `every`th split, for tile first + i of what they
 * left, in the place of way 0's thread `thread`; i below `tiles`. Several splits are on their
 * way at once, or each would cost the whole latency of L2. This block's own part is acc, where
 * it is `kept`. */
template <class C, int tiles, int at_once, bool kept, int every>
HQQ_DEVICE_INLINE void hqq_small_gather_parts(const hqq_small_arguments &a,
                                              float (&acc)[4][C::MT][4], int first, int thread)
{
    float own[4][C::MT][4];
#pragma unroll
    for (int i = 0; i < 16 * C::MT; i++) { /* beyond `tiles`: needed no more */
        own[i / 4 / C::MT][i / 4 % C::MT][i % 4] = acc[i / 4 / C::MT][i / 4 % C::MT][i % 4];
        acc[i / 4 / C::MT][i / 4 % C::MT][i % 4] = 0.0f;
    }
#pragma unroll 1
    for (int split = blockIdx.y % every; split < (int)gridDim.y; split += at_once * every) {
        float4 part[at_once][4 * tiles];
#pragma unroll
        for (int s = 0; s < at_once; s++)
#pragma unroll
            for (int i = 0; i < 4 * tiles; i++) {
                const float (&mine)[4] = own[i / tiles][i % tiles];
                part[s][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                const int of = split + s * every;
                if (kept && of == (int)blockIdx.y)
                    part[s][i] = make_float4(mine[0], mine[1], mine[2], mine[3]);
                else if (of < (int)gridDim.y)
                    part[s][i] = __ldcg(
                        hqq_small_partial<C>(a, of, i / tiles, first + i % tiles, thread));
            }
#pragma unroll
        for (int s = 0; s < at_once; s++)
#pragma unroll
            for (int i = 0; i < 4 * tiles; i++) {
                float *sum = acc[i / tiles][i % tiles];
                sum[0] += part[s][i].x;
                sum[1] += part[s][i].y;
                sum[2] += part[s][i].z;
                sum[3] += part[s][i].w;
            }
    }
}

/* Adds up the splits: acc[.][0 .. tiles - 1] are then this warp's, from tile `first` on. Of 64
 * tokens two ways do half each, where there are two. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_gather(const hqq_small_arguments &a, float (&acc)[4][C::MT][4],
                                        int way, int *first, int *tiles)
{
    const int thread = threadIdx.x & ((32 << a.unit_bits) - 1);
    *first = 0;
    *tiles = way == 0 ? C::MT : 0;
    if (C::MT == 8 && C::BITS < 8 && a.ways > 1) { /* 8 bits: no registers left */
        *first = way * 4;
        *tiles = way < 2 ? 4 : 0;
        if (*tiles)
            hqq_small_gather_parts<C, C::MT == 8 ? 4 : 1, 2, false, 1>(a, acc, *first, thread);
    } else if (way == 0) {
        hqq_small_gather_parts<C, C::MT, C::SPLITS_AT_ONCE, C::MT <= 2, 1>(a, acc, 0, thread);
    }
}

/* Which of outputs `output` .. + 7 dropout keeps, for tokens m and m + 1: bit 8 b + i. The loop
 * is not unrolled: Philox is long, and only LoRA's dx needs it. */
template <class C>
HQQ_DEVICE_INLINE unsigned hqq_small_kept(const hqq_small_arguments &a, int m, int output)
{
    const hqq_dropout dropout = hqq_dropout_read(&a.addend.dropout);
    unsigned kept = 0;
#pragma unroll 1
    for (int quad = 0; quad < 4; quad++) {
        uint32_t words[4];
        uint64_t element = (uint64_t)(m + quad / 2) * hqq_small_outputs<C>(a) + output;
        hqq_dropout_words(words, dropout.seed, element / 4 + quad % 2);
#pragma unroll
        for (int i = 0; i < 4; i++)
            kept |= (unsigned)(words[i] <= dropout.last) << (4 * quad + i);
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

/* Of the first `tiles` tiles of tokens, from first_token on. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_finish(const hqq_small_arguments &a, float (&acc)[4][C::MT][4],
                                        int unit, int first_token, int tiles, int lane)
{
    if (unit >= a.units) return;
    int output[8];
#pragma unroll
    for (int half = 0; half < 8; half++)
        output[half] = hqq_small_output<C>(a, unit, lane / 4, half);
#pragma unroll
    for (int mt = 0; mt < C::MT; mt++) {
        if (mt < tiles) {
            if (a.addend.bias || a.addend.rank > 0)
                hqq_small_add<C>(a, acc, mt, first_token, output);
            hqq_small_store<C>(a, acc, mt, first_token, output);
        }
    }
}

#endif

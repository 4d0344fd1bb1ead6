/*
 * The skinny products of lora_product.cuh on tensor cores, where `in` is bf16.
 *
 *     out[j,r] = scaling * sum_i in(i,j) * right(i,r)
 *
 * `in` is exact as it is. right is fp32, xa, dyb or an adapter that may be: its 24 bits are cut
 * into three numbers of 8, exactly, each of them a bf16 (`planes`; an adapter in bf16 is one).
 * So every product is exact, as in fp32 arithmetic, and sums are fp32's.
 *
 * A block of 8 warps does 64 j and `ranks` r again, chunk by chunk of 64 i, and the next chunk
 * is on its way in registers. In shared memory, rows padded by 16 bytes, so that 8 rows of 16
 * bytes, or of one word of a quad of lanes, meet 32 banks:
 *
 *     in     [64 j][64 i] if its rows run along i, else [64 i][64 j]: as memory has it
 *     right  [planes][ranks r][64 i]
 *
 *                      32 i    32 i
 *           16 j     [warp 0 | warp 4]
 *           16 j     [warp 1 | warp 5]        mma.m16n8k16: in is A, 16 j x 16 i by ldmatrix
 *           16 j     [warp 2 | warp 6]        (transposed from [i][j]); right is B, 16 i x 8 r
 *           16 j     [warp 3 | warp 7]
 *
 * At the end the right half's sums are added to the left half's.
 *
 * Dropout zeroes elements of `in`, and scales the sum: keep_scale in 16 bits would round.
 */
#ifndef HQQ_KERNELS_CUDA_LORA_MMA_CUH
#define HQQ_KERNELS_CUDA_LORA_MMA_CUH

#include "lora_load.cuh"
#include "ptx.cuh"

template <int ranks, int planes> struct lora_mma_tile {
    static constexpr int chunk = 64, pitch = chunk + 8; /* bf16 */
    static constexpr int j_warps = HQQ_LORA_TILE / 16;
    static constexpr int warp_i = chunk / (LORA_WARPS / j_warps);
    static constexpr int r_tiles = ranks / 8;
    static constexpr int in_items = HQQ_LORA_TILE * pitch, right_items = ranks * pitch;
    static constexpr int row = ranks + 1; /* fp32, of the block's sums: columns spread */
    static constexpr int chunk_bytes = 2 * (in_items + planes * right_items);
    static constexpr int sum_bytes = 4 * HQQ_LORA_TILE * row;
    static constexpr int bytes = chunk_bytes > sum_bytes ? chunk_bytes : sum_bytes;
};

/* v = part[0] + part[1] + part[2], each with 8 bits of mantissa: a bf16 in a float's upper
 * half. The first alone carries an infinity or NaN. */
HQQ_DEVICE_INLINE void cut_into_planes(uint32_t (&part)[3], float v)
{
    uint32_t bits = hqq_bit_cast<uint32_t>(v);
    part[0] = bits & 0xffff0000u;
    float rest = (bits & 0x7f800000u) == 0x7f800000u ? 0.0f : v - hqq_bit_cast<float>(part[0]);
    part[1] = hqq_bit_cast<uint32_t>(rest) & 0xffff0000u;
    part[2] = hqq_bit_cast<uint32_t>(rest - hqq_bit_cast<float>(part[1]));
}

/* Into shared memory what load_ahead brought: `in` with dropout's zeros, right as planes. */
template <int ranks, int planes, bool in_runs_along_i>
HQQ_DEVICE_INLINE void store_planes(uint16_t *in, uint16_t *right,
                                    const lora_ahead<__nv_bfloat16, ranks> &ahead,
                                    const hqq_lora_product &p, int64_t j0, int64_t i0)
{
    using tile = lora_mma_tile<ranks, planes>;
    using loads = lora_loads<__nv_bfloat16, ranks>;
    hqq_dropout dropout = hqq_dropout_if(p.drops, p.dropout);
    dropout.keep_scale = 1.0f;
#pragma unroll
    for (int l = 0; l < loads::in_loads; l++) {
        int row, column;
        in_place<__nv_bfloat16, in_runs_along_i>(row, column, l);
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; w++) words[w] = ahead.in[l][w];
        if (p.drops) {
            int64_t m = in_runs_along_i ? j0 + row : i0 + row;
            int64_t k = in_runs_along_i ? i0 + column : j0 + column;
            float values[8];
            unpack_in<__nv_bfloat16>(values, ahead.in[l]);
            hqq_drop_run(values, dropout, static_cast<uint64_t>(m * p.in_width + k));
#pragma unroll
            for (int w = 0; w < 4; w++)
                words[w] = hqq_join_word(values[2 * w], values[2 * w + 1], __nv_bfloat16());
        }
        hqq_store_words(in + row * tile::pitch + column, words);
    }
#pragma unroll
    for (int l = 0; l < loads::right_loads; l++) {
        int v = threadIdx.x + l * LORA_THREADS;
        if (v >= loads::right_items) continue;
        float values[4];
        uint32_t part[4][3];
        unpack_right(values, ahead.right[l], p.right_dtype);
#pragma unroll
        for (int e = 0; e < 4; e++) cut_into_planes(part[e], values[e]);
#pragma unroll
        for (int plane = 0; plane < planes; plane++) {
            uint16_t *to = right + plane * tile::right_items;
            if (p.right_runs_along_i) { /* four i of one r */
                uint32_t pairs[2] = {__byte_perm(part[0][plane], part[1][plane], 0x7632),
                                     __byte_perm(part[2][plane], part[3][plane], 0x7632)};
                hqq_store_words(to + v % ranks * tile::pitch + v / ranks * 4, pairs);
            } else { /* four r of one i */
#pragma unroll
                for (int e = 0; e < 4; e++)
                    to[(v % (ranks / 4) * 4 + e) * tile::pitch + v / (ranks / 4)] =
                        static_cast<uint16_t>(part[e][plane] >> 16);
            }
        }
    }
}

/* sums [r tile][4] += this warp's 16 j and 32 i of the chunk. */
template <int ranks, int planes, bool in_runs_along_i>
HQQ_DEVICE_INLINE void multiply_planes(float (&sums)[ranks / 8][4], const uint16_t *in,
                                       const uint16_t *right)
{
    using tile = lora_mma_tile<ranks, planes>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int j = warp % tile::j_warps * 16, first = warp / tile::j_warps * tile::warp_i;
#pragma unroll
    for (int i = 0; i < tile::warp_i; i += 16) {
        /* matrices of 8 x 8: j and i, j + 8, i + 8, both + 8 */
        uint32_t a[4];
        if (in_runs_along_i)
            ptx_ldmatrix_x4(a, in + (j + lane % 16) * tile::pitch + first + i + lane / 16 * 8);
        else
            ptx_ldmatrix_x4_trans(a, in + (first + i + lane % 8 + lane / 16 * 8) * tile::pitch +
                                         j + lane / 8 % 2 * 8);
        const uint16_t *from = right + lane / 4 * tile::pitch + first + i + lane % 4 * 2;
#pragma unroll
        for (int plane = planes - 1; plane >= 0; plane--) /* the smallest first */
#pragma unroll
            for (int n = 0; n < tile::r_tiles; n++) {
                const uint16_t *at = from + plane * tile::right_items + n * 8 * tile::pitch;
                uint32_t b[2] = {*reinterpret_cast<const uint32_t *>(at),
                                 *reinterpret_cast<const uint32_t *>(at + 8)};
                ptx_mma(sums[n], a, b, __nv_bfloat16());
            }
    }
}

/* The block's sums, in `shared` as [64 j][row]. */
template <int ranks, int planes>
HQQ_DEVICE_INLINE void add_halves(float *shared, const float (&sums)[ranks / 8][4],
                                  float factor)
{
    using tile = lora_mma_tile<ranks, planes>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *mine = shared + (warp % tile::j_warps * 16 + lane / 4) * tile::row + lane % 4 * 2;
#pragma unroll
    for (int half = LORA_WARPS / tile::j_warps - 1; half >= 0; half--) {
        __syncthreads();
        if (warp / tile::j_warps != half) continue;
#pragma unroll
        for (int n = 0; n < tile::r_tiles; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float *at = mine + e / 2 * 8 * tile::row + n * 8 + e % 2;
                float other = half == LORA_WARPS / tile::j_warps - 1 ? 0.0f : *at;
                *at = half == 0 ? (sums[n][e] + other) * factor : sums[n][e] + other;
            }
    }
    __syncthreads();
}

template <int ranks, bool in_runs_along_i, int planes>
static __global__ void __launch_bounds__(LORA_THREADS, 2) lora_mma(const hqq_lora_product p)
{
    using tile = lora_mma_tile<ranks, planes>;
    HQQ_SHARED(float4[(tile::bytes + 15) / 16], shared_fours);
    float *shared = &shared_fours[0].x;
    uint16_t *in = reinterpret_cast<uint16_t *>(shared), *right = in + tile::in_items;
    int64_t j0 = static_cast<int64_t>(blockIdx.x) * HQQ_LORA_TILE;
    int64_t r0 = static_cast<int64_t>(blockIdx.z) * ranks;
    int64_t i0 = blockIdx.y * p.part_length;
    int64_t i_end = i0 + p.part_length < p.I ? i0 + p.part_length : p.I;

    lora_ahead<__nv_bfloat16, ranks> ahead;
    float sums[ranks / 8][4] = {};
    if (i0 < i_end)
        load_ahead<__nv_bfloat16, ranks, in_runs_along_i>(ahead, p, j0, r0, i0, i_end);
    for (; i0 < i_end; i0 += tile::chunk) {
        __syncthreads();
        store_planes<ranks, planes, in_runs_along_i>(in, right, ahead, p, j0, i0);
        __syncthreads();
        if (i0 + tile::chunk < i_end)
            load_ahead<__nv_bfloat16, ranks, in_runs_along_i>(ahead, p, j0, r0,
                                                              i0 + tile::chunk, i_end);
        multiply_planes<ranks, planes, in_runs_along_i>(sums, in, right);
    }
    const hqq_dropout dropout = hqq_dropout_if(p.drops, p.dropout);
    add_halves<ranks, planes>(shared, sums, p.drops ? dropout.keep_scale : 1.0f);
    write_sums<ranks>(shared, tile::row, p, j0, r0);
}

#endif

/*
 * The skinny products of an adapter, all four of them; in fp32 arithmetic, but bf16 goes to
 * lora_mma.cuh:
 *
 *     out[j,r] = scaling * sum_i in(i,j) * right(i,r)          j < J, r < R, summed over i < I
 *
 *     lora_projection.cu       xa, dyb   j = m, i = k or n, right = A^T or B
 *     lora_weight_gradient.cu  dA, dB    j = k or n, i = m, right = dyb or xa
 *
 * `in` is x, with dropout, or dy, in its own dtype. A projection's rows run along i, a
 * gradient's along j: `in_runs_along_i` says which, and is all that differs.
 *
 * A block of 8 warps does 64 j and `ranks` (16, 32 or 64) r, over one part of the i. It goes
 * through them in chunks that hold 8 KiB of `in`, the next one on its way in registers:
 *
 *     in    [chunk][64 j]     fp32 in shared memory, dropout applied
 *     right [chunk][ranks]    fp32 in shared memory
 *
 *     warp     1024 outputs: 64 x 16, 32 x 32 or 16 x 64. The warps beyond those that cover
 *              the block's outputs take other i of the chunk.
 *     thread   8 j (two runs of 4, half a warp's j apart) x 4 r in registers: 3 loads of
 *              16 bytes for 32 multiply-adds.
 *
 * Where rows of `in` run along i they are stored transposed, element (i, j) at column
 * j ^ 4 (i / run % 8): so a warp's scattered stores meet 32 banks, and runs of 4 j stay whole.
 *
 * Then the warps' sums are added, the upper half's to the lower half's, until one is left.
 * Where a part is not the whole sum, `parts` gets it, and hqq_lora_add_parts adds them in their
 * order: results depend on the shapes and the device alone.
 *
 * For M = K = 4096 in fp16: 34 MB, 11 us at 3.0 TB/s; M K R multiply-adds, 9.3 us at R = 16 and
 * 37 us at R = 64 if nothing else were issued (132 multiprocessors, 1.7 GHz). A warp issues 290
 * instructions for 256 of them, and 390 with what else a chunk takes at R = 16 (nvcc 13.0,
 * sm_90): 14 us; 1480 for 1024 at R = 64: 54 us. Dropout adds 330 a chunk: Philox is 10 rounds.
 */
#ifndef HQQ_KERNELS_CUDA_LORA_PRODUCT_CUH
#define HQQ_KERNELS_CUDA_LORA_PRODUCT_CUH

#include "lora_load.cuh"
#include "lora_mma.cuh"

enum { LORA_WARP_OUTPUTS = 1024 };

template <class T, int ranks> struct lora_tile : lora_loads<T, ranks> {
    using lora_loads<T, ranks>::run;
    using lora_loads<T, ranks>::chunk;
    static constexpr int rank_lanes = ranks / 4; /* lanes side by side along r */
    static constexpr int warp_j = LORA_WARP_OUTPUTS / ranks;
    static constexpr int j_warps = HQQ_LORA_TILE / warp_j;
    static constexpr int i_warps = LORA_WARPS / j_warps;
    static constexpr int warp_i = chunk / i_warps; /* i of a chunk that a warp does */
    static constexpr int unrolled = warp_i < 8 ? warp_i : 8;
    static constexpr int same_row = unrolled < run ? unrolled : run; /* rows swizzled alike */
    static constexpr int in_floats = chunk * HQQ_LORA_TILE, right_floats = chunk * ranks;
    /* the sums of half the warps, and then the block's, take the place of the chunk */
    static constexpr int chunk_floats = in_floats + right_floats;
    static constexpr int warp_floats = LORA_WARPS / 2 * LORA_WARP_OUTPUTS;
    static constexpr int row = ranks + 1; /* of the block's sums: odd, so that columns spread */
    static constexpr int block_floats = HQQ_LORA_TILE * row;
    static constexpr int sum_floats = warp_floats > block_floats ? warp_floats : block_floats;
    static constexpr int floats = chunk_floats > sum_floats ? chunk_floats : sum_floats;
    static_assert(run % same_row == 0 && warp_i % unrolled == 0, "rows come in whole runs");
};

/* Where element (i, j) of the chunk lies. */
template <class T, bool in_runs_along_i> HQQ_DEVICE_INLINE int in_at(int i, int j)
{
    constexpr int run = 16 / sizeof(T);
    return i * HQQ_LORA_TILE + (in_runs_along_i ? j ^ (i / run % 8 * 4) : j);
}

template <class T, int ranks, bool in_runs_along_i>
HQQ_DEVICE_INLINE void store_chunk(float *in, float *right, const lora_ahead<T, ranks> &ahead,
                                   const hqq_lora_product &p, int64_t j0, int64_t i0)
{
    using tile = lora_tile<T, ranks>;
    const hqq_dropout dropout = hqq_dropout_if(p.drops, p.dropout);
#pragma unroll
    for (int l = 0; l < tile::in_loads; l++) {
        int row, column;
        in_place<T, in_runs_along_i>(row, column, l);
        float values[tile::run];
        unpack_in<T>(values, ahead.in[l]);
        if (p.drops) {
            int64_t m = in_runs_along_i ? j0 + row : i0 + row;
            int64_t k = in_runs_along_i ? i0 + column : j0 + column;
            hqq_drop_run(values, dropout, static_cast<uint64_t>(m * p.in_width + k));
        }
        if (in_runs_along_i) {
#pragma unroll
            for (int e = 0; e < tile::run; e++) in[in_at<T, true>(column + e, row)] = values[e];
        } else {
            hqq_store_run(in + in_at<T, false>(row, column), values);
        }
    }
#pragma unroll
    for (int l = 0; l < tile::right_loads; l++) {
        int v = threadIdx.x + l * LORA_THREADS;
        float values[4];
        unpack_right(values, ahead.right[l], p.right_dtype);
        if (v >= tile::right_items) continue;
        if (p.right_runs_along_i) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                right[(v / ranks * 4 + e) * ranks + v % ranks] = values[e];
        } else {
            hqq_store_run(right + v * 4, values);
        }
    }
}

/* sums [8 j][4 r] += the chunk's products, of this warp's j and i. */
template <class T, int ranks, bool in_runs_along_i>
HQQ_DEVICE_INLINE void multiply_chunk(float (&sums)[8][4], const float *in, const float *right)
{
    using tile = lora_tile<T, ranks>;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int j = warp % tile::j_warps * tile::warp_j + lane / tile::rank_lanes * 4;
    int r = lane % tile::rank_lanes * 4;
    int first = warp / tile::j_warps * tile::warp_i;
#pragma unroll 1
    for (int i = first; i < first + tile::warp_i; i += tile::unrolled) {
#pragma unroll
        for (int step = 0; step < tile::unrolled; step += tile::same_row) {
            /* one address for rows that are swizzled alike */
            const float *low = in + in_at<T, in_runs_along_i>(i + step, j);
            const float *high = in + in_at<T, in_runs_along_i>(i + step, j + tile::warp_j / 2);
#pragma unroll
            for (int row = 0; row < tile::same_row; row++) {
                float a[4], b[4], c[4];
                hqq_load_run(a, low + row * HQQ_LORA_TILE);
                hqq_load_run(b, high + row * HQQ_LORA_TILE);
                hqq_load_run(c, right + (i + step + row) * ranks + r);
#pragma unroll
                for (int u = 0; u < 4; u++)
#pragma unroll
                    for (int v = 0; v < 4; v++) {
                        sums[u][v] += a[u] * c[v];
                        sums[4 + u][v] += b[u] * c[v];
                    }
            }
        }
    }
}

/* The sum of the warps' sums, in `shared` as [64 j][row]. */
template <class T, int ranks>
HQQ_DEVICE_INLINE void add_warps(float *shared, float (&sums)[8][4])
{
    using tile = lora_tile<T, ranks>;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int j_warp = warp % tile::j_warps, i_warp = warp / tile::j_warps;
#pragma unroll
    for (int half = tile::i_warps / 2; half > 0; half /= 2) {
        __syncthreads();
        float *slot =
            shared + ((i_warp % half) * tile::j_warps + j_warp) * LORA_WARP_OUTPUTS + lane;
        if (i_warp >= half && i_warp < 2 * half)
#pragma unroll
            for (int e = 0; e < 32; e++) slot[e * 32] = sums[e / 4][e % 4];
        __syncthreads();
        if (i_warp < half)
#pragma unroll
            for (int e = 0; e < 32; e++) sums[e / 4][e % 4] += slot[e * 32];
    }
    __syncthreads();
    if (i_warp == 0)
#pragma unroll
        for (int e = 0; e < 32; e++) {
            int j = j_warp * tile::warp_j + lane / tile::rank_lanes * 4 + e / 4 % 4 +
                    e / 16 * (tile::warp_j / 2);
            shared[j * tile::row + lane % tile::rank_lanes * 4 + e % 4] = sums[e / 4][e % 4];
        }
    __syncthreads();
}

template <class T, int ranks, bool in_runs_along_i>
static __global__ void __launch_bounds__(LORA_THREADS, 2) lora_product(const hqq_lora_product p)
{
    using tile = lora_tile<T, ranks>;
    constexpr int fours = (tile::floats + 3) / 4; /* float4: its alignment is what loads need */
    HQQ_SHARED(float4[fours], shared_fours);
    float *shared = &shared_fours[0].x;
    float *in = shared, *right = shared + tile::in_floats;
    int64_t j0 = static_cast<int64_t>(blockIdx.x) * HQQ_LORA_TILE;
    int64_t r0 = static_cast<int64_t>(blockIdx.z) * ranks;
    int64_t i0 = blockIdx.y * p.part_length;
    int64_t i_end = i0 + p.part_length < p.I ? i0 + p.part_length : p.I;

    lora_ahead<T, ranks> ahead;
    float sums[8][4] = {};
    if (i0 < i_end) load_ahead<T, ranks, in_runs_along_i>(ahead, p, j0, r0, i0, i_end);
    for (; i0 < i_end; i0 += tile::chunk) {
        __syncthreads();
        store_chunk<T, ranks, in_runs_along_i>(in, right, ahead, p, j0, i0);
        __syncthreads();
        if (i0 + tile::chunk < i_end)
            load_ahead<T, ranks, in_runs_along_i>(ahead, p, j0, r0, i0 + tile::chunk, i_end);
        multiply_chunk<T, ranks, in_runs_along_i>(sums, in, right);
    }
    add_warps<T, ranks>(shared, sums);
    write_sums<ranks>(shared, tile::row, p, j0, r0);
}

/* ---- host -------------------------------------------------------------------------- */

template <class T, bool in_runs_along_i>
static hqq_status launch_product(const hqq_lora_product *p, dim3 grid, void *stream)
{
    dim3 block(LORA_THREADS);
    switch (hqq_lora_tile_ranks(p->R)) {
    case 16:
        return hqq_launch(lora_product<T, 16, in_runs_along_i>, grid, block, 0, stream, *p);
    case 32:
        return hqq_launch(lora_product<T, 32, in_runs_along_i>, grid, block, 0, stream, *p);
    default:
        return hqq_launch(lora_product<T, 64, in_runs_along_i>, grid, block, 0, stream, *p);
    }
}

/* bf16: on tensor cores. */
template <int planes, bool in_runs_along_i>
static hqq_status launch_mma(const hqq_lora_product *p, dim3 grid, void *stream)
{
    dim3 block(LORA_THREADS);
    switch (hqq_lora_tile_ranks(p->R)) {
    case 16:
        return hqq_launch(lora_mma<16, in_runs_along_i, planes>, grid, block, 0, stream, *p);
    case 32:
        return hqq_launch(lora_mma<32, in_runs_along_i, planes>, grid, block, 0, stream, *p);
    default:
        return hqq_launch(lora_mma<64, in_runs_along_i, planes>, grid, block, 0, stream, *p);
    }
}

template <bool in_runs_along_i>
static hqq_status launch_bf16(const hqq_lora_product *p, dim3 grid, void *stream)
{
    return p->right_dtype == HQQ_BF16 ? launch_mma<1, in_runs_along_i>(p, grid, stream)
                                      : launch_mma<3, in_runs_along_i>(p, grid, stream);
}

static int right_runs_aligned(const hqq_lora_product *p)
{
    int64_t bytes = hqq_dtype_bytes(p->right_dtype);
    int64_t stride = p->right_runs_along_i ? p->right_r_stride : p->right_i_stride;
    return reinterpret_cast<uintptr_t>(p->right) % (4 * bytes) == 0 && stride % 4 == 0;
}

template <bool in_runs_along_i>
static hqq_status run_product(hqq_lora_product *p, hqq_dtype dtype, void *workspace,
                              const hqq_cuda_device *device, void *stream)
{
    if (p->J == 0 || p->R == 0) return HQQ_OK;
    int ranks = hqq_lora_tile_ranks(p->R);
    int64_t parts = hqq_lora_parts(&p->part_length, p->I, p->J, p->R, device);
    p->parts = parts > 1 ? static_cast<float *>(workspace) : NULL;
    p->in_aligned = hqq_rows_aligned(p->in, p->ld_in, hqq_dtype_bytes(dtype));
    p->right_aligned = right_runs_aligned(p);
    dim3 grid(static_cast<unsigned>((p->J + HQQ_LORA_TILE - 1) / HQQ_LORA_TILE),
              static_cast<unsigned>(parts), static_cast<unsigned>((p->R + ranks - 1) / ranks));
    hqq_status status =
        dtype == HQQ_F16    ? launch_product<__half, in_runs_along_i>(p, grid, stream)
        : dtype == HQQ_BF16 ? launch_bf16<in_runs_along_i>(p, grid, stream)
                            : launch_product<float, in_runs_along_i>(p, grid, stream);
    if (status != HQQ_OK || parts == 1) return status;
    return hqq_lora_add_parts(p, parts, stream);
}

#endif

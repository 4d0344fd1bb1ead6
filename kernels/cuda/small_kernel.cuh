/*
 * The small-M kernel: out = in W^T (+ addend) or in W (+ addend), straight from the packed
 * codes. small_layout.cuh draws the layout.
 *
 *     block   WARPS warps, 8 MT tokens: 2^unit_bits units of 64 outputs side by side, and each
 *             of them `ways` times, for another part of the reduction
 *     grid    x: tiles of tokens, so that blocks that read the same codes run together
 *             y: splits of the reduction        z: 2^unit_bits units each
 *
 *                        chunks of the reduction  ->
 *                 split 0                split 1
 *                 way 0 | way 1          way 0 | way 1
 *     unit 0     [warp 0| warp 2]       [warp 0| warp 2]      unit_bits 1, ways 2
 *     unit 1     [warp 1| warp 3]       [warp 1| warp 3]
 *
 * The codes of a warp's unit stream through its own ring of STAGES in shared memory: each lane
 * waits for its own copies and a __syncwarp shares them, so warps run freely. The block's
 * barriers are around a new panel of tokens, every PANEL chunks; each way has its own panel.
 * At the end the ways' sums meet in shared memory, and the splits' in the workspace; of a pair
 * of splits, that is a cluster, in each other's shared memory first.
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_KERNEL_CUH
#define HQQ_KERNELS_CUDA_SMALL_KERNEL_CUH

#include "small_finish.cuh"
#include "small_multiply.cuh"
#include "small_pair.cuh"
#include "small_stage.cuh"

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::MIN_BLOCKS)
    hqq_small_kernel(const hqq_small_arguments a)
{
    unsigned char *shared = hqq_dynamic_shared<unsigned char>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int way = warp >> a.unit_bits, in_way = warp & ((1 << a.unit_bits) - 1);
    const int unit = (blockIdx.z << a.unit_bits) + in_way;
    const int first_token = blockIdx.x * C::TOKENS;
    const int split_end = min((int)(blockIdx.y + 1) * a.chunks_per_split, a.chunks);
    const int begin =
        min((int)blockIdx.y * a.chunks_per_split + way * a.chunks_per_way, split_end);
    const int end = min(begin + a.chunks_per_way, split_end);
    /* a warp beyond the last unit or chunk only helps with the tokens */
    const bool works = unit < a.units && begin < end;

    unsigned char *ring = shared + C::CODES_AT + warp * (C::STAGES * C::STAGE_BYTES);
    unsigned char *metas = shared + C::META_AT + warp * (C::METAS * C::META_BYTES);
    unsigned short *panel =
        reinterpret_cast<unsigned short *>(shared + C::WAYS_AT + way * C::WAY_BYTES);
    float *sums =
        reinterpret_cast<float *>(reinterpret_cast<unsigned char *>(panel) + C::SUMS_IN_WAY);

    float acc[4][C::MT][4] = {};
    hqq_small_code_cursor codes = hqq_small_code_cursor_at<C>(a, works ? unit : 0, begin, lane);
    hqq_small_meta_cursor meta = hqq_small_meta_cursor_at<C>(a, works ? unit : 0, begin, lane);
    hqq_small_meta_batch<C> batch = {};
    if (works) {
#pragma unroll
        for (int s = 0; s < C::STAGES - 1; s++) {
            if (begin + s < end)
                hqq_small_copy_codes<C>(ring + s * C::STAGE_BYTES, &codes, a, lane);
            ptx_cp_async_commit();
        }
        if (!C::META_BATCHES)
            hqq_small_load_meta<C>(&meta, a);
        else if (C::META_AHEAD && a.meta_aligned)
            hqq_small_load_batch<C>(&batch, meta, a, begin);
    }

    hqq_small_clear_tokens<C>(panel, a, first_token, in_way, lane);
    int stage = 0;                                                  /* of chunk c in the ring */
    for (int done = 0; done < a.chunks_per_way; done += C::PANEL) { /* the block's ways alike */
        const int first = begin + done, count = min(C::PANEL, end - first);
        __syncthreads(); /* all warps are done with the panel before */
        hqq_small_stage_tokens<C>(panel, a, first_token, first, count, in_way, lane);
        __syncthreads();
        if (C::INSIDE) {
            hqq_small_sum_tokens<C>(sums, panel, count, 32 * in_way + lane, 32 << a.unit_bits);
            __syncthreads();
        }
        if (!works || count <= 0) continue;
        if (C::META_BATCHES && done % C::METAS == 0) {
            if (!a.meta_aligned) {
                hqq_small_fetch_batch<C>(metas, meta, a, first, min(C::METAS, end - first),
                                         lane);
            } else {
                if (C::META_AHEAD) hqq_small_store_batch<C>(metas, batch, lane);
#pragma unroll 1
                for (int i = 0; !C::META_AHEAD && i < C::METAS; i += 4 * C::META_FOURS) {
                    hqq_small_meta_batch<C> now = {};
                    hqq_small_load_batch<C>(&now, meta, a, first + i);
                    hqq_small_store_batch<C>(metas + i * C::META_BYTES, now, lane);
                }
                if (C::META_AHEAD && first + C::METAS < end)
                    hqq_small_load_batch<C>(&batch, meta, a, first + C::METAS);
            }
        }
        for (int c = first; c < first + count; c++) {
            unsigned char *current_meta = metas + (c - begin) % C::METAS * C::META_BYTES;
            ptx_cp_async_wait<C::STAGES - 2>();
            if (!C::META_BATCHES) hqq_small_store_meta(current_meta, meta, lane);
            __syncwarp(); /* c's codes and meta are there; no lane is still in chunk c - 1 */
            int free_stage = stage == 0 ? C::STAGES - 1 : stage - 1;
            if (c + C::STAGES - 1 < end)
                hqq_small_copy_codes<C>(ring + free_stage * C::STAGE_BYTES, &codes, a, lane);
            ptx_cp_async_commit();
            if (!C::META_BATCHES && c + 1 < end) hqq_small_load_meta<C>(&meta, a);

            const unsigned char *current = ring + stage * C::STAGE_BYTES;
            const unsigned short *tokens = panel + HQQ_CHUNK * (c - first);
            if constexpr (C::INSIDE)
                hqq_small_multiply_inside<C>(acc, tokens, current, current_meta,
                                             sums + (c - first) * C::TOKENS, lane);
            else
                hqq_small_multiply_scaled<C>(acc, tokens, current, current_meta, lane);
            stage = stage == C::STAGES - 1 ? 0 : stage + 1;
        }
    }
    ptx_cp_async_wait<0>();

    if (a.ways > 1) hqq_small_join_ways<C>(a, acc, reinterpret_cast<float *>(shared), way);
    int first = 0, tiles = way == 0 ? C::MT : 0; /* of 8 tokens, that this warp finishes */
#ifdef PTX_CLUSTERS
    if constexpr (C::PAIRS)
        if (a.paired) {
            hqq_small_meet<C>(a, acc, shared, way);
            if (hqq_small_gather_pairs<C>(a, acc, way, &first, &tiles))
                hqq_small_finish<C>(a, acc, unit, first_token + 8 * first, tiles, lane);
            ptx_cluster_wait(); /* at which it has arrived */
            return;
        }
#endif
    if (gridDim.y > 1) {
        if (way == 0) hqq_small_leave<C, C::MT>(a, acc);
        if (!hqq_small_is_last(a, 1)) return;
        hqq_small_gather<C>(a, acc, way, &first, &tiles);
    }
    hqq_small_finish<C>(a, acc, unit, first_token + 8 * first, tiles, lane);
}

#endif

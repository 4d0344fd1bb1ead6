/*
 * The small-M kernel: out = in W^T (+ addend) or in W (+ addend), straight from the packed
 * codes. small_layout.cuh draws the layout.
 *
 *     block   4 or 8 warps = units of 64 outputs, 8 MT tokens
 *     grid    x: tiles of tokens, so that blocks that read the same codes run together
 *             y: splits of the reduction        z: WARPS units each
 *
 * The codes of a warp's unit stream through its own ring of STAGES in shared memory: each lane
 * waits for its own copies and a __syncwarp shares them, so warps run freely. The block's
 * barriers are around a new panel of tokens, every PANEL chunks.
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_KERNEL_CUH
#define HQQ_KERNELS_CUDA_SMALL_KERNEL_CUH

#include "small_finish.cuh"
#include "small_multiply.cuh"
#include "small_stage.cuh"

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::MIN_BLOCKS)
    hqq_small_kernel(const hqq_small_arguments a)
{
    unsigned char *shared = hqq_dynamic_shared<unsigned char>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int unit = blockIdx.z * C::WARPS + warp, first_token = blockIdx.x * C::TOKENS;
    const int begin = blockIdx.y * a.chunks_per_split;
    const int end = min(begin + a.chunks_per_split, a.chunks);
    const bool works =
        unit < a.units; /* a warp beyond the last unit only helps with the tokens */

    unsigned char *ring = shared + C::CODES_AT + warp * (C::STAGES * C::STAGE_BYTES);
    unsigned char *metas = shared + C::META_AT + warp * (C::METAS * C::META_BYTES);
    unsigned short *panel = reinterpret_cast<unsigned short *>(shared + C::PANEL_AT);
    float *sums = reinterpret_cast<float *>(shared + C::SUMS_AT);

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

    int stage = 0; /* of chunk c in the ring */
    for (int first = begin; first < end; first += C::PANEL) {
        const int count = min(C::PANEL, end - first);
        __syncthreads(); /* all warps are done with the panel before */
        hqq_small_stage_tokens<C>(panel, a, first_token, first, count);
        __syncthreads();
        if (C::INSIDE) {
            hqq_small_sum_tokens<C>(sums, panel, count);
            __syncthreads();
        }
        if (!works) continue;
        if (C::META_BATCHES) {
            if (!a.meta_aligned) {
                hqq_small_fetch_batch<C>(metas, meta, a, first, count, lane);
            } else {
                if (!C::META_AHEAD) hqq_small_load_batch<C>(&batch, meta, a, first);
                hqq_small_store_batch<C>(metas, batch, lane);
                if (C::META_AHEAD && first + C::PANEL < end)
                    hqq_small_load_batch<C>(&batch, meta, a, first + C::PANEL);
            }
        }
        for (int c = first; c < first + count; c++) {
            unsigned char *current_meta = metas + (c - first) % C::METAS * C::META_BYTES;
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

    if (gridDim.y > 1) {
        hqq_small_leave<C>(a, acc);
        if (!hqq_small_is_last(a)) return;
        hqq_small_gather_parts<C>(a, acc);
    }
    hqq_small_finish<C>(a, acc, unit, first_token, lane);
}

#endif

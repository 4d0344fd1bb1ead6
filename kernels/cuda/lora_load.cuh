/*
 * What the skinny products of an adapter have in common (lora_product.cuh, lora_mma.cuh): a
 * chunk of `in` and of right on its way from memory, in registers; and the end of a sum.
 */
#ifndef HQQ_KERNELS_CUDA_LORA_LOAD_CUH
#define HQQ_KERNELS_CUDA_LORA_LOAD_CUH

#include "dropout.cuh"
#include "elements.cuh"
#include "lora_product.h"

enum { LORA_WARPS = 8, LORA_THREADS = 32 * LORA_WARPS };

/* What a thread loads of a chunk. */
template <class T, int ranks> struct lora_loads {
    static constexpr int run = 16 / sizeof(T);    /* elements in a 16-byte load */
    static constexpr int chunk = 128 / sizeof(T); /* i in a chunk */
    static constexpr int in_loads = HQQ_LORA_TILE * chunk / run / LORA_THREADS;
    static constexpr int right_items = chunk * ranks / 4; /* of four elements */
    static constexpr int right_loads = (right_items + LORA_THREADS - 1) / LORA_THREADS;
    static_assert(in_loads == 2, "8 KiB a chunk");
};

/* A chunk's elements on their way: as they lie in memory. */
template <class T, int ranks> struct lora_ahead {
    uint32_t in[lora_loads<T, ranks>::in_loads][4];
    uint32_t right[lora_loads<T, ranks>::right_loads][4];
};

/* Four words of elements of `bytes` bytes from `from`, the first `valid` of them; the others
 * are 0, and nothing behind is read. One load where memory is aligned and all are valid. */
template <int bytes, int words>
HQQ_DEVICE_INLINE void load_elements(uint32_t *raw, const void *from, int64_t valid,
                                     int aligned)
{
    constexpr int n = 4 * words / bytes;
    if (aligned && valid >= n) {
        uint32_t loaded[words];
        hqq_load_words(loaded, from);
#pragma unroll
        for (int i = 0; i < words; i++) raw[i] = loaded[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < words; i++) raw[i] = 0;
#pragma unroll
    for (int i = 0; i < n; i++) {
        if (i >= valid) continue;
        if (bytes == 4)
            raw[i] = static_cast<const uint32_t *>(from)[i];
        else
            raw[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t *>(from)[i])
                          << i % 2 * 16;
    }
}

/* Which run of `in` a thread's load l is: row and column of the chunk, as memory has them. */
template <class T, bool in_runs_along_i>
HQQ_DEVICE_INLINE void in_place(int &row, int &column, int l)
{
    constexpr int run = 16 / sizeof(T);
    constexpr int width = in_runs_along_i ? 128 / static_cast<int>(sizeof(T)) : HQQ_LORA_TILE;
    int v = threadIdx.x + l * LORA_THREADS;
    row = v / (width / run);
    column = v % (width / run) * run;
}

template <class T, int ranks, bool in_runs_along_i>
HQQ_DEVICE_INLINE void load_ahead(lora_ahead<T, ranks> &ahead, const hqq_lora_product &p,
                                  int64_t j0, int64_t r0, int64_t i0, int64_t i_end)
{
    using loads = lora_loads<T, ranks>;
    int64_t j_left = p.J - j0, i_left = i_end - i0, r_left = p.R - r0;
#pragma unroll
    for (int l = 0; l < loads::in_loads; l++) {
        int row, column;
        in_place<T, in_runs_along_i>(row, column, l);
        int64_t rows_left = in_runs_along_i ? j_left : i_left;
        int64_t columns_left = in_runs_along_i ? i_left : j_left;
        int64_t at = in_runs_along_i ? (j0 + row) * p.ld_in + i0 + column
                                     : (i0 + row) * p.ld_in + j0 + column;
        load_elements<sizeof(T), 4>(ahead.in[l], static_cast<const T *>(p.in) + at,
                                    row < rows_left ? columns_left - column : 0, p.in_aligned);
    }
#pragma unroll
    for (int l = 0; l < loads::right_loads; l++) {
        int v = threadIdx.x + l * LORA_THREADS;
        int i = p.right_runs_along_i ? v / ranks * 4 : v / (ranks / 4);
        int r = p.right_runs_along_i ? v % ranks : v % (ranks / 4) * 4;
        int64_t valid = p.right_runs_along_i ? (r < r_left ? i_left - i : 0)
                                             : (i < i_left ? r_left - r : 0);
        if (v >= loads::right_items) valid = 0;
        int64_t at = (i0 + i) * p.right_i_stride + (r0 + r) * p.right_r_stride;
        const void *from =
            static_cast<const char *>(p.right) + at * (p.right_dtype == HQQ_F32 ? 4 : 2);
        if (p.right_dtype == HQQ_F32)
            load_elements<4, 4>(ahead.right[l], from, valid, p.right_aligned);
        else
            load_elements<2, 2>(ahead.right[l], from, valid, p.right_aligned);
    }
}

HQQ_DEVICE_INLINE void unpack_right(float (&values)[4], const uint32_t (&raw)[4],
                                    hqq_dtype dtype)
{
    if (dtype == HQQ_F32) {
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = hqq_bit_cast<float>(raw[i]);
    } else if (dtype == HQQ_BF16) {
        hqq_split_word(values[0], values[1], raw[0], __nv_bfloat16());
        hqq_split_word(values[2], values[3], raw[1], __nv_bfloat16());
    } else {
        hqq_split_word(values[0], values[1], raw[0], __half());
        hqq_split_word(values[2], values[3], raw[1], __half());
    }
}

template <class T>
HQQ_DEVICE_INLINE void unpack_in(float (&values)[16 / sizeof(T)], const uint32_t (&raw)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(T) == 4)
            values[i] = hqq_bit_cast<float>(raw[i]);
        else
            hqq_split_word(values[2 * i], values[2 * i + 1], raw[i], T());
    }
}

/* The block's sums, in `shared` as [64 j][row], to where they belong. Lanes go along whichever
 * of j and r is contiguous in out. */
template <int ranks>
HQQ_DEVICE_INLINE void write_sums(const float *shared, int row, const hqq_lora_product &p,
                                  int64_t j0, int64_t r0)
{
    int64_t base = blockIdx.y * p.J * p.R;
    for (int v = threadIdx.x; v < HQQ_LORA_TILE * ranks; v += LORA_THREADS) {
        int j = p.out_r_stride == 1 ? v / ranks : v % HQQ_LORA_TILE;
        int r = p.out_r_stride == 1 ? v % ranks : v / HQQ_LORA_TILE;
        if (j0 + j >= p.J || r0 + r >= p.R) continue;
        int64_t at = (j0 + j) * p.out_j_stride + (r0 + r) * p.out_r_stride;
        float sum = shared[j * row + r];
        if (p.parts)
            p.parts[base + at] = sum;
        else
            hqq_store(p.out, p.out_dtype, at, sum * p.scaling);
    }
}

#endif

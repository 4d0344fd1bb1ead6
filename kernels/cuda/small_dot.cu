/*
 * Products of up to 8 rows in fp32 arithmetic, straight from the packed codes:
 *
 *     transpose 0   out [M,N] = in [M,K] W^T + addend     a warp: one byte row, P outputs
 *     transpose 1   out [M,K] = in [M,N] W + addend       a block: 32 columns
 *
 * with P = 8 / bits slots: byte (p, k) of [N/P, K] holds W[p + s N/P, k] in slot s.
 *
 *     transpose 0: lane l reads bytes 128 i + 4 l .. + 3 of its warp's row; shuffles add up
 *                  the 32 lanes
 *     transpose 1: lane l reads byte (p, 32 b + l); warp w of 32 takes p = w, w + 32, ...; the
 *                  warps' sums meet in shared memory, in the order of the warps
 *
 * A weight is decoded and scaled in fp32 once, (q - z) s, and used for all M tokens: about 5 +
 * M instructions a weight, so at 4 bits and M = 1 an H100 is predicted to spend as long on them
 * as on reading the codes (0.5 bytes a weight at 3 TB/s), and at M = 8 twice as long; dense
 * fp32 reads 8 times as much.
 */
#include "small_dot.h"

#include "cuda.cuh"
#include "elements.cuh"

namespace
{

enum { WARPS = 4, COLUMNS = 32, COLUMN_WARPS = 32 };

struct dot_arguments {
    const unsigned char *packed;
    const void *scale, *zero;
    hqq_dtype meta_dtype;
    int axis;
    int64_t N, K, per_slot; /* N/P */
    int64_t groups_per_row; /* axis 1: K/G */
    int64_t G;
    int64_t residues; /* axis 0: Q = N/G */
    const void *in;
    int64_t ld_in;
    int in_aligned; /* four elements of a row can be read at once */
    void *out;
    int M;
    hqq_addend addend;
};

template <int BITS> __device__ __forceinline__ float code_of(uint32_t byte, int slot)
{
    return (float)(byte >> (8 - BITS * (slot + 1)) & ((1u << BITS) - 1));
}

__device__ __forceinline__ int64_t group_of(const dot_arguments &a, int64_t n, int64_t k)
{
    return a.axis == 1 ? n * a.groups_per_row + k / a.G : n % a.residues * a.K + k;
}

/* ---- transpose 0 ------------------------------------------------------------------------ */

/* Four neighbours of a row of `in`. */
template <class X>
__device__ __forceinline__ void load_four(float (&x)[4], const dot_arguments &a, int m,
                                          int64_t k)
{
    struct alignas(4 * sizeof(X)) four {
        X value[4];
    };
    const X *from = static_cast<const X *>(a.in) + m * a.ld_in + k;
    if (a.in_aligned) {
        four all = *reinterpret_cast<const four *>(from);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = hqq_to_float(all.value[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = hqq_to_float(from[i]);
    }
}

/* Scale and zero of W[p + s N/P, k .. k + 3]. Axis 0: those of all slots, N/P being a multiple
 * of the residues. Axis 1: one for the four, G being a multiple of 4. */
__device__ __forceinline__ void load_meta(float (&scale)[4], float (&zero)[4],
                                          const dot_arguments &a, int64_t n, int64_t k)
{
    int64_t group = group_of(a, n, k);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        scale[i] = a.axis == 1 && i > 0 ? scale[0] : hqq_load(a.scale, a.meta_dtype, group + i);
        zero[i] = a.axis == 1 && i > 0 ? zero[0] : hqq_load(a.zero, a.meta_dtype, group + i);
    }
}

/* sum[s][m] += W[p + s N/P, k .. k + 3] . in[m, k .. k + 3] */
template <class X, int BITS>
__device__ __forceinline__ void dot_four(float (&sum)[8 / BITS][HQQ_DOT_TOKENS],
                                         const dot_arguments &a, uint32_t bytes, int64_t p,
                                         int64_t k)
{
    const int P = 8 / BITS;
    float w[P][4], scale[4], zero[4];
#pragma unroll
    for (int s = 0; s < P; s++) {
        if (s == 0 || a.axis == 1) load_meta(scale, zero, a, p + s * a.per_slot, k);
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[s][i] = (code_of<BITS>(bytes >> (8 * i) & 0xff, s) - zero[i]) * scale[i];
    }
#pragma unroll
    for (int m = 0; m < HQQ_DOT_TOKENS; m++) {
        if (m >= a.M) break;
        float x[4];
        load_four<X>(x, a, m, k);
#pragma unroll
        for (int s = 0; s < P; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[s][m] = __fmaf_rn(w[s][i], x[i], sum[s][m]);
    }
}

template <class X, int BITS>
__global__ void __launch_bounds__(32 * WARPS) dot_rows(const dot_arguments a)
{
    const int P = 8 / BITS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    HQQ_SHARED(float[WARPS][P][HQQ_DOT_TOKENS], totals);
    const int64_t p = (int64_t)blockIdx.x * WARPS + warp;
    if (p >= a.per_slot) return; /* a whole warp; there is no block barrier */
    float sum[P][HQQ_DOT_TOKENS] = {};
    for (int64_t k = 4 * lane; k < a.K; k += 128)
        dot_four<X, BITS>(
            sum, a, __ldg(reinterpret_cast<const uint32_t *>(a.packed + p * a.K + k)), p, k);
#pragma unroll
    for (int s = 0; s < P; s++)
#pragma unroll
        for (int m = 0; m < HQQ_DOT_TOKENS; m++) {
            float total = sum[s][m];
#pragma unroll
            for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
            if (lane == 0) totals[warp][s][m] = total;
        }
    __syncwarp();
    for (int i = lane; i < P * HQQ_DOT_TOKENS; i += 32) {
        int64_t m = i % HQQ_DOT_TOKENS, n = p + i / HQQ_DOT_TOKENS * a.per_slot;
        if (m < a.M)
            hqq_from_float(static_cast<X *>(a.out)[m * a.N + n],
                           totals[warp][i / HQQ_DOT_TOKENS][m] +
                               hqq_addend_at(&a.addend, m, n, a.N));
    }
}

/* ---- transpose 1 ------------------------------------------------------------------------ */

template <class X, int BITS>
__global__ void __launch_bounds__(32 * COLUMN_WARPS) dot_columns(const dot_arguments a)
{
    HQQ_SHARED(float[COLUMN_WARPS][HQQ_DOT_TOKENS][COLUMNS], parts);
    const int P = 8 / BITS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t k = (int64_t)blockIdx.x * COLUMNS + lane;
    float sum[HQQ_DOT_TOKENS] = {};
    if (k < a.K)
        for (int64_t p = warp; p < a.per_slot; p += COLUMN_WARPS) {
            uint32_t byte = __ldg(a.packed + p * a.K + k);
#pragma unroll
            for (int s = 0; s < P; s++) {
                int64_t n = p + s * a.per_slot, group = group_of(a, n, k);
                float w = (code_of<BITS>(byte, s) - hqq_load(a.zero, a.meta_dtype, group)) *
                          hqq_load(a.scale, a.meta_dtype, group);
#pragma unroll
                for (int m = 0; m < HQQ_DOT_TOKENS; m++) {
                    if (m >= a.M) break;
                    float dy = hqq_to_float(static_cast<const X *>(a.in)[m * a.ld_in + n]);
                    sum[m] = __fmaf_rn(w, dy, sum[m]);
                }
            }
        }
#pragma unroll
    for (int m = 0; m < HQQ_DOT_TOKENS; m++) parts[warp][m][lane] = sum[m];
    __syncthreads();
    if (warp < a.M && k < a.K) { /* warp m adds up token m */
        float total = 0.0f;
        for (int w = 0; w < COLUMN_WARPS; w++) total += parts[w][warp][lane];
        hqq_from_float(static_cast<X *>(a.out)[warp * a.K + k],
                       total + hqq_addend_at(&a.addend, warp, k, a.K));
    }
}

/* ---- launch ----------------------------------------------------------------------------- */

template <class X, int BITS>
hqq_status launch(const dot_arguments *a, int transpose, void *stream)
{
    if (transpose)
        return hqq_launch(dot_columns<X, BITS>,
                          dim3((unsigned)((a->K + COLUMNS - 1) / COLUMNS)),
                          dim3(32 * COLUMN_WARPS), 0, stream, *a);
    return hqq_launch(dot_rows<X, BITS>, dim3((unsigned)((a->per_slot + WARPS - 1) / WARPS)),
                      dim3(32 * WARPS), 0, stream, *a);
}

template <class X>
hqq_status launch_bits(const dot_arguments *a, int nbits, int transpose, void *stream)
{
    switch (nbits) {
    case 8: return launch<X, 8>(a, transpose, stream);
    case 4: return launch<X, 4>(a, transpose, stream);
    case 2: return launch<X, 2>(a, transpose, stream);
    case 1: return launch<X, 1>(a, transpose, stream);
    default: return hqq_fail(HQQ_UNSUPPORTED, "no dot-product kernel for %d bits", nbits);
    }
}

} // namespace

int hqq_small_dot_serves(const hqq_weight *w, int64_t M, int transpose)
{
    hqq_layout l =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    if (!hqq_rows_align(&l) || !hqq_groups_align(&l) || M > HQQ_DOT_TOKENS) return 0;
    if (l.N / l.per >= INT32_MAX || l.K >= INT32_MAX) return 0;
    return transpose ||
           (l.K % 16 == 0 && (l.axis == 0 || l.G % 4 == 0) && (uintptr_t)w->packed % 16 == 0);
}

hqq_status hqq_small_dot(void *out, const void *in, int64_t ld_in, const hqq_weight *w,
                         const hqq_addend *addend, int64_t M, hqq_dtype dtype, int transpose,
                         void *stream)
{
    dot_arguments a = {};
    a.packed = static_cast<const unsigned char *>(w->packed);
    a.scale = w->scale;
    a.zero = w->zero;
    a.meta_dtype = w->meta_dtype;
    a.axis = w->axis;
    a.N = w->out_features;
    a.K = w->in_features;
    a.per_slot = a.N / hqq_slots_per_word(w->nbits);
    a.groups_per_row = a.K / w->group_size;
    a.G = w->group_size;
    a.residues = a.N / w->group_size;
    a.in = in;
    a.ld_in = ld_in;
    a.in_aligned = (uintptr_t)in % (4 * hqq_dtype_bytes(dtype)) == 0 && ld_in % 4 == 0;
    a.out = out;
    a.M = (int)M;
    a.addend = *addend;
    switch (dtype) {
    case HQQ_BF16: return launch_bits<__nv_bfloat16>(&a, w->nbits, transpose, stream);
    case HQQ_F16: return launch_bits<__half>(&a, w->nbits, transpose, stream);
    default: return launch_bits<float>(&a, w->nbits, transpose, stream);
    }
}

/* The kernel of many tokens: see wide_layout.cuh. */
#ifndef HQQ_KERNELS_CUDA_WIDE_KERNEL_CUH
#define HQQ_KERNELS_CUDA_WIDE_KERNEL_CUH

#include "small_codes.cuh"
#include "wide_finish.cuh"
#include "wide_stage.cuh"

/* (q - z) s of two codes. */
template <class T>
HQQ_DEVICE_INLINE uint32_t hqq_wide_scaled(uint32_t codes, uint32_t zero, uint32_t scale)
{
    return hqq_pair_mul(hqq_pair_sub(codes, zero, T()), scale, T());
}

HQQ_DEVICE_INLINE uint32_t hqq_wide_twice(unsigned short bits)
{
    return __byte_perm(bits, 0, 0x1010);
}

/* Transpose 0: the A operand of tile f, step e, of the warp's codes at `rows` (its first
 * octet's row g). Two neighbouring bytes of a row are the codes of one a[i] for each of its
 * slots. */
template <class C>
HQQ_DEVICE_INLINE void hqq_wide_fragment_of_rows(uint32_t (&a)[4], const unsigned char *rows,
                                                 const hqq_wide_meta<C> &meta, int warp, int f,
                                                 int e, int t)
{
    typedef typename C::T T;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int half = 2 * f + i % 2;
        const unsigned char *at =
            rows + half / C::P * 8 * C::ROW_STRIDE + 16 * e + 8 * (i / 2) + 2 * t;
        uint32_t bytes = *reinterpret_cast<const unsigned short *>(at);
        bytes = __byte_perm(bytes, 0, 0x4140);       /* one in each half of the word */
        if (C::P == 8 && warp % 2 == 0) bytes >>= 4; /* the octet is another warp's, too */
        int slot = C::P == 8 ? half + 4 : half % C::P;
        uint32_t codes = hqq_code_pair<C::BITS>(bytes, slot, 0, T());
        a[i] = hqq_wide_scaled<T>(codes, hqq_wide_twice(meta.zero[half % C::METAS]),
                                  hqq_wide_twice(meta.scale[half % C::METAS]));
    }
}

/* Transpose 1: the words of columns 4g .. 4g + 3 in byte rows 2t and 2t + 1 of an octet. */
template <class C> struct hqq_wide_words {
    uint32_t even[C::OCTETS], odd[C::OCTETS];
};

template <class C>
HQQ_DEVICE_INLINE void hqq_wide_load_words(hqq_wide_words<C> *w, const unsigned char *columns)
{
#pragma unroll
    for (int o = 0; o < C::OCTETS; o++) {
        const unsigned char *at = columns + 8 * o * C::ROW_STRIDE;
        w->even[o] = *reinterpret_cast<const uint32_t *>(at);
        w->odd[o] = *reinterpret_cast<const uint32_t *>(at + C::ROW_STRIDE);
    }
}

/* The A operand of tile f, step e; meta: the lane's four times eight pairs of scales, and 128
 * bytes on of zeros. */
template <class C>
HQQ_DEVICE_INLINE void hqq_wide_fragment_of_columns(uint32_t (&a)[4],
                                                    const hqq_wide_words<C> &w,
                                                    const unsigned char *meta, int f, int e)
{
    typedef typename C::T T;
    uint2 scale = *reinterpret_cast<const uint2 *>(meta + 8 * e);
    uint2 zero = *reinterpret_cast<const uint2 *>(meta + 128 + 8 * e);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int half = 2 * e + i / 2, octet = half / C::P;
        uint32_t word = __byte_perm(w.even[octet], w.odd[octet], f ? 0x7632 : 0x5410);
        uint32_t codes = hqq_code_pair<C::BITS>(word, half % C::P, i % 2, T());
        a[i] = hqq_wide_scaled<T>(codes, i < 2 ? zero.x : zero.y, i < 2 ? scale.x : scale.y);
    }
}

/* What a thread copies, and where it has got to. */
template <class C> struct hqq_wide_source {
    hqq_wide_token_cursor tokens;
    hqq_wide_code_cursor codes;
    hqq_wide_meta_cursor<C> metas;
};

/* The next chunk of tokens and codes, on its way into its stage; nothing after the last.
 * `chunk` counts this block's. */
template <class C, bool aligned>
HQQ_DEVICE_INLINE void hqq_wide_stage(unsigned char *shared, hqq_wide_source<C> *source,
                                      int chunk, const hqq_wide_arguments &a,
                                      const hqq_wide_place &here)
{
    if (here.begin + chunk < here.end) {
        int stage = chunk % C::STAGES;
        hqq_wide_stage_tokens<C, aligned>(shared + stage * C::TOKEN_BYTES, &source->tokens);
        hqq_wide_stage_codes<C>(shared + C::CODES_AT + stage * C::CODE_BYTES, &source->codes,
                                a.K);
    }
    ptx_cp_async_commit();
}

/* A staged chunk: four steps of two products. The fragments of a step are decoded while the
 * products of the step before are under way; those of two steps before are done. */
template <class C>
HQQ_DEVICE_INLINE void
hqq_wide_multiply(float (&acc)[2][C::SUMS], uint32_t (&a)[2][2][4], const unsigned char *tokens,
                  const unsigned char *codes, const unsigned char *metas,
                  const hqq_wide_meta<C> &meta, const hqq_wide_place &here)
{
    hqq_wide_words<C> words;
    if (C::TRANSPOSE)
        hqq_wide_load_words<C>(&words, codes + 2 * here.t * C::ROW_STRIDE + 32 * here.warp +
                                           4 * here.g);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        ptx_warpgroup_wait<1>();
#pragma unroll
        for (int f = 0; f < 2; f++)
            if (C::TRANSPOSE)
                hqq_wide_fragment_of_columns<C>(
                    a[e % 2][f], words, metas + here.warp / 2 * 256 + 32 * here.t, f, e);
            else
                hqq_wide_fragment_of_rows<C>(
                    a[e % 2][f], codes + (4 * here.warp / C::P * 8 + here.g) * C::ROW_STRIDE,
                    meta, here.warp, f, e, here.t);
        ptx_warpgroup_begin();
        ptx_warpgroup_mma(acc[0], a[e % 2][0], tokens + 32 * e, typename C::T());
        ptx_warpgroup_mma(acc[1], a[e % 2][1], tokens + 32 * e, typename C::T());
        ptx_warpgroup_commit();
    }
}

/* While chunk c is multiplied, c + 1 has arrived or soon will, and c + 2 is on its way: into
 * the stage of c - 2, whose products each warp has waited for within c - 1. */
template <class C, bool aligned>
__global__ void __launch_bounds__(C::THREADS, C::MIN_BLOCKS)
    hqq_wide_kernel(const hqq_wide_arguments a)
{
    unsigned char *shared = hqq_dynamic_shared<unsigned char>();
    shared += (1024 - (reinterpret_cast<uintptr_t>(shared) & 1023)) & 1023;
    const hqq_wide_tile tile = hqq_wide_tile_of(a);
    const int thread = threadIdx.x, lane = thread % 32;
    const int begin = blockIdx.y * a.chunks_per_split;
    const hqq_wide_place here = {tile.token * C::TOKENS,
                                 hqq_wide_first<C>(tile.output),
                                 begin,
                                 min(begin + a.chunks_per_split, a.chunks),
                                 thread,
                                 thread / 32,
                                 lane / 4,
                                 lane % 4};
    hqq_wide_source<C> source = {hqq_wide_first_tokens<C>(a, here),
                                 hqq_wide_first_codes<C>(a, here),
                                 hqq_wide_first_meta<C>(a, here)};
    float acc[2][C::SUMS];
    uint32_t fragments[2][2][4];
#pragma unroll
    for (int i = 0; i < 2 * C::SUMS; i++) acc[i / C::SUMS][i % C::SUMS] = 0.0f;
    ptx_warpgroup_arrived(acc[0]); /* zeros, and no instruction later on that makes them so */
    ptx_warpgroup_arrived(acc[1]);
    ptx_warpgroup_begin();

    hqq_wide_meta<C> meta, next;
    hqq_wide_load_meta<C>(&next, &source.metas, a.groups_per_row, a.chunks_per_group);
    hqq_wide_stage<C, aligned>(shared, &source, 0, a, here);
    hqq_wide_stage<C, aligned>(shared, &source, 1, a, here);
    if (C::TRANSPOSE) hqq_wide_store_meta<C>(shared + C::META_AT, next, thread);
#pragma unroll 1
    for (int c = 0; c < here.end - here.begin; c++) {
        unsigned char *metas = shared + C::META_AT;
        meta = next;
        if (here.begin + c + 1 < here.end)
            hqq_wide_load_meta<C>(&next, &source.metas, a.groups_per_row, a.chunks_per_group);
        ptx_cp_async_wait<1>();
        ptx_warpgroup_publish();
        __syncthreads();
        hqq_wide_stage<C, aligned>(shared, &source, c + 2, a, here);
        hqq_wide_multiply<C>(acc, fragments, shared + c % C::STAGES * C::TOKEN_BYTES,
                             shared + C::CODES_AT + c % C::STAGES * C::CODE_BYTES,
                             metas + c % 2 * C::META_BYTES, meta, here);
        if (C::TRANSPOSE)
            hqq_wide_store_meta<C>(metas + (c + 1) % 2 * C::META_BYTES, next, thread);
    }
    ptx_cp_async_wait<0>();
    ptx_warpgroup_wait<0>();
    ptx_warpgroup_arrived(acc[0]);
    ptx_warpgroup_arrived(acc[1]);
    /* from the same offset on in all blocks of a cluster */
    float *sums = hqq_dynamic_shared<float>();
#ifdef PTX_CLUSTERS
    if constexpr ((int)C::TOKENS == HQQ_WIDE_FEW)
        if (a.cluster) {
            hqq_wide_meet<C>(sums, a, acc, here.first_token, here.first, thread);
            return;
        }
#endif
    hqq_wide_finish<C>(sums, a, acc, here.first_token, here.first, thread);
}

#endif

/* One chunk of one unit on the tensor cores: 16 MT mma for 64 x 64 codes (see
 * small_layout.cuh). */
#ifndef HQQ_KERNELS_CUDA_SMALL_MULTIPLY_CUH
#define HQQ_KERNELS_CUDA_SMALL_MULTIPLY_CUH

#include "small_codes.cuh"
#include "small_layout.cuh"

/* A tile's words, whichever half of the layout's drawing applies:
 *   transpose 0   word[h][e]: bytes 4e .. 4e+3 of this lane's 16, of the octet of half 2f + h
 *   transpose 1   word[0][o]: columns 2f, 2f+1 of byte rows 2t (bytes 0, 1) and 2t+1 (2, 3) of
 *                 octet o */
template <class C> struct hqq_small_words {
    uint32_t word[2][C::TRANSPOSE ? C::OCTETS : 4];
};

template <class C>
HQQ_DEVICE_INLINE hqq_small_words<C> hqq_small_load_words(const unsigned char *stage, int f,
                                                          int lane)
{
    hqq_small_words<C> w;
    if (!C::TRANSPOSE) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int octet = (2 * f + h) / C::P;
            uint4 x = *reinterpret_cast<const uint4 *>(stage + 512 * octet + 16 * lane);
            w.word[h][0] = x.x;
            w.word[h][1] = x.y;
            w.word[h][2] = x.z;
            w.word[h][3] = x.w;
        }
        return w;
    }
    int g = lane / 4, t = lane % 4;
    const unsigned char *at = stage + hqq_small_piece_at<C>(2 * t, g / 2) + g % 2 * 8;
#pragma unroll
    for (int o = 0; o < C::OCTETS; o++) {
        uint2 even = *reinterpret_cast<const uint2 *>(at + 512 * o);
        uint2 odd = *reinterpret_cast<const uint2 *>(at + 512 * o + 256);
        w.word[0][o] = __byte_perm(f < 2 ? even.x : even.y, f < 2 ? odd.x : odd.y,
                                   f % 2 ? 0x7632 : 0x5410);
    }
    return w;
}

/* The A operand of tile f, step e: raw codes. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_fragment(uint32_t (&a)[4], const hqq_small_words<C> &w, int f,
                                          int e)
{
    typename C::T type = typename C::T();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int half = C::TRANSPOSE ? 2 * e + i / 2 : 2 * f + i % 2;
        int odd = C::TRANSPOSE ? i % 2 : i / 2;
        uint32_t word = C::TRANSPOSE ? w.word[0][half / C::P] : w.word[i % 2][e];
        a[i] = hqq_code_pair<C::BITS>(word, half % C::P, odd, type);
    }
}

/* This lane's B operands of steps 2h, 2h+1: tokens 8 mt + g, positions 16 t + 8 h .. + 7 of the
 * chunk at `tokens`. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_load_tokens(uint32_t (&b)[2][2], const unsigned short *tokens,
                                             int mt, int h, int lane)
{
    uint4 x = *reinterpret_cast<const uint4 *>(tokens + (8 * mt + lane / 4) * C::PANEL_STRIDE +
                                               16 * (lane % 4) + 8 * h);
    b[0][0] = x.x;
    b[0][1] = x.y;
    b[1][0] = x.z;
    b[1][1] = x.w;
}

/* Eight 16-byte aligned values of T from shared memory. */
HQQ_DEVICE_INLINE void hqq_small_load_eight(uint32_t (&pairs)[4], const unsigned char *at)
{
    uint4 x = *reinterpret_cast<const uint4 *>(at);
    pairs[0] = x.x;
    pairs[1] = x.y;
    pairs[2] = x.z;
    pairs[3] = x.w;
}

/* acc[f][mt]: outputs of halves 2f (elements 0, 1) and 2f+1 (2, 3), row g; tokens 8 mt + 2t +
 * {0, 1}. INSIDE: acc += s (sum of x q - z sum of x), the sums over this chunk. */
template <class C>
HQQ_DEVICE_INLINE void
hqq_small_multiply_inside(float (&acc)[4][C::MT][4], const unsigned short *tokens,
                          const unsigned char *stage, const unsigned char *meta,
                          const float *sums, int lane)
{
    const uint32_t *pairs = reinterpret_cast<const uint32_t *>(meta + 16 * (lane / 4));
    uint32_t b[C::MT][2][2][2]; /* step e: [e / 2][e % 2] */
#pragma unroll
    for (int mt = 0; mt < C::MT; mt++)
#pragma unroll
        for (int h = 0; h < 2; h++) hqq_small_load_tokens<C>(b[mt][h], tokens, mt, h, lane);
#pragma unroll
    for (int f = 0; f < 4; f++) {
        hqq_small_words<C> words = hqq_small_load_words<C>(stage, f, lane);
        float2 s = hqq_pair_to_floats(pairs[f], typename C::T()); /* halves 2f, 2f+1 */
        float2 z = hqq_pair_to_floats(pairs[32 + f], typename C::T());
        uint32_t a[4][4];
#pragma unroll
        for (int e = 0; e < 4; e++) hqq_small_fragment<C>(a[e], words, f, e);
#pragma unroll
        for (int mt = 0; mt < C::MT; mt++) {
            float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int e = 0; e < 4; e++)
                ptx_mma(part, a[e], b[mt][e / 2][e % 2], typename C::T());
            float2 sum = *reinterpret_cast<const float2 *>(sums + 8 * mt + 2 * (lane % 4));
            float *d = acc[f][mt];
            d[0] = __fmaf_rn(s.x, __fmaf_rn(-z.x, sum.x, part[0]), d[0]);
            d[1] = __fmaf_rn(s.x, __fmaf_rn(-z.x, sum.y, part[1]), d[1]);
            d[2] = __fmaf_rn(s.y, __fmaf_rn(-z.y, sum.x, part[2]), d[2]);
            d[3] = __fmaf_rn(s.y, __fmaf_rn(-z.y, sum.y, part[3]), d[3]);
        }
    }
}

/* a = (a - z) s for one step's A operand. zeros and scales are those of the lane's positions of
 * steps 2h, 2h+1 in pairs; or, ALONG, of halves 2f and 2f+1, each twice. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_scale(uint32_t (&a)[4], const uint32_t *zeros,
                                       const uint32_t *scales)
{
    typename C::T type = typename C::T();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int pair = C::ALONG ? i % 2 : i / 2;
        a[i] = hqq_pair_mul(hqq_pair_sub(a[i], zeros[pair], type), scales[pair], type);
    }
}

/* SCALED */
template <class C>
HQQ_DEVICE_INLINE void
hqq_small_multiply_scaled(float (&acc)[4][C::MT][4], const unsigned short *tokens,
                          const unsigned char *stage, const unsigned char *meta, int lane)
{
    typename C::T type = typename C::T();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t b[C::MT][2][2], scales[4],
            zeros[4]; /* of steps 2h, 2h+1; ALONG: of the rows */
#pragma unroll
        for (int mt = 0; mt < C::MT; mt++) hqq_small_load_tokens<C>(b[mt], tokens, mt, h, lane);
        const unsigned char *mine =
            meta + (C::ALONG ? 16 * (lane / 4) : 32 * (lane % 4) + 16 * h);
        hqq_small_load_eight(scales, mine);
        hqq_small_load_eight(zeros, mine + 128);
#pragma unroll
        for (int f = 0; f < 4; f++) {
            hqq_small_words<C> words = hqq_small_load_words<C>(stage, f, lane);
            uint32_t z[2] = {__byte_perm(zeros[f], 0, 0x1010),
                             __byte_perm(zeros[f], 0, 0x3232)};
            uint32_t s[2] = {__byte_perm(scales[f], 0, 0x1010),
                             __byte_perm(scales[f], 0, 0x3232)};
#pragma unroll
            for (int step = 0; step < 2; step++) {
                uint32_t a[4];
                hqq_small_fragment<C>(a, words, f, 2 * h + step);
                hqq_small_scale<C>(a, C::ALONG ? z : zeros + 2 * step,
                                   C::ALONG ? s : scales + 2 * step);
#pragma unroll
                for (int mt = 0; mt < C::MT; mt++) ptx_mma(acc[f][mt], a, b[mt][step], type);
            }
        }
    }
}

#endif

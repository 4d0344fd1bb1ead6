/*
 * Bringing a chunk's three parts to where the multiplication finds them (see small_layout.cuh):
 *   codes    16 bytes a lane and octet by cp.async into the warp's own ring; no block barrier
 *   meta     64 scales and zeros: two of each a lane, a chunk ahead through registers; eight
 *            chunks' at once where a row's lie side by side (META_BATCHES)
 *   tokens   a panel of chunks for the warps of a way, in the order of the fragments
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_STAGE_CUH
#define HQQ_KERNELS_CUDA_SMALL_STAGE_CUH

#include "small_codes.cuh"
#include "small_layout.cuh"

/* ---- codes ------------------------------------------------------------------------------ */

/* Walks over a lane's 16 bytes of octet 0 of one chunk after the other. */
struct hqq_small_code_cursor {
    const unsigned char *from;
    int octet_bytes; /* from octet to octet */
    int left;        /* axis 1: byte rows from this lane's to the last */
    int residue;     /* axis 0, transpose 1 */
};

template <class C>
HQQ_DEVICE_INLINE hqq_small_code_cursor hqq_small_code_cursor_at(const hqq_small_arguments &a,
                                                                 int unit, int chunk, int lane)
{
    hqq_small_rows rows = hqq_small_rows_of<C>(a, C::TRANSPOSE ? chunk : unit);
    int column = C::TRANSPOSE ? HQQ_UNIT * unit : HQQ_CHUNK * chunk;
    int64_t row = rows.first + (int64_t)(lane / 4) * rows.step;
    hqq_small_code_cursor cursor;
    cursor.from = a.packed + row * a.K + column + 16 * (lane % 4);
    cursor.octet_bytes = 8 * rows.step * a.K;
    cursor.left = (int)(a.N / C::P - row);
    cursor.residue = C::AXIS == 0 ? chunk % a.residues : 0;
    return cursor;
}

/* Starts the copies of the cursor's chunk into `stage` (512 * bits bytes), and moves on. Byte
 * rows that do not exist become zeros. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_copy_codes(unsigned char *stage, hqq_small_code_cursor *cursor,
                                            const hqq_small_arguments &a, int lane)
{
    stage += hqq_small_piece_at<C>(lane / 4, lane % 4);
#pragma unroll
    for (int o = 0; o < C::OCTETS; o++) {
        bool exists = C::AXIS == 0 || 8 * o < cursor->left;
        ptx_cp_async_16(stage + 512 * o,
                        exists ? cursor->from + (int64_t)o * cursor->octet_bytes : a.packed,
                        exists);
    }
    if (!C::TRANSPOSE) {
        cursor->from += HQQ_CHUNK;
    } else if (C::AXIS == 1) {
        cursor->from += (int64_t)C::ROWS * a.K;
        cursor->left -= C::ROWS;
    } else {
        cursor->from += a.K;
        if (++cursor->residue == a.residues) {
            cursor->residue = 0;
            cursor->from += (int64_t)(C::ROWS - 1) * a.residues * a.K;
        }
    }
}

/* ---- scale and zero --------------------------------------------------------------------- */

/* Entry i of a chunk's 64 scales (and zeros) is at index base(i) + step(chunk) of the array.
 *   ALONG: i = 8 g + half, of the output; else: i = position in the chunk */
template <class C>
HQQ_DEVICE_INLINE int hqq_small_meta_base(const hqq_small_arguments &a, int unit, int i)
{
    if (C::ALONG) {
        if (C::TRANSPOSE) return HQQ_UNIT * unit + i; /* + r K */
        int n = hqq_small_output<C>(a, unit, i / 8, i % 8);
        return n < 0 ? 0 : n * a.groups_per_row; /* + k / G */
    }
    int t = i / 16, e = i / 4 % 4, j = i % 4;
    if (!C::TRANSPOSE) /* r K + k */
        return unit % a.residues * a.K + 16 * t + 4 * e + (j % 2 * 2 + j / 2);
    int half = 2 * e + j / 2;
    int n = half / C::P * 8 + 2 * t + j % 2 + half % C::P * (a.N / C::P);
    return n * a.groups_per_row + unit / a.chunks_per_group;
}

/* Entries 2 lane and 2 lane + 1 of one chunk after the other, on their way through registers.
 */
struct hqq_small_meta_cursor {
    int base[2];
    int step;
    int phase;   /* ALONG, transpose 1: residue */
    int left[2]; /* not ALONG, transpose 1: byte rows from this entry's to the last */
    uint32_t scale, zero;
};

template <class C>
HQQ_DEVICE_INLINE hqq_small_meta_cursor hqq_small_meta_cursor_at(const hqq_small_arguments &a,
                                                                 int unit, int chunk, int lane)
{
    hqq_small_meta_cursor m;
    for (int b = 0; b < 2; b++) {
        int i = 2 * lane + b;
        int row = (2 * (i / 4 % 4) + i % 4 / 2) / C::P * 8 + i / 16 * 2 + i % 2;
        m.base[b] = hqq_small_meta_base<C>(a, unit, i);
        m.left[b] = a.N / C::P - row - chunk * C::ROWS;
    }
    m.scale = m.zero = 0;
    m.phase = 0;
    if (!C::ALONG) {
        m.step = C::TRANSPOSE ? chunk * C::ROWS * a.groups_per_row : chunk * HQQ_CHUNK;
    } else if (C::TRANSPOSE) {
        m.phase = chunk % a.residues;
        m.step = m.phase * a.K;
    } else {
        m.step = 0; /* batches know their chunks */
    }
    return m;
}

/* Loads the cursor's chunk, and moves on. Not for META_BATCHES. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_load_meta(hqq_small_meta_cursor *m,
                                           const hqq_small_arguments &a)
{
    const unsigned short *scale = static_cast<const unsigned short *>(a.scale);
    const unsigned short *zero = static_cast<const unsigned short *>(a.zero);
    uint32_t s[2], z[2];
#pragma unroll
    for (int b = 0; b < 2; b++) {
        bool exists = C::ALONG || !C::TRANSPOSE || m->left[b] > 0;
        s[b] = exists ? __ldg(scale + (m->base[b] + m->step)) : 0;
        z[b] = exists ? __ldg(zero + (m->base[b] + m->step)) : 0;
    }
    m->scale = s[0] | s[1] << 16;
    m->zero = z[0] | z[1] << 16;
    if (!C::ALONG) {
        m->step += C::TRANSPOSE ? C::ROWS * a.groups_per_row : HQQ_CHUNK;
        m->left[0] -= C::ROWS;
        m->left[1] -= C::ROWS;
    } else if (C::TRANSPOSE) {
        m->step += a.K;
        if (++m->phase == a.residues) m->phase = 0, m->step = 0;
    }
}

/* META_BATCHES: the lane's two entries of 4 META_FOURS chunks, four in each uint2. */
template <class C> struct hqq_small_meta_batch {
    uint2 scale[2][C::META_FOURS], zero[2][C::META_FOURS];
};

template <class C>
HQQ_DEVICE_INLINE void hqq_small_load_batch(hqq_small_meta_batch<C> *batch,
                                            const hqq_small_meta_cursor &m,
                                            const hqq_small_arguments &a, int chunk)
{
    const unsigned short *scale = static_cast<const unsigned short *>(a.scale);
    const unsigned short *zero = static_cast<const unsigned short *>(a.zero);
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
        for (int i = 0; i < C::META_FOURS; i++) {
            if (chunk + 4 * i >= a.chunks) break;
            int at = m.base[b] + chunk + 4 * i;
            batch->scale[b][i] = __ldg(reinterpret_cast<const uint2 *>(scale + at));
            batch->zero[b][i] = __ldg(reinterpret_cast<const uint2 *>(zero + at));
        }
}

/* Stores four chunks' 16-bit entries of a and b as pairs, chunk by chunk. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_store_pairs(unsigned char *at, uint2 a, uint2 b)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        *reinterpret_cast<uint32_t *>(at + j * C::META_BYTES) =
            __byte_perm(j < 2 ? a.x : a.y, j < 2 ? b.x : b.y, j % 2 ? 0x7632 : 0x5410);
}

/* Chunk j of the batch at metas + j * META_BYTES, as hqq_small_store_meta has it. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_store_batch(unsigned char *metas,
                                             const hqq_small_meta_batch<C> &batch, int lane)
{
#pragma unroll
    for (int i = 0; i < C::META_FOURS; i++) {
        unsigned char *at = metas + 4 * i * C::META_BYTES + 4 * lane;
        hqq_small_store_pairs<C>(at, batch.scale[0][i], batch.scale[1][i]);
        hqq_small_store_pairs<C>(at + 128, batch.zero[0][i], batch.zero[1][i]);
    }
}

/* The same where scales cannot be read four at a time: one by one, waiting for each. */
template <class C>
HQQ_DEVICE_INLINE void
hqq_small_fetch_batch(unsigned char *metas, const hqq_small_meta_cursor &m,
                      const hqq_small_arguments &a, int chunk, int count, int lane)
{
    const unsigned short *scale = static_cast<const unsigned short *>(a.scale);
    const unsigned short *zero = static_cast<const unsigned short *>(a.zero);
#pragma unroll 1
    for (int j = 0; j < count; j++) {
        uint32_t *meta = reinterpret_cast<uint32_t *>(metas + j * C::META_BYTES);
        int group = (chunk + j) / a.chunks_per_group;
        meta[lane] = __ldg(scale + (m.base[0] + group)) |
                     (uint32_t)__ldg(scale + (m.base[1] + group)) << 16;
        meta[32 + lane] = __ldg(zero + (m.base[0] + group)) |
                          (uint32_t)__ldg(zero + (m.base[1] + group)) << 16;
    }
}

HQQ_DEVICE_INLINE void hqq_small_store_meta(unsigned char *shared,
                                            const hqq_small_meta_cursor &meta, int lane)
{
    reinterpret_cast<uint32_t *>(shared)[lane] = meta.scale;
    reinterpret_cast<uint32_t *>(shared + 128)[lane] = meta.zero;
}

/* ---- tokens -----------------------------------------------------------------------------
 *
 * panel[token][position], position of small_layout.cuh's drawing. The warps of a way take some
 * tokens each at a time, with all of their chunks. */

/* What lies at position `at` of chunk c: its index in a row of `in`, or -1. */
template <class C>
HQQ_DEVICE_INLINE int hqq_small_index_at(const hqq_small_arguments &a, int c, int at)
{
    int t = at / 16, e = at / 4 % 4, j = at % 4;
    if (!C::TRANSPOSE) return HQQ_CHUNK * c + 16 * t + 4 * e + (j % 2 * 2 + j / 2);
    hqq_small_rows rows = hqq_small_rows_of<C>(a, c);
    int half = 2 * e + j / 2, per_slot = a.N / C::P;
    int64_t row = rows.first + (int64_t)(half / C::P * 8 + 2 * t + j % 2) * rows.step;
    return row < per_slot ? (int)row + half % C::P * per_slot : -1;
}

/* Any alignment, any chunks. */
template <class C>
HQQ_DEVICE_INLINE void
hqq_small_stage_one_by_one(unsigned short *to, const hqq_small_arguments &a,
                           const unsigned short *row, int chunk, int count, int lane)
{
#pragma unroll 1
    for (int i = lane; i < HQQ_CHUNK * count; i += 32) {
        int from = hqq_small_index_at<C>(a, chunk + i / HQQ_CHUNK, i % HQQ_CHUNK);
        to[i] = from < 0 ? 0 : __ldg(row + from);
    }
}

/* These stage a whole panel, of which the chunks from `count` on may be anything.
 * Transpose 0: eight neighbours k a lane are eight positions, in their order of fours. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_stage_along_k(unsigned short *to, const unsigned short *row,
                                               int count, int lane)
{
#pragma unroll
    for (int i = 0; i < C::PANEL / 4; i++) {
        int piece = lane + 32 * i;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (piece < 8 * count) x = __ldg(reinterpret_cast<const uint4 *>(row) + piece);
        reinterpret_cast<uint4 *>(to)[piece] =
            make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632),
                       __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632));
    }
}

/* Transpose 1: a lane's two positions 2 lane, 2 lane + 1 of a chunk are two byte rows of one
 * slot. Axis 1: neighbours, `left` before the slot's end, which `whole` panels do not reach. */
template <class C, bool whole>
HQQ_DEVICE_INLINE void hqq_small_stage_pairs(unsigned short *to, const unsigned short *row,
                                             int count, int left, int lane)
{
    uint32_t pairs[C::PANEL];
#pragma unroll
    for (int c = 0; c < C::PANEL; c++) {
        pairs[c] = 0;
        if (whole || (c < count && c * C::ROWS < left))
            pairs[c] = __ldg(reinterpret_cast<const uint32_t *>(row + c * C::ROWS));
    }
#pragma unroll
    for (int c = 0; c < C::PANEL; c++)
        reinterpret_cast<uint32_t *>(to + HQQ_CHUNK * c)[lane] = pairs[c];
}

/* Axis 0: a panel's chunks are residues side by side. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_stage_residues(unsigned short *to, const unsigned short *row,
                                                int residues, int lane)
{
#pragma unroll
    for (int four = 0; four < C::PANEL; four += 4) {
        uint2 even = __ldg(reinterpret_cast<const uint2 *>(row + four));
        uint2 odd = __ldg(reinterpret_cast<const uint2 *>(row + residues + four));
#pragma unroll
        for (int c = 0; c < 4; c++)
            reinterpret_cast<uint32_t *>(to + HQQ_CHUNK * (four + c))[lane] = __byte_perm(
                c < 2 ? even.x : even.y, c < 2 ? odd.x : odd.y, c % 2 ? 0x7632 : 0x5410);
    }
}

/* How a token's panel is staged: for the whole panel by one of the functions above. */
enum hqq_small_staging {
    HQQ_STAGE_ONE_BY_ONE,
    HQQ_STAGE_WHOLE_PAIRS,
    HQQ_STAGE_WIDE /* along k, pairs, residues */
};

/* The way's tokens, each warp's TOKENS_AT_ONCE at a time, so that their loads are on their way
 * together. Where those are not all there, the last one is staged again in their place. */
template <class C, int staging>
HQQ_DEVICE_INLINE void hqq_small_stage_all(unsigned short *panel, const hqq_small_arguments &a,
                                           int first_token, int chunk, int count, int in_way,
                                           int lane)
{
    const unsigned short *in = static_cast<const unsigned short *>(a.in);
    const int mine =
        C::TRANSPOSE ? hqq_small_index_at<C>(a, chunk, 2 * lane) : HQQ_CHUNK * chunk;
    /* axis 1: byte rows from this lane's to the last */
    const int left = a.N / C::P - chunk * C::ROWS - (lane % 8 / C::P * 8 + lane / 8 * 2);
    const int apart = 1 << a.unit_bits, last = min(C::TOKENS, a.M - first_token) - 1;
#pragma unroll 1
    for (int token = in_way; token <= last; token += C::TOKENS_AT_ONCE * apart) {
#pragma unroll
        for (int i = 0; i < C::TOKENS_AT_ONCE; i++) {
            unsigned short *to = panel + (token + i * apart) * C::PANEL_STRIDE;
            const unsigned short *row =
                in + (first_token + min(token + i * apart, last)) * a.ld_in;
            if (staging == HQQ_STAGE_ONE_BY_ONE)
                hqq_small_stage_one_by_one<C>(to, a, row, chunk, count, lane);
            else if (!C::TRANSPOSE)
                hqq_small_stage_along_k<C>(to, row + mine, count, lane);
            else if (C::AXIS == 0)
                hqq_small_stage_residues<C>(to, row + mine, a.residues, lane);
            else
                hqq_small_stage_pairs<C, staging == HQQ_STAGE_WHOLE_PAIRS>(to, row + mine,
                                                                           count, left, lane);
        }
    }
}

/* The way's tokens for `count` chunks from `chunk`; nothing where there is no token. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_stage_tokens(unsigned short *panel,
                                              const hqq_small_arguments &a, int first_token,
                                              int chunk, int count, int in_way, int lane)
{
    if (count <= 0) return;
    const bool wide =
        a.in_aligned &&
        (!C::TRANSPOSE || (C::AXIS == 1 ? a.N / C::P % 2 == 0
                                        : a.residues % C::PANEL == 0 && chunk % C::PANEL == 0));
    const bool pairs = C::TRANSPOSE && C::AXIS == 1;
    const bool whole = (chunk + C::PANEL) * C::ROWS <= a.N / C::P;
    if (!wide)
        hqq_small_stage_all<C, HQQ_STAGE_ONE_BY_ONE>(panel, a, first_token, chunk, count,
                                                     in_way, lane);
    else if (pairs && whole)
        hqq_small_stage_all<C, HQQ_STAGE_WHOLE_PAIRS>(panel, a, first_token, chunk, count,
                                                      in_way, lane);
    else
        hqq_small_stage_all<C, HQQ_STAGE_WIDE>(panel, a, first_token, chunk, count, in_way,
                                               lane);
}

/* Zeros for the tokens that there are not, once. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_clear_tokens(unsigned short *panel,
                                              const hqq_small_arguments &a, int first_token,
                                              int in_way, int lane)
{
#pragma unroll 1
    for (int token = in_way; token < C::TOKENS; token += 1 << a.unit_bits)
        if (first_token + token >= a.M)
            for (int i = lane; i < C::PANEL * HQQ_CHUNK / 8; i += 32)
                reinterpret_cast<uint4 *>(panel + token * C::PANEL_STRIDE)[i] =
                    make_uint4(0, 0, 0, 0);
}

/* sums[chunk][token]: over a chunk of the panel, for the INSIDE zeros. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_sum_tokens(float *sums, const unsigned short *panel, int count,
                                            int thread, int threads)
{
    for (int i = thread; i < C::TOKENS * count; i += threads) {
        int token = i % C::TOKENS, c = i / C::TOKENS;
        const uint4 *from =
            reinterpret_cast<const uint4 *>(panel + token * C::PANEL_STRIDE + HQQ_CHUNK * c);
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int part = 0; part < 8; part++) {
            uint4 x = from[part];
            uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                float2 pair = hqq_pair_to_floats(words[w], typename C::T());
                even += pair.x;
                odd += pair.y;
            }
        }
        sums[c * C::TOKENS + token] = even + odd;
    }
}

#endif

/*
 * Bringing a chunk's three parts to where the multiplication finds them (see small_layout.cuh):
 *   codes    16 bytes a lane and octet by cp.async into the warp's own ring; no block barrier
 *   meta     64 scales and zeros: two of each a lane, loaded a chunk ahead into registers
 *   tokens   a panel of chunks for the whole block, in the order of the fragments
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
                        exists ? cursor->from + o * cursor->octet_bytes : a.packed, exists);
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
    int phase;   /* ALONG: chunks into the group (transpose 0); residue (transpose 1) */
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
        m.phase = chunk % a.chunks_per_group;
        m.step = chunk / a.chunks_per_group;
    }
    return m;
}

/* Loads the cursor's chunk, and moves on. */
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
    } else if (++m->phase == a.chunks_per_group) {
        m->phase = 0;
        m->step++;
    }
}

HQQ_DEVICE_INLINE void hqq_small_store_meta(unsigned char *shared,
                                            const hqq_small_meta_cursor &meta, int lane)
{
    reinterpret_cast<uint32_t *>(shared)[lane] = meta.scale;
    reinterpret_cast<uint32_t *>(shared + 128)[lane] = meta.zero;
}

/* ---- tokens ----------------------------------------------------------------------------- */

/* Elements 8 part .. 8 part + 7 of a chunk, in order of position, of a row of `in`. */
template <class C>
HQQ_DEVICE_INLINE uint4 hqq_small_gather(const hqq_small_arguments &a,
                                         const unsigned short *row, int chunk, int part)
{
    unsigned short v[8];
    if (!C::TRANSPOSE) {
        const unsigned short *from = row + HQQ_CHUNK * chunk + 8 * part;
        uint4 x;
        if (a.in_aligned) {
            x = __ldg(reinterpret_cast<const uint4 *>(from));
        } else {
            for (int i = 0; i < 8; i++) v[i] = from[i];
            x = make_uint4(v[0] | (uint32_t)v[1] << 16, v[2] | (uint32_t)v[3] << 16,
                           v[4] | (uint32_t)v[5] << 16, v[6] | (uint32_t)v[7] << 16);
        }
        return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632),
                          __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632));
    }
    hqq_small_rows rows = hqq_small_rows_of<C>(a, chunk);
    int t = part / 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int half = 2 * (part % 2 * 2 + i / 4) + i % 4 / 2;
        int64_t p = rows.first + (int64_t)(half / C::P * 8 + 2 * t + i % 2) * rows.step;
        bool exists = C::AXIS == 0 || p < a.N / C::P;
        v[i] = exists ? row[p + (int64_t)(half % C::P) * (a.N / C::P)] : 0;
    }
    return make_uint4(v[0] | (uint32_t)v[1] << 16, v[2] | (uint32_t)v[3] << 16,
                      v[4] | (uint32_t)v[5] << 16, v[6] | (uint32_t)v[7] << 16);
}

/* The block's tokens for `count` chunks from `chunk`: panel[token][position]. Neighbouring
 * threads read neighbouring memory: parts of a chunk, but for axis-0 rows neighbouring
 * residues, which are neighbouring chunks. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_stage_tokens(unsigned short *panel,
                                              const hqq_small_arguments &a, int first_token,
                                              int chunk, int count)
{
    const unsigned short *in = static_cast<const unsigned short *>(a.in);
    for (int i = threadIdx.x; i < C::TOKENS * 8 * count; i += C::THREADS) {
        int token = i / (8 * count), rest = i % (8 * count);
        bool by_residue = C::TRANSPOSE && C::AXIS == 0;
        int c = by_residue ? rest % count : rest / 8,
            part = by_residue ? rest / count : rest % 8;
        int m = first_token + token;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (m < a.M) x = hqq_small_gather<C>(a, in + m * a.ld_in, chunk + c, part);
        *reinterpret_cast<uint4 *>(panel + token * C::PANEL_STRIDE + HQQ_CHUNK * c + 8 * part) =
            x;
    }
}

/* sums[chunk][token]: over a chunk of the panel, for the INSIDE zeros. */
template <class C>
HQQ_DEVICE_INLINE void hqq_small_sum_tokens(float *sums, const unsigned short *panel, int count)
{
    for (int i = threadIdx.x; i < C::TOKENS * count; i += C::THREADS) {
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

/* From global memory to a stage of shared memory: a chunk's tokens, codes and scales (see
 * wide_layout.cuh). What a thread copies moves on by a constant from chunk to chunk; a warp has
 * some 500 instructions to spend while the tensor cores multiply one, of which decoding takes
 * 200. */
#ifndef HQQ_KERNELS_CUDA_WIDE_STAGE_CUH
#define HQQ_KERNELS_CUDA_WIDE_STAGE_CUH

#include "wide_layout.cuh"

/* What a thread knows of its block. */
struct hqq_wide_place {
    int first_token, first; /* token; byte row (transpose 0) or column */
    int begin, end;         /* chunks */
    int thread, warp, g, t;
};

/* ---- tokens: four rows 32 apart, a 16-byte piece of each --------------------------------- */

struct hqq_wide_token_cursor {
    const unsigned short *from; /* of the first row */
    int64_t apart;              /* elements from one of the four rows to the next */
    int rows_left;              /* tokens from the first row to the last */
    int left;                   /* transpose 1: byte rows from the piece's to the last */
    int at;                     /* in a stage */
};

template <class C>
HQQ_DEVICE_INLINE hqq_wide_token_cursor hqq_wide_first_tokens(const hqq_wide_arguments &a,
                                                              const hqq_wide_place &here)
{
    int token = here.thread / 8, piece = here.thread % 8, index = 8 * piece;
    hqq_wide_token_cursor cursor;
    cursor.left = 0;
    if (C::TRANSPOSE) { /* piece = half */
        cursor.left = a.N / C::P - piece / C::P * 8 - here.begin * C::ROWS;
        index = piece / C::P * 8 + piece % C::P * (a.N / C::P);
    }
    cursor.from = static_cast<const unsigned short *>(a.in) +
                  (here.first_token + token) * a.ld_in + index +
                  here.begin * (C::TRANSPOSE ? (int)C::ROWS : (int)HQQ_WIDE_CHUNK);
    cursor.apart = 32 * a.ld_in;
    cursor.rows_left = a.M - here.first_token - token;
    cursor.at = 128 * token + 16 * (piece ^ (token & 7)); /* swizzled; 32 tokens on the same */
    return cursor;
}

/* aligned: in's rows can be copied 16 bytes at a time. */
template <class C, bool aligned>
HQQ_DEVICE_INLINE void hqq_wide_stage_tokens(unsigned char *stage,
                                             hqq_wide_token_cursor *cursor)
{
    const bool there = !C::TRANSPOSE || cursor->left > 0;
#pragma unroll
    for (int i = 0; i < C::TOKENS / 32; i++) {
        const unsigned short *from = cursor->from + i * cursor->apart;
        unsigned char *at = stage + cursor->at + 32 * 128 * i;
        const bool reads = there && cursor->rows_left > 32 * i;
        if (aligned) {
            ptx_cp_async_16(at, from, reads);
        } else {
#pragma unroll 1
            for (int j = 0; j < 8; j++)
                reinterpret_cast<unsigned short *>(at)[j] = reads ? __ldg(from + j) : 0;
        }
    }
    cursor->from += C::TRANSPOSE ? (int)C::ROWS : (int)HQQ_WIDE_CHUNK;
    if (C::TRANSPOSE) cursor->left -= C::ROWS;
}

/* ---- codes: 16-byte pieces, CODE_STEP byte rows apart ------------------------------------ */

struct hqq_wide_code_cursor {
    const unsigned char *from;
    int left; /* byte rows from this one to the last; none where there is no such column */
    int at;   /* in a stage */
};

template <class C>
HQQ_DEVICE_INLINE hqq_wide_code_cursor hqq_wide_first_codes(const hqq_wide_arguments &a,
                                                            const hqq_wide_place &here)
{
    int row = here.thread / C::PIECES, part = here.thread % C::PIECES;
    int from_row = (C::TRANSPOSE ? here.begin * C::ROWS : here.first) + row;
    int column = (C::TRANSPOSE ? here.first : here.begin * HQQ_WIDE_CHUNK) + 16 * part;
    hqq_wide_code_cursor cursor;
    cursor.from = a.packed + (int64_t)from_row * a.K + column;
    cursor.left = column < a.K && row < C::ROWS ? a.N / C::P - from_row : 0;
    cursor.at = C::ROW_STRIDE * row + 16 * part;
    return cursor;
}

template <class C>
HQQ_DEVICE_INLINE void hqq_wide_stage_codes(unsigned char *stage, hqq_wide_code_cursor *cursor,
                                            int K)
{
    enum { COPIES = (C::ROWS + C::CODE_STEP - 1) / C::CODE_STEP };
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        if (C::ROWS < C::CODE_STEP && (int)threadIdx.x >= C::ROWS * C::PIECES) break;
        ptx_cp_async_16(stage + cursor->at + i * C::CODE_STEP * C::ROW_STRIDE,
                        cursor->from + (int64_t)i * C::CODE_STEP * K,
                        cursor->left > i * C::CODE_STEP);
    }
    cursor->from += C::TRANSPOSE ? (int64_t)C::ROWS * K : (int64_t)HQQ_WIDE_CHUNK;
    if (C::TRANSPOSE) cursor->left -= C::ROWS;
}

/* ---- scales and zeros, through registers ------------------------------------------------- */

/* Of one chunk. Transpose 0: of row g of the warp's four halves. Transpose 1: [0] of one of the
 * chunk's 64 rows and one of four times 64 columns. */
template <class C> struct hqq_wide_meta {
    unsigned short scale[C::TRANSPOSE ? 1 : 4], zero[C::TRANSPOSE ? 1 : 4];
};

template <class C> struct hqq_wide_meta_cursor {
    const unsigned short *scale, *zero;
    int at[C::TRANSPOSE ? 1 : 4]; /* elements from there; -1: there is no such row */
    int left;                     /* byte rows to the last, or chunks of the group */
};

template <class C>
HQQ_DEVICE_INLINE hqq_wide_meta_cursor<C> hqq_wide_first_meta(const hqq_wide_arguments &a,
                                                              const hqq_wide_place &here)
{
    const int per_slot = a.N / C::P;
    hqq_wide_meta_cursor<C> cursor;
    cursor.scale = static_cast<const unsigned short *>(a.scale);
    cursor.zero = static_cast<const unsigned short *>(a.zero);
    if (C::TRANSPOSE) { /* entry 16 t + 2 half + j of 64: byte row 2t + j of the half */
        int entry = here.thread / 4, half = entry / 2 % 8;
        int row = here.begin * C::ROWS + half / C::P * 8 + entry / 16 * 2 + entry % 2;
        int column = here.first + 64 * (here.thread % 4);
        cursor.at[0] = (row + half % C::P * per_slot) * a.groups_per_row +
                       column / HQQ_WIDE_CHUNK / a.chunks_per_group;
        cursor.left = column < a.K ? per_slot - row : 0;
    } else {
#pragma unroll
        for (int half = 0; half < 4; half++) {
            int number = 4 * here.warp + half, row = here.first + number / C::P * 8 + here.g;
            cursor.at[half % C::METAS] =
                row < per_slot ? (row + number % C::P * per_slot) * a.groups_per_row : -1;
        }
        cursor.scale += here.begin / a.chunks_per_group;
        cursor.zero += here.begin / a.chunks_per_group;
        cursor.left = a.chunks_per_group - here.begin % a.chunks_per_group;
    }
    return cursor;
}

/* Loads the cursor's chunk, and moves on. */
template <class C>
HQQ_DEVICE_INLINE void hqq_wide_load_meta(hqq_wide_meta<C> *meta,
                                          hqq_wide_meta_cursor<C> *cursor, int groups_per_row,
                                          int chunks_per_group)
{
#pragma unroll
    for (int i = 0; i < C::METAS; i++) {
        bool there = C::TRANSPOSE ? cursor->left > 0 : cursor->at[i] >= 0;
        meta->scale[i] = there ? __ldg(cursor->scale + cursor->at[i]) : 0;
        meta->zero[i] = there ? __ldg(cursor->zero + cursor->at[i]) : 0;
    }
    if (C::TRANSPOSE) {
        cursor->scale += C::ROWS * groups_per_row;
        cursor->zero += C::ROWS * groups_per_row;
        cursor->left -= C::ROWS;
    } else if (--cursor->left == 0) {
        cursor->scale++;
        cursor->zero++;
        cursor->left = chunks_per_group;
    }
}

/* Transpose 1: [64 columns][scales, zeros][t][half][j] */
template <class C>
HQQ_DEVICE_INLINE void hqq_wide_store_meta(unsigned char *to, const hqq_wide_meta<C> &meta,
                                           int thread)
{
    unsigned short *at = reinterpret_cast<unsigned short *>(to) + 128 * (thread % 4);
    at[thread / 4] = meta.scale[0];
    at[64 + thread / 4] = meta.zero[0];
}

#endif

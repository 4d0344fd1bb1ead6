/*
 * Products of many tokens with packed codes on a warpgroup's tensor cores (wgmma, compute
 * capability 9.0), no dequantized copy: what a block owns, and where things lie.
 *
 *     transpose 0   out [M,N] (+)= in [M,K] W^T      outputs o = n, reduction i = k
 *     transpose 1   out [M,K] (+)= in [M,N] W        outputs o = k, reduction i = n
 *
 * Axis 1. With P = 8 / bits slots, byte (p, k) of the packed [N/P, K] bytes holds W[p + s N/P,
 * k] in slot s (slot 0 in the highest bits). Eight byte rows are an OCTET; octet o with slot s
 * is HALF h = o P + s.
 *
 * A block has two warpgroups and computes 256 outputs for 128 tokens, or 64 where there are no
 * more; it walks the reduction in chunks of 64, four steps of 16 each. W is the A operand, from
 * registers: a warp multiplies its 32 outputs, two tiles of 16, with all tokens, which are the
 * B operand, in shared memory.
 * So a fragment of A is decoded once for 128 tokens, for 64 cycles of its tensor core; that
 * takes about 22 instructions, and the decoding of one warp hides behind the products of two.
 *
 *                 128 tokens                     a chunk in shared memory, of STAGES
 *               +------------+
 *     warp 0    | 2 x 16 out |      tokens  [128][64]    128-byte rows, swizzled
 *       ..      |            |      codes   [byte rows]  with 16 bytes between rows, so that
 *     warp 7    | 2 x 16 out |                           lanes meet no bank twice
 *               +------------+      scales  transpose 1: 64 of each 64 columns
 *
 * The fragments, as ptx_mma has them, lane 4 g + t:
 *
 *     transpose 0                                transpose 1
 *
 *     warp w has halves 4 w .. 4 w + 3           warp w has columns 32 w .. + 31
 *
 *                  k = 16 e +                                 byte rows 2t, 2t+1 of
 *                 2t, 2t+1  2t+8, 2t+9                        half 2e     half 2e+1
 *                 +--------+--------+                        +----------+----------+
 *     half 2f     |  a[0]  |  a[2]  |            col 4g+2f   |   a[0]   |   a[2]   |
 *     half 2f+1   |  a[1]  |  a[3]  |            col 4g+2f+1 |   a[1]   |   a[3]   |
 *     (row g)     +--------+--------+                        +----------+----------+
 *
 * Position i of a chunk's tokens is k = 64 c + i; or byte row i % 8 of half i / 8.
 *
 * A is (q - z) s, rounded to T twice, as dequantized weights in T and the other kernels have
 * it.
 */
#ifndef HQQ_KERNELS_CUDA_WIDE_LAYOUT_CUH
#define HQQ_KERNELS_CUDA_WIDE_LAYOUT_CUH

#include "ptx_warpgroup.cuh"
#include "wide_launch.h"

template <class T_, int BITS_, int TRANSPOSE_, int TOKENS_> struct hqq_wide {
    typedef T_ T;
    enum {
        BITS = BITS_,
        TRANSPOSE = TRANSPOSE_,
        P = 8 / BITS,
        OUTPUTS = HQQ_WIDE_OUTPUTS,
        TOKENS = TOKENS_,  /* 128, or 64: HQQ_WIDE_FEW */
        SUMS = TOKENS / 2, /* of a lane, for each of its two tiles of outputs */
        THREADS = 256,
        /* on a multiprocessor: two where 128 registers are enough */
        MIN_BLOCKS = TOKENS_ == HQQ_WIDE_FEW && (BITS_ < 4 || (BITS_ == 4 && TRANSPOSE_)) ? 2
                                                                                          : 1,
        ROWS = (TRANSPOSE ? HQQ_WIDE_CHUNK : OUTPUTS) / P, /* byte rows of a chunk */
        PIECES = TRANSPOSE ? 16 : 4,                       /* of 16 bytes of a byte row */
        ROW_STRIDE = 16 * PIECES + 16,
        CODE_STEP = THREADS / PIECES, /* byte rows that the block copies at a time */
        METAS = TRANSPOSE ? 1 : 4,    /* scales that a thread loads of a chunk */
        OCTETS = TRANSPOSE ? 8 / P : (P < 4 ? 4 / P : 1), /* a lane reads of */
        /* one chunk's products under way or in use, one next, two on their way */
        STAGES = 4,
        TOKEN_BYTES = TOKENS * 2 * HQQ_WIDE_CHUNK,
        /* shared memory, from a multiple of 1024 bytes on, as swizzled rows must be */
        CODES_AT = STAGES * TOKEN_BYTES,
        CODE_BYTES = ROWS * ROW_STRIDE,
        META_AT = CODES_AT + STAGES * CODE_BYTES,
        META_BYTES = TRANSPOSE ? 4 * 256 : 0, /* of 64 columns: 64 scales, 64 zeros */
        STAGES_BYTES = META_AT + 2 * META_BYTES,
        /* the sums of so many tokens take the stages' place at the end */
        TOKENS_AT_END = 64,
        SUM_STRIDE = OUTPUTS + 4,
        SUMS_BYTES = 4 * TOKENS_AT_END * SUM_STRIDE,
        SHARED_BYTES = 1024 + (STAGES_BYTES > SUMS_BYTES ? STAGES_BYTES : SUMS_BYTES)
    };
    static_assert(SHARED_BYTES <= 227 * 1024, "compute capability 9.0");
};

/* The tile of this block. Blocks that run at a time share tokens and codes in L2: eight tiles
 * of tokens, then the next outputs. */
struct hqq_wide_tile {
    int token, output;
};

HQQ_DEVICE_INLINE hqq_wide_tile hqq_wide_tile_of(const hqq_wide_arguments &a)
{
    const int together = 8, block = blockIdx.x;
    int group = block / (together * a.output_tiles);
    int in_group = block - group * together * a.output_tiles;
    int tokens = min(together, a.token_tiles - together * group);
    hqq_wide_tile tile;
    tile.token = together * group + in_group % tokens;
    tile.output = in_group / tokens;
    return tile;
}

/* The first byte row (transpose 0) or column of a tile of outputs. */
template <class C> HQQ_DEVICE_INLINE int hqq_wide_first(int output_tile)
{
    return output_tile * (C::TRANSPOSE ? (int)C::OUTPUTS : (int)C::ROWS);
}

#endif

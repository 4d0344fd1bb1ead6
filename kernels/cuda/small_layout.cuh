/*
 * The small-M products on packed codes: what a warp owns, and where things lie.
 *
 *     transpose 0   out [M,N] = in [M,K] W^T      outputs o = n, reduction i = k
 *     transpose 1   out [M,K] = in [M,N] W        outputs o = k, reduction i = n
 *
 * With P = 8 / bits slots, byte (p, k) of the packed [N/P, K] bytes holds W[p + s N/P, k] in
 * slot s (slot 0 in the highest bits), so one loaded byte serves P rows of W.
 *
 * A warp computes one UNIT of 64 outputs for 8 MT tokens, and walks the reduction in CHUNKS
 * of 64. A unit times a chunk is 64 x 64 codes: 64/P byte rows of 64 bytes (transpose 0: the
 * byte rows of the unit, 64 columns k; transpose 1: the byte rows of the chunk, the unit's 64
 * columns). Eight byte rows are an OCTET; octet o with slot s gives HALF h = o P + s, and there
 * are eight halves.
 *
 * mma.m16n8k16 with W as its A operand: 16 outputs x 16 of the reduction, times 8 tokens; four
 * such tiles f are the unit, four steps e the chunk. Lane = 4 g + t.
 *
 *     transpose 0                                transpose 1
 *
 *                  k = 16t + 4e +                             byte rows 2t, 2t+1 of
 *                   {0, 2}   {1, 3}                           half 2e     half 2e+1
 *                 +--------+--------+                        +----------+----------+
 *     half 2f     |  a[0]  |  a[2]  |            col 8g+2f   |   a[0]   |   a[2]   |
 *     half 2f+1   |  a[1]  |  a[3]  |            col 8g+2f+1 |   a[1]   |   a[3]   |
 *     (row g)     +--------+--------+                        +----------+----------+
 *
 * so that one 32-bit word (four bytes of a row; or columns 2f, 2f+1 of two rows, by one PRMT)
 * gives its codes in pairs, bytes {0, 2} and {1, 3}, by a shift and a LOP3 each
 * (small_codes.cuh). The tokens' side is put into the same order of the reduction when it is
 * staged (small_stage.cuh): position 16 t + 4 e + j of a chunk c is, for j = 0..3,
 *
 *     transpose 0   k = 64 c + 16 t + 4 e + {0, 2, 1, 3}
 *     transpose 1   slot and octet of half 2e + j/2, byte row 2t + j%2 of that octet
 *
 * Byte row i of a unit or chunk a (an axis-0 group holds the rows n = r mod Q, Q = N/G):
 *
 *     axis 1   64/P neighbours         a * 64/P + i
 *     axis 0   64/P of one residue     a % Q + (a / Q * 64/P + i) * Q
 *
 * Two ways to apply scale and zero:
 *
 *     INSIDE   The raw codes are multiplied, exactly; acc += s (sum of x q - z sum of x) once
 *              a chunk. Where groups lie ALONG the reduction (transpose 0 at axis 1, transpose
 *              1 at axis 0), up to 16 tokens: beyond, a chunk's own sums do not fit into the
 *              registers.
 *     SCALED   A becomes (q - z) s, rounded to T twice: two more instructions for two weights,
 *              whatever the number of tokens. Where groups lie along the reduction s and z
 *              belong to a row of A, else to a column. (Scaling the tokens instead would save
 *              roundings, but x s leaves fp16's range for small gradients.)
 */
#ifndef HQQ_KERNELS_CUDA_SMALL_LAYOUT_CUH
#define HQQ_KERNELS_CUDA_SMALL_LAYOUT_CUH

#include "ptx.cuh"
#include "small_launch.h"

template <class T_, int BITS_, int TRANSPOSE_, int AXIS_, int MT_> struct hqq_small {
    typedef T_ T;
    enum {
        BITS = BITS_,
        TRANSPOSE = TRANSPOSE_,
        AXIS = AXIS_,
        MT = MT_,                  /* tiles of 8 tokens */
        ALONG = AXIS != TRANSPOSE, /* groups lie along the reduction: one scale a row of A */
        INSIDE = ALONG && MT <= 2,
        P = 8 / BITS,
        OCTETS = 8 / P,
        ROWS = 64 / P, /* byte rows of a unit or chunk */
        TOKENS = 8 * MT,
        WARPS = hqq_small_warps(TOKENS, BITS),
        THREADS = 32 * WARPS,
        /* Chunks of codes under way or in use in a warp, of 512 * bits bytes each. Up to 16
         * tokens memory is the limit, and wants some 20 KiB under way in a multiprocessor. */
        STAGES = BITS == 8 ? 2 : (BITS == 4 && MT == 8 ? 3 : 4),
        STAGE_BYTES = 512 * BITS,
        /* Chunks whose tokens are in shared memory at a time; rows are padded by 16 bytes, so
         * that the 8 lanes that load together hit 8 different groups of banks. */
        PANEL = MT <= 2 ? 8 : 4,
        PANEL_STRIDE = PANEL * HQQ_CHUNK + 8,
        TOKENS_AT_ONCE = MT == 8 ? (BITS == 8 ? 1 : 4) : MT, /* that a warp stages */
        META_BYTES = 256,                                    /* 64 scales, 64 zeros */
        /* Where a row's scales lie side by side from chunk to chunk, a load of one would move a
         * sector of 16 of them: eight chunks' are loaded at once, four in 8 bytes. (8 bits and
         * 64 tokens have no registers left for that, nor for tokens that come together.) */
        META_BATCHES = ALONG && !TRANSPOSE,
        META_AHEAD = !META_BATCHES || MT <= 2, /* loaded before they are due; costs registers */
        META_FOURS = META_AHEAD ? 2 : 1,       /* on their way together */
        METAS = !META_BATCHES ? 2 : (BITS == 8 && MT == 8 ? 4 : 8), /* in shared memory */
        /* shared memory */
        CODES_AT = 0,
        META_AT = WARPS * STAGES * STAGE_BYTES,
        WAYS_AT = META_AT + WARPS * METAS * META_BYTES,
        SUMS_IN_WAY = TOKENS * PANEL_STRIDE * 2, /* a way's panel, and then its sums */
        WAY_BYTES = SUMS_IN_WAY + (INSIDE ? PANEL * TOKENS * 4 : 0),
        ACCUMULATORS = 16 * MT,                           /* of a lane */
        SPLITS_AT_ONCE = MT == 1 ? 4 : (MT == 2 ? 2 : 1), /* a warp adds up */
        PAIRS = hqq_small_pairs(TOKENS),                  /* small_pair.cuh */
        /* on a multiprocessor: bounds the registers */
        MIN_BLOCKS = MT == 8 ? 8 / WARPS : (MT == 2 ? 3 : 4)
    };
    /* Of a block whose reduction goes `ways` ways. */
    static constexpr int shared_bytes(int ways) { return WAYS_AT + ways * WAY_BYTES; }
    /* Half of a way's accumulators, which a pair of blocks exchanges in their place. */
    static constexpr int pair_bytes(int ways) { return ACCUMULATORS * 64 * WARPS / ways; }
    static_assert(WAYS_AT + WAY_BYTES <= 98 * 1024, "compute capability 8.6: 99 KiB");
    static_assert(WAYS_AT + WAY_BYTES <= hqq_small_shared_most(TOKENS, 1) &&
                      WAYS_AT + 4 * WAY_BYTES <= hqq_small_shared_most(TOKENS, 4),
                  "what the host reckons with");
    /* the ways' accumulators take the place of all that */
    static_assert(ACCUMULATORS * 128 * WARPS / 2 <= WAYS_AT + 2 * WAY_BYTES, "two ways");
    static_assert(ACCUMULATORS * 128 * WARPS * 3 / 4 <= WAYS_AT + 4 * WAY_BYTES, "four ways");
    static_assert(pair_bytes(1) <= hqq_small_shared_most(TOKENS, 1), "one, of a pair");
};

/* Byte row i of a unit or chunk is first + i * step. */
struct hqq_small_rows {
    int64_t first;
    int step;
};

template <class C>
HQQ_DEVICE_INLINE hqq_small_rows hqq_small_rows_of(const hqq_small_arguments &a, int index)
{
    hqq_small_rows rows;
    if (C::AXIS == 1) {
        rows.first = (int64_t)index * C::ROWS;
        rows.step = 1;
    } else {
        rows.first = index % a.residues + (int64_t)(index / a.residues) * C::ROWS * a.residues;
        rows.step = a.residues;
    }
    return rows;
}

/* Where 16-byte piece `piece` of byte row `row` of an octet lies in its 512 bytes. Transpose 0:
 * lane 4 row + piece reads back what it copied. Transpose 1: lane 4g + t reads 8 bytes of rows
 * 2t and 2t + 1, and the eight 16-byte banks must differ for t = 0..3 and two neighbouring
 * pieces. */
template <class C> HQQ_DEVICE_INLINE int hqq_small_piece_at(int row, int piece)
{
    if (!C::TRANSPOSE) return 16 * (4 * row + piece);
    return 16 * (piece % 2 + row / 2 * 2 + piece / 2 * 8 + row % 2 * 16);
}

/* The output of half `half` (and row g) of a unit; -1 where there is none. */
template <class C>
HQQ_DEVICE_INLINE int hqq_small_output(const hqq_small_arguments &a, int unit, int g, int half)
{
    if (C::TRANSPOSE) return HQQ_UNIT * unit + 8 * g + half;
    hqq_small_rows rows = hqq_small_rows_of<C>(a, unit);
    int64_t row = rows.first + (int64_t)(half / C::P * 8 + g) * rows.step;
    int per_slot = a.N / C::P;
    return row < per_slot ? (int)row + half % C::P * per_slot : -1;
}

template <class C> HQQ_DEVICE_INLINE int hqq_small_outputs(const hqq_small_arguments &a)
{
    return C::TRANSPOSE ? a.K : a.N;
}

#endif

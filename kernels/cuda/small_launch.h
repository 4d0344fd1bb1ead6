/* What the small-M kernels are told, and their launch. */
#ifndef HQQ_KERNELS_CUDA_SMALL_LAUNCH_H
#define HQQ_KERNELS_CUDA_SMALL_LAUNCH_H

#include "addend.h"

/* A warp computes a unit of outputs, and walks the reduction in chunks: see small_layout.cuh.
 */
enum { HQQ_UNIT = 64, HQQ_CHUNK = 64 };

/* Warps of a block for up to `tokens` tokens. More warps share the tokens, where those are
 * many.
 */
constexpr int hqq_small_warps(int tokens, int nbits)
{
    return tokens == 64 && nbits < 8 ? 8 : 4;
}

/* Whether two splits may meet in each other's shared memory: each finishes half the tokens. */
constexpr int hqq_small_pairs(int tokens)
{
    return tokens > 8;
}

/* Dynamic shared memory of a block whose reduction goes so many ways: the most of all kernels
 * for `tokens` tokens (hqq_small::shared_bytes). */
constexpr int hqq_small_shared_most(int tokens, int ways)
{
    return tokens == 64 ? 65536 + ways * 33792 : 40960 + ways * 17152;
}

typedef struct hqq_small_arguments {
    const unsigned char *packed; /* [N/P, K] */
    const void *scale, *zero;    /* of T */
    const void *in;              /* of T, row m at in + m ld_in */
    int64_t ld_in;
    void *out;      /* of T, [M, outputs] */
    float *partial; /* [splits][tiles][accumulators][threads of a way], where splits > 1 */
    void *arrived;  /* [tiles][splits] of 16 bytes, or [tiles]: see small_finish.cuh */
    int M, N, K;
    int groups_per_row;   /* axis 1: K/G */
    int residues;         /* axis 0: Q = N/G */
    int chunks_per_group; /* G/64 */
    int units, chunks, chunks_per_split, chunks_per_way;
    int meta_aligned;  /* a row's scales of four chunks can be read at once */
    int in_aligned;    /* in's rows can be read 16 bytes at a time */
    int out_aligned;   /* and out's written */
    int counts_splits; /* the device has a 16-byte compare and exchange */
    int paired;        /* splits 2i and 2i + 1 are a cluster: see small_pair.cuh */
    hqq_addend addend;
    /* the grid */
    int tokens;          /* of a block: 8, 16 or 64 */
    int ways, unit_bits; /* ways << unit_bits warps */
    int token_tiles, splits, unit_blocks;
    int shared_most; /* bytes of dynamic shared memory that the device allows */
} hqq_small_arguments;

#ifdef __cplusplus
extern "C" {
#endif

/* nbits: 8, 4, 2 or 1. */
hqq_status hqq_small_launch_bf16(const hqq_small_arguments *a, int nbits, int transpose,
                                 int axis, void *stream);
hqq_status hqq_small_launch_f16(const hqq_small_arguments *a, int nbits, int transpose,
                                int axis, void *stream);

#ifdef __cplusplus
}
#endif
#endif

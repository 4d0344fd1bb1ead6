/* What the kernel of many tokens is told, and its launch. */
#ifndef HQQ_KERNELS_CUDA_WIDE_LAUNCH_H
#define HQQ_KERNELS_CUDA_WIDE_LAUNCH_H

#include "hqqlora.h"

/* Of a block; and of the reduction at a time: see wide_layout.cuh. */
enum { HQQ_WIDE_OUTPUTS = 256, HQQ_WIDE_TOKENS = 128, HQQ_WIDE_FEW = 64, HQQ_WIDE_CHUNK = 64 };

typedef struct hqq_wide_arguments {
    const unsigned char *packed; /* [N/P, K] */
    const void *scale, *zero;    /* of T, [N, groups_per_row] */
    const void *in;              /* of T, row m at in + m ld_in */
    int64_t ld_in;
    void *out;      /* of T, [M, outputs] */
    float *partial; /* [splits, M, outputs], where splits > 1 are no cluster */
    int M, N, K;
    int groups_per_row;   /* K/G */
    int chunks_per_group; /* G/64 */
    int chunks;           /* of the reduction */
    int splits, chunks_per_split;
    int tokens;  /* of a block: HQQ_WIDE_TOKENS or, then one tile of them, HQQ_WIDE_FEW */
    int cluster; /* a tile's splits are one, and add up in each other's shared memory */
    int token_tiles, output_tiles;
    int in_aligned;  /* in's rows can be copied 16 bytes at a time */
    int out_aligned; /* and out's written */
    int adds;        /* to what is in out */
} hqq_wide_arguments;

#ifdef __cplusplus
extern "C" {
#endif

/* nbits: 8, 4, 2 or 1. */
hqq_status hqq_wide_launch_bf16(const hqq_wide_arguments *a, int nbits, int transpose,
                                void *stream);
hqq_status hqq_wide_launch_f16(const hqq_wide_arguments *a, int nbits, int transpose,
                               void *stream);

/* out (+)= the sum of a->partial over the splits, in their order. */
hqq_status hqq_wide_launch_sum(const hqq_wide_arguments *a, hqq_dtype dtype, int64_t outputs,
                               void *stream);

#ifdef __cplusplus
}
#endif
#endif

/* What the quantizer's host code (quantize.cu) hands to its kernels. */
#ifndef HQQ_KERNELS_CUDA_QUANTIZE_JOB_H
#define HQQ_KERNELS_CUDA_QUANTIZE_JOB_H

#include "format.h"
#include "hqqlora.h"

enum {
    HQQ_TILE_LANES = 32,
    HQQ_TILE_RUN =
        512, /* steps that are summed up before they join a total, and held at once */
    HQQ_SHARE_STEPS = 128, /* of importance, held at once */
    HQQ_TILE_WARPS = 16    /* of a multiprocessor, that the registers must suffice for */
};

typedef struct hqq_quantize_job {
    hqq_layout layout;
    int64_t bands; /* rows of words at axis 1, groups at axis 0 */
    int64_t tiles;
    int tile_bands, tile_slots; /* bands in a tile, and groups that share a word across lanes */
    float levels;
    const void *W;
    const float *importance; /* [K] or NULL: all columns matter the same to each group */
    void *packed;            /* [words] */
    void *scale, *zero;      /* [groups] in meta_dtype */
    hqq_dtype W_dtype, meta_dtype;
} hqq_quantize_job;

/* 16-byte cells for all lanes of four steps each, up to `most` steps, padded. */
HQQ_INLINE int hqq_tile_cells(const hqq_quantize_job *job, int most)
{
    int steps = job->layout.G < most ? (int)job->layout.G : most;
    return (steps + 3) / 4 * (HQQ_TILE_LANES + 1);
}

/* Bytes of dynamic shared memory for a tile: two floats a lane, the values, their shares. */
HQQ_INLINE int hqq_tile_bytes(const hqq_quantize_job *job)
{
    int cells = hqq_tile_cells(job, HQQ_TILE_RUN);
    if (job->importance) cells += hqq_tile_cells(job, HQQ_SHARE_STEPS);
    return HQQ_TILE_LANES * 8 + cells * 16;
}

/* Blocks of one warp; each takes every (number of blocks)-th tile. */
static inline unsigned hqq_tile_blocks(const hqq_quantize_job *job)
{
    return job->tiles < INT32_MAX ? (unsigned)job->tiles : INT32_MAX;
}

#ifdef __cplusplus
extern "C" {
#endif

/* The default solver. */
hqq_status hqq_cuda_quantize_default(const hqq_quantize_job *job, void *stream);

/* hqq's solver; with options->solver HQQ_SOLVER_MINMAX the range alone. */
hqq_status hqq_cuda_quantize_hqq(const hqq_quantize_job *job,
                                 const hqq_quantize_options *options, void *stream);

#ifdef __cplusplus
}
#endif
#endif

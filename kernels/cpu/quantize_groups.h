/* Quantizing whole groups: what the driver (quantize.c) asks of each instruction set. */
#ifndef HQQ_KERNELS_CPU_QUANTIZE_GROUPS_H
#define HQQ_KERNELS_CPU_QUANTIZE_GROUPS_H

#include "format.h"
#include "isa.h"

/* Groups are taken in bands, counted from 0: at axis 1 band b is row b of the packed words, so
 * the groups b, b + bands, b + 2 bands, ...; at axis 0 it is group b alone, one column of the
 * words. No two bands share a word, so threads may have any bands of their own. */
typedef struct hqq_quantize_job {
    hqq_layout layout;
    int64_t bands;
    const void *W;
    hqq_dtype W_dtype;
    void *packed;       /* [words] */
    void *scale, *zero; /* [groups] in meta_dtype */
    hqq_dtype meta_dtype;
    const hqq_quantize_options *options;
    const float *importance; /* [K] or NULL: all columns matter the same to each group */
    uint8_t *settled;        /* hqq's solver: [hqq_quantize_tiles_most] or NULL */
} hqq_quantize_job;

static inline int64_t hqq_quantize_bands(const hqq_layout *l)
{
    return l->axis == 1 ? l->words / l->G : l->groups;
}

/* job->settled, where not NULL, holds of the tiles of the same bands, that is words, the number
 * of steps from which on nothing changes; HQQ_UNSETTLED: not known. It starts at 0.
 * hqq_quantize_hqq writes it where it is asked for errors; otherwise it leaves out the tiles
 * that settle within its steps: they are stored. Slots of a word are stored together or not. */
enum { HQQ_UNSETTLED = 255, HQQ_FEWEST_LANES = 4 };

static inline int64_t hqq_quantize_tiles_most(const hqq_quantize_job *job)
{
    return (job->bands + HQQ_FEWEST_LANES - 1) / HQQ_FEWEST_LANES;
}

/* More steps of a group than these are not held in the scratch, but read again in each pass. */
enum { HQQ_TILE_STEPS = 16384 };

/* Tiles that are solved beside each other, round by round: where groups are short, a sum has
 * few steps, and the processor has another tile's to do while divisions wait for its end. A
 * Xeon gains 3 % at groups of 64, 8 at 32, and nothing that could be told at 128. */
enum { HQQ_TILES_MOST = 2, HQQ_SHORT_GROUP = 64 };

static inline int hqq_tiles_at_once(const hqq_layout *l)
{
    return l->G <= HQQ_SHORT_GROUP ? HQQ_TILES_MOST : 1;
}

/* Bytes of scratch that the functions below need; 64-byte aligned. */
size_t hqq_quantize_scratch(const hqq_quantize_job *job);

/* The default solver on bands [begin, end). */
HQQ_ISA_DECLARE(void, hqq_quantize_default,
                (const hqq_quantize_job *job, int64_t begin, int64_t end, void *scratch));

/* hqq's solver on bands [begin, end), `iters` steps (0: the range alone). errors [iters] (+=,
 * may be NULL): the sum of |w - w'| before each step. */
HQQ_ISA_DECLARE(void, hqq_quantize_hqq,
                (const hqq_quantize_job *job, int64_t begin, int64_t end, int iters,
                 double *errors, void *scratch));

#endif

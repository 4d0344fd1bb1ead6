/* Between the driver (gemm.c) and the kernels of each instruction set (gemm_tile.c). */
#ifndef HQQ_KERNELS_CPU_GEMM_TILE_H
#define HQQ_KERNELS_CPU_GEMM_TILE_H

#include "gemm.h"
#include "isa.h"

/* k is worked off in slabs of this many, in order. Rows of a packed panel of A are
 * HQQ_GEMM_LDA apart: 17 cache lines, so that they do not fall into one set of L1. */
#define HQQ_GEMM_KC  256
#define HQQ_GEMM_LDA (HQQ_GEMM_KC + 16)

/* How a product is cut. C is [m,n] here as the kernels see it: the transpose of the caller's
 * where that spares the larger operand a transposing copy. */
typedef struct hqq_gemm_plan {
    hqq_gemm g;
    int transposed;    /* A, B, m, n of g are swapped; C, ldc, bias and dropout are not */
    int rows, vectors; /* of a tile held in registers: rows x vectors * lanes */
    int64_t columns;   /* of a tile: vectors * lanes */
    int64_t slabs, row_tiles, panels; /* how many of each: k, m, n */
    int64_t mc, nc;                   /* of a chunk of C, in multiples of the tile */
    int64_t row_chunks, column_chunks;
    int share_A, share_B;    /* packed once for all chunks; else each chunk packs its own */
    int B_in_place;          /* tiles read it where it is (gemm_in_place.h) */
    float *packed;           /* the shared packings, B before A */
    int64_t packed_A_offset; /* in floats */
    size_t packed_bytes;     /* 0: nothing is shared */
    size_t scratch_bytes;    /* of a chunk */
} hqq_gemm_plan;

/* Fills in everything but `packed`. k > 0. */
HQQ_ISA_DECLARE(void, hqq_gemm_plan_for, (hqq_gemm_plan * plan, const hqq_gemm *g));

/* Packs into plan->packed what is shared of slab `slab`: part `part` of `parts`. */
HQQ_ISA_DECLARE(void, hqq_gemm_pack_shared,
                (const hqq_gemm_plan *plan, int64_t slab, int64_t part, int64_t parts));

/* One chunk of C. */
HQQ_ISA_DECLARE(void, hqq_gemm_chunk,
                (const hqq_gemm_plan *plan, int64_t chunk, void *scratch));

#endif

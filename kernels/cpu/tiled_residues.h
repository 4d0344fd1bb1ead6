/*
 * The tiled input gradient at axis 0 where sums take the scales, in bf16:
 *
 *     dx[m, k] = sum_r scale[r, k] (sum_n dy[m, n] q[n, k]  -  zero[r, k] sum_n dy[m, n])
 *
 * over the G rows n = r mod N/G of W, a residue, which share a scale and a zero a column. Codes
 * are decoded by one table for all (8 bits: converted), two rows to a word as decode_pairs.h
 * does, and bf16 holds them exactly; a tile sums over a residue, and then takes its scales.
 *
 * So that a residue's rows follow one another, dy is turned once for all chunks: from each
 * token's [G, N/G] to [N/G, G]. Tiles read it where it is.
 *
 *     residue r   slot 0: W rows r, r + N/G ..   slot 1: r + N/per, r + N/per + N/G ..   ...
 *     dy          [r, 0 .. G/per)                [r, G/per .. 2 G/per)                   ...
 *
 * Included by tiled_dgrad.c.
 */
#ifndef HQQ_KERNELS_CPU_TILED_RESIDUES_H
#define HQQ_KERNELS_CPU_TILED_RESIDUES_H

#include "decode_pairs.h"
#include "tiled_block.h"
#include "tiled_fetch.h"

/* Residues [begin, end), decoded together. */
typedef struct residue_block {
    int64_t begin, end;
} residue_block;

static residue_block residues_from(const hqq_tiled_job *job, int64_t begin)
{
    int64_t all = job->layout.N / job->layout.G, count = job->block_sets / job->sets.cycle;
    return (residue_block){begin, hqq_least(begin + count, all)};
}

static hqq_strips strips_of_residues(const hqq_tiled_chunk *c, const residue_block *b)
{
    int64_t cycle = c->job->sets.cycle;
    return hqq_strips_of(c->job, b->begin * cycle, b->end * cycle, c->begin, c->end);
}

/* A residue's codes, columns [c->begin, c->end), two rows a word; rows of words `ld` apart. */
HQQ_ALWAYS_INLINE void decode_residue(uint32_t *out, int64_t ld, const hqq_tiled_chunk *c,
                                      int64_t residue, const int nbits)
{
    const hqq_tiled_job *job = c->job;
    const hqq_row_sets *sets = &job->sets;
    const __m512i table = nbits < 8 ? hqq_pair_table(nbits, 0.0f, 1.0f) : (__m512i){0};
    for (int j = 0; j < sets->slots; j++)
        for (int64_t i = 0; i < sets->cycle; i += 2, out += ld) {
            int64_t n = sets->start[j] + residue + i * sets->step;
            coded_row even = row_from(job, n, j, c->begin, nbits == 3);
            coded_row odd = row_from(job, n + sets->step, j, c->begin, nbits == 3);
            for (int64_t k = 0; k < c->end - c->begin; k += 32)
                hqq_interleave_pairs(out + k, out + k + 16,
                                     values_of_codes(&even, k, table, nbits),
                                     values_of_codes(&odd, k, table, nbits));
        }
}

/* Codes, zeros and scales of a block. */
static void decode_residues(const hqq_tiled_chunk *c, const residue_block *b)
{
    const hqq_tiled_job *job = c->job;
    const hqq_weight *w = job->weight;
    int64_t ld = hqq_tiled_stride(job->block_columns), columns = c->end - c->begin;
    for (int64_t r = b->begin; r < b->end; r++) {
        int64_t at = r * job->layout.K + c->begin, i = r - b->begin;
        uint32_t *out = (uint32_t *)c->weights + i * (job->layout.G / 2) * ld;
        hqq_load_floats(c->zero + i * job->block_columns, w->zero, w->meta_dtype, at, columns);
        hqq_load_floats(c->scale + i * job->block_columns, w->scale, w->meta_dtype, at,
                        columns);
        switch (w->nbits) {
        case 8: decode_residue(out, ld, c, r, 8); break;
        case 4: decode_residue(out, ld, c, r, 4); break;
        case 3: decode_residue(out, ld, c, r, 3); break;
        case 2: decode_residue(out, ld, c, r, 2); break;
        case 1: decode_residue(out, ld, c, r, 1); break;
        }
    }
}

/* One residue against `rows` tokens, and four vectors of columns. */
typedef struct residue_tile {
    float *sums; /* [rows, ld_sums], added to if `add` */
    int64_t ld_sums;
    const uint16_t *dy; /* [rows, ld_dy] */
    int64_t ld_dy;
    const float *dy_sums; /* [rows, ld_dy_sums]: of the residue */
    int64_t ld_dy_sums;
    const uint32_t *codes; /* [steps, ld_codes] */
    int64_t ld_codes, steps;
    const float *zero, *scale; /* of the columns */
    int add;
} residue_tile;

HQQ_ALWAYS_INLINE void multiply_residue(const residue_tile *t, const int rows)
{
    hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 4
    for (int j = 0; j < HQQ_TILED_SIDE; j++) {
        hqq_vec zero = hqq_vec_load(t->zero + j * HQQ_LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
            c[i * HQQ_TILED_SIDE + j] = zero * hqq_vec_set1(-t->dy_sums[i * t->ld_dy_sums]);
    }
    hqq_outer_steps(c, t->dy, t->ld_dy / 2, t->codes, t->ld_codes, t->steps, rows,
                    HQQ_TILED_SIDE, HQQ_PAIRS);
#pragma GCC unroll 4
    for (int j = 0; j < HQQ_TILED_SIDE; j++) {
        hqq_vec scale = hqq_vec_load(t->scale + j * HQQ_LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            float *at = t->sums + i * t->ld_sums + j * HQQ_LANES;
            hqq_vec sum = c[i * HQQ_TILED_SIDE + j] * scale;
            hqq_vec_store(at, t->add ? sum + hqq_vec_load(at) : sum);
        }
    }
}

#define RESIDUE_TILE(rows)                                 \
    static void residue_tile_##rows(const residue_tile *t) \
    {                                                      \
        multiply_residue(t, rows);                         \
    }
RESIDUE_TILE(1)
RESIDUE_TILE(2)
RESIDUE_TILE(3)
RESIDUE_TILE(4)
RESIDUE_TILE(5)
RESIDUE_TILE(6)
static void (*const residue_tiles[HQQ_TILED_TOKENS + 1])(const residue_tile *t) = {
    NULL,           residue_tile_1, residue_tile_2, residue_tile_3,
    residue_tile_4, residue_tile_5, residue_tile_6};

/* A block against all tokens of the chunk. */
static void multiply_residues(const hqq_tiled_chunk *c, const residue_block *b,
                              hqq_strips *next)
{
    const hqq_tiled_job *job = c->job;
    const int64_t width = HQQ_TILED_SIDE * HQQ_LANES, G = job->layout.G;
    int64_t residues = job->layout.N / G, tokens = c->m_end - c->m_begin;
    int64_t done = 0, all = hqq_ceil_div(tokens, HQQ_TILED_TOKENS) *
                            hqq_ceil_div(c->end - c->begin, width) * (b->end - b->begin);
    decode_residues(c, b);
    residue_tile t = {.ld_sums = c->ld_sums,
                      .ld_dy = job->ld_turned,
                      .ld_dy_sums = residues,
                      .ld_codes = hqq_tiled_stride(job->block_columns),
                      .steps = G / 2};
    for (int64_t m = 0; m < tokens;) {
        int rows = hqq_tiled_tokens(tokens - m);
        for (int64_t k = 0; k < c->end - c->begin; k += width)
            for (int64_t r = b->begin; r < b->end; r++) {
                int64_t i = r - b->begin;
                hqq_fetch_part(next, ++done, all);
                t.sums = c->sums + m * c->ld_sums + k;
                t.dy =
                    (const uint16_t *)job->turned + (c->m_begin + m) * job->ld_turned + r * G;
                t.dy_sums = job->residue_sums + (c->m_begin + m) * residues + r;
                t.codes = (const uint32_t *)c->weights + i * t.steps * t.ld_codes + k;
                t.zero = c->zero + i * job->block_columns + k;
                t.scale = c->scale + i * job->block_columns + k;
                t.add = c->add || r > 0;
                residue_tiles[rows](&t);
            }
        m += rows;
    }
}

/* hqq_tiled_dgrad_chunk, but for storing. */
static void sum_residues(const hqq_tiled_chunk *c)
{
    residue_block b = residues_from(c->job, 0);
    hqq_strips next = strips_of_residues(c, &b);
    hqq_fetch_part(&next, 1, 1);
    for (; b.begin < b.end; b = residues_from(c->job, b.end)) {
        residue_block after = residues_from(c->job, b.end);
        next = strips_of_residues(c, &after);
        multiply_residues(c, &b, &next);
    }
}

#endif

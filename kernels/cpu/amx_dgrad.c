/* One chunk of the input gradient in AMX tiles (amx.h): dx = dy W for some columns. */
#include "amx_tile.h"

#include "amx_rows.h"
#include "dequantize_block.h"

/* Sets of rows of a block. */
typedef struct set_block {
    int64_t begin, end, steps;
} set_block;

static set_block block_at(const hqq_amx_job *job, int64_t begin)
{
    set_block b = {.begin = begin, .end = begin + job->block};
    if (b.end > job->sets.sets) b.end = job->sets.sets;
    b.steps = hqq_amx_steps_of_sets(job, b.end) - hqq_amx_steps_of_sets(job, begin);
    return b;
}

/* Rows 2 i and 2 i + 1 of 16 decoded ones become row i of half a tile, for each 16 columns.
 * `to` is where the first column's half tile begins, the next one's is `apart` bytes on. */
static void pair_rows(char *to, int64_t apart, const uint16_t *rows, int64_t ld)
{
    for (int64_t k = 0; k < ld; k += 32, to += 2 * apart)
        for (int64_t i = 0; i < 8; i++) {
            const uint16_t *even = rows + 2 * i * ld + k;
            hqq_pair_rows(to + i * 64, to + apart + i * 64, even, even + ld);
        }
}

/* The same in parts, which are 1 KB apart. */
HQQ_ALWAYS_INLINE void pair_parts(char *to, int64_t apart, const void *rows, int64_t ld,
                                  hqq_dtype dtype, const int parts)
{
    for (int64_t k = 0; k < ld; k += 16, to += apart)
        for (int64_t i = 0; i < 8; i++) {
            hqq_vec even = hqq_vec_load_dtype(rows, dtype, 2 * i * ld + k);
            hqq_vec odd = hqq_vec_load_dtype(rows, dtype, (2 * i + 1) * ld + k);
#pragma GCC unroll 3
            for (int p = 0; p < parts; p++) {
                hqq_uvec low = (hqq_uvec)hqq_amx_take_part(&even);
                hqq_uvec high = (hqq_uvec)hqq_amx_take_part(&odd);
                hqq_uvec pair = low >> 16 | high;
                memcpy(to + p * HQQ_AMX_BYTES + i * 64, &pair, 64);
            }
        }
}

/* 16 rows, those of `piece` and zeros, to their halves of the tiles of all columns. */
static void decode_rows(const hqq_amx_chunk *c, const hqq_row_piece *piece, char *to,
                        int64_t apart)
{
    const hqq_amx_job *job = c->job;
    int64_t columns = c->end - c->begin, width = (columns + 31) / 32 * 32;
    int64_t bytes = hqq_dtype_bytes(job->dtype), ld = width * bytes;
    hqq_dequantize_rows_avx512_bf16(c->rows, width, job->dtype, job->weight, piece->first, 1,
                                    piece->count, c->begin, c->end);
    for (int64_t r = 0; r < piece->count && columns < width; r++)
        memset((char *)c->rows + r * ld + columns * bytes, 0,
               (size_t)((width - columns) * bytes));
    if (piece->count < 16)
        memset((char *)c->rows + piece->count * ld, 0, (size_t)((16 - piece->count) * ld));
    switch (job->dtype) {
    case HQQ_BF16: pair_rows(to, apart, c->rows, width); break;
    case HQQ_F16: pair_parts(to, apart, c->rows, width, HQQ_F16, 2); break;
    case HQQ_F32: pair_parts(to, apart, c->rows, width, HQQ_F32, 3); break;
    }
}

/* All rows of a block: [column tile][step][part] tiles. */
static void decode_block(const hqq_amx_chunk *c, const set_block *b)
{
    const hqq_amx_job *job = c->job;
    int64_t step_bytes = job->parts * HQQ_AMX_BYTES, apart = b->steps * step_bytes;
    char *to = c->weights;
    for (int64_t set = b->begin; set < b->end; set += job->group_sets)
        for (int64_t q = 0; q < job->group_rows / 16; q++) {
            hqq_row_piece piece = hqq_amx_rows(job, set, q);
            decode_rows(c, &piece, to + q % 2 * 512, apart);
            if (q % 2) to += step_bytes;
        }
}

HQQ_AMX_VARIANTS(1, 1)
HQQ_AMX_VARIANTS(1, 2)
HQQ_AMX_VARIANTS(2, 1)
HQQ_AMX_VARIANTS(2, 2)
static const hqq_amx_multiply_fn multiply[3][3][4] = {
    [1] = {[1] = HQQ_AMX_ROW(1, 1), [2] = HQQ_AMX_ROW(1, 2)},
    [2] = {[1] = HQQ_AMX_ROW(2, 1), [2] = HQQ_AMX_ROW(2, 2)},
};

/* Each pair of token tiles stays in the first cache, all weights of the block pass by. */
static void multiply_block(const hqq_amx_chunk *c, const set_block *b)
{
    const hqq_amx_job *job = c->job;
    int64_t tokens = hqq_amx_token_tiles(job), column_tiles = (c->end - c->begin + 15) / 16;
    int64_t step_bytes = job->parts * HQQ_AMX_BYTES, tile_bytes = b->steps * step_bytes;
    int64_t before = hqq_amx_steps_of_sets(job, b->begin);
    for (int64_t t = 0; t < tokens; t += 2)
        for (int64_t k = 0; k < column_tiles; k += 2) {
            int64_t ts = tokens - t < 2 ? 1 : 2, ks = column_tiles - k < 2 ? 1 : 2;
            const char *weights = c->weights + k * tile_bytes;
            hqq_amx_operand W = {weights, weights + tile_bytes, 64, step_bytes, HQQ_AMX_BYTES};
            hqq_amx_operand dy = {hqq_amx_input(job, before, b->steps, t),
                                  hqq_amx_input(job, before, b->steps, t + 1), 64, step_bytes,
                                  HQQ_AMX_BYTES};
            multiply[ts][ks][job->parts](c->sums + (k * tokens + t) * 256, 256, tokens * 256,
                                         c->carry, &dy, &W, b->steps, b->begin > 0);
        }
}

/* Sums [tokens, columns] of a tile to dx, with LoRA. */
static void store_tile(const hqq_amx_chunk *c, const float *sums, int64_t column, int64_t count,
                       int64_t token_tile)
{
    const hqq_amx_job *job = c->job;
    int64_t first = token_tile * HQQ_AMX_TOKENS, tokens = job->m_end - job->m_begin - first;
    for (int64_t i = 0; i < HQQ_AMX_TOKENS && i < tokens; i++) {
        hqq_vec v = hqq_vec_load(sums + i * 16);
        if (c->addend) v += hqq_vec_load(c->addend + (first + i) * c->ld_addend + column);
        int64_t at = (job->m_begin + first + i) * job->layout.K + c->begin + column;
        if (count >= 16)
            hqq_vec_store_dtype(job->out, job->dtype, at, v);
        else
            hqq_vec_store_dtype_part(job->out, job->dtype, at, v, (int)count);
    }
}

void hqq_amx_dgrad_chunk(const hqq_amx_chunk *c)
{
    const hqq_amx_job *job = c->job;
    int64_t columns = c->end - c->begin, tokens = hqq_amx_token_tiles(job);
    hqq_amx_begin();
    for (set_block b = block_at(job, 0); b.begin < job->sets.sets; b = block_at(job, b.end)) {
        decode_block(c, &b);
        multiply_block(c, &b);
    }
    _tile_release();
    for (int64_t k = 0; k < columns; k += 16)
        for (int64_t t = 0; t < tokens; t++)
            store_tile(c, c->sums + (k / 16 * tokens + t) * 256, k, columns - k, t);
}

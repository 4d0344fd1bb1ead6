/* One chunk of the forward product in AMX tiles (amx.h): y^T = W x^T for some sets of rows. */
#include "amx_tile.h"

#include "amx_rows.h"
#include "dequantize_block.h"
#include "transpose.h"

/* Columns of a block. */
typedef struct column_block {
    int64_t begin, end, steps;
    int64_t ld; /* elements between decoded rows */
} column_block;

static column_block block_at(const hqq_amx_job *job, int64_t begin)
{
    column_block b = {.begin = begin, .end = begin + job->block};
    if (b.end > job->layout.K) b.end = job->layout.K;
    b.steps = (b.end - b.begin + HQQ_AMX_STEP - 1) / HQQ_AMX_STEP;
    b.ld = hqq_amx_stride(job->block);
    return b;
}

/* 16 decoded rows, cut into parts `part_bytes` apart. */
HQQ_ALWAYS_INLINE void split_rows(char *to, int64_t part_bytes, const void *rows,
                                  const column_block *b, hqq_dtype dtype, const int parts)
{
    for (int64_t r = 0; r < 16; r++)
        for (int64_t k = 0; k < b->steps * HQQ_AMX_STEP; k += HQQ_AMX_STEP) {
            hqq_vec low = hqq_vec_load_dtype(rows, dtype, r * b->ld + k);
            hqq_vec high = hqq_vec_load_dtype(rows, dtype, r * b->ld + k + 16);
            char *at = to + (r * b->ld + k) * 2;
#pragma GCC unroll 3
            for (int p = 0; p < parts; p++) {
                hqq_vec l = hqq_amx_take_part(&low), h = hqq_amx_take_part(&high);
                _mm512_storeu_si512(at + p * part_bytes, hqq_round_to_pairs(l, h));
            }
        }
}

/* A tile of rows: those of `piece`, and zeros. */
static void decode_tile(const hqq_amx_chunk *c, const column_block *b, char *to,
                        int64_t part_bytes, const hqq_row_piece *piece)
{
    const hqq_amx_job *job = c->job;
    void *rows = job->parts > 1 ? c->rows : to;
    int64_t columns = b->end - b->begin, bytes = hqq_dtype_bytes(job->dtype),
            ld = b->ld * bytes;
    hqq_dequantize_rows_avx512_bf16(rows, b->ld, job->dtype, job->weight, piece->first, 1,
                                    piece->count, b->begin, b->end);
    int64_t tail = (b->steps * HQQ_AMX_STEP - columns) * bytes;
    for (int64_t r = 0; r < piece->count && tail > 0; r++)
        memset((char *)rows + r * ld + columns * bytes, 0, (size_t)tail);
    if (piece->count < 16)
        memset((char *)rows + piece->count * ld, 0, (size_t)((16 - piece->count) * ld));
    if (job->dtype == HQQ_F16) split_rows(to, part_bytes, rows, b, HQQ_F16, 2);
    if (job->dtype == HQQ_F32) split_rows(to, part_bytes, rows, b, HQQ_F32, 3);
}

HQQ_AMX_VARIANTS(2, 2)
HQQ_AMX_VARIANTS(2, 1)
static const hqq_amx_multiply_fn multiply[3][4] = {
    [1] = HQQ_AMX_ROW(2, 1),
    [2] = HQQ_AMX_ROW(2, 2),
};

/* The number of a tile of rows in the chunk. */
static int64_t row_tile(const hqq_amx_chunk *c, int64_t set, int64_t q)
{
    return (set - c->begin) / c->job->group_sets * (c->job->group_rows / 16) + q;
}

/* Two tiles of rows of a group, against all tokens. */
static void multiply_pair(const hqq_amx_chunk *c, const column_block *b, int64_t set, int64_t q)
{
    const hqq_amx_job *job = c->job;
    hqq_row_piece pieces[2] = {hqq_amx_rows(job, set, q), hqq_amx_rows(job, set, q + 1)};
    int64_t tile_bytes = 16 * b->ld * 2, part_bytes = 2 * tile_bytes;
    for (int i = 0; i < 2; i++)
        decode_tile(c, b, c->weights + i * tile_bytes, part_bytes, &pieces[i]);
    hqq_amx_operand W = {c->weights, c->weights + tile_bytes, b->ld * 2, 64, part_bytes};
    int64_t tokens = hqq_amx_token_tiles(job);
    for (int64_t t = 0; t < tokens; t += 2) {
        int64_t at_once = tokens - t < 2 ? 1 : 2, before = b->begin / HQQ_AMX_STEP;
        hqq_amx_operand x = {hqq_amx_input(job, before, b->steps, t),
                             hqq_amx_input(job, before, b->steps, t + 1), 64,
                             job->parts * HQQ_AMX_BYTES, HQQ_AMX_BYTES};
        multiply[at_once][job->parts](c->sums + (row_tile(c, set, q) * tokens + t) * 256,
                                      tokens * 256, 256, c->carry, &W, &x, b->steps,
                                      b->begin > 0);
    }
}

/* A tile of sums [rows of W, tokens] to y, with LoRA and bias. */
static void store_tile(const hqq_amx_chunk *c, const float *sums, const hqq_row_piece *piece,
                       int64_t addend_column, int64_t token_tile, hqq_vec bias)
{
    const hqq_amx_job *job = c->job;
    int64_t first = token_tile * HQQ_AMX_TOKENS, tokens = job->m_end - job->m_begin - first;
    hqq_vec tile[HQQ_LANES];
    memcpy(tile, sums, sizeof tile);
    hqq_vec_transpose(tile);
    for (int64_t i = 0; i < HQQ_AMX_TOKENS && i < tokens; i++) {
        hqq_vec v = tile[i] + bias;
        if (c->addend)
            v += hqq_vec_load(c->addend + (first + i) * c->ld_addend + addend_column);
        int64_t at = (job->m_begin + first + i) * job->layout.N + piece->first;
        if (piece->count == 16)
            hqq_vec_store_dtype(job->out, job->dtype, at, v);
        else
            hqq_vec_store_dtype_part(job->out, job->dtype, at, v, (int)piece->count);
    }
}

/* Token by token: the rows of a slot lie side by side in y, and lines of it are filled at once.
 */
static void store_tokens(const hqq_amx_chunk *c, int64_t token_tile)
{
    const hqq_amx_job *job = c->job;
    int64_t tokens = hqq_amx_token_tiles(job), slot_tiles = job->group_sets / 16;
    for (int64_t q = 0; q < job->group_rows / 16; q++)
        for (int64_t set = c->begin; set < c->end; set += job->group_sets) {
            hqq_row_piece piece = hqq_amx_rows(job, set, q);
            if (piece.count == 0) continue;
            hqq_vec bias = hqq_vec_zero();
            if (job->bias)
                bias = hqq_vec_load_dtype_part(job->bias, job->bias_dtype, piece.first,
                                               (int)piece.count);
            int64_t column = q / slot_tiles * job->width + set - c->begin + q % slot_tiles * 16;
            store_tile(c, c->sums + (row_tile(c, set, q) * tokens + token_tile) * 256, &piece,
                       column, token_tile, bias);
        }
}

void hqq_amx_linear_chunk(const hqq_amx_chunk *c)
{
    const hqq_amx_job *job = c->job;
    hqq_amx_begin();
    for (column_block b = block_at(job, 0); b.begin < job->layout.K; b = block_at(job, b.end))
        for (int64_t set = c->begin; set < c->end; set += job->group_sets)
            for (int64_t q = 0; q < job->group_rows / 16; q += 2) multiply_pair(c, &b, set, q);
    _tile_release();
    for (int64_t t = 0; t < hqq_amx_token_tiles(job); t++) store_tokens(c, t);
}

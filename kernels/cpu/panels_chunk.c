/* Decoding and multiplying one panel (panels.h). */
#include "panels.h"

#include "dequantize_block.h"
#include "gemm_pack.h"
#include "integers.h"
#include "multiply_tile.h"
#include "tiled_block.h"
#if HQQ_HAS_PAIRS
#include "decode_pairs.h"
#include "decode_pairs_scaled.h"
#endif

#define COLUMNS HQQ_PANEL_COLUMNS
/* Whose words are fetched: they lie too far apart for the processor to foresee. */
#define ROWS_AHEAD 8

static hqq_dtype word_dtype(const hqq_panels_job *job)
{
    return job->product.pairs ? HQQ_BF16 : HQQ_F32;
}

static void *panel_of(const hqq_panels_job *job, int64_t panel)
{
    return (char *)job->panels + panel * job->part_steps * COLUMNS * 4;
}

static void decode_rows(void *out, int64_t ld, const hqq_panels_job *job, int64_t row,
                        int64_t rows, int64_t begin, int64_t end)
{
    HQQ_ISA_NAME(hqq_dequantize_rows)
    (out, ld, word_dtype(job), job->product.weight, row, 1, rows, begin, end);
}

/* ---- decoding ------------------------------------------------------------------------ */

/* Words along k of HQQ_LANES rows, `ld` words apart, to the columns of a panel. */
static void turn_rows(float *panel, const float *rows, int64_t ld, int64_t steps)
{
    for (int64_t p = 0; p < steps; p += HQQ_LANES) {
        hqq_vec tile[HQQ_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < HQQ_LANES; i++) tile[i] = hqq_vec_load(rows + i * ld + p);
        hqq_vec_transpose(tile);
        float *to = panel + p * COLUMNS;
        if (steps - p >= HQQ_LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < HQQ_LANES; i++) hqq_vec_store(to + i * COLUMNS, tile[i]);
        } else {
            for (int i = 0; i < steps - p; i++) hqq_vec_store(to + i * COLUMNS, tile[i]);
        }
    }
}

/* Rows [begin, end) of W. */
static void decode_turned(float *panel, const hqq_panels_job *job, int64_t begin, int64_t end,
                          float *rows)
{
    int64_t ld = hqq_tiled_stride(job->part_steps), in_word = job->product.pairs ? 2 : 1;
    for (int64_t n = begin; n < begin + COLUMNS; n += HQQ_PANEL_STRIP) {
        int64_t count = hqq_most(0, hqq_least(end - n, HQQ_PANEL_STRIP));
        if (count < HQQ_PANEL_STRIP) memset(rows, 0, (size_t)(HQQ_PANEL_STRIP * ld) * 4);
        if (count > 0) decode_rows(rows, ld * in_word, job, n, count, 0, job->reduction);
        for (int i = 0; i < HQQ_PANEL_STRIP; i += HQQ_LANES)
            turn_rows(panel + n - begin + i, rows + i * ld, ld, job->steps);
    }
}

#if HQQ_HAS_PAIRS
/* Columns [begin, end) of W, two rows a step. */
static void decode_paired(uint32_t *panel, const hqq_panels_job *job, int64_t begin,
                          int64_t end, uint16_t *rows)
{
    const hqq_layout *l = &job->product.layout;
    if (hqq_rows_decode_in_pairs(&job->product) && l->N / l->per % 2 == 0) {
        int64_t count = l->N / l->per;
        for (int j = 0; j < l->per; j++)
            hqq_decode_piece_in_pairs(panel + j * count / 2 * COLUMNS, COLUMNS, &job->product,
                                      (hqq_row_piece){j * count, count}, j, begin, end - begin);
        return;
    }
    if (hqq_residues_decode_in_pairs(l)) {
        hqq_decode_residues_in_pairs(panel, COLUMNS, &job->product, begin, end - begin);
        return;
    }
    for (int64_t n = 0; n < l->N; n += HQQ_PANEL_STRIP) {
        int64_t count = hqq_least(l->N - n, HQQ_PANEL_STRIP);
        decode_rows(rows, COLUMNS, job, n, count, begin, end);
        for (int64_t r = 0; r < count; r += 2)
            for (int64_t k = 0; k < end - begin; k += 32) {
                uint32_t *to = panel + (n + r) / 2 * COLUMNS + k;
                hqq_pair_rows(to, to + 16, rows + r * COLUMNS + k,
                              rows + (r + 1) * COLUMNS + k);
            }
    }
}
#endif

void HQQ_ISA_NAME(hqq_panels_decode)(const hqq_panels_job *job, int64_t panel, void *scratch)
{
    int64_t begin = job->begin + panel * COLUMNS, end = hqq_least(begin + COLUMNS, job->end);
    void *out = panel_of(job, panel);
    if (!job->transpose) {
        decode_turned(out, job, begin, end, scratch);
        return;
    }
    if (end - begin < COLUMNS) { /* columns that there are not */
        memset(out, 0, (size_t)(job->steps * COLUMNS) * 4);
        memset(scratch, 0, HQQ_PANEL_STRIP * COLUMNS * 4);
    }
#if HQQ_HAS_PAIRS
    if (job->product.pairs) {
        decode_paired(out, job, begin, end, scratch);
        return;
    }
#endif
    if (job->strips) HQQ_ISA_NAME(hqq_decode_strips)
    (out, COLUMNS, job->count, job->product.weight, &job->product.layout, job->first,
     job->first + job->count, begin, end, ROWS_AHEAD);
    else decode_rows(out, COLUMNS, job, job->first, job->count, begin, end);
}

/* ---- multiplying --------------------------------------------------------------------- */

/* What the tiles of a chunk share. */
typedef struct panel_tiles {
    const hqq_panels_job *job;
    const void *panel;
    const float *factor;  /* [R][COLUMNS] */
    const float *bias;    /* [COLUMNS]; NULL: none */
    int64_t first, count; /* columns of out */
    hqq_dropout dropout;
} panel_tiles;

typedef void (*panel_tile_fn)(const panel_tiles *t, int64_t m);

/* c = scaling * inner [rows, R] factor [R, ...], times the mask of dx. */
HQQ_ALWAYS_INLINE void add_adapter(hqq_vec *c, const panel_tiles *t, int64_t m, int64_t column,
                                   const int rows)
{
    const hqq_tiled_job *job = &t->job->product;
    int64_t R = job->lora->rank;
    const float *inner = job->inner + m * R;
    for (int64_t r = 0; r < R; r++) {
        hqq_vec b[HQQ_TILED_SIDE];
#pragma GCC unroll 4
        for (int j = 0; j < HQQ_TILED_SIDE; j++)
            b[j] = hqq_vec_load(t->factor + r * COLUMNS + column + j * HQQ_LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            hqq_vec a = hqq_vec_set1(inner[i * R + r]);
#pragma GCC unroll 4
            for (int j = 0; j < HQQ_TILED_SIDE; j++) c[i * HQQ_TILED_SIDE + j] += a * b[j];
        }
    }
    hqq_vec scaling = hqq_vec_set1(job->lora->scaling);
#pragma GCC unroll 24
    for (int i = 0; i < rows * HQQ_TILED_SIDE; i++) c[i] *= scaling;
}

/* Dropout of dx: the factors are computed out of line of the registers that c takes. */
static __attribute__((noinline)) void mask_adapter(float *sums, const panel_tiles *t, int64_t m,
                                                   int64_t column, int rows)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < HQQ_TILED_SIDE; j++) {
            float *at = sums + (i * HQQ_TILED_SIDE + j) * HQQ_LANES;
            int64_t element = (m + i) * t->job->columns + t->first + column + j * HQQ_LANES;
            hqq_vec_store(at, hqq_vec_load(at) *
                                  hqq_dropout_factors(&t->dropout, (uint64_t)element));
        }
}

/* c = what the parts before this one have left in out. */
HQQ_ALWAYS_INLINE void load_sums(hqq_vec *c, const panel_tiles *t, int64_t m, int64_t column,
                                 const int rows)
{
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < HQQ_TILED_SIDE; j++) {
            int64_t at = column + j * HQQ_LANES, left = t->count - at;
            const float *sums =
                (const float *)t->job->product.out + (m + i) * t->job->columns + t->first;
            hqq_vec *v = &c[i * HQQ_TILED_SIDE + j];
            if (left >= HQQ_LANES)
                *v = hqq_vec_load(sums + at);
            else if (left > 0)
                *v = hqq_vec_load_dtype_part(sums, HQQ_F32, at, (int)left);
        }
}

HQQ_ALWAYS_INLINE void multiply_panel(const panel_tiles *t, int64_t m, const int rows,
                                      const hqq_tile_word kind)
{
    const hqq_tiled_job *job = &t->job->product;
    const hqq_dtype dtype = kind == HQQ_PAIRS ? HQQ_BF16 : HQQ_F32;
    const int64_t ld = job->ld_in * (kind == HQQ_PAIRS ? 2 : 4);
    const int64_t steps = t->job->steps / t->job->spans;
    for (int64_t column = 0; column < t->count; column += HQQ_TILED_SIDE * HQQ_LANES) {
        hqq_vec c[HQQ_TILE_REGISTERS];
#pragma GCC unroll 24
        for (int i = 0; i < rows * HQQ_TILED_SIDE; i++) c[i] = hqq_vec_zero();
        if (kind == HQQ_FLOATS && !t->job->is_first) load_sums(c, t, m, column, rows);
        if (job->lora && t->job->is_first) {
            add_adapter(c, t, m, column, rows);
            if (t->dropout.keep_scale != 0.0f) {
                float sums[HQQ_TILE_REGISTERS * HQQ_LANES];
#pragma GCC unroll 24
                for (int i = 0; i < rows * HQQ_TILED_SIDE; i++)
                    hqq_vec_store(sums + i * HQQ_LANES, c[i]);
                mask_adapter(sums, t, m, column, rows);
#pragma GCC unroll 24
                for (int i = 0; i < rows * HQQ_TILED_SIDE; i++)
                    c[i] = hqq_vec_load(sums + i * HQQ_LANES);
            }
        }
        const float *right = (const float *)t->panel + column;
        for (int span = 0; span < t->job->spans; span++) {
            int64_t first = t->job->first + span * t->job->apart;
            const char *left = hqq_at(job->in, dtype, m * job->ld_in + first);
            for (int64_t p = 0; p < steps; p++) {
                hqq_vec b[HQQ_TILED_SIDE];
#pragma GCC unroll 4
                for (int j = 0; j < HQQ_TILED_SIDE; j++)
                    b[j] = hqq_vec_load(right + j * HQQ_LANES);
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++) {
                    hqq_vec a = hqq_broadcast_word(left + i * ld, 0, kind);
#pragma GCC unroll 4
                    for (int j = 0; j < HQQ_TILED_SIDE; j++)
                        c[i * HQQ_TILED_SIDE + j] =
                            hqq_multiply_add(c[i * HQQ_TILED_SIDE + j], a, b[j], kind);
                }
                left += 4;
                right += COLUMNS;
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < HQQ_TILED_SIDE; j++) {
                int64_t at = column + j * HQQ_LANES;
                hqq_vec v = c[i * HQQ_TILED_SIDE + j];
                if (t->bias) v += hqq_vec_load(t->bias + at);
                int64_t to = (m + i) * t->job->columns + t->first + at;
                if (t->count - at >= HQQ_LANES)
                    hqq_vec_store_dtype(job->out, dtype, to, v);
                else if (t->count > at)
                    hqq_vec_store_dtype_part(job->out, dtype, to, v, (int)(t->count - at));
            }
    }
}

#define PANEL_TILE(rows, kind)                                              \
    static void panel_tile_##rows##_##kind(const panel_tiles *t, int64_t m) \
    {                                                                       \
        multiply_panel(t, m, rows, kind);                                   \
    }
#define PANEL_TILES(kind) \
    PANEL_TILE(1, kind)   \
    PANEL_TILE(2, kind)   \
    PANEL_TILE(3, kind)   \
    PANEL_TILE(4, kind) PANEL_TILE(5, kind) PANEL_TILE(6, kind)
#define PANEL_ROW(kind)   \
    {NULL,                \
     panel_tile_1_##kind, \
     panel_tile_2_##kind, \
     panel_tile_3_##kind, \
     panel_tile_4_##kind, \
     panel_tile_5_##kind, \
     panel_tile_6_##kind}
PANEL_TILES(HQQ_FLOATS)
#if HQQ_HAS_PAIRS
PANEL_TILES(HQQ_PAIRS)
#endif
static const panel_tile_fn panel_tile[][HQQ_TILED_TOKENS + 1] = {
    PANEL_ROW(HQQ_FLOATS),
#if HQQ_HAS_PAIRS
    PANEL_ROW(HQQ_PAIRS),
#endif
};

/* The columns of the adapter's second factor that belong to the panel. */
static void take_factor(float *factor, const panel_tiles *t)
{
    const hqq_lora *lora = t->job->product.lora;
    block_target to = {factor, COLUMNS, COLUMNS, 0, 0};
    if (t->count < COLUMNS) memset(factor, 0, (size_t)(lora->rank * COLUMNS) * 4);
    hqq_view view = t->job->transpose ? hqq_view_rows(hqq_at(lora->A, lora->dtype, t->first),
                                                      lora->dtype, t->job->columns)
                                      : hqq_view_transposed(hqq_view_rows(
                                            hqq_at(lora->B, lora->dtype, t->first * lora->rank),
                                            lora->dtype, lora->rank));
    copy_block(&to, &view, 0, 0, lora->rank, t->count);
}

void HQQ_ISA_NAME(hqq_panels_multiply)(const hqq_panels_job *job, int64_t panel,
                                       int64_t m_begin, int64_t m_end, void *scratch)
{
    const hqq_tiled_job *p = &job->product;
    float *bias = scratch, *factor = bias + COLUMNS;
    panel_tiles t = {.job = job, .panel = panel_of(job, panel), .factor = factor};
    t.first = job->begin + panel * COLUMNS;
    t.count = hqq_least(COLUMNS, job->end - t.first);
    if (p->lora && job->is_first) {
        take_factor(factor, &t);
        if (job->transpose && p->lora->dropout != 0.0f) t.dropout = hqq_dropout_of(p->lora);
    }
    if (p->bias && job->is_last) {
        memset(bias, 0, COLUMNS * 4);
        hqq_load_floats(bias, p->bias, p->bias_dtype, t.first, t.count);
        t.bias = bias;
    }
    for (int64_t m = m_begin; m < m_end;) {
        int tokens = hqq_tiled_tokens(m_end - m);
        panel_tile[p->pairs][tokens](&t, m);
        m += tokens;
    }
}

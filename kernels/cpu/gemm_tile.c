/*
 * The kernels of the library's own GEMM for one instruction set (see gemm.h and gemm_tile.h).
 *
 * A tile of C, `rows` x `vectors` registers, stays in registers over a slab of k:
 *
 *     panel of A  [rows][LDA]      fp32, rows as in memory: each element is broadcast
 *     panel of B  [kc][columns]    fp32, `vectors` loads a step of k
 *
 * Keeping A in rows, not in the usual [kc][rows], spares x and dy (row-major, and the larger
 * operand here) a transposition: packing them is a mere conversion. With one vector a step,
 * which R <= lanes asks for, every multiply-add takes its broadcast straight from memory: 24
 * rows give 24 multiply-adds for 25 loads, within the two loads a cycle of current processors.
 *
 * Chunk: for each slab of k, the panels of B are packed (or were, for all chunks), then for
 * each panel of A: pack it into L1, run it against all panels of B. A tile's sums go to
 * scratch, tile by tile, [rows][columns] each; after the last slab they are finished and stored
 * in C.
 *
 * How fast: x [1024,4096] bf16, A [16,4096] fp32 is 134 MFLOP and 8 MB of x. Sixteen lanes, two
 * multiply-adds a cycle, at 3.25 GHz: 208 GFLOP/s for a core, 0.65 ms; reading x at 20 GB/s:
 * 0.4 ms, so arithmetic decides. On a Sapphire Rapids guest whose two processors behaved like
 * one core (a register-only loop: 208 GFLOP/s with one thread, 213 with two), CPU time of one
 * thread beside other load, so against about 107, in GFLOP/s, K = N = 576 / 1536 / 4096:
 *     x A^T, dy B          117 / 106 / 103        torch x.float() @ A.T  59 / 58 / 38
 *     dA, dB               102 /  87 /  70        torch in fp32          62 / 51 / 24
 *     addend, bf16 out      80 /  79 /  52        torch in fp32          62 / 61 / 30
 * dA and dB wait for x and dy, read in short stretches; the addends for the rounding to bf16
 * (8 instructions a vector beside 16 multiply-adds) and, at 4096, for memory. A dropout mask
 * costs about 18 instructions a vector: x A^T then runs at 52 to 60. torch in bf16 with AMX is
 * 3 to 4 times as fast in x A^T and 1.4 to 2 times in dA, with A rounded to bf16.
 */
#include "gemm_tile.h"

#include "gemm_fetch.h"
#include "gemm_in_place.h"
#include "gemm_pack.h"
#include "integers.h"
#include "multiply_tile.h"

#define HQQ_MAX_VECTORS 3
#define HQQ_VARIANTS    6
/* Operands up to this size are packed once for all chunks: 8 MB. */
#define HQQ_SHARED_ELEMENTS (INT64_C(1) << 21)

/* sums [rows, vectors * lanes] (+)= a b, as they are packed. */
typedef void (*tile_fn)(float *sums, const float *a, const float *b, int64_t kc, int add);

#define HQQ_TILE(rows, vectors)                                                        \
    static void tile_##rows##x##vectors(float *sums, const float *a, const float *b,   \
                                        int64_t kc, int add)                           \
    {                                                                                  \
        hqq_multiply_outer(sums, (vectors) * HQQ_LANES, a, HQQ_GEMM_LDA, b,            \
                           (vectors) * HQQ_LANES, kc, add, rows, vectors, HQQ_FLOATS); \
    }
HQQ_TILE(1, 1)
HQQ_TILE(2, 1)
HQQ_TILE(4, 1)
HQQ_TILE(8, 1)
HQQ_TILE(1, 2)
HQQ_TILE(2, 2)
HQQ_TILE(4, 2)
HQQ_TILE(6, 2)
HQQ_TILE(1, 3)
HQQ_TILE(2, 3)
HQQ_TILE(4, 3)
#if HQQ_TILE_REGISTERS == 24
HQQ_TILE(16, 1)
HQQ_TILE(24, 1)
HQQ_TILE(8, 2)
HQQ_TILE(12, 2)
HQQ_TILE(6, 3)
HQQ_TILE(8, 3)
#else
HQQ_TILE(12, 1)
#endif

typedef struct tile_variant {
    int rows;
    tile_fn run;
} tile_variant;

/* By vectors - 1: the full tile first, then smaller ones for the last rows. */
static const tile_variant variants[HQQ_MAX_VECTORS][HQQ_VARIANTS] = {
#if HQQ_TILE_REGISTERS == 24
    {{24, tile_24x1},
     {16, tile_16x1},
     {8, tile_8x1},
     {4, tile_4x1},
     {2, tile_2x1},
     {1, tile_1x1}},
    {{12, tile_12x2},
     {8, tile_8x2},
     {6, tile_6x2},
     {4, tile_4x2},
     {2, tile_2x2},
     {1, tile_1x2}},
    {{8, tile_8x3}, {6, tile_6x3}, {4, tile_4x3}, {2, tile_2x3}, {1, tile_1x3}},
#else
    {{12, tile_12x1}, {8, tile_8x1}, {4, tile_4x1}, {2, tile_2x1}, {1, tile_1x1}},
    {{6, tile_6x2}, {4, tile_4x2}, {2, tile_2x2}, {1, tile_1x2}},
    {{4, tile_4x3}, {2, tile_2x3}, {1, tile_1x3}},
#endif
};

/* The smallest tile that holds `rows` rows. */
static const tile_variant *variant_for(int vectors, int64_t rows)
{
    const tile_variant *v = variants[vectors - 1], *best = v;
    for (int i = 0; i < HQQ_VARIANTS && v[i].rows >= rows; i++) best = v + i;
    return best;
}

/* ---- plan ------------------------------------------------------------------------- */

/* Elements that are copied across the direction in which they lie. */
static int64_t turning_work(const hqq_view *A, const hqq_view *B, int64_t m, int64_t n,
                            int64_t k)
{
    return (A->column_stride == 1 ? 0 : m * k) + (B->column_stride == 1 ? 0 : k * n);
}

/* Half cycles for a step of k of a tile: one for a multiply-add, at least 8 for the latency of
 * its sums, one more for the loop. */
static int64_t tile_cost(int64_t rows, int64_t vectors)
{
    int64_t multiplies = rows * vectors;
    return (multiplies > 8 ? multiplies : 8) + 1;
}

/* Half cycles for a step of k of packing a vector of B. */
#define HQQ_PACK_COST 3

/* The tile shape that takes the least time for all of C. */
static void choose_tile(hqq_gemm_plan *plan)
{
    int64_t m = plan->g.m, n = plan->g.n, best = INT64_MAX;
    int in_place = readable_in_place(&plan->g.B);
    for (int vectors = HQQ_MAX_VECTORS; vectors >= 1; vectors--) {
        int64_t rows = variants[vectors - 1][0].rows, columns = vectors * HQQ_LANES;
        int64_t cost = m / rows * tile_cost(rows, vectors);
        if (m % rows) cost += tile_cost(variant_for(vectors, m % rows)->rows, vectors);
        if (vectors > 1 || !in_place) cost += HQQ_PACK_COST * vectors;
        cost *= hqq_ceil_div(n, columns);
        if (cost >= best) continue;
        best = cost;
        plan->vectors = vectors;
        plan->rows = (int)rows;
        plan->columns = columns;
    }
}

/* Whether there are tiles that read B in place, of the rows that tiles of one vector have. */
static int fits_right_tiles(const hqq_gemm_plan *plan)
{
    int64_t last = plan->g.m % plan->rows;
    return plan->vectors == 1 && readable_in_place(&plan->g.B) && right_tile_of(plan->rows) &&
           (last == 0 || right_tile_of(variant_for(1, last)->rows));
}

/* Chunks of about 1/32 of the work, but at least ten microseconds (2^20 multiply-adds) and at
 * most 256 x 512 of C, so that a slab of B takes half a megabyte of L2. */
static void choose_chunk(hqq_gemm_plan *plan)
{
    int64_t m = plan->g.m, n = plan->g.n, k = plan->g.k;
    double wanted = (double)m * (double)n * (double)k / 32;
    if (wanted < 0x1p20) wanted = 0x1p20;
    int64_t rows = hqq_least(plan->row_tiles, 256 / plan->rows);
    int64_t columns = hqq_least(plan->panels, 512 / plan->columns);
    int share_A = m * k <= HQQ_SHARED_ELEMENTS, share_B = n * k <= HQQ_SHARED_ELEMENTS;
    /* A large B is read in stretches of its rows, each on a page of its own: not too short
     * (256 columns and more were slower again: 144 are about right). */
    int64_t narrowest = share_B ? 1 : hqq_least(n / 8, 144) / plan->columns;
    /* An operand that all chunks share costs nothing more in smaller chunks: then cut across
     * it; else cut the longer side. */
    while ((double)(rows * plan->rows) * (double)(columns * plan->columns) * (double)k >
           2 * wanted) {
        int cut_rows = rows * plan->rows >= columns * plan->columns;
        if (share_A != share_B) cut_rows = share_B;
        int64_t half = hqq_ceil_div(columns, 2);
        int can_cut_columns = columns > 1 && half >= narrowest;
        if (rows > 1 && (cut_rows || !can_cut_columns))
            rows = hqq_ceil_div(rows, 2);
        else if (can_cut_columns)
            columns = half;
        else
            break;
    }
    plan->mc = rows * plan->rows;
    plan->nc = columns * plan->columns;
    plan->row_chunks = hqq_ceil_div(m, plan->mc);
    plan->column_chunks = hqq_ceil_div(n, plan->nc);
    plan->B_in_place = plan->row_chunks == 1 && fits_right_tiles(plan);
    plan->share_A = share_A && plan->column_chunks > 1;
    plan->share_B = share_B && plan->row_chunks > 1;
}

/* Where the parts of a chunk's scratch begin, in floats. */
typedef struct scratch_layout {
    int64_t A, B, sums, turned, floats;
    int64_t ld_turned;
} scratch_layout;

static scratch_layout scratch_of(const hqq_gemm_plan *plan)
{
    scratch_layout s;
    int64_t kc = hqq_least(plan->g.k, HQQ_GEMM_KC);
    s.A = 0;
    s.B = s.A + (plan->share_A ? 0 : plan->rows * HQQ_GEMM_LDA);
    s.sums = s.B + (plan->share_B ? 0 : kc * plan->nc);
    int64_t kept = plan->g.k > HQQ_GEMM_KC ? plan->mc : plan->rows; /* rows of sums */
    s.turned = s.sums + kept * plan->nc;
    s.ld_turned = hqq_ceil_div(plan->rows, HQQ_LANES) * HQQ_LANES;
    s.floats = s.turned + (plan->transposed ? plan->columns * s.ld_turned : 0);
    return s;
}

void HQQ_ISA_NAME(hqq_gemm_plan_for)(hqq_gemm_plan *plan, const hqq_gemm *g)
{
    plan->g = *g;
    plan->packed = NULL;
    hqq_view left = hqq_view_transposed(g->B), right = hqq_view_transposed(g->A);
    plan->transposed = turning_work(&left, &right, g->n, g->m, g->k) + g->m * g->n <
                       turning_work(&g->A, &g->B, g->m, g->n, g->k);
    if (plan->transposed) {
        plan->g.A = left;
        plan->g.B = right;
        plan->g.m = g->n;
        plan->g.n = g->m;
    }
    choose_tile(plan);
    plan->slabs = hqq_ceil_div(g->k, HQQ_GEMM_KC);
    plan->row_tiles = hqq_ceil_div(plan->g.m, plan->rows);
    plan->panels = hqq_ceil_div(plan->g.n, plan->columns);
    choose_chunk(plan);
    plan->scratch_bytes = (size_t)scratch_of(plan).floats * sizeof(float);
    int64_t A = plan->share_A ? plan->slabs * plan->row_tiles * plan->rows * HQQ_GEMM_LDA : 0;
    int64_t B = plan->share_B ? plan->panels * plan->columns * g->k : 0;
    plan->packed_A_offset = B;
    plan->packed_bytes = (size_t)(A + B) * sizeof(float);
}

/* ---- chunk ------------------------------------------------------------------------ */

/* Panels [begin, end) of rows [p, p + kc) of B, one after the other. */
static void pack_panels(float *out, const hqq_gemm_plan *plan, int64_t p, int64_t kc,
                        int64_t begin, int64_t end)
{
    int64_t width = plan->columns, n = plan->g.n;
    block_target to = {out, width, width, kc * width, 0};
    copy_block(&to, &plan->g.B, p, begin * width, kc,
               hqq_least(end * width, n) - begin * width);
    /* the rest of the last panel; copy_block has filled the vector that n ends in */
    int64_t filled = hqq_ceil_div(n - (end - 1) * width, HQQ_LANES) * HQQ_LANES;
    float *last = out + (end - 1 - begin) * kc * width;
    for (int64_t i = 0; i < kc && filled < width; i++)
        memset(last + i * width + filled, 0, (size_t)(width - filled) * sizeof(float));
}

/* `rows` rows of A from i on, filled up with zeros to the rows of their tile. */
static void pack_rows(float *out, const hqq_gemm_plan *plan, int64_t i, int64_t p, int64_t kc,
                      int fetched)
{
    int64_t rows = hqq_least(plan->rows, plan->g.m - i);
    block_target to = {out, HQQ_GEMM_LDA, HQQ_GEMM_LDA, 0, fetched};
    copy_block(&to, &plan->g.A, i, p, rows, kc);
    for (int64_t r = rows; r < variant_for(plan->vectors, rows)->rows; r++)
        memset(out + r * HQQ_GEMM_LDA, 0, (size_t)kc * sizeof(float));
}

/* Where the shared packings have a row tile of A and a panel of B, of a slab. */
static float *shared_rows(const hqq_gemm_plan *plan, int64_t slab, int64_t row_tile)
{
    int64_t tile = slab * plan->row_tiles + row_tile;
    return plan->packed + plan->packed_A_offset + tile * plan->rows * HQQ_GEMM_LDA;
}

static float *shared_panel(const hqq_gemm_plan *plan, int64_t slab, int64_t panel)
{
    int64_t p = slab * HQQ_GEMM_KC, kc = hqq_least(HQQ_GEMM_KC, plan->g.k - p);
    return plan->packed + (p * plan->panels + panel * kc) * plan->columns;
}

void HQQ_ISA_NAME(hqq_gemm_pack_shared)(const hqq_gemm_plan *plan, int64_t slab, int64_t part,
                                        int64_t parts)
{
    int64_t p = slab * HQQ_GEMM_KC, kc = hqq_least(HQQ_GEMM_KC, plan->g.k - p);
    int64_t first = plan->panels * part / parts, last = plan->panels * (part + 1) / parts;
    if (plan->share_B && first < last)
        pack_panels(shared_panel(plan, slab, first), plan, p, kc, first, last);
    if (!plan->share_A) return;
    first = plan->row_tiles * part / parts, last = plan->row_tiles * (part + 1) / parts;
    for (int64_t tile = first; tile < last; tile++)
        pack_rows(shared_rows(plan, slab, tile), plan, tile * plan->rows, p, kc, 0);
}

/* Row i of C from column j on: alpha, dropout, bias, beta, and the one rounding. */
HQQ_ALWAYS_INLINE void store_row(const hqq_gemm *g, int64_t i, int64_t j, int64_t count,
                                 const float *sums, hqq_dtype dtype)
{
    int64_t mask_row = g->mask_first + i * g->mask_stride;
    for (int64_t at = 0; at < count; at += HQQ_LANES) {
        int64_t left = count - at, c = i * g->ldc + j + at;
        int whole = left >= HQQ_LANES;
        hqq_vec v = hqq_vec_load(sums + at) * hqq_vec_set1(g->alpha);
        if (g->dropout) v *= hqq_dropout_factors(g->dropout, (uint64_t)(mask_row + j + at));
        if (g->bias)
            v += whole ? hqq_vec_load_dtype(g->bias, g->bias_dtype, j + at)
                       : hqq_vec_load_dtype_part(g->bias, g->bias_dtype, j + at, (int)left);
        if (g->beta != 0.0f)
            v += hqq_vec_set1(g->beta) *
                 (whole ? hqq_vec_load_dtype(g->C, dtype, c)
                        : hqq_vec_load_dtype_part(g->C, dtype, c, (int)left));
        if (whole)
            hqq_vec_store_dtype(g->C, dtype, c, v);
        else
            hqq_vec_store_dtype_part(g->C, dtype, c, v, (int)left);
    }
}

/* sums [rows, columns], ld apart, to C from (i, j) on. */
HQQ_ALWAYS_INLINE void store_rows(const hqq_gemm *g, int64_t i, int64_t j, int64_t rows,
                                  int64_t columns, const float *sums, int64_t ld,
                                  hqq_dtype dtype)
{
    for (int64_t r = 0; r < rows; r++) store_row(g, i + r, j, columns, sums + r * ld, dtype);
}

/* The tile whose first element is (i, j) of the kernels' C, to the caller's. */
static void store_tile(const hqq_gemm_plan *plan, int64_t i, int64_t j, const float *sums,
                       float *turned, int64_t ld_turned)
{
    const hqq_gemm *g = &plan->g;
    int64_t rows = hqq_least(plan->rows, g->m - i),
            columns = hqq_least(plan->columns, g->n - j);
    int64_t ld = plan->columns;
    if (plan->transposed) {
        hqq_view view = hqq_view_transposed(hqq_view_rows(sums, HQQ_F32, ld));
        block_target to = {turned, ld_turned, ld_turned, 0, 0};
        copy_block(&to, &view, 0, 0, columns, rows);
        int64_t row = i, count = rows;
        i = j, rows = columns, j = row, columns = count;
        sums = turned, ld = ld_turned;
    }
    switch (g->C_dtype) {
    case HQQ_F32: store_rows(g, i, j, rows, columns, sums, ld, HQQ_F32); break;
    case HQQ_F16: store_rows(g, i, j, rows, columns, sums, ld, HQQ_F16); break;
    case HQQ_BF16: store_rows(g, i, j, rows, columns, sums, ld, HQQ_BF16); break;
    }
}

/* A tile of one vector whose columns of B are in place. */
static void run_right(float *sums, const hqq_gemm_plan *plan, int64_t i, int64_t panel,
                      const float *A, int64_t p, int64_t kc, int64_t fetch)
{
    const hqq_view *v = &plan->g.B;
    int64_t rows = variant_for(1, hqq_least(plan->rows, plan->g.m - i))->rows;
    const void *B = hqq_at(v->data, v->dtype, p * v->row_stride + panel * HQQ_LANES);
    right_tile_of(rows)->run[v->dtype == HQQ_BF16](sums, A, B, v->row_stride, kc, p > 0, fetch);
}

void HQQ_ISA_NAME(hqq_gemm_chunk)(const hqq_gemm_plan *plan, int64_t chunk, void *scratch)
{
    const hqq_gemm *g = &plan->g;
    scratch_layout s = scratch_of(plan);
    float *own_A = (float *)scratch + s.A, *own_B = (float *)scratch + s.B;
    int64_t i0 = chunk / plan->column_chunks * plan->mc, i1 = hqq_least(i0 + plan->mc, g->m);
    int64_t j0 = chunk % plan->column_chunks * plan->nc, j1 = hqq_least(j0 + plan->nc, g->n);
    int64_t first = j0 / plan->columns, last = hqq_ceil_div(j1, plan->columns);
    int fetched = 0; /* whether the rows of A that are packed next have been */

    for (int64_t slab = 0; slab < plan->slabs; slab++) {
        int64_t p = slab * HQQ_GEMM_KC, kc = hqq_least(HQQ_GEMM_KC, g->k - p);
        const float *A = own_A, *B = own_B;
        if (plan->share_B)
            B = shared_panel(plan, slab, first);
        else if (!plan->B_in_place)
            pack_panels(own_B, plan, p, kc, first, last);
        else if (last * plan->columns > g->n) /* the last columns */
            pack_panels(own_B + (last - 1 - first) * kc * plan->columns, plan, p, kc, last - 1,
                        last);
        float *sums = (float *)scratch + s.sums;
        for (int64_t i = i0; i < i1; i += plan->rows) {
            next_rows next;
            int fetching_next = 0;
            if (plan->share_A)
                A = shared_rows(plan, slab, i / plan->rows);
            else {
                pack_rows(own_A, plan, i, p, kc, fetched);
                fetched = fetching_next = fetches_next(&next, plan, i, i0, i1, p);
            }
            for (int64_t panel = first; panel < last; panel++) {
                float *tile_sums = sums + (panel - first) * plan->rows * plan->columns;
                const float *packed = B + (panel - first) * kc * plan->columns;
                if (plan->B_in_place && (panel + 1) * plan->columns <= g->n)
                    run_right(tile_sums, plan, i, panel, A, p, kc,
                              i > i0 ? HQQ_FETCH_ROWS * g->B.row_stride
                                     : to_next_line(&g->B, last - panel, last - first, kc));
                else if (fetching_next && panel == first)
                    fetching[plan->vectors - 1][g->A.dtype == HQQ_F32](tile_sums, A, packed, kc,
                                                                       p > 0, &next);
                else
                    variant_for(plan->vectors, g->m - i)->run(tile_sums, A, packed, kc, p > 0);
                if (slab == plan->slabs - 1)
                    store_tile(plan, i, panel * plan->columns, tile_sums,
                               (float *)scratch + s.turned, s.ld_turned);
            }
            if (plan->slabs > 1) sums += plan->rows * plan->nc;
        }
    }
}

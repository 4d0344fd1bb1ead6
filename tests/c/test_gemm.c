/* The library's own GEMM against double loops: all dtypes, strides, transposes, dropout on A, B
 * and C, odd sizes; repeatable; independent of the number and order of chunks. */
#include "cpu/gemm.h"
#include "sample_weight.h"

/* Half the distance to the next value, relative; fp16's absolute floor is its subnormals'. */
static double epsilon_of(hqq_dtype dtype)
{
    return dtype == HQQ_F32 ? 0x1p-24 : dtype == HQQ_F16 ? 0x1p-11 : 0x1p-8;
}
static double floor_of(hqq_dtype dtype)
{
    return dtype == HQQ_F16 ? 0x1p-25 : 0x1p-140;
}

typedef enum direction { ROWS, COLUMNS, GENERAL } direction;

/* A view of [rows, columns] over an array of exactly the size it spans. */
static hqq_view random_view(uint64_t *state, void **memory, int64_t rows, int64_t columns,
                            hqq_dtype dtype, direction way, const hqq_dropout *dropout)
{
    int64_t pad = random_bits(state) % 3 * (1 + random_bits(state) % 9);
    hqq_view v = {.dtype = dtype, .dropout = dropout};
    v.column_stride = way == COLUMNS ? rows + pad : way == GENERAL ? 2 : 1;
    v.row_stride = way == COLUMNS ? 1 : columns * v.column_stride + pad;
    v.mask_row_stride = way == COLUMNS ? 1 : columns;
    v.mask_column_stride = way == COLUMNS ? rows : 1;
    if (random_bits(state) % 4 == 0) /* a counter that passes 2^32 within a vector */
        *(way == COLUMNS ? &v.mask_column_stride : &v.mask_row_stride) = (INT64_C(1) << 32) - 3;
    int64_t size = (rows - 1) * v.row_stride + (columns - 1) * v.column_stride + 1;
    *memory = random_array(state, size, dtype, -1, 1);
    v.data = *memory;
    return v;
}

static double view_at(const hqq_view *v, int64_t i, int64_t j)
{
    float value = hqq_load(v->data, v->dtype, i * v->row_stride + j * v->column_stride);
    if (v->dropout)
        value *= hqq_dropout_factor(
            v->dropout, (uint64_t)(i * v->mask_row_stride + j * v->mask_column_stride));
    return (double)value;
}

/* Element (i, j) as it should be, and how far off fp32 sums and one rounding may take it. */
static double oracle(double *tolerance, const hqq_gemm *g, const void *C_before, int64_t i,
                     int64_t j)
{
    double sum = 0, size = 0;
    for (int64_t p = 0; p < g->k; p++) {
        double term = view_at(&g->A, i, p) * view_at(&g->B, p, j);
        sum += term;
        size += fabs(term);
    }
    double factor = (double)g->alpha;
    if (g->dropout)
        factor *= (double)hqq_dropout_factor(
            g->dropout, (uint64_t)(g->mask_first + i * g->mask_stride + j));
    double bias = g->bias ? (double)hqq_load(g->bias, g->bias_dtype, j) : 0;
    double before =
        g->beta != 0 ? (double)g->beta * (double)hqq_load(C_before, g->C_dtype, i * g->ldc + j)
                     : 0;
    double result = factor * sum + bias + before;
    *tolerance = (double)(g->k + 4) * 0x1p-24 * fabs(factor) * size +
                 4 * 0x1p-24 * (fabs(bias) + fabs(before));
    *tolerance += epsilon_of(g->C_dtype) * (fabs(result) + *tolerance) + floor_of(g->C_dtype);
    return result;
}

static int check_result(const hqq_gemm *g, const void *C_before, const char *what)
{
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->ldc && (i < g->m - 1 || j < g->n); j++) {
            double got = (double)hqq_load(g->C, g->C_dtype, i * g->ldc + j), tolerance = 0;
            double want = j < g->n ? oracle(&tolerance, g, C_before, i, j)
                                   : (double)hqq_load(C_before, g->C_dtype, i * g->ldc + j);
            int same_kind = isnan(want) ? isnan(got) : isinf(want) ? got == want : 0;
            if (same_kind || fabs(got - want) <= tolerance) continue;
            fprintf(
                stderr,
                "%s: C[%lld,%lld] of %lld x %lld x %lld is %.9g, not %.9g (tolerance %.3g); "
                "dtypes %d = %d %d, strides %lld,%lld %lld,%lld, beta %g\n",
                what, (long long)i, (long long)j, (long long)g->m, (long long)g->n,
                (long long)g->k, got, want, tolerance, (int)g->C_dtype, (int)g->A.dtype,
                (int)g->B.dtype, (long long)g->A.row_stride, (long long)g->A.column_stride,
                (long long)g->B.row_stride, (long long)g->B.column_stride, (double)g->beta);
            return 1;
        }
    return 0;
}

static hqq_dtype any_dtype(uint64_t *state)
{
    return all_dtypes[random_bits(state) % 3];
}
static direction any_way(uint64_t *state)
{
    uint32_t r = random_bits(state) % 8;
    return r == 0 ? GENERAL : r & 1 ? ROWS : COLUMNS;
}

/* Runs g on one thread and with chunks backwards: right, and the same bits. */
static int run_both_ways(hqq_gemm *g, const void *before, int64_t C_size, hqq_isa isa,
                         const char *what)
{
    size_t bytes = (size_t)(C_size * hqq_dtype_bytes(g->C_dtype));
    hqq_context one = {.isa = isa}, backwards = {.isa = isa, .parallel_for = backwards_for};
    void *first = exact_alloc(bytes), *second = exact_alloc(bytes);
    memcpy(first, before, bytes);
    memcpy(second, before, bytes);
    g->C = second;
    int failed = hqq_gemm_run(g, &backwards) != HQQ_OK;
    g->C = first;
    failed |= hqq_gemm_run(g, &one) != HQQ_OK || check_result(g, before, what);
    if (!failed && memcmp(first, second, bytes) != 0) {
        fprintf(stderr, "%s: the order of chunks changes the result\n", what);
        failed = 1;
    }
    free(first);
    free(second);
    return failed;
}

static int check_random(uint64_t seed, hqq_isa isa, int64_t m, int64_t n, int64_t k)
{
    uint64_t state = seed * 2654435761u + 88172645463325252u;
    hqq_dropout dropout = hqq_dropout_make(0.25f, UINT64_C(0x123456789abcdef) + seed);
    uint32_t masks = random_bits(&state) % 16;
    void *A, *B, *bias = NULL;
    hqq_gemm g = {.m = m, .n = n, .k = k, .C_dtype = any_dtype(&state)};
    g.A = random_view(&state, &A, m, k, any_dtype(&state), any_way(&state),
                      masks == 1 || masks == 4 ? &dropout : NULL);
    g.B = random_view(&state, &B, k, n, any_dtype(&state), any_way(&state),
                      masks == 2 || masks == 5 ? &dropout : NULL);
    g.dropout = masks == 3 || masks == 4 ? &dropout : NULL;
    g.mask_first = random_bits(&state) % 5;
    g.mask_stride = random_bits(&state) % 4 ? n + 3 : (INT64_C(1) << 32) - 5;
    g.alpha = random_bits(&state) % 2 ? 1.0f : random_float(&state, -2, 2);
    g.beta = random_bits(&state) % 2 ? 0.0f : random_bits(&state) % 3 ? 1.0f : -0.5f;
    g.ldc = n + random_bits(&state) % 3 * 5;
    if (random_bits(&state) % 3 == 0) {
        g.bias_dtype = any_dtype(&state);
        g.bias = bias = random_array(&state, n, g.bias_dtype, -1, 1);
    }
    int64_t C_size = (m - 1) * g.ldc + n;
    void *before = random_array(&state, C_size, g.C_dtype, -1, 1);
    int failed = run_both_ways(&g, before, C_size, isa, "random");
    free(A);
    free(B);
    free(bias);
    free(before);
    return failed;
}

static int check_sizes(hqq_isa isa)
{
    static const int64_t sizes[] = {1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 33, 48, 64, 67};
    uint64_t state = 7, seed = 1;
    int failures = 0;
    for (int i = 0; i < 14 && !failures; i++)
        for (int j = 0; j < 14 && !failures; j++)
            failures +=
                check_random(seed++, isa, sizes[i], sizes[j], sizes[random_bits(&state) % 14]);
    /* several slabs of k, several chunks, a packed operand that all chunks share */
    static const int64_t shapes[][3] = {{1, 1, 1000},   {3, 16, 257},   {300, 16, 520},
                                        {16, 600, 300}, {200, 3, 256},  {257, 256, 64},
                                        {64, 257, 513}, {520, 530, 16}, {1, 700, 16},
                                        {700, 1, 300},  {600, 530, 33}, {130, 100, 700}};
    for (int i = 0; i < 12 && !failures; i++)
        for (int repeat = 0; repeat < 3 && !failures; repeat++)
            failures += check_random(seed++, isa, shapes[i][0], shapes[i][1], shapes[i][2]);
    return failures;
}

/* Infinities and NaNs come out where they belong and nowhere else: padding is not multiplied
 * into results. */
static int check_non_finite(hqq_isa isa)
{
    int failures = 0;
    for (int which = 0; which < 3 && !failures; which++) {
        uint64_t state = 99;
        int64_t m = 29, n = 19, k = 37, at = which == 0 ? 0 : 5 * k + 36;
        float *A = random_array(&state, m * k, HQQ_F32, -1, 1);
        void *B = random_array(&state, k * n, HQQ_BF16, 0.5f, 1);
        float *before = random_array(&state, m * n, HQQ_F32, -1, 1);
        A[at] = which == 1 ? NAN : INFINITY;
        before[n + 1] = NAN; /* beta 0: not read */
        hqq_dropout dropout = hqq_dropout_make(0.5f, 3);
        hqq_gemm g = {.m = m, .n = n, .k = k, .ldc = n, .C_dtype = HQQ_F32, .alpha = 1};
        g.A = hqq_view_dropped(A, HQQ_F32, k, k, which == 2 ? &dropout : NULL);
        g.B = hqq_view_rows(B, HQQ_BF16, n);
        failures += run_both_ways(&g, before, m * n, isa, "non-finite");
        free(A);
        free(B);
        free(before);
    }
    return failures;
}

static int check_empty(hqq_isa isa)
{
    float bias[3] = {1, 2, 3}, C[6] = {1, 1, 1, 1, 1, 1};
    hqq_context context = {.isa = isa};
    hqq_gemm g = {
        .C = C, .ldc = 3, .m = 2, .n = 3, .k = 0, .alpha = 5, .beta = 1, .bias = bias};
    int failed = hqq_gemm_run(&g, &context) != HQQ_OK;
    for (int i = 0; i < 6; i++) failed |= C[i] != bias[i % 3] + 1;
    g.m = 0;
    failed |= hqq_gemm_run(&g, &context) != HQQ_OK;
    if (failed) fprintf(stderr, "a product over k = 0 is not bias + C\n");
    return failed;
}

static int32_t failing_gemm(void *C, int64_t ldc, const void *A, int64_t lda,
                            int32_t transpose_a, const void *B, int64_t ldb,
                            int32_t transpose_b, int64_t m, int64_t n, int64_t k, float beta,
                            hqq_dtype dtype, void *gemm_data)
{
    (void)C, (void)ldc, (void)A, (void)lda, (void)transpose_a, (void)B, (void)ldb;
    (void)transpose_b, (void)m, (void)n, (void)k, (void)beta, (void)dtype;
    return *(int *)gemm_data;
}

/* The four transpositions of the context's GEMM, and what a failing one leads to. */
static int check_context_gemm(hqq_isa isa)
{
    enum { m = 9, n = 21, k = 35 };
    uint64_t state = 5;
    int failed = 0;
    for (int way = 0; way < 4; way++) {
        int ta = way & 1, tb = way >> 1;
        float *A = random_array(&state, m * k, HQQ_F32, -1, 1);
        float *B = random_array(&state, k * n, HQQ_F32, -1, 1), C[m * n];
        hqq_context context = {.isa = isa};
        failed |= hqq_gemm_of_context(C, n, A, ta ? m : k, ta, B, tb ? k : n, tb, m, n, k, 0,
                                      HQQ_F32, &context) != HQQ_OK;
        for (int i = 0; i < m * n; i++) {
            double sum = 0;
            for (int p = 0; p < k; p++)
                sum += (double)A[ta ? p * m + i / n : i / n * k + p] *
                       (double)B[tb ? i % n * k + p : p * n + i % n];
            failed |= !(fabs(sum - (double)C[i]) < k * k * 0x1p-24);
        }
        free(A);
        free(B);
    }
    int code = 3;
    hqq_context context = {.isa = isa, .gemm = failing_gemm, .gemm_data = &code};
    failed |= hqq_gemm_of_context(NULL, 1, NULL, 1, 0, NULL, 1, 0, 1, 1, 1, 0, HQQ_F32,
                                  &context) != HQQ_CALLBACK;
    if (failed) fprintf(stderr, "the context's GEMM is wrong\n");
    return failed;
}

static int check_isa(hqq_isa isa)
{
    return check_sizes(isa) + check_non_finite(isa) + check_empty(isa) +
           check_context_gemm(isa);
}

int main(void)
{
    return for_each_isa(check_isa) != 0;
}

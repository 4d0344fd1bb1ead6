/* The six LoRA products against double loops: every rank class, dtype and dropout, odd sizes,
 * ranges of columns, in buffers of exactly their size. */
#include "cpu/lora.h"
#include "dropout.h"
#include "sample_weight.h"

typedef struct problem {
    int64_t M, N, K, ldx, lddy;
    hqq_dtype dtype;
    hqq_lora lora;
    void *x, *dy, *A, *B, *bias;
    float *xa, *dyb;
} problem;

static double epsilon_of(hqq_dtype dtype)
{
    return dtype == HQQ_F32 ? 0x1p-24 : dtype == HQQ_F16 ? 0x1p-11 : 0x1p-8;
}

static const uint64_t seed = 77;

static problem make_problem(uint64_t *state, int64_t M, int64_t N, int64_t K, int64_t R,
                            hqq_dtype dtype, hqq_dtype lora_dtype, float dropout)
{
    problem p = {.M = M,
                 .N = N,
                 .K = K,
                 .ldx = K + random_bits(state) % 2 * 3,
                 .lddy = N + random_bits(state) % 2 * 5,
                 .dtype = dtype};
    p.x = random_array(state, (M - 1) * p.ldx + K, dtype, -1, 1);
    p.dy = random_array(state, (M - 1) * p.lddy + N, dtype, -1, 1);
    p.A = random_array(state, R * K, lora_dtype, -1, 1);
    p.B = random_array(state, N * R, lora_dtype, -1, 1);
    p.bias = random_array(state, N, dtype, -1, 1);
    p.xa = random_array(state, M * R, HQQ_F32, -1, 1);
    p.dyb = random_array(state, M * R, HQQ_F32, -1, 1);
    p.lora = (hqq_lora){.rank = R,
                        .dtype = lora_dtype,
                        .A = p.A,
                        .B = p.B,
                        .scaling = -1.5f,
                        .dropout = dropout,
                        .seed = &seed};
    return p;
}

static void free_problem(problem *p)
{
    free(p->x);
    free(p->dy);
    free(p->A);
    free(p->B);
    free(p->bias);
    free(p->xa);
    free(p->dyb);
}

/* A sum of products in double, with the sum of their sizes, which bounds what fp32 loses. */
typedef struct exact_sum {
    double value, size;
    int64_t terms;
} exact_sum;

static void add_product(exact_sum *s, double a, double b)
{
    s->value += a * b;
    s->size += fabs(a * b);
    s->terms++;
}

static double x_at(const problem *p, int64_t m, int64_t k)
{
    hqq_dropout d = hqq_dropout_make(p->lora.dropout, seed);
    float factor = p->lora.dropout > 0 ? hqq_dropout_factor(&d, (uint64_t)(m * p->K + k)) : 1;
    return (double)(hqq_load(p->x, p->dtype, m * p->ldx + k) * factor);
}
static double dy_at(const problem *p, int64_t m, int64_t n)
{
    return (double)hqq_load(p->dy, p->dtype, m * p->lddy + n);
}
static double A_at(const problem *p, int64_t r, int64_t k)
{
    return (double)hqq_load(p->A, p->lora.dtype, r * p->K + k);
}
static double B_at(const problem *p, int64_t n, int64_t r)
{
    return (double)hqq_load(p->B, p->lora.dtype, n * p->lora.rank + r);
}

/* got[i] against factor * sum + bias. */
static int check(const char *what, const problem *p, const void *got, hqq_dtype dtype,
                 int64_t i, exact_sum sum, double factor, double bias)
{
    double value = (double)hqq_load(got, dtype, i), want = factor * sum.value + bias;
    double tolerance =
        ((double)sum.terms + 4) * 0x1p-24 * (fabs(factor) * sum.size + fabs(bias));
    tolerance += epsilon_of(dtype) * (fabs(want) + tolerance) + 0x1p-25;
    if (fabs(value - want) <= tolerance) return 0;
    fprintf(
        stderr,
        "%s[%lld] is %.9g, not %.9g (tolerance %.3g); M %lld, N %lld, K %lld, R %lld, dtype "
        "%d, lora dtype %d, dropout %g\n",
        what, (long long)i, value, want, tolerance, (long long)p->M, (long long)p->N,
        (long long)p->K, (long long)p->lora.rank, (int)p->dtype, (int)p->lora.dtype,
        (double)p->lora.dropout);
    return 1;
}

static int check_inner_products(const problem *p, const hqq_context *context)
{
    int64_t M = p->M, N = p->N, K = p->K, R = p->lora.rank;
    float *xa = exact_alloc((size_t)(M * R) * sizeof(float));
    float *dyb = exact_alloc((size_t)(M * R) * sizeof(float));
    hqq_dropout mask;
    hqq_gemm for_xa = hqq_lora_xa(&mask, xa, p->x, p->ldx, p->dtype, &p->lora, M, K);
    hqq_gemm for_dyb = hqq_lora_dyb(dyb, p->dy, p->lddy, p->dtype, &p->lora, M, N);
    int failures = hqq_gemm_run(&for_xa, context) != HQQ_OK;
    failures += hqq_gemm_run(&for_dyb, context) != HQQ_OK;
    for (int64_t i = 0; i < M * R && !failures; i++) {
        exact_sum x_sum = {0}, dy_sum = {0};
        for (int64_t k = 0; k < K; k++)
            add_product(&x_sum, x_at(p, i / R, k), A_at(p, i % R, k));
        for (int64_t n = 0; n < N; n++)
            add_product(&dy_sum, dy_at(p, i / R, n), B_at(p, n, i % R));
        failures += check("xa", p, xa, HQQ_F32, i, x_sum, 1, 0);
        failures += check("dyb", p, dyb, HQQ_F32, i, dy_sum, 1, 0);
    }
    free(xa);
    free(dyb);
    return failures;
}

/* Columns [begin, end) of both addends, in fp32 or in x's dtype, with and without bias. */
static int check_addends(const problem *p, const hqq_context *context, int fp32, int with_bias)
{
    int64_t M = p->M, R = p->lora.rank, N = p->N, K = p->K;
    int64_t n0 = N / 3, n1 = N - N / 4, k0 = K / 4, k1 = K - K / 3;
    hqq_dtype dtype = fp32 ? HQQ_F32 : p->dtype;
    hqq_dropout d = hqq_dropout_make(p->lora.dropout, seed);
    uint64_t state = 3;
    void *y = random_array(&state, M * (n1 - n0), dtype, 5, 6);
    void *dx = random_array(&state, M * (k1 - k0), dtype, 5, 6);
    int failures = hqq_lora_addend(y, n1 - n0, dtype, p->xa, with_bias ? p->bias : NULL,
                                   p->dtype, &p->lora, M, n0, n1, context) != HQQ_OK;
    failures += hqq_lora_dx_addend(dx, k1 - k0, dtype, p->dyb, &p->lora, M, K, k0, k1,
                                   context) != HQQ_OK;
    for (int64_t m = 0; m < M && !failures; m++) {
        for (int64_t n = n0; n < n1 && !failures; n++) {
            exact_sum sum = {0};
            for (int64_t r = 0; r < R; r++)
                add_product(&sum, (double)p->xa[m * R + r], B_at(p, n, r));
            failures += check("addend", p, y, dtype, m * (n1 - n0) + n - n0, sum,
                              (double)p->lora.scaling,
                              with_bias ? (double)hqq_load(p->bias, p->dtype, n) : 0);
        }
        for (int64_t k = k0; k < k1 && !failures; k++) {
            exact_sum sum = {0};
            for (int64_t r = 0; r < R; r++)
                add_product(&sum, (double)p->dyb[m * R + r], A_at(p, r, k));
            double factor = (double)hqq_dropout_factor(&d, (uint64_t)(m * K + k));
            failures += check("dx addend", p, dx, dtype, m * (k1 - k0) + k - k0, sum,
                              factor * (double)p->lora.scaling, 0);
        }
    }
    free(y);
    free(dx);
    return failures;
}

static int check_gradients(const problem *p, const hqq_context *context)
{
    int64_t M = p->M, N = p->N, K = p->K, R = p->lora.rank;
    size_t bytes = (size_t)hqq_dtype_bytes(p->lora.dtype);
    void *dA = exact_alloc((size_t)(R * K) * bytes), *dB = exact_alloc((size_t)(N * R) * bytes);
    hqq_dropout mask;
    hqq_gemm for_dA = hqq_lora_dA(&mask, dA, p->dyb, p->x, p->ldx, p->dtype, &p->lora, M, K);
    hqq_gemm for_dB = hqq_lora_dB(dB, p->dy, p->lddy, p->dtype, p->xa, &p->lora, M, N);
    int failures = hqq_gemm_run(&for_dA, context) != HQQ_OK;
    failures += hqq_gemm_run(&for_dB, context) != HQQ_OK;
    for (int64_t r = 0; r < R && !failures; r++) {
        for (int64_t k = 0; k < K && !failures; k++) {
            exact_sum sum = {0};
            for (int64_t m = 0; m < M; m++)
                add_product(&sum, (double)p->dyb[m * R + r], x_at(p, m, k));
            failures +=
                check("dA", p, dA, p->lora.dtype, r * K + k, sum, (double)p->lora.scaling, 0);
        }
        for (int64_t n = 0; n < N && !failures; n++) {
            exact_sum sum = {0};
            for (int64_t m = 0; m < M; m++)
                add_product(&sum, dy_at(p, m, n), (double)p->xa[m * R + r]);
            failures +=
                check("dB", p, dB, p->lora.dtype, n * R + r, sum, (double)p->lora.scaling, 0);
        }
    }
    free(dA);
    free(dB);
    return failures;
}

/* Without an adapter the addend is the bias in every row. */
static int check_bias_alone(const hqq_context *context)
{
    float bias[7] = {1, -2, 3, INFINITY, 5, 6, 7}, y[14];
    int failed =
        hqq_lora_addend(y, 7, HQQ_F32, NULL, bias, HQQ_F32, NULL, 2, 0, 7, context) != HQQ_OK;
    for (int i = 0; i < 14; i++) failed |= y[i] != bias[i % 7];
    if (failed) fprintf(stderr, "the addend without an adapter is not the bias\n");
    return failed;
}

static int check_isa(hqq_isa isa)
{
    static const int64_t ranks[] = {1, 3, 8, 16, 64, 256};
    static const int64_t sizes[][3] = {{1, 67, 61}, {5, 33, 130}, {67, 16, 29}, {37, 300, 270}};
    hqq_context context = {.isa = isa, .parallel_for = backwards_for};
    uint64_t state = 31;
    int failures = check_bias_alone(&context);
    for (int r = 0; r < 6; r++)
        for (int s = 0; s < 4; s++)
            for (int dropped = 0; dropped < 2 && !failures; dropped++) {
                hqq_dtype dtype = all_dtypes[random_bits(&state) % 3];
                problem p = make_problem(
                    &state, sizes[s][0], sizes[s][1], sizes[s][2], ranks[r], dtype,
                    random_bits(&state) % 2 ? HQQ_F32 : dtype, dropped ? 0.3f : 0.0f);
                failures += check_inner_products(&p, &context);
                if (!failures) failures += check_addends(&p, &context, 0, dropped);
                if (!failures) failures += check_addends(&p, &context, 1, !dropped);
                if (!failures) failures += check_gradients(&p, &context);
                free_problem(&p);
            }
    return failures;
}

int main(void)
{
    return for_each_isa(check_isa) != 0;
}

/* The blocked kernel: weights of several blocks against sums in double over the dequantized
 * weight; the GEMM that the caller lends, which never sees more than half of the weight; and
 * callbacks that fail. */
#include "sample_weight.h"

/* y = x W^T + bias and dx = dy W in double, each with the sum of the sizes of its terms. */
typedef struct oracle {
    double *y, *y_size, *dx, *dx_size;
} oracle;

static double *zeros(int64_t count)
{
    double *p = exact_alloc((size_t)count * sizeof(double));
    for (int64_t i = 0; i < count; i++) p[i] = 0;
    return p;
}

static oracle make_oracle(const hqq_weight *w, const void *x, const void *dy, const void *bias,
                          int64_t M, hqq_dtype dtype)
{
    int64_t N = w->out_features, K = w->in_features;
    oracle o = {zeros(M * N), zeros(M * N), zeros(M * K), zeros(M * K)};
    float *W = exact_alloc((size_t)(N * K) * sizeof(float));
    if (hqq_dequantize(W, K, HQQ_F32, w, 0, N, 0, K, NULL) != HQQ_OK) exit(2);
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double left = (double)hqq_load(dy, dtype, m * N + n), sum = 0, size = 0;
            for (int64_t k = 0; k < K; k++) {
                double weight = (double)W[n * K + k];
                double term = (double)hqq_load(x, dtype, m * K + k) * weight;
                sum += term;
                size += fabs(term);
                o.dx[m * K + k] += left * weight;
                o.dx_size[m * K + k] += fabs(left * weight);
            }
            double b = bias ? (double)hqq_load(bias, dtype, n) : 0;
            o.y[m * N + n] = sum + b;
            o.y_size[m * N + n] = size + fabs(b);
        }
    free(W);
    return o;
}

static void free_oracle(oracle *o)
{
    free(o->y);
    free(o->y_size);
    free(o->dx);
    free(o->dx_size);
}

/* fp32 sums of `terms` terms; the weights, the bias and the result are rounded to dtype. */
static int count_wrong(const void *got, const double *want, const double *size, int64_t count,
                       int64_t terms, hqq_dtype dtype)
{
    double e = dtype == HQQ_F32 ? 0x1p-24 : dtype == HQQ_F16 ? 0x1p-11 : 0x1p-8;
    int wrong = 0;
    for (int64_t i = 0; i < count; i++) {
        double tolerance = ((double)(terms + 8) * 0x1p-24 + 3 * e) * size[i];
        wrong += !(fabs((double)hqq_load(got, dtype, i) - want[i]) <= tolerance);
    }
    return wrong;
}

/* Both products of a random weight through `context`; the number of wrong elements. */
static int check_products(int64_t M, int64_t N, int64_t K, hqq_dtype dtype,
                          const hqq_context *context)
{
    uint64_t state = 5;
    size_t bytes = (size_t)hqq_dtype_bytes(dtype);
    hqq_weight w = sample_weight(&state, N, K, K, 4, 1, HQQ_F32, 0.02f);
    void *x = random_array(&state, M * K, dtype, -1, 1);
    void *dy = random_array(&state, M * N, dtype, -1, 1);
    void *bias = M % 2 ? random_array(&state, N, dtype, -1, 1) : NULL;
    void *y = exact_alloc((size_t)(M * N) * bytes), *dx = exact_alloc((size_t)(M * K) * bytes);
    oracle o = make_oracle(&w, x, dy, bias, M, dtype);
    int wrong = hqq_linear(y, x, K, &w, bias, dtype, M, dtype, NULL, 0, context) != HQQ_OK;
    wrong += hqq_linear_dgrad(dx, dy, N, &w, M, dtype, NULL, 0, context) != HQQ_OK;
    wrong += count_wrong(y, o.y, o.y_size, M * N, K, dtype);
    wrong += count_wrong(dx, o.dx, o.dx_size, M * K, N, dtype);
    free_oracle(&o);
    free_weight(&w);
    free(x), free(dy), free(bias), free(y), free(dx);
    if (wrong)
        fprintf(stderr, "%d elements are wrong: M %lld, N %lld, K %lld, dtype %d (%s)\n", wrong,
                (long long)M, (long long)N, (long long)K, (int)dtype, hqq_last_error());
    return wrong;
}

/* A GEMM in plain loops that keeps count and can be told to fail. */
typedef struct lent_gemm {
    int calls, fail_at;
    int64_t largest; /* elements of B */
} lent_gemm;

static int32_t plain_gemm(void *C, int64_t ldc, const void *A, int64_t lda, int32_t transpose_a,
                          const void *B, int64_t ldb, int32_t transpose_b, int64_t m, int64_t n,
                          int64_t k, float beta, hqq_dtype dtype, void *gemm_data)
{
    lent_gemm *lent = gemm_data;
    if (++lent->calls == lent->fail_at) return 7;
    if (n * k > lent->largest) lent->largest = n * k;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = beta != 0 ? (double)hqq_load(C, dtype, i * ldc + j) : 0;
            for (int64_t p = 0; p < k; p++)
                sum += (double)hqq_load(A, dtype, transpose_a ? p * lda + i : i * lda + p) *
                       (double)hqq_load(B, dtype, transpose_b ? j * ldb + p : p * ldb + j);
            hqq_store(C, dtype, i * ldc + j, (float)sum);
        }
    return 0;
}

static int32_t failing_for(int64_t begin, int64_t end, int64_t grain,
                           void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)begin, (void)end, (void)grain, (void)fn, (void)data;
    return 1;
}

static int check_lent_gemm(hqq_isa isa)
{
    static const int64_t shapes[][3] = {{7, 50, 38}, {2, 1, 9}, {3, 9, 1}, {4, 33, 67}};
    int failures = 0;
    for (int i = 0; i < 12; i++) {
        int64_t M = shapes[i / 3][0], N = shapes[i / 3][1], K = shapes[i / 3][2];
        lent_gemm lent = {0};
        hqq_context context = {
            .isa = isa, .kernel = HQQ_KERNEL_BLOCKED, .gemm = plain_gemm, .gemm_data = &lent};
        failures += check_products(M, N, K, all_dtypes[i % 3], &context);
        int64_t half_rows = (N + 1) / 2 * K, half_columns = (K + 1) / 2 * N;
        if (lent.largest > (half_rows > half_columns ? half_rows : half_columns)) {
            fprintf(stderr, "the GEMM was given %lld of %lld weights at once\n",
                    (long long)lent.largest, (long long)(N * K));
            failures++;
        }
    }
    return failures;
}

/* A failure of either callback, at any of its calls, is the status of the product. */
static int check_failing_callbacks(hqq_isa isa)
{
    enum { M = 100, N = 300, K = 800 }; /* more than one chunk: parallel_for is called */
    uint64_t state = 9;
    int failures = 0;
    hqq_weight w = sample_weight(&state, N, K, K, 4, 1, HQQ_F32, 0.02f);
    float *x = random_array(&state, M * K, HQQ_F32, -1, 1), *y = exact_alloc(M * N * 4);
    for (int at = 1; at <= 2; at++) {
        lent_gemm lent = {.fail_at = at};
        hqq_context context = {
            .isa = isa, .kernel = HQQ_KERNEL_BLOCKED, .gemm = plain_gemm, .gemm_data = &lent};
        failures += hqq_linear(y, x, K, &w, NULL, HQQ_F32, M, HQQ_F32, NULL, 0, &context) !=
                    HQQ_CALLBACK;
        failures += lent.calls != at;
    }
    hqq_context context = {
        .isa = isa, .kernel = HQQ_KERNEL_BLOCKED, .parallel_for = failing_for};
    failures +=
        hqq_linear(y, x, K, &w, NULL, HQQ_F32, M, HQQ_F32, NULL, 0, &context) != HQQ_CALLBACK;
    if (failures) fprintf(stderr, "a failing callback is not reported\n");
    free_weight(&w);
    free(x), free(y);
    return failures;
}

static int check_isa(hqq_isa isa)
{
    hqq_context context = {.isa = isa, .kernel = HQQ_KERNEL_BLOCKED};
    int failures = check_products(3, 2100, 2048, HQQ_F32, &context);
    failures += check_products(2, 2050, 2100, HQQ_BF16, &context);
    return failures + check_lent_gemm(isa) + check_failing_callbacks(isa);
}

int main(void)
{
    return for_each_isa(check_isa) != 0;
}

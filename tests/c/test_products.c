/*
 * The products through the C interface, each kernel against the reference kernel: forward and
 * backward, with and without bias, LoRA and dropout, all bits, axes and dtypes, odd shapes;
 * workspace of exactly the size asked for; outputs that are not asked for are left alone.
 */
#include "sample_weight.h"

typedef struct problem {
    hqq_weight weight;
    hqq_lora lora;
    hqq_dtype dtype, bias_dtype;
    int64_t M, ldx, lddy;
    void *x, *dy, *bias, *A, *B;
} problem;

/* What a call gives. */
typedef struct results {
    void *y, *dx, *dA, *dB;
    float *xa;
} results;

static double epsilon_of(hqq_dtype dtype)
{
    return dtype == HQQ_F32 ? 0x1p-24 : dtype == HQQ_F16 ? 0x1p-11 : 0x1p-8;
}

static const uint64_t seed = UINT64_C(0xfedcba9876543210);

static problem make_problem(uint64_t *state, int64_t M, int64_t N, int64_t K, int64_t G,
                            int nbits, int axis, int64_t R, hqq_dtype dtype, hqq_dtype meta)
{
    problem p = {
        .M = M, .dtype = dtype, .bias_dtype = random_bits(state) % 2 ? HQQ_F32 : dtype};
    p.weight = sample_weight(state, N, K, G, nbits, axis, meta, 0.02f);
    p.ldx = K + random_bits(state) % 2 * 3;
    p.lddy = N + random_bits(state) % 2 * 5;
    p.x = random_array(state, (M - 1) * p.ldx + K, dtype, -1, 1);
    p.dy = random_array(state, (M - 1) * p.lddy + N, dtype, -1, 1);
    p.bias = random_bits(state) % 2 ? random_array(state, N, p.bias_dtype, -1, 1) : NULL;
    p.lora.rank = R;
    p.lora.dtype = random_bits(state) % 2 ? HQQ_F32 : dtype;
    p.lora.A = p.A = random_array(state, R * K, p.lora.dtype, -1, 1);
    p.lora.B = p.B = random_array(state, N * R, p.lora.dtype, -1, 1);
    p.lora.scaling = 0.75f;
    p.lora.dropout = random_bits(state) % 2 ? 0.25f : 0.0f;
    p.lora.seed = &seed;
    return p;
}

static void free_problem(problem *p)
{
    free_weight(&p->weight);
    free(p->x);
    free(p->dy);
    free(p->bias);
    free(p->A);
    free(p->B);
}

static results make_results(const problem *p)
{
    size_t bytes = (size_t)hqq_dtype_bytes(p->dtype);
    size_t lora_bytes = (size_t)hqq_dtype_bytes(p->lora.dtype);
    size_t M = (size_t)p->M, N = (size_t)p->weight.out_features;
    size_t K = (size_t)p->weight.in_features, R = (size_t)p->lora.rank;
    return (results){.y = exact_alloc(M * N * bytes),
                     .dx = exact_alloc(M * K * bytes),
                     .dA = exact_alloc(R * K * lora_bytes),
                     .dB = exact_alloc(N * R * lora_bytes),
                     .xa = exact_alloc(M * R * sizeof(float))};
}

static void free_results(results *r)
{
    free(r->y);
    free(r->dx);
    free(r->dA);
    free(r->dB);
    free(r->xa);
}

/* Everything, with a workspace of exactly the size that the library names. */
static int run_all(results *r, const problem *p, int xa_in_backward, const hqq_context *context)
{
    const hqq_lora *lora = &p->lora;
    size_t bytes;
    int failed =
        hqq_workspace_size(&bytes, &p->weight, lora, p->M, p->dtype, context) != HQQ_OK;
    void *workspace = aligned_alloc(64, bytes ? (bytes + 63) / 64 * 64 : 64);
    failed |= bytes % 64 != 0;
    failed |= hqq_lora_linear(r->y, r->xa, p->x, p->ldx, &p->weight, p->bias, p->bias_dtype,
                              lora, p->M, p->dtype, workspace, bytes, context) != HQQ_OK;
    failed |= hqq_lora_linear_backward(r->dx, r->dA, r->dB, p->dy, p->lddy, p->x, p->ldx,
                                       xa_in_backward ? r->xa : NULL, &p->weight, lora, p->M,
                                       p->dtype, workspace, bytes, context) != HQQ_OK;
    free(workspace);
    if (failed) fprintf(stderr, "a call failed: %s\n", hqq_last_error());
    return failed;
}

static double absolute(const void *data, hqq_dtype dtype, int64_t i)
{
    return fabs((double)hqq_load(data, dtype, i));
}

/*
 * Bounds. `work` is the sum of the sizes of all terms, with which fp32 sums grow: an element of
 * a sum of k terms is off by at most about k * 2^-24 * work; dequantized weights are rounded to
 * x's dtype (epsilon * work), the addend and the result too (2 epsilon * size).
 */
typedef struct scale_of_errors {
    double base, lora; /* sums of sizes of terms */
} scale_of_errors;

static int differs(const char *what, const problem *p, hqq_kernel kernel, const void *got,
                   const void *want, hqq_dtype dtype, int64_t i, double tolerance)
{
    double a = (double)hqq_load(got, dtype, i), b = (double)hqq_load(want, dtype, i);
    if (fabs(a - b) <= tolerance) return 0; /* false for NaN */
    fprintf(stderr,
            "%s[%lld] is %.9g, the reference %.9g (tolerance %.3g); kernel %d, M %lld, rank "
            "%lld, dtype %d, lora dtype %d, dropout %g\n",
            what, (long long)i, a, b, tolerance, (int)kernel, (long long)p->M,
            (long long)p->lora.rank, (int)p->dtype, (int)p->lora.dtype,
            (double)p->lora.dropout);
    print_weight(&p->weight);
    return 1;
}

/* Sum over r of |scaling| * (sum over the inner index of |left| |inner|) * |outer|. */
static double lora_size(const problem *p, const double *inner, const void *outer,
                        int64_t stride, int64_t at)
{
    double size = 0;
    for (int64_t r = 0; r < p->lora.rank; r++)
        size += inner[r] * absolute(outer, p->lora.dtype, at + r * stride);
    return size * fabs((double)p->lora.scaling) / (1 - (double)p->lora.dropout);
}

/* |x| |A|^T or |dy| |B| of row m. */
static void inner_sizes(double *sizes, const problem *p, int64_t m, int forward)
{
    int64_t N = p->weight.out_features, K = p->weight.in_features, R = p->lora.rank;
    for (int64_t r = 0; r < R; r++) {
        sizes[r] = 0;
        for (int64_t k = 0; forward && k < K; k++)
            sizes[r] += absolute(p->x, p->dtype, m * p->ldx + k) *
                        absolute(p->A, p->lora.dtype, r * K + k);
        for (int64_t n = 0; !forward && n < N; n++)
            sizes[r] += absolute(p->dy, p->dtype, m * p->lddy + n) *
                        absolute(p->B, p->lora.dtype, n * R + r);
    }
}

static int compare_y_and_dx(const results *got, const results *want, const problem *p,
                            const float *W, hqq_kernel kernel)
{
    int64_t N = p->weight.out_features, K = p->weight.in_features, R = p->lora.rank;
    double e = epsilon_of(p->dtype), sums = (double)(N + K + R + 8) * 0x1p-24;
    double inner[256];
    int failures = 0;
    for (int64_t m = 0; m < p->M; m++) {
        inner_sizes(inner, p, m, 1);
        for (int64_t r = 0; r < R; r++)
            failures += differs("xa", p, kernel, got->xa, want->xa, HQQ_F32, m * R + r,
                                sums * inner[r] / (1 - (double)p->lora.dropout));
        for (int64_t n = 0; n < N && !failures; n++) {
            double base = 0, lora = lora_size(p, inner, p->B, 1, n * R);
            double bias = p->bias ? absolute(p->bias, p->bias_dtype, n) : 0;
            for (int64_t k = 0; k < K; k++)
                base += absolute(p->x, p->dtype, m * p->ldx + k) * fabs((double)W[n * K + k]);
            failures += differs("y", p, kernel, got->y, want->y, p->dtype, m * N + n,
                                (sums + 3 * e) * (base + lora + bias));
        }
        inner_sizes(inner, p, m, 0);
        for (int64_t k = 0; k < K && !failures; k++) {
            double base = 0, lora = lora_size(p, inner, p->A, K, k);
            for (int64_t n = 0; n < N; n++)
                base += absolute(p->dy, p->dtype, m * p->lddy + n) * fabs((double)W[n * K + k]);
            failures += differs("dx", p, kernel, got->dx, want->dx, p->dtype, m * K + k,
                                (sums + 3 * e) * (base + lora));
        }
        if (failures) return failures;
    }
    return 0;
}

static int compare_dA_and_dB(const results *got, const results *want, const problem *p,
                             hqq_kernel kernel)
{
    int64_t N = p->weight.out_features, K = p->weight.in_features, R = p->lora.rank;
    double *dyb = exact_alloc((size_t)(p->M * R) * sizeof(double));
    double *xa = exact_alloc((size_t)(p->M * R) * sizeof(double));
    double e = epsilon_of(p->lora.dtype), sums = (double)(N + K + p->M + 8) * 0x1p-24;
    double factor = fabs((double)p->lora.scaling) / (1 - (double)p->lora.dropout);
    int failures = 0;
    for (int64_t m = 0; m < p->M; m++) {
        inner_sizes(dyb + m * R, p, m, 0);
        inner_sizes(xa + m * R, p, m, 1);
    }
    for (int64_t r = 0; r < R && !failures; r++)
        for (int64_t k = 0; k < K && !failures; k++) {
            double size = 0;
            for (int64_t m = 0; m < p->M; m++)
                size += dyb[m * R + r] * absolute(p->x, p->dtype, m * p->ldx + k);
            failures += differs("dA", p, kernel, got->dA, want->dA, p->lora.dtype, r * K + k,
                                (sums + 2 * e) * size * factor + 0x1p-25);
        }
    for (int64_t n = 0; n < N && !failures; n++)
        for (int64_t r = 0; r < R && !failures; r++) {
            double size = 0;
            for (int64_t m = 0; m < p->M; m++)
                size += xa[m * R + r] * absolute(p->dy, p->dtype, m * p->lddy + n);
            failures += differs("dB", p, kernel, got->dB, want->dB, p->lora.dtype, n * R + r,
                                (sums + 2 * e) * size * factor + 0x1p-25);
        }
    free(dyb);
    free(xa);
    return failures;
}

static int check_problem(const problem *p, hqq_isa isa)
{
    size_t elements = (size_t)(p->weight.out_features * p->weight.in_features);
    float *W = exact_alloc(elements * sizeof(float));
    hqq_context reference = {.kernel = HQQ_KERNEL_REFERENCE};
    results want = make_results(p);
    int failures = run_all(&want, p, 0, &reference);
    failures +=
        hqq_dequantize(W, p->weight.in_features, HQQ_F32, &p->weight, 0, p->weight.out_features,
                       0, p->weight.in_features, &reference) != HQQ_OK;
    for (int kernel = HQQ_KERNEL_DIRECT; kernel <= (int)LAST_KERNEL && !failures; kernel++) {
        hqq_context context = {.isa = isa, .kernel = (hqq_kernel)kernel};
        hqq_context backwards = {
            .isa = isa, .kernel = (hqq_kernel)kernel, .parallel_for = backwards_for};
        results got = make_results(p), again = make_results(p);
        failures += run_all(&got, p, 1, &context);
        if (!failures) failures += compare_y_and_dx(&got, &want, p, W, (hqq_kernel)kernel);
        if (!failures) failures += compare_dA_and_dB(&got, &want, p, (hqq_kernel)kernel);
        /* xa recomputed from x, and chunks in another order: the same bits */
        failures += run_all(&again, p, 0, &backwards);
        size_t MN = (size_t)(p->M * p->weight.out_features * hqq_dtype_bytes(p->dtype));
        size_t NR =
            (size_t)(p->weight.out_features * p->lora.rank * hqq_dtype_bytes(p->lora.dtype));
        if (!failures &&
            (memcmp(got.y, again.y, MN) != 0 || memcmp(got.dB, again.dB, NR) != 0)) {
            fprintf(stderr, "y or dB do not repeat bitwise; kernel %d\n", kernel);
            print_weight(&p->weight);
            failures++;
        }
        free_results(&got);
        free_results(&again);
    }
    free(W);
    free_results(&want);
    return failures;
}

static int check_shapes(hqq_isa isa)
{
    static const struct {
        int64_t N, K, G;
    } weights[] = {{64, 64, 32}, {48, 160, 16}, {20, 70, 35}, {1, 64, 64},
                   {128, 8, 8},  {33, 27, 9},   {67, 61, 61}, {16, 24, 64}};
    static const int64_t rows[] = {1, 3, 8, 17, 40}, ranks[] = {1, 3, 16, 64, 256};
    uint64_t state = 4711;
    int failures = 0;
    for (int w = 0; w < 8; w++)
        for (int bits = 0; bits < BIT_WIDTHS; bits++)
            for (int axis = 0; axis < 2 && !failures; axis++) {
                int64_t M = rows[random_bits(&state) % 5], R = ranks[random_bits(&state) % 5];
                problem p =
                    make_problem(&state, M, weights[w].N, weights[w].K, weights[w].G,
                                 all_bits[bits], axis, R, all_dtypes[random_bits(&state) % 3],
                                 all_dtypes[random_bits(&state) % 3]);
                failures += check_problem(&p, isa);
                free_problem(&p);
            }
    return failures;
}

/* Weights that a GPU's small-product kernels take: whole rows and groups, 16-bit scales like x.
 * Row counts on both sides of a tile of 8 and of 32, sums of one chunk and of several, outputs
 * that fill no tile. */
static int check_aligned_shapes(hqq_isa isa)
{
    static const struct {
        int64_t N, K, G;
        int axes; /* 2: both; 1: axis 1 alone, because G does not divide N */
    } weights[] = {{64, 64, 64, 2}, {128, 192, 64, 2}, {72, 320, 64, 1}, {256, 128, 128, 2}};
    static const int64_t rows[] = {1, 8, 9, 33, 64}, ranks[] = {4, 8, 1, 16};
    uint64_t state = 815;
    int failures = 0, turn = 0;
    for (int w = 0; w < 4; w++)
        for (int bits = 0; bits < BIT_WIDTHS; bits++)
            for (int axis = 0; axis < 2 && !failures; axis++) {
                if (hqq_word_bytes(all_bits[bits]) > 1 || axis + weights[w].axes < 2) continue;
                hqq_dtype dtype = turn % 2 ? HQQ_F16 : HQQ_BF16;
                problem p = make_problem(&state, rows[turn % 5], weights[w].N, weights[w].K,
                                         weights[w].G, all_bits[bits], axis, ranks[turn % 4],
                                         dtype, dtype);
                turn++;
                for (int transpose = 0; transpose < 2; transpose++) {
                    hqq_kernel kernel =
                        hqq_choose_kernel(&p.weight, p.M, dtype, transpose, HQQ_ISA_AUTO);
                    /* from 17 rows on a GPU's kernel of many may be the faster one */
                    int many = kernel == HQQ_KERNEL_TILED && p.M > 16 && axis == 1;
                    if (kernel != HQQ_KERNEL_DIRECT && !many) {
                        print_weight(&p.weight);
                        fprintf(stderr, "M %lld: not served by the direct kernels\n",
                                (long long)p.M);
                        failures++;
                    }
                }
                failures += check_problem(&p, isa);
                free_problem(&p);
            }
    return failures;
}

/* Room for the small products below, which an accelerator's library does not make itself. */
static _Alignas(64) char room[1 << 20];

/* Each gradient alone, with only the inputs that it needs, is the gradient of the full call;
 * linear and linear_dgrad are the products without an adapter. */
static int check_parts(hqq_isa isa)
{
    uint64_t state = 11;
    int failures = 0;
    for (int kernel = HQQ_KERNEL_REFERENCE; kernel <= (int)LAST_KERNEL; kernel++) {
        problem p = make_problem(&state, 5, 32, 48, 16, 4, 1, 3, HQQ_BF16, HQQ_F32);
        hqq_context context = {.isa = isa, .kernel = (hqq_kernel)kernel};
        results all = make_results(&p), part = make_results(&p);
        failures += run_all(&all, &p, 1, &context);
        hqq_lora none = {.rank = 0, .dtype = HQQ_F32, .scaling = 1};
        failures += hqq_lora_linear_backward(part.dx, NULL, NULL, p.dy, p.lddy, NULL, 0, NULL,
                                             &p.weight, &p.lora, p.M, p.dtype, room,
                                             sizeof room, &context) != HQQ_OK;
        failures += hqq_lora_linear_backward(NULL, part.dA, NULL, p.dy, p.lddy, p.x, p.ldx,
                                             NULL, &p.weight, &p.lora, p.M, p.dtype, room,
                                             sizeof room, &context) != HQQ_OK;
        failures += hqq_lora_linear_backward(NULL, NULL, part.dB, p.dy, p.lddy, NULL, 0, all.xa,
                                             &p.weight, &p.lora, p.M, p.dtype, room,
                                             sizeof room, &context) != HQQ_OK;
        size_t half = 2, lora = (size_t)hqq_dtype_bytes(p.lora.dtype);
        failures += memcmp(part.dx, all.dx, 5 * 48 * half) != 0;
        failures += memcmp(part.dA, all.dA, 3 * 48 * lora) != 0;
        failures += memcmp(part.dB, all.dB, 32 * 3 * lora) != 0;
        failures += hqq_linear(all.y, p.x, p.ldx, &p.weight, p.bias, p.bias_dtype, p.M, p.dtype,
                               room, sizeof room, &context) != HQQ_OK;
        failures += hqq_lora_linear(part.y, NULL, p.x, p.ldx, &p.weight, p.bias, p.bias_dtype,
                                    &none, p.M, p.dtype, room, sizeof room, &context) != HQQ_OK;
        failures += memcmp(part.y, all.y, 5 * 32 * half) != 0;
        failures += hqq_linear_dgrad(all.dx, p.dy, p.lddy, &p.weight, p.M, p.dtype, room,
                                     sizeof room, &context) != HQQ_OK;
        failures += hqq_lora_linear_backward(part.dx, NULL, NULL, p.dy, p.lddy, NULL, 0, NULL,
                                             &p.weight, &none, p.M, p.dtype, room, sizeof room,
                                             &context) != HQQ_OK;
        failures += memcmp(part.dx, all.dx, 5 * 48 * half) != 0;
        if (failures) fprintf(stderr, "parts differ from the whole, kernel %d\n", kernel);
        free_results(&all);
        free_results(&part);
        free_problem(&p);
        if (failures) return failures;
    }
    return 0;
}

/* An infinity or a NaN in one row of x or dy reaches all that depends on it, and no other
 * row. */
static int check_non_finite(hqq_isa isa)
{
    uint64_t state = 23;
    int failures = 0;
    for (int kernel = HQQ_KERNEL_DIRECT; kernel <= (int)LAST_KERNEL; kernel++) {
        problem p = make_problem(&state, 4, 32, 64, 32, 4, 1, 2, HQQ_F32, HQQ_F32);
        hqq_context context = {.isa = isa, .kernel = (hqq_kernel)kernel};
        results r = make_results(&p);
        ((float *)p.x)[2 * p.ldx + 63] = INFINITY;
        ((float *)p.dy)[1 * p.lddy + 31] = NAN;
        failures += run_all(&r, &p, 1, &context);
        for (int64_t i = 0; i < 4 * 32; i++)
            failures += (isfinite(((float *)r.y)[i]) == 0) != (i / 32 == 2);
        for (int64_t i = 0; i < 4 * 64; i++)
            failures += (isfinite(((float *)r.dx)[i]) == 0) != (i / 64 == 1);
        for (int64_t i = 0; i < 2 * 64; i++) failures += isfinite(((float *)r.dA)[i]) != 0;
        for (int64_t i = 0; i < 32 * 2; i++)
            failures += isfinite(((float *)r.dB)[i]) != 0; /* dB = dy^T xa, and xa has inf */
        if (failures) fprintf(stderr, "non-finite values got lost, kernel %d\n", kernel);
        free_results(&r);
        free_problem(&p);
        if (failures) return failures;
    }
    return 0;
}

static int check_isa(hqq_isa isa)
{
    return check_shapes(isa) + (HQQ_TEST_CUDA ? check_aligned_shapes(isa) : 0) +
           check_parts(isa) + check_non_finite(isa);
}

int main(void)
{
    return for_each_isa(check_isa) != 0;
}

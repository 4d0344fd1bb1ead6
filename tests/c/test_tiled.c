/* The tiled kernel: several blocks and chunks in every direction, all formats, against sums in
 * double; one rounding; every weight in its place; which calls it serves. */
#include "dropout.h"
#include "sample_weight.h"

typedef struct problem {
    hqq_weight weight;
    hqq_lora lora; /* rank 0: none */
    int64_t M, N, K;
    hqq_dtype dtype;
    hqq_isa isa;
    float *W; /* dequantized */
    void *x, *dy, *bias, *A, *B;
} problem;

static const uint64_t seed = 99;

static problem make_problem(uint64_t *state, int64_t M, int64_t N, int64_t K, int64_t G,
                            int nbits, int axis, int64_t R, hqq_dtype dtype, hqq_isa isa)
{
    problem p = {.M = M, .N = N, .K = K, .dtype = dtype, .isa = isa};
    p.weight =
        sample_weight(state, N, K, G, nbits, axis, all_dtypes[random_bits(state) % 3], 0.02f);
    p.W = exact_alloc((size_t)(N * K) * sizeof(float));
    if (hqq_dequantize(p.W, K, HQQ_F32, &p.weight, 0, N, 0, K, NULL) != HQQ_OK) exit(2);
    p.x = random_array(state, M * K, dtype, -1, 1);
    p.dy = random_array(state, M * N, dtype, -1, 1);
    p.bias = M % 2 ? random_array(state, N, HQQ_F32, -1, 1) : NULL;
    p.A = random_array(state, R * K, HQQ_F32, -1, 1);
    p.B = random_array(state, N * R, HQQ_F32, -1, 1);
    p.lora = (hqq_lora){.rank = R,
                        .dtype = HQQ_F32,
                        .A = p.A,
                        .B = p.B,
                        .scaling = -0.5f,
                        .dropout = R % 2 ? 0.25f : 0.0f,
                        .seed = &seed};
    return p;
}

static void free_problem(problem *p)
{
    free_weight(&p->weight);
    free(p->W), free(p->x), free(p->dy), free(p->bias), free(p->A), free(p->B);
}

/* y and dx by the tiled kernel, in parts or not. */
static int solve(void *y, void *dx, const problem *p, hqq_parallel_for_fn parallel_for)
{
    hqq_context context = {
        .kernel = HQQ_KERNEL_TILED, .isa = p->isa, .parallel_for = parallel_for};
    int failed = hqq_lora_linear(y, NULL, p->x, p->K, &p->weight, p->bias, HQQ_F32, &p->lora,
                                 p->M, p->dtype, NULL, 0, &context) != HQQ_OK;
    failed |= hqq_lora_linear_backward(dx, NULL, NULL, p->dy, p->N, NULL, 0, NULL, &p->weight,
                                       &p->lora, p->M, p->dtype, NULL, 0, &context) != HQQ_OK;
    if (failed) fprintf(stderr, "a call failed: %s\n", hqq_last_error());
    return failed;
}

/* A sum in double, and the sum of the sizes of its terms. */
typedef struct sum {
    double value, size;
} sum;

static void add(sum *s, double left, double right)
{
    s->value += left * right;
    s->size += fabs(left * right);
}

static double dropped(const problem *p, int64_t m, int64_t k)
{
    hqq_dropout d = hqq_dropout_make(p->lora.dropout, seed);
    return p->lora.dropout > 0 ? (double)hqq_dropout_factor(&d, (uint64_t)(m * p->K + k)) : 1;
}

/* The inner LoRA products of token m: drop(x) A^T, or dy B. */
static void inner_sums(sum *inner, const problem *p, int64_t m, int forward)
{
    for (int64_t r = 0; r < p->lora.rank; r++) {
        inner[r] = (sum){0};
        for (int64_t k = 0; forward && k < p->K; k++)
            add(&inner[r], (double)hqq_load(p->x, p->dtype, m * p->K + k) * dropped(p, m, k),
                (double)((float *)p->A)[r * p->K + k]);
        for (int64_t n = 0; !forward && n < p->N; n++)
            add(&inner[r], (double)hqq_load(p->dy, p->dtype, m * p->N + n),
                (double)((float *)p->B)[n * p->lora.rank + r]);
    }
}

/* y[m,n] or dx[m,k]: the base product, with LoRA and bias. */
static sum oracle(const problem *p, const sum *inner, int64_t m, int64_t i, int forward)
{
    sum s = {0};
    for (int64_t k = 0; forward && k < p->K; k++)
        add(&s, (double)hqq_load(p->x, p->dtype, m * p->K + k), (double)p->W[i * p->K + k]);
    for (int64_t n = 0; !forward && n < p->N; n++)
        add(&s, (double)hqq_load(p->dy, p->dtype, m * p->N + n), (double)p->W[n * p->K + i]);
    double factor = (double)p->lora.scaling * (forward ? 1 : dropped(p, m, i));
    for (int64_t r = 0; r < p->lora.rank; r++) {
        double outer = forward ? (double)((float *)p->B)[i * p->lora.rank + r]
                               : (double)((float *)p->A)[r * p->K + i];
        s.value += factor * inner[r].value * outer;
        s.size += fabs(factor * inner[r].size * outer);
    }
    if (forward && p->bias) add(&s, 1, (double)((float *)p->bias)[i]);
    return s;
}

/* How far a product of a weight and an input may be off before it is added up: where pairs of
 * bf16 are multiplied, weights are rounded to bf16, with AMX also to fp16; and there fp16 and
 * fp32 are multiplied in parts, but for the smallest products. */
static double term_error(const problem *p)
{
    if (p->isa < HQQ_ISA_AVX512_BF16) return 0;
    if (p->dtype == HQQ_BF16) return 0x1p-8;
    if (p->isa < HQQ_ISA_AMX) return 0;
    return p->dtype == HQQ_F16 ? 0x1p-11 + 0x1p-16 : 0x1p-23;
}

/* One rounding to dtype, and sums in fp32. */
static double tolerance_of(const problem *p, sum want)
{
    double e = p->dtype == HQQ_F32 ? 0x1p-24 : p->dtype == HQQ_F16 ? 0x1p-11 : 0x1p-8;
    double sums = (double)(p->N + p->K + p->lora.rank + 8) * 0x1p-24 * want.size;
    double off = sums + term_error(p) * want.size;
    return off + e * (fabs(want.value) + off) + 0x1p-25; /* fp16's subnormals */
}

static int check_direction(const problem *p, const void *got, int forward)
{
    int64_t width = forward ? p->N : p->K, step = p->M * width > 20000 ? 7 : 1;
    sum inner[8];
    for (int64_t m = 0; m < p->M; m++) {
        inner_sums(inner, p, m, forward);
        for (int64_t i = m % step; i < width; i += step) {
            sum want = oracle(p, inner, m, i, forward);
            double value = (double)hqq_load(got, p->dtype, m * width + i);
            if (fabs(value - want.value) <= tolerance_of(p, want)) continue;
            fprintf(stderr,
                    "%s[%lld,%lld] is %.9g, not %.9g (tolerance %.3g); M %lld, dtype %d\n",
                    forward ? "y" : "dx", (long long)m, (long long)i, value, want.value,
                    tolerance_of(p, want), (long long)p->M, (int)p->dtype);
            print_weight(&p->weight);
            return 1;
        }
    }
    return 0;
}

/* Right, and the same bits when the chunks run backwards. */
static int check_problem(problem *p)
{
    size_t y_bytes = (size_t)(p->M * p->N * hqq_dtype_bytes(p->dtype));
    size_t dx_bytes = (size_t)(p->M * p->K * hqq_dtype_bytes(p->dtype));
    void *y = exact_alloc(y_bytes), *y_again = exact_alloc(y_bytes);
    void *dx = exact_alloc(dx_bytes), *dx_again = exact_alloc(dx_bytes);
    int failures = solve(y, dx, p, NULL) + solve(y_again, dx_again, p, backwards_for);
    if (!failures) failures += check_direction(p, y, 1) + check_direction(p, dx, 0);
    if (memcmp(y, y_again, y_bytes) != 0 || memcmp(dx, dx_again, dx_bytes) != 0) {
        fprintf(stderr, "the order of chunks changes the result\n");
        failures++;
    }
    free(y), free(y_again), free(dx), free(dx_again);
    return failures;
}

/* More than one block and chunk in each direction: of tokens (128; 512 where x is turned; 256),
 * of columns (1024 words; 256, strips of 64), of rows (256, 96; 500, of few tokens from
 * 64 on, of strips 96). */
static int check_blocks(hqq_isa isa)
{
    static const struct {
        int64_t M, N, K, G, R;
        int nbits, axis;
    } cases[] = {
        {7, 12, 2120, 8, 1, 4, 1},    /* columns forward: three blocks in fp32, two in bf16 */
        {270, 40, 48, 16, 3, 4, 1},   /* tokens, with a dropout mask in each chunk */
        {116, 24, 1088, 64, 2, 2, 1}, /* x is too large to be copied whole */
        {5, 1300, 70, 35, 0, 8, 1}, /* rows of dgrad; an odd number of them in the last block */
        {9, 600, 272, 24, 1, 4, 0}, /* columns of dgrad */
        {97, 1100, 64, 8, 1, 4, 0}, /* rows, of more than a few tokens */
        {9, 144, 176, 8, 1, 1, 0},  /* residues of a packed row each, several a block */
        {7, 384, 208, 96, 0, 8, 0}, /* and of more rows than a block has */
        {9, 40, 192, 96, 1, 4, 1},  /* that begin within a group */
        {14, 12, 2240, 320, 1, 2, 1}, /* columns forward in bf16 that do */
        {7, 100, 2112, 48, 2, 4, 1},  /* strips of dgrad, of two blocks of rows */
        {13, 33, 27, 9, 3, 3, 1},     /* slots that begin within rows and lack some */
        {6, 1, 64, 64, 1, 4, 1},      /* one row: the second slot has none */
        /* x is turned: two parts of the tokens, the last panel of each shorter; half a word */
        {545, 12, 35, 35, 2, 4, 1},
        {520, 70, 36, 12, 3, 4, 1},   /* panels (panels.h) forward, too, the last not full */
        {256, 2048, 600, 8, 1, 4, 1}, /* two blocks of panels */
        {48, 12, 2120, 8, 1, 4, 1},   /* columns, as above */
        {64, 600, 48, 24, 1, 4, 0},   /* rows */
        /* cycles of rows that share scales, several in a chunk, a part of one, parts of two */
        {61, 600, 80, 24, 2, 4, 0},
        {61, 384, 80, 96, 1, 8, 0},
        {61, 320, 80, 32, 2, 8, 0},
        {61, 33, 27, 9, 3, 3, 1},      /* slots, as above */
        {129, 16, 130, 26, 0, 8, 1},   /* one slot; panels of two and three vectors */
        {260, 2, 8200, 8, 0, 4, 1},    /* fewer tokens in a part, as K is long */
        {260, 76, 96, 32, 1, 4, 1},    /* panels: a part of one in both passes, a mask */
        {261, 10, 72, 8, 2, 8, 0},     /* rows of panels that are not decoded in pairs */
        {256, 580, 4096, 64, 1, 4, 1}, /* several blocks of panels */
        /* panels of two parts of dgrad in fp32, whose last columns are few: of strips, and not
         */
        {257, 2100, 80, 16, 2, 4, 1},
        {256, 2064, 72, 8, 3, 8, 0},
        {9, 34, 96, 32, 1, 8, 1},    /* bytes in pairs */
        {7, 300, 1056, 32, 1, 8, 1}, /* strips of them, of two blocks of rows */
        {170, 34, 96, 32, 0, 8, 1},  /* and to panels */
        {161, 64, 96, 32, 2, 8, 0},  /* residues to panels, two at a time, the last not full */
        {162, 160, 32, 16, 0, 4, 0},
        {160, 96, 64, 8, 1, 2, 0},
        {161, 32, 64, 16, 0, 1, 0},
    };
    uint64_t state = 41;
    int failures = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int d = 0; d < 3; d++) {
            problem p =
                make_problem(&state, cases[i].M, cases[i].N, cases[i].K, cases[i].G,
                             cases[i].nbits, cases[i].axis, cases[i].R, all_dtypes[d], isa);
            failures += check_problem(&p);
            free_problem(&p);
        }
    return failures;
}

/* extra: tokens more than the few that there are. */
static int check_formats(hqq_isa isa, int64_t extra)
{
    static const int64_t shapes[][3] = {{64, 128, 64}, {30, 65, 13}, {16, 192, 8}};
    uint64_t state = 43;
    int failures = 0;
    for (int s = 0; s < 3; s++)
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int axis = 0; axis < 2; axis++) {
                int64_t M = 1 + random_bits(&state) % 13 + extra, R = random_bits(&state) % 4;
                problem p = make_problem(&state, M, shapes[s][0], shapes[s][1], shapes[s][2],
                                         all_bits[b], axis, R,
                                         all_dtypes[random_bits(&state) % 3], isa);
                failures += check_problem(&p);
                free_problem(&p);
            }
    return failures;
}

/* Scales and zeros in bf16 at axis 0, as x takes them in bf16 (tiled_scaled.h) and sums of dx
 * do (tiled_residues.h): more than eight tokens, two blocks of columns, several cycles of sets
 * in a chunk and in a block, two blocks of rows, an adapter, a bias. */
static int check_scaled(hqq_isa isa)
{
    static const int64_t cases[][6] = {/* M, N, K, G, R, bits */
                                       {13, 256, 96, 32, 3, 4}, {12, 128, 2144, 64, 2, 2},
                                       {17, 192, 64, 64, 0, 8}, {7, 2048, 64, 32, 2, 4},
                                       {26, 640, 64, 32, 1, 1}, {13, 256, 96, 64, 3, 1},
                                       {15, 128, 64, 32, 1, 1}, {9, 128, 1088, 64, 1, 8}};
    uint64_t state = 53;
    int failures = 0;
    for (int i = 0; i < 8; i++)
        for (int done = 0; !done;) { /* until scales are drawn in bf16 */
            const int64_t *c = cases[i];
            problem p =
                make_problem(&state, c[0], c[1], c[2], c[3], (int)c[5], 0, c[4], HQQ_BF16, isa);
            done = p.weight.meta_dtype == HQQ_BF16;
            if (done) failures += check_problem(&p);
            free_problem(&p);
        }
    return failures;
}

/* x and dy = the identity: the products are W, rounded once, bit for bit. */
static int check_identity(hqq_isa isa)
{
    uint64_t state = 47;
    int failures = 0;
    for (int b = 0; b < BIT_WIDTHS; b++)
        for (int d = 0; d < 3; d++) {
            problem p =
                make_problem(&state, 66, 66, 66, 11, all_bits[b], b % 2, 0, all_dtypes[d], isa);
            size_t bytes = (size_t)(66 * 66 * hqq_dtype_bytes(p.dtype));
            void *y = exact_alloc(bytes), *dx = exact_alloc(bytes), *W = exact_alloc(bytes);
            for (int64_t i = 0; i < 66 * 66; i++) {
                hqq_store(p.x, p.dtype, i, i / 66 == i % 66);
                hqq_store(p.dy, p.dtype, i, i / 66 == i % 66);
                hqq_store(W, p.dtype, i % 66 * 66 + i / 66, p.W[i]); /* y = W^T */
            }
            failures += solve(y, dx, &p, NULL) + (memcmp(y, W, bytes) != 0);
            for (int64_t i = 0; i < 66 * 66; i++) hqq_store(W, p.dtype, i, p.W[i]);
            failures += memcmp(dx, W, bytes) != 0;
            free(y), free(dx), free(W);
            free_problem(&p);
        }
    if (failures) fprintf(stderr, "%d products with the identity are not W\n", failures);
    return failures;
}

static int32_t no_gemm(void *C, int64_t ldc, const void *A, int64_t lda, int32_t transpose_a,
                       const void *B, int64_t ldb, int32_t transpose_b, int64_t m, int64_t n,
                       int64_t k, float beta, hqq_dtype dtype, void *gemm_data)
{
    (void)C, (void)ldc, (void)A, (void)lda, (void)transpose_a, (void)B, (void)ldb;
    (void)transpose_b, (void)m, (void)n, (void)k, (void)beta, (void)dtype, (void)gemm_data;
    return 1;
}

static int32_t no_threads(int64_t begin, int64_t end, int64_t grain,
                          void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)begin, (void)end, (void)grain, (void)fn, (void)data;
    return 1;
}

/* Few tokens go to the direct kernels, and more never come back to them; fp32 stays with the
 * tiles wherever there is AVX2, and needs no GEMM there. A parallel_for that fails is reported.
 */
static int check_choice(hqq_isa isa)
{
    uint64_t state = 53;
    problem p = make_problem(&state, 40, 96, 64, 32, 4, 1, 0, HQQ_F32, isa);
    int failures = 0;
    for (int d = 0; d < 3; d++)
        for (int transpose = 0; transpose < 2; transpose++) {
            hqq_kernel last = HQQ_KERNEL_DIRECT;
            failures += hqq_choose_kernel(&p.weight, 1, all_dtypes[d], transpose, isa) != last;
            for (int64_t M = 2; M < 600; M++) {
                hqq_kernel now = hqq_choose_kernel(&p.weight, M, all_dtypes[d], transpose, isa);
                failures += now != last && now == HQQ_KERNEL_DIRECT;
                failures += now == HQQ_KERNEL_TILED && last == HQQ_KERNEL_BLOCKED;
                last = now;
            }
            if (isa >= HQQ_ISA_AVX2 && all_dtypes[d] != HQQ_BF16)
                failures += last != HQQ_KERNEL_TILED;
        }
    hqq_context context = {.isa = isa, .gemm = no_gemm};
    float y[40 * 96];
    hqq_status status =
        hqq_linear(y, p.x, p.K, &p.weight, NULL, HQQ_F32, p.M, HQQ_F32, NULL, 0, &context);
    failures += status != (isa >= HQQ_ISA_AVX2 ? HQQ_OK : HQQ_CALLBACK);
    context = (hqq_context){.isa = isa, .kernel = HQQ_KERNEL_TILED, .parallel_for = no_threads};
    failures += hqq_linear(y, p.x, p.K, &p.weight, NULL, HQQ_F32, p.M, HQQ_F32, NULL, 0,
                           &context) != HQQ_CALLBACK;
    if (failures) fprintf(stderr, "%d choices are not as they should be\n", failures);
    free_problem(&p);
    return failures;
}

static int check_isa(hqq_isa isa)
{
    return check_blocks(isa) + check_formats(isa, 0) + check_formats(isa, 128) +
           check_formats(isa, 512) + check_scaled(isa) + check_identity(isa) +
           check_choice(isa);
}

int main(void)
{
    return for_each_isa(check_isa) != 0;
}

/* Quantizing for columns that matter more: against a plain solver in double, element by element
 * from the formula; the same bytes on every instruction set and in every order of work; and
 * where importance makes no difference, those without it. */
#include "quantized_sample.h"

typedef struct shape {
    int64_t N, K, G;
} shape;

/* Groups within rows, whole rows, across rows (K below G, no multiple of it, or itself no
 * multiple of a vector), longer than a run and than a tile. At axis 0 some divide N. */
static const shape shapes[] = {
    {1, 1, 1},         {3, 5, 5},      {7, 9, 3},         {5, 64, 16},  {48, 64, 64},
    {9, 33, 11},       {33, 31, 31},   {2, 13, 26},       {1, 70, 35},  {64, 96, 32},
    {257, 3, 3},       {70, 130, 26},  {12, 96, 36},      {40, 24, 64}, {2, 1700, 850},
    {1, 20000, 20000}, {9, 1000, 600}, {3, 24000, 18000}, {40, 256, 64}};

/* Up to 1 and down to 1e-6 of it. */
static float *random_importance(uint64_t *state, int64_t K)
{
    float *importance = random_array(state, K, HQQ_F32, -6.0f, 0.0f);
    for (int64_t k = 0; k < K; k++) importance[k] = powf(10.0f, importance[k]);
    return importance;
}

/* ---- the solver in double ---------------------------------------------------------------- */

typedef struct plain_group {
    const float *w;
    double *share;
    double scale, zero; /* w ~ (q - zero) * scale */
    int n, levels;
} plain_group;

static double plain_code(const plain_group *p, int i)
{
    return rint(clip((double)p->w[i] / p->scale + p->zero, p->levels));
}

/* Sum of share * |error|^power. */
static double plain_error(const plain_group *p, double power)
{
    double sum = 0;
    for (int i = 0; i < p->n; i++) {
        double error = fabs((double)p->w[i] - (plain_code(p, i) - p->zero) * p->scale);
        sum += p->share[i] * pow(error, power);
    }
    return sum;
}

/* fmin and fmax over an array are an internal error of GCC 12 for AArch64. */
static double smaller(double a, double b)
{
    return a < b ? a : b;
}
static double larger(double a, double b)
{
    return a > b ? a : b;
}

static void plain_shares(plain_group *p, const float *importance)
{
    double largest = 0, sum = 0;
    for (int i = 0; i < p->n; i++) largest = larger(largest, (double)importance[i]);
    for (int i = 0; i < p->n; i++) {
        p->share[i] = largest > 0 ? (double)importance[i] / largest : 1;
        sum += p->share[i];
    }
    for (int i = 0; i < p->n; i++) p->share[i] = fmax(p->share[i], 0.01 * sum / p->n);
}

static void plain_search(plain_group *p, double low, double step)
{
    plain_group best = *p;
    double least = INFINITY;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            p->scale = step * (1 - 0.15 * (i + j) / p->levels);
            p->zero = -(low + 0.15 * i * step) / p->scale;
            double error = plain_error(p, 3);
            if (!(error < least)) continue;
            least = error;
            best = *p;
        }
    *p = best;
}

/* The line w ~ scale * q - scale * zero through the codes. */
static void plain_least_squares(plain_group *p)
{
    double m = 0, q = 0, w = 0, qq = 0, qw = 0;
    for (int i = 0; i < p->n; i++) {
        double code = plain_code(p, i), share = p->share[i];
        m += share;
        q += share * code;
        w += share * (double)p->w[i];
        qq += share * code * code;
        qw += share * code * (double)p->w[i];
    }
    double variance = m * qq - q * q, slope = (m * qw - q * w) / variance;
    if (!(variance > 1e-6 * m * m && slope > 0.001 * p->scale)) return;
    p->scale = slope;
    p->zero = (q - w / slope) / m;
}

static void plain_solve(plain_group *p, int nbits)
{
    double low = INFINITY, high = -INFINITY;
    int even = 1; /* all count the same: as without importance */
    for (int i = 0; i < p->n; i++) {
        even &= p->share[i] == 1;
        low = smaller(low, (double)p->w[i]);
        high = larger(high, (double)p->w[i]);
    }
    int searches = nbits != 1 && (nbits != 3 || !even);
    double step = (high - low) / p->levels;
    p->scale = step;
    p->zero = -low / step;
    if (searches) plain_search(p, low, step);
    for (int round = 0; round < (searches ? 4 : 8); round++) plain_least_squares(p);
}

/* ---- against it -------------------------------------------------------------------------- */

/* Fewer elements than codes are fitted without any error that could be compared. */
enum { FEWEST = 10, LONGEST = 1000 };

/* Where rounding turns one code of a group, the rounds may end elsewhere: one group in fifty is
 * allowed to, and half a percent of the error of all. */
static int compare_with_plain(const result *r, const float *W, const float *importance)
{
    const hqq_layout *l = &r->layout;
    float w[LONGEST], m[LONGEST];
    double share[LONGEST], ours = 0, plain = 0;
    int64_t off = 0;
    for (int64_t g = 0; g < l->groups; g++) {
        for (int64_t i = 0; i < l->G; i++) {
            w[i] = W[element_of(l, g, i)];
            m[i] = importance[element_of(l, g, i) % l->K];
        }
        plain_group p = {
            .w = w, .share = share, .n = (int)l->G, .levels = hqq_max_code(l->nbits)};
        plain_shares(&p, m);
        plain_solve(&p, l->nbits);
        double scale = (double)((const float *)r->weight.scale)[g];
        double zero = (double)((const float *)r->weight.zero)[g];
        off += !(fabs(scale / p.scale - 1) <= 1e-3 && fabs(zero - p.zero) <= 1e-3 * p.levels);
        plain += plain_error(&p, 2);
        p.scale = scale;
        p.zero = zero;
        ours += plain_error(&p, 2);
    }
    if (off * 50 <= l->groups && ours <= 1.005 * plain) return 0;
    fprintf(stderr, "%lld of %lld groups differ; error %g, in double %g\n", (long long)off,
            (long long)l->groups, ours, plain);
    return 1;
}

static int check_format(const shape *s, int nbits, int axis, hqq_isa isa, uint64_t *state)
{
    hqq_weight w = {.out_features = s->N,
                    .in_features = s->K,
                    .group_size = s->G,
                    .nbits = nbits,
                    .axis = axis,
                    .meta_dtype = HQQ_F32};
    hqq_quantize_options without = hqq_quantize_defaults(), with = without;
    hqq_context plain = {.isa = HQQ_ISA_PORTABLE};
    hqq_context context = {.isa = isa, .parallel_for = backwards_for};
    float *W = random_array(state, s->N * s->K, HQQ_F32, -0.1f, 0.12f);
    float *importance = random_importance(state, s->K);
    with.importance = importance;
    result expected = quantize(W, HQQ_F32, w, &with, &plain);
    result got = quantize(W, HQQ_F32, w, &with, &context);
    int failed = check_result(&got, W, HQQ_F32, 0);
    if (!same_result(&expected, &got)) {
        failed = 1;
        fprintf(stderr, "%s differs from portable\n", hqq_isa_name(isa));
    }
    if (s->G >= FEWEST && s->G <= LONGEST) failed |= compare_with_plain(&got, W, importance);
    int same = s->K == 1 || s->G == 1 || (axis == 0 && s->N % s->G == 0);
    result none = quantize(W, HQQ_F32, w, &without, &context);
    if (same && !same_result(&none, &got)) {
        failed = 1;
        fprintf(stderr, "one column a group, and importance makes a difference\n");
    }
    static const float equal[] = {0.0f, 3.0f, 1e-30f, 1e-42f, FLT_MAX};
    size_t equals = s->K > 1000 ? 1 : sizeof equal / sizeof *equal;
    for (size_t i = 0; i < equals && !failed; i++) {
        for (int64_t k = 0; k < s->K; k++) importance[k] = equal[i];
        result even = quantize(W, HQQ_F32, w, &with, &context);
        if (!same_result(&none, &even)) {
            failed = 1;
            fprintf(stderr, "importance %g everywhere makes a difference\n", (double)equal[i]);
        }
        free_weight(&even.weight);
    }
    if (failed) print_weight(&w);
    free_weight(&expected.weight);
    free_weight(&got.weight);
    free_weight(&none.weight);
    free(importance);
    free(W);
    return failed;
}

static int check_formats(hqq_isa isa)
{
    int quick = getenv("HQQLORA_TEST_QUICK") != NULL;
    uint64_t state = 88172645463325252u;
    int failures = 0;
    for (size_t s = quick; s < sizeof shapes / sizeof *shapes; s += quick ? 4 : 1) {
        if (quick && shapes[s].K > 1000) continue;
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int axis = 0; axis < 2; axis++)
                failures += check_format(&shapes[s], all_bits[b], axis, isa, &state);
    }
    return failures;
}

/* Importance from 0 over the smallest to the largest number, on weights of any size: finite, as
 * on every instruction set. */
static int check_extremes(hqq_isa isa)
{
    enum { N = 6, K = 64, G = 32 };
    static const float values[] = {0.0f, 1e-45f, FLT_MIN, 1e-20f, 1.0f, 1e20f, FLT_MAX};
    static const float sizes[] = {1e-38f, 1e-6f, 1.0f, 1e38f};
    enum { VALUES = sizeof values / sizeof *values };
    uint64_t state = 362436069u;
    int failures = 0;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int m = 0; m < 3; m++)
            for (int repeat = 0; repeat < 8; repeat++) {
                float importance[K];
                float *W = random_array(&state, N * K, HQQ_F32, -1.0f, 1.0f);
                for (int i = 0; i < N * K; i++) /* flat groups at first */
                    W[i] = sizes[s] * (i < K ? 1.0f : W[i]);
                for (int k = 0; k < K; k++)
                    importance[k] = values[random_bits(&state) % (repeat % 2 ? 2 : VALUES)];
                hqq_weight w = {.out_features = N,
                                .in_features = K,
                                .group_size = G,
                                .nbits = all_bits[repeat % BIT_WIDTHS],
                                .axis = 1,
                                .meta_dtype = all_dtypes[m]};
                hqq_quantize_options options = hqq_quantize_defaults();
                options.importance = importance;
                hqq_context plain = {.isa = HQQ_ISA_PORTABLE}, context = {.isa = isa};
                result expected = quantize(W, HQQ_F32, w, &options, &plain);
                result got = quantize(W, HQQ_F32, w, &options, &context);
                int failed = check_result(&got, W, HQQ_F32, 0);
                if (!same_result(&expected, &got)) {
                    failed = 1;
                    fprintf(stderr, "%s differs from portable\n", hqq_isa_name(isa));
                }
                if (failed) {
                    print_weight(&w);
                    fprintf(stderr, "weights of %g\n", (double)sizes[s]);
                }
                failures += failed;
                free(W);
                free_weight(&expected.weight);
                free_weight(&got.weight);
            }
    return failures;
}

int main(void)
{
    int failures = for_each_isa(check_formats);
    failures += for_each_isa(check_extremes);
    return failures != 0;
}

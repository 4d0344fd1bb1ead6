/* The direct kernels against sums in double over the dequantized weight: every format,
 * instruction set and dtype, M from 1 to 40, odd shapes, strided rows, with and without an
 * addend; every code at its place; the same bits whatever the order of the chunks. */
#include "cpu/direct_dgrad.h"
#include "cpu/direct_linear.h"
#include "cpu/reference.h"
#include "sample_weight.h"

typedef enum direction { FORWARD, DGRAD } direction;

/* One product: y [M,outs] = x [M,ins] times W or its transpose, + addend. */
typedef struct problem {
    direction pass;
    const hqq_weight *weight;
    hqq_dtype dtype;
    hqq_isa isa;
    int64_t M, ins, outs, ldx;
    void *x;       /* [M,ldx], NaN between the rows */
    float *addend; /* [M,outs] or NULL */
    void *y;
} problem;

static double unit_roundoff(hqq_dtype dtype)
{
    return dtype == HQQ_F32 ? 0x1p-24 : dtype == HQQ_F16 ? 0x1p-11 : 0x1p-8;
}

static problem make_problem(uint64_t *state, direction pass, const hqq_weight *w,
                            hqq_dtype dtype, hqq_isa isa, int64_t M)
{
    problem p = {.pass = pass,
                 .weight = w,
                 .dtype = dtype,
                 .isa = isa,
                 .M = M,
                 .ins = pass == FORWARD ? w->in_features : w->out_features,
                 .outs = pass == FORWARD ? w->out_features : w->in_features};
    p.ldx = p.ins + random_bits(state) % 3;
    p.x = exact_alloc((size_t)(((M - 1) * p.ldx + p.ins) * hqq_dtype_bytes(dtype)));
    for (int64_t i = 0; i < (M - 1) * p.ldx + p.ins; i++)
        hqq_store(p.x, dtype, i, i % p.ldx < p.ins ? random_float(state, -1, 1) : NAN);
    if (random_bits(state) % 2) p.addend = random_array(state, M * p.outs, HQQ_F32, -1, 1);
    p.y = exact_alloc((size_t)(M * p.outs * hqq_dtype_bytes(dtype)));
    for (int64_t i = 0; i < M * p.outs; i++) hqq_store(p.y, dtype, i, NAN);
    return p;
}

static void free_problem(problem *p)
{
    free(p->x);
    free(p->addend);
    free(p->y);
}

static hqq_status solve(problem *p, hqq_parallel_for_fn parallel_for)
{
    hqq_context context = {.parallel_for = parallel_for};
    size_t bytes = p->pass == FORWARD ? hqq_direct_linear_workspace(p->weight, p->M, p->dtype)
                                      : hqq_direct_dgrad_workspace(p->weight, p->M, p->dtype);
    void *workspace = aligned_alloc(64, bytes);
    memset(workspace, 0xff, bytes); /* NaN */
    hqq_status status = (p->pass == FORWARD ? hqq_direct_linear : hqq_direct_dgrad)(
        p->y, p->x, p->ldx, p->weight, p->addend, p->M, p->dtype, workspace, p->isa, &context);
    free(workspace);
    return status;
}

static void report(const problem *p, int64_t m, int64_t out, double got, double expected)
{
    print_weight(p->weight);
    fprintf(stderr, "%s, %s, dtype %d, M %lld%s: [%lld,%lld] is %.9g, expected %.9g\n",
            p->pass == FORWARD ? "forward" : "dgrad", hqq_isa_name(p->isa), (int)p->dtype,
            (long long)p->M, p->addend ? ", addend" : "", (long long)m, (long long)out, got,
            expected);
}

/* |error| <= (what summing in fp32 and rounding the weights may do) * sum |x| |W| + the
 * rounding of the output. W: dequantized, [N,K]. */
static int check_values(const problem *p, const float *W)
{
    double weight_error = p->dtype == HQQ_BF16 ? 0x1p-8 : 0;
    double smallest =
        p->dtype == HQQ_F16 ? 0x1p-25 : 0x1p-126; /* where outputs are subnormal */
    double sum_error = (double)(p->ins + 4) * 0x1p-24 + weight_error;
    int64_t K = p->weight->in_features;
    for (int64_t m = 0; m < p->M; m++)
        for (int64_t o = 0; o < p->outs; o++) {
            double sum = p->addend ? (double)p->addend[m * p->outs + o] : 0, size = fabs(sum);
            for (int64_t i = 0; i < p->ins; i++) {
                double w = (double)(p->pass == FORWARD ? W[o * K + i] : W[i * K + o]);
                double product = (double)hqq_load(p->x, p->dtype, m * p->ldx + i) * w;
                sum += product;
                size += fabs(product);
            }
            double got = (double)hqq_load(p->y, p->dtype, m * p->outs + o);
            double bound = sum_error * size +
                           unit_roundoff(p->dtype) * (fabs(sum) + sum_error * size) + smallest;
            if (fabs(got - sum) <= bound) continue;
            report(p, m, o, got, sum);
            return 1;
        }
    return 0;
}

static int check_problem(uint64_t *state, direction pass, const hqq_weight *w, const float *W,
                         hqq_dtype dtype, hqq_isa isa, int64_t M)
{
    problem p = make_problem(state, pass, w, dtype, isa, M);
    size_t bytes = (size_t)(M * p.outs * hqq_dtype_bytes(dtype));
    int failed = solve(&p, NULL) != HQQ_OK || check_values(&p, W);
    void *first = p.y;
    p.y = exact_alloc(bytes);
    if (!failed && (solve(&p, backwards_for) != HQQ_OK || memcmp(first, p.y, bytes) != 0)) {
        fprintf(stderr, "the order of the chunks changes the result\n");
        report(&p, 0, 0, NAN, NAN);
        failed = 1;
    }
    free(first);
    free_problem(&p);
    return failed;
}

static float *dequantized(const hqq_weight *w)
{
    float *W = exact_alloc((size_t)(w->out_features * w->in_features) * sizeof(float));
    hqq_reference_dequantize(W, w->in_features, HQQ_F32, w, 0, w->out_features, 0,
                             w->in_features);
    return W;
}

typedef struct shape {
    int64_t N, K, G;
} shape;

static const shape shapes[] = {{1, 1, 1},     {3, 5, 5},      {7, 33, 3},     {16, 64, 64},
                               {10, 130, 65}, {12, 70, 20},   {6, 256, 128},  {33, 31, 31},
                               {64, 128, 64}, {40, 257, 257}, {8, 1100, 8},   {96, 96, 32},
                               {32, 640, 16}, {128, 192, 64}, {300, 130, 30}, {24, 2112, 64},
                               {64, 576, 32}, {256, 64, 256}, {6, 4416, 64},  {60, 128, 30}};

static int check_formats(hqq_isa isa)
{
    static const int64_t rows[] = {1, 2, 3, 4, 5, 8, 16, 17, 40};
    uint64_t state = 2463534242u;
    int failures = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int axis = 0; axis < 2; axis++) {
                const shape *f = &shapes[s];
                hqq_dtype meta = all_dtypes[random_bits(&state) % 3];
                hqq_weight w =
                    sample_weight(&state, f->N, f->K, f->G, all_bits[b], axis, meta, 0.01f);
                float *W = dequantized(&w);
                for (int d = 0; d < 3; d++)
                    for (direction pass = FORWARD; pass <= DGRAD; pass++)
                        for (int i = 0; i < 2; i++) {
                            int64_t M =
                                rows[random_bits(&state) % (sizeof rows / sizeof *rows)];
                            failures +=
                                check_problem(&state, pass, &w, W, all_dtypes[d], isa, M);
                        }
                free(W);
                free_weight(&w);
            }
    return failures;
}

/* Whether a and b, of dtype, are equal or neighbours. */
static int within_one_unit(const void *a, const void *b, hqq_dtype dtype)
{
    int64_t x, y;
    if (dtype == HQQ_F32) {
        int32_t u, v;
        memcpy(&u, a, 4);
        memcpy(&v, b, 4);
        x = u < 0 ? -(int64_t)(u & 0x7fffffff) : u;
        y = v < 0 ? -(int64_t)(v & 0x7fffffff) : v;
    } else {
        int16_t u, v;
        memcpy(&u, a, 2);
        memcpy(&v, b, 2);
        x = u < 0 ? -(int64_t)(u & 0x7fff) : u;
        y = v < 0 ? -(int64_t)(v & 0x7fff) : v;
    }
    return x - y <= 1 && y - x <= 1;
}

/* x = the identity: the product is W, whose every element is then in its place. */
static int check_identity(direction pass, const hqq_weight *w, hqq_dtype dtype, hqq_isa isa)
{
    uint64_t state = 1;
    problem p = make_problem(&state, pass, w, dtype, isa,
                             pass == FORWARD ? w->in_features : w->out_features);
    free(p.addend);
    p.addend = NULL;
    for (int64_t m = 0; m < p.M; m++)
        for (int64_t i = 0; i < p.ins; i++) hqq_store(p.x, dtype, m * p.ldx + i, m == i);
    int failed = solve(&p, NULL) != HQQ_OK;
    for (int64_t m = 0; m < p.M && !failed; m++)
        for (int64_t o = 0; o < p.outs && !failed; o++) {
            char expected[4];
            float value = pass == FORWARD ? hqq_reference_element(w, o, m)
                                          : hqq_reference_element(w, m, o);
            hqq_store(expected, dtype, 0, value);
            if (within_one_unit(hqq_at(p.y, dtype, m * p.outs + o), expected, dtype)) continue;
            report(&p, m, o, (double)hqq_load(p.y, dtype, m * p.outs + o),
                   (double)hqq_load(expected, dtype, 0));
            failed = 1;
        }
    free_problem(&p);
    return failed;
}

static int check_identities(hqq_isa isa)
{
    static const shape few[] = {{64, 128, 64}, {30, 65, 13}, {128, 64, 32}, {16, 192, 8}};
    uint64_t state = 19;
    int failures = 0;
    for (size_t s = 0; s < sizeof few / sizeof *few; s++)
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int way = 0; way < 3; way++) { /* axis 0 in two ways, by the zeros' dtype */
                hqq_weight w = sample_weight(&state, few[s].N, few[s].K, few[s].G, all_bits[b],
                                             way % 2, way == 2 ? HQQ_BF16 : HQQ_F32, 1.0f);
                for (int d = 0; d < 3; d++)
                    for (direction pass = FORWARD; pass <= DGRAD; pass++)
                        failures += check_identity(pass, &w, all_dtypes[d], isa);
                free_weight(&w);
            }
    return failures;
}

int main(void)
{
    int failures = for_each_isa(check_formats);
    failures += for_each_isa(check_identities);
    return failures != 0;
}

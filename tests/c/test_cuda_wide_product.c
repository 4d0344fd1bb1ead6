/* Products of many tokens on the tensor cores of compute capability 9.0: several tiles and
 * chunks in every direction, all formats that it serves, against sums in double; every weight
 * in its place; memory of any alignment; when it is chosen. */
#include "control.h"
#include "sample_weight.h"

enum { COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76 }; /* CUDA's names */

static _Alignas(64) char room[4 << 20];

typedef struct problem {
    hqq_weight weight;
    int64_t M, N, K, ld; /* ld: elements beyond a row of the input */
    hqq_dtype dtype;
    int transpose, offset; /* offset: elements before the input and the output */
    float *W;              /* dequantized */
    void *in, *bias;
} problem;

static int64_t length_of(const problem *p)
{
    return p->transpose ? p->N : p->K;
}

static int64_t outputs_of(const problem *p)
{
    return p->transpose ? p->K : p->N;
}

static int expect(int holds, const char *what)
{
    if (!holds) fprintf(stderr, "not so: %s\n", what);
    return !holds;
}

static problem make_problem(uint64_t *state, int64_t M, int64_t N, int64_t K, int64_t G,
                            int nbits, hqq_dtype dtype, int transpose)
{
    problem p = {.M = M, .N = N, .K = K, .dtype = dtype, .transpose = transpose};
    p.weight = sample_weight(state, N, K, G, nbits, 1, dtype, 0.02f);
    p.W = exact_alloc((size_t)(N * K) * sizeof(float));
    if (hqq_dequantize(p.W, K, HQQ_F32, &p.weight, 0, N, 0, K, NULL) != HQQ_OK) exit(2);
    return p;
}

static void free_problem(problem *p)
{
    free_weight(&p->weight);
    free(p->W), free(p->in), free(p->bias);
}

static const void *input_of(const problem *p)
{
    return (const char *)p->in + p->offset * hqq_dtype_bytes(p->dtype);
}

/* The product into `out`, which has `offset` elements before it. */
static int solve(void *out, const problem *p, hqq_kernel kernel)
{
    hqq_context context = {.kernel = kernel};
    void *to = (char *)out + p->offset * hqq_dtype_bytes(p->dtype);
    int64_t ld = length_of(p) + p->ld;
    hqq_status status = p->transpose
                            ? hqq_linear_dgrad(to, input_of(p), ld, &p->weight, p->M, p->dtype,
                                               room, sizeof room, &context)
                            : hqq_linear(to, input_of(p), ld, &p->weight, p->bias, HQQ_F32,
                                         p->M, p->dtype, room, sizeof room, &context);
    if (status != HQQ_OK) fprintf(stderr, "a call failed: %s\n", hqq_last_error());
    return status != HQQ_OK;
}

/* W is rounded to dtype twice, as q - z and as their product with s; sums are fp32; what is
 * added is rounded once before, and all of it once. */
static double tolerance_of(const problem *p, double value, double size, double added)
{
    double e = p->dtype == HQQ_F16 ? 0x1p-11 : 0x1p-8;
    double off = (2.1 * e + (double)length_of(p) * 0x1p-24) * size + e * fabs(added);
    return off + e * (fabs(value) + off) + 0x1p-25; /* fp16's subnormals */
}

static int check_against_sums(const problem *p, const void *out)
{
    int64_t O = outputs_of(p), L = length_of(p);
    for (int64_t m = 0; m < p->M; m++)
        for (int64_t o = m % 5; o < O; o += p->M > 40 ? 5 : 1) {
            double value = 0, size = 0;
            for (int64_t i = 0; i < L; i++) {
                double w = (double)p->W[p->transpose ? i * p->K + o : o * p->K + i];
                double x = (double)hqq_load(input_of(p), p->dtype, m * (L + p->ld) + i);
                value += x * w;
                size += fabs(x) * (fabs(w) + 0.02); /* a weight near 0 is a difference */
            }
            double added = p->bias ? (double)((float *)p->bias)[o] : 0;
            double got = (double)hqq_load(out, p->dtype, p->offset + m * O + o);
            double tolerance = tolerance_of(p, value + added, size, added);
            if (fabs(got - value - added) <= tolerance) continue;
            fprintf(stderr, "[%lld,%lld] is %.9g, not %.9g (tolerance %.3g); M %lld, pass %d\n",
                    (long long)m, (long long)o, got, value + added, tolerance, (long long)p->M,
                    p->transpose);
            print_weight(&p->weight);
            return 1;
        }
    return 0;
}

/* Right, twice with the same bits, and nothing written before it. */
static int check_problem(problem *p, uint64_t *state)
{
    int64_t O = outputs_of(p), L = length_of(p), elements = p->M * O + p->offset;
    size_t bytes = (size_t)(elements * hqq_dtype_bytes(p->dtype));
    p->in = random_array(state, p->M * (L + p->ld) - p->ld + p->offset, p->dtype, -1, 1);
    void *out = random_array(state, elements, p->dtype, 3, 4), *again = exact_alloc(bytes);
    memcpy(again, out, bytes);
    int failures = solve(out, p, HQQ_KERNEL_TILED) + solve(again, p, HQQ_KERNEL_TILED);
    if (!failures) failures = check_against_sums(p, out);
    if (memcmp(out, again, bytes) != 0) {
        fprintf(stderr, "it does not repeat bitwise\n");
        failures++;
    }
    for (int64_t i = 0; i < p->offset; i++) failures += hqq_load(out, p->dtype, i) < 3;
    free(out), free(again);
    return failures;
}

/* Tiles are of 256 outputs and 128 tokens, or 64 where there are no more; chunks of 64, with
 * four of them in shared memory; eight tiles of tokens come together. */
static int check_tiles(void)
{
    static const struct {
        int64_t M, N, K, G;
        int nbits;
    } cases[] = {
        {1, 64, 64, 64, 4},     /* a part of a tile; one chunk */
        {130, 512, 128, 64, 4}, /* two tiles each */
        {9, 16, 640, 64, 4},    /* eight byte rows; ten chunks forward */
        {129, 528, 320, 64, 4}, /* the last tile of few outputs, both ways */
        {3, 1040, 192, 192, 4}, /* long groups; seventeen chunks of dgrad, the last a part */
        {5, 80, 384, 128, 4},   /* groups of two chunks */
        {5, 80, 1344, 192, 4},  /* parts of the reduction that begin within a group */
        {1100, 16, 64, 64, 4},  /* nine tiles of tokens */
        {70, 264, 192, 64, 8},  /* one slot */
        {70, 288, 256, 128, 2}, /* four */
        {70, 576, 192, 64, 1},  /* eight; the last octets of a tile are none */
        {17, 2112, 64, 64, 1},
        {6, 40, 320, 64, 8},
        {33, 1056, 64, 64, 2},
        /* the same for 128 tokens, or for 64 in clusters */
        {66, 16, 640, 64, 4},
        {65, 1040, 192, 192, 4},
        {66, 80, 1344, 192, 4},
        {64, 1040, 768, 64, 8},
        {31, 2080, 768, 128, 2},
        {64, 4160, 832, 64, 1},
    };
    uint64_t state = 61;
    int failures = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int way = 0; way < 4; way++) {
            problem p = make_problem(&state, cases[i].M, cases[i].N, cases[i].K, cases[i].G,
                                     cases[i].nbits, way & 1 ? HQQ_F16 : HQQ_BF16, way / 2);
            if (way == 0) p.bias = random_array(&state, p.N, HQQ_F32, -1, 1);
            failures += check_problem(&p, &state);
            free_problem(&p);
        }
    return failures;
}

/* Rows of the input that are not aligned, or not one behind the other; an output that is not.
 */
static int check_memory(void)
{
    static const struct {
        int64_t ld;
        int offset;
    } cases[] = {{8, 0}, {3, 0}, {0, 1}, {5, 3}, {0, 8}};
    uint64_t state = 67;
    int failures = 0;
    for (int i = 0; i < 5; i++)
        for (int way = 0; way < 4; way++) {
            const int64_t M = way < 2 ? 19 : 70;
            problem p = make_problem(&state, M, 144, 192, 64, 4, HQQ_BF16, way % 2);
            p.ld = cases[i].ld, p.offset = cases[i].offset;
            if (way % 2 == 0) p.bias = random_array(&state, p.N, HQQ_F32, -1, 1);
            failures += check_problem(&p, &state);
            free_problem(&p);
        }
    return failures;
}

static uint64_t clusters(void)
{
    hqqlora_emulated_counts counts;
    hqqlora_emulated_get_counts(&counts);
    return counts.clusters;
}

/* Few tokens with a long reduction: its splits are clusters, of two and of three blocks, of
 * which some have no tokens to add up; captured as a graph. More tokens have none. */
static int check_clusters(void)
{
    static const struct {
        int64_t M, K;
        int clusters;
    } cases[] = {{1, 2112, 1}, {2, 768, 1}, {50, 768, 1}, {64, 2112, 1}, {65, 768, 0}};
    uint64_t state = 73;
    int failures = 0;
    for (int i = 0; i < 10; i++) {
        const int way = i % 2, at = i / 2;
        problem p = make_problem(&state, cases[at].M, way ? cases[at].K : 80,
                                 way ? 64 : cases[at].K, 64, way ? 8 : 4, HQQ_BF16, way);
        const uint64_t before = clusters();
        failures += check_problem(&p, &state);
        failures += expect((clusters() > before) == cases[at].clusters, "it has clusters");

        const size_t bytes = (size_t)(p.M * outputs_of(&p) * 2);
        void *out = exact_alloc(bytes), *replayed = exact_alloc(bytes);
        failures += solve(out, &p, HQQ_KERNEL_TILED);
        hqqlora_emulated_begin_capture();
        failures += solve(replayed, &p, HQQ_KERNEL_TILED);
        hqqlora_emulated_graph *graph = hqqlora_emulated_end_capture();
        memset(replayed, 0xff, bytes);
        failures +=
            expect(hqqlora_emulated_replay(graph) == 0 && memcmp(out, replayed, bytes) == 0,
                   "a replay has the same bits");
        hqqlora_emulated_destroy_graph(graph);
        free(out), free(replayed);
        free_problem(&p);
    }
    return failures;
}

/* in = the identity: the product is W, rounded as said, bit for bit. */
static int check_identity(void)
{
    enum { MOST = 256 };
    uint64_t state = 71;
    int failures = 0;
    for (int b = 0; b < BIT_WIDTHS; b++)
        for (int way = 0; way < 4 && hqq_word_bytes(all_bits[b]) == 1; way++) {
            hqq_dtype dtype = way & 1 ? HQQ_F16 : HQQ_BF16;
            problem p = make_problem(&state, way / 2 ? MOST : MOST / 2, MOST, MOST / 2, 64,
                                     all_bits[b], dtype, way / 2);
            p.in = exact_alloc((size_t)(p.M * p.M * 2));
            for (int64_t i = 0; i < p.M * p.M; i++)
                hqq_store(p.in, dtype, i, i / p.M == i % p.M);
            void *out = exact_alloc((size_t)(p.N * p.K * 2));
            failures += solve(out, &p, HQQ_KERNEL_TILED);
            for (int64_t i = 0; i < p.N * p.K && !failures; i++) {
                int64_t n = i / p.K, k = i % p.K, group = i / 64;
                float zero = hqq_load(p.weight.zero, dtype, group), rounded;
                float scale = hqq_load(p.weight.scale, dtype, group);
                /* the code, exactly: W in fp32 is (code - zero) * scale, rounded once each */
                float code = nearbyintf(p.W[i] / scale + zero);
                hqq_store(&rounded, dtype, 0, code - zero);
                hqq_store(&rounded, dtype, 0, hqq_load(&rounded, dtype, 0) * scale);
                int64_t at = p.transpose ? i : k * p.N + n;
                if (hqq_load(out, dtype, at) == hqq_load(&rounded, dtype, 0)) continue;
                fprintf(stderr, "W[%lld,%lld] is %g, not %g\n", (long long)n, (long long)k,
                        (double)hqq_load(out, dtype, at), (double)hqq_load(&rounded, dtype, 0));
                print_weight(&p.weight);
                failures++;
            }
            free(out);
            free_problem(&p);
        }
    return failures;
}

/* Large products with formats that it serves, on a device that has the instructions. */
static int check_choice(void)
{
    static _Alignas(16) const uint8_t packed[32];
    const hqq_weight w = {.out_features = 14336,
                          .in_features = 4096,
                          .group_size = 64,
                          .nbits = 4,
                          .axis = 1,
                          .meta_dtype = HQQ_BF16,
                          .packed = packed};
    int failures = 0;
#define CHOOSES(kernel, M, dtype, change)                                                    \
    for (int transpose = 0; transpose < 2; transpose++) {                                    \
        hqq_weight changed = w;                                                              \
        change;                                                                              \
        failures += expect(hqq_choose_kernel(&changed, M, dtype, transpose, HQQ_ISA_AUTO) == \
                               HQQ_KERNEL_##kernel,                                          \
                           #kernel " for " #M " rows, " #dtype ", " #change);                \
    }
    CHOOSES(DIRECT, 16, HQQ_BF16, (void)0)
    CHOOSES(TILED, 64, HQQ_BF16, changed.out_features *= 2; changed.in_features *= 2)
    CHOOSES(DIRECT, 16, HQQ_BF16, changed.out_features *= 2; changed.in_features *= 2)
    CHOOSES(TILED, 128, HQQ_BF16, (void)0)
    CHOOSES(TILED, 512, HQQ_BF16, (void)0)
    CHOOSES(TILED, 1024, HQQ_BF16, (void)0)
    CHOOSES(TILED, 512, HQQ_F16, changed.meta_dtype = HQQ_F16)
    CHOOSES(TILED, 512, HQQ_BF16, changed.nbits = 1)
    CHOOSES(BLOCKED, 512, HQQ_BF16, changed.nbits = 3)
    CHOOSES(BLOCKED, 512, HQQ_F32, (void)0)
    CHOOSES(BLOCKED, 512, HQQ_BF16, changed.meta_dtype = HQQ_F32)
    CHOOSES(BLOCKED, 512, HQQ_BF16, changed.axis = 0)
    CHOOSES(BLOCKED, 512, HQQ_BF16, changed.group_size = 32)
    CHOOSES(BLOCKED, 512, HQQ_BF16, changed.packed = packed + 1)
    CHOOSES(BLOCKED, 512, HQQ_BF16, changed.out_features = 14336 + 8) /* half an octet a slot */
    static const int others[][2] = {{8, 0}, {8, 9}, {10, 0}, {12, 0}};
    for (int i = 0; i < 4; i++) {
        hqqlora_emulated_set_device_attribute(COMPUTE_CAPABILITY_MAJOR, others[i][0]);
        hqqlora_emulated_set_device_attribute(COMPUTE_CAPABILITY_MINOR, others[i][1]);
        CHOOSES(BLOCKED, 4096, HQQ_BF16, (void)0)
    }
    hqqlora_emulated_set_device_attribute(COMPUTE_CAPABILITY_MAJOR, 9);
    hqqlora_emulated_set_device_attribute(COMPUTE_CAPABILITY_MINOR, 0);
    return failures;
}

int main(void)
{
    int failures =
        check_choice() + check_tiles() + check_memory() + check_clusters() + check_identity();
    return failures != 0;
}

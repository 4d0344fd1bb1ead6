/* Sums of small products whose splits meet in pairs, as clusters of two blocks: against the
 * reference kernel, over a workspace that holds anything, and captured as a graph. */
#include "control.h"
#include "sample_weight.h"

enum { MULTIPROCESSORS = 16 }; /* the name of the device's attribute */

static _Alignas(64) char room[4 << 20];

typedef struct product {
    int64_t N, K, M;
    int nbits, axis;
    int multiprocessors; /* for which there are these ways and splits */
    int passes;          /* 2: dgrad too */
} product;

static const product products[] = {
    {64, 1984, 40, 4, 1, 132, 2},  /* 4 ways, one pair */
    {128, 1344, 12, 4, 0, 132, 2}, /* 4 ways, one pair, 16 tokens, splits of 11 and 10 chunks */
    {64, 4096, 40, 2, 0, 132, 2},  /* 4 ways, four pairs */
    {64, 1984, 12, 8, 1, 132, 1},  /* 1 way, four pairs, 16 tokens */
    {256, 1536, 33, 4, 1, 2, 2},   /* 2 ways of 8 and 4 chunks, one pair */
    {256, 1792, 64, 8, 0, 4, 1},   /* 2 ways, one pair */
};

static uint64_t clusters(void)
{
    hqqlora_emulated_counts counts;
    hqqlora_emulated_get_counts(&counts);
    return counts.clusters;
}

static hqq_status multiply(void *out, const void *in, const hqq_weight *w, int64_t M,
                           hqq_dtype dtype, int transpose, hqq_kernel kernel)
{
    const hqq_context context = {.kernel = kernel};
    return transpose ? hqq_linear_dgrad(out, in, w->out_features, w, M, dtype, room,
                                        sizeof room, &context)
                     : hqq_linear(out, in, w->in_features, w, NULL, HQQ_F32, M, dtype, room,
                                  sizeof room, &context);
}

static int expect(int holds, const char *what, const hqq_weight *w, int transpose)
{
    if (holds) return 0;
    print_weight(w);
    fprintf(stderr, "transpose %d, not so: %s (%s)\n", transpose, what, hqq_last_error());
    return 1;
}

/* Within a few roundings of outputs of this size. */
static int agree(const void *out, const void *expected, int64_t n, hqq_dtype dtype)
{
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += pow((double)hqq_load(expected, dtype, i), 2);
    const double usual = sqrt(squares / (double)n);
    for (int64_t i = 0; i < n; i++) {
        double a = (double)hqq_load(out, dtype, i), b = (double)hqq_load(expected, dtype, i);
        if (!(fabs(a - b) <= 0.01 * fabs(b) + 0.03 * usual)) return 0;
    }
    return 1;
}

static int check_product(const product *p, int transpose, hqq_dtype dtype, uint64_t *state)
{
    /* dgrad sums over N, and has the groups along it at axis 0 */
    const int64_t N = transpose ? p->K : p->N, K = transpose ? p->N : p->K;
    hqq_weight w = sample_weight(state, N, K, 64, p->nbits, transpose ? 1 - p->axis : p->axis,
                                 dtype, 0.02f);
    void *in = random_array(state, p->M * p->K, dtype, -1, 1);
    const int64_t n = p->M * p->N;
    const size_t bytes = (size_t)(n * hqq_dtype_bytes(dtype));
    void *out = exact_alloc(bytes), *again = exact_alloc(bytes), *plain = exact_alloc(bytes);
    int failures = 0;

    for (size_t i = 0; i < sizeof room; i++) room[i] = (char)random_bits(state);
    const uint64_t before = clusters();
    failures += expect(multiply(out, in, &w, p->M, dtype, transpose, HQQ_KERNEL_AUTO) == HQQ_OK,
                       "the product is computed", &w, transpose);
    failures += expect(clusters() > before, "by clusters", &w, transpose);
    failures += expect(multiply(plain, in, &w, p->M, dtype, transpose, HQQ_KERNEL_REFERENCE) ==
                               HQQ_OK &&
                           agree(out, plain, n, dtype),
                       "it is the reference kernel's", &w, transpose);

    hqqlora_emulated_begin_capture();
    multiply(again, in, &w, p->M, dtype, transpose, HQQ_KERNEL_AUTO);
    hqqlora_emulated_graph *graph = hqqlora_emulated_end_capture();
    for (int replay = 0; replay < 2; replay++) {
        memset(again, 0xff, bytes);
        failures += expect(hqqlora_emulated_replay(graph) == 0 && !memcmp(again, out, bytes),
                           "a replay has the same bits", &w, transpose);
    }
    hqqlora_emulated_destroy_graph(graph);
    free(in), free(out), free(again), free(plain);
    free_weight(&w);
    return failures;
}

int main(void)
{
    uint64_t state = 4242;
    int failures = 0;
    for (size_t i = 0; i < sizeof products / sizeof *products; i++)
        for (int transpose = 0; transpose < products[i].passes; transpose++) {
            hqqlora_emulated_set_device_attribute(MULTIPROCESSORS, products[i].multiprocessors);
            failures +=
                check_product(&products[i], transpose, i % 2 ? HQQ_F16 : HQQ_BF16, &state);
        }
    return failures != 0;
}

/* 3 bits in planes against hqq's own words: the same codes, and the same products with whole
 * numbers, whose sums are exact in any order, by every kernel, instruction set and dtype. */
#include "sample_weight.h"

#include "format.h"

typedef struct shape {
    int64_t N, K, G;
} shape;

/* rows that end within a vector, groups within a row, over rows and longer than what is
 * expanded at a time; vectors that align, in pairs of bf16 and without */
static const shape shapes[] = {{8, 1, 1},     {8, 5, 1},    {16, 33, 8},   {24, 40, 8},
                               {8, 96, 96},   {32, 64, 64}, {64, 192, 64}, {40, 48, 16},
                               {16, 36, 24},  {8, 1100, 8}, {8, 2304, 64}, {64, 32, 128},
                               {80, 576, 32}, {72, 64, 16}, {64, 64, 16}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

typedef struct both {
    hqq_weight words, planes;
} both;

static void must(hqq_status status)
{
    if (status == HQQ_OK) return;
    fprintf(stderr, "%s\n", hqq_last_error());
    exit(1);
}

/* 0 where planes do not fit the shape. */
static int make_both(both *w, uint64_t *state, const shape *s, int axis, hqq_dtype meta)
{
    w->words = sample_weight(state, s->N, s->K, s->G, 3, axis, meta, 1.0f);
    int64_t bytes, word_bytes, groups;
    w->planes = w->words;
    w->planes.packing = HQQ_PACKING_PLANES;
    if (hqq_layout_of(&bytes, &word_bytes, &groups, &w->planes) != HQQ_OK) {
        free_weight(&w->words);
        return 0;
    }
    for (int64_t g = 0; g < groups; g++) {
        hqq_store((void *)w->words.zero, meta, g, (float)(random_bits(state) % 8));
        hqq_store((void *)w->words.scale, meta, g, random_bits(state) % 2 ? 0.5f : 1.0f);
    }
    void *packed = exact_alloc((size_t)bytes);
    memset(packed, 0xa5, (size_t)bytes);
    const hqq_context context = {.parallel_for = backwards_for};
    must(hqq_repack(packed, HQQ_PACKING_PLANES, &w->words, &context));
    w->planes.packed = packed;
    return bytes * word_bytes * 8 == s->N * s->K * 3 ? 1 : -1;
}

static void free_both(both *w)
{
    free((void *)w->planes.packed);
    free_weight(&w->words);
}

/* Every code of either, back and forth. */
static int check_codes(const both *w)
{
    int64_t words, word_bytes, E = w->words.out_features * w->words.in_features;
    must(hqq_layout_of(&words, &word_bytes, NULL, &w->words));
    uint8_t *codes = exact_alloc((size_t)E), *other = exact_alloc((size_t)E);
    must(hqq_unpack(codes, &w->words, NULL));
    must(hqq_unpack(other, &w->planes, NULL));
    int wrong = memcmp(codes, other, (size_t)E) != 0;

    uint8_t *packed = exact_alloc((size_t)(E / 8 * 3));
    must(hqq_pack(packed, codes, &w->planes, NULL));
    wrong += memcmp(packed, w->planes.packed, (size_t)(E / 8 * 3)) != 0;

    hqq_weight back = w->words;
    uint8_t *again = exact_alloc((size_t)(words * word_bytes));
    must(hqq_repack(again, HQQ_PACKING_HQQ, &w->planes, NULL));
    back.packed = again;
    memset(other, 0xa5, (size_t)E);
    must(hqq_unpack(other, &back, NULL));
    wrong += memcmp(codes, other, (size_t)E) != 0;
    free(codes), free(other), free(packed), free(again);
    return wrong;
}

static int check_block(const both *w, hqq_dtype dtype, const hqq_context *context, int64_t row,
                       int64_t rows, int64_t column, int64_t columns)
{
    size_t bytes = (size_t)(rows * columns * hqq_dtype_bytes(dtype));
    void *of_words = exact_alloc(bytes), *of_planes = exact_alloc(bytes);
    const hqq_context plain = {.kernel = HQQ_KERNEL_REFERENCE};
    must(hqq_dequantize(of_words, columns, dtype, &w->words, row, row + rows, column,
                        column + columns, &plain));
    must(hqq_dequantize(of_planes, columns, dtype, &w->planes, row, row + rows, column,
                        column + columns, context));
    int wrong = memcmp(of_words, of_planes, bytes) != 0;
    free(of_words), free(of_planes);
    return wrong;
}

/* y = x W^T, or with transpose dx = dy W. */
static void multiply(void *out, const void *in, const hqq_weight *w, int64_t M, hqq_dtype dtype,
                     int transpose, const hqq_context *context)
{
    size_t bytes;
    must(hqq_workspace_size(&bytes, w, NULL, M, dtype, context));
    void *workspace = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (transpose)
        must(
            hqq_linear_dgrad(out, in, w->out_features, w, M, dtype, workspace, bytes, context));
    else
        must(hqq_linear(out, in, w->in_features, w, NULL, HQQ_F32, M, dtype, workspace, bytes,
                        context));
    free(workspace);
}

static int check_product(uint64_t *state, const both *w, int64_t M, hqq_dtype dtype,
                         int transpose, hqq_context context)
{
    int64_t N = w->words.out_features, K = w->words.in_features;
    int64_t in_size = M * (transpose ? N : K), out_size = M * (transpose ? K : N);
    size_t bytes = (size_t)(out_size * hqq_dtype_bytes(dtype));
    void *in = exact_alloc((size_t)(in_size * hqq_dtype_bytes(dtype)));
    for (int64_t i = 0; i < in_size; i++)
        hqq_store(in, dtype, i, (float)(random_bits(state) % 5) - 2.0f);
    void *expected = exact_alloc(bytes), *out = exact_alloc(bytes);
    const hqq_context plain = {.kernel = HQQ_KERNEL_REFERENCE};
    multiply(expected, in, &w->words, M, dtype, transpose, &plain);
    int wrong = 0;
    for (int kernel = HQQ_KERNEL_REFERENCE; kernel <= LAST_KERNEL; kernel++) {
        context.kernel = (hqq_kernel)kernel;
        memset(out, 0xa5, bytes);
        multiply(out, in, &w->planes, M, dtype, transpose, &context);
        int different = 0; /* as numbers: a sum of nothing may be -0 */
        for (int64_t i = 0; i < out_size; i++)
            different += hqq_load(out, dtype, i) != hqq_load(expected, dtype, i);
        if (different)
            fprintf(stderr, "%s, M = %lld, dtype %d, kernel %d: %d of %lld wrong\n",
                    transpose ? "dgrad" : "forward", (long long)M, (int)dtype, kernel,
                    different, (long long)out_size);
        wrong += different != 0;
    }
    free(in), free(expected), free(out);
    return wrong;
}

static int check_shape(const shape *s, int axis, hqq_dtype meta, hqq_isa isa)
{
    static const int64_t tokens[] = {1, 3, 9};
    uint64_t state = 88172645463325252u;
    both w;
    int made = make_both(&w, &state, s, axis, meta);
    if (made <= 0) return made != 0;
    hqq_context context = {.isa = isa, .parallel_for = backwards_for};
    int wrong = check_codes(&w);
    for (int d = 0; d < 3; d++) {
        wrong += check_block(&w, all_dtypes[d], &context, 0, s->N, 0, s->K);
        int64_t row = random_bits(&state) % s->N, column = random_bits(&state) % s->K;
        wrong += check_block(&w, all_dtypes[d], &context, row,
                             1 + random_bits(&state) % (s->N - row), column,
                             1 + random_bits(&state) % (s->K - column));
        for (int m = 0; m < 3; m++)
            for (int transpose = 0; transpose < 2; transpose++)
                wrong +=
                    check_product(&state, &w, tokens[m], all_dtypes[d], transpose, context);
    }
    if (s->N * s->K < 5000) wrong += check_product(&state, &w, 161, HQQ_BF16, 1, context);
    if (wrong) print_weight(&w.planes);
    free_both(&w);
    return wrong != 0;
}

static int check_isa(hqq_isa isa)
{
    int failures = 0;
    for (int s = 0; s < SHAPES; s++)
        for (int axis = 0; axis < 2; axis++)
            failures += check_shape(&shapes[s], axis, all_dtypes[s % 3], isa);
    return failures;
}

/* Chunks of work on codes, more than one. */
static int check_long(void)
{
    const shape s = {64, 9000, 8};
    uint64_t state = 362436069u;
    int wrong = 0;
    for (int axis = 0; axis < 2; axis++) {
        both w;
        if (make_both(&w, &state, &s, axis, HQQ_F32) != 1) return 1;
        wrong += check_codes(&w);
        free_both(&w);
    }
    return wrong;
}

static int refuses(const char *says, hqq_status status)
{
    if (status == HQQ_INVALID && strstr(hqq_last_error(), says)) return 0;
    fprintf(stderr, "status %d, \"%s\"; expected \"%s\"\n", (int)status, hqq_last_error(),
            says);
    return 1;
}

static int check_refused(void)
{
    hqq_weight w = {.out_features = 8,
                    .in_features = 8,
                    .group_size = 8,
                    .nbits = 3,
                    .axis = 1,
                    .packing = HQQ_PACKING_PLANES};
    int64_t words, failed = hqq_layout_of(&words, NULL, NULL, &w) != HQQ_OK || words != 24;
    w.nbits = 4;
    failed += refuses("weight.packing is HQQ_PACKING_PLANES (1) with nbits 4; expected 3",
                      hqq_layout_of(&words, NULL, NULL, &w));
    w.nbits = 3, w.group_size = 16;
    failed += refuses("8 must divide out_features 8 and the number of groups 4",
                      hqq_layout_of(&words, NULL, NULL, &w));
    w.axis = 0, w.group_size = 4;
    failed += refuses("8 must divide out_features 8 and group_size 4",
                      hqq_layout_of(&words, NULL, NULL, &w));
    w.out_features = 16, w.in_features = 4, w.group_size = 8, w.packing = (hqq_packing)2;
    failed += refuses("weight.packing is 2; expected HQQ_PACKING_HQQ (0) or",
                      hqq_layout_of(&words, NULL, NULL, &w));
    w.packing = HQQ_PACKING_HQQ, w.out_features = 12, w.axis = 1;
    failed += refuses("packing is HQQ_PACKING_PLANES (1), for which 8 must divide",
                      hqq_repack(&words, HQQ_PACKING_PLANES, &w, NULL));
    return failed != 0;
}

int main(void)
{
    return (for_each_isa(check_isa) || check_long() || check_refused()) != 0;
}

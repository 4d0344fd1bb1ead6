/* Dequantize against the plain formula, bit for bit: every format, instruction set and dtype,
 * odd shapes, groups across rows, sub-blocks, and nothing written outside of the block. */
#include "reference_elements.h"
#include "sample_weight.h"

#define CANARY 0xa5

typedef struct shape {
    int64_t N, K;
} shape;

static const shape shapes[] = {{1, 1},   {3, 5},   {7, 33},   {16, 64},  {10, 130}, {12, 70},
                               {6, 256}, {33, 31}, {64, 128}, {40, 257}, {8, 1024}, {96, 96}};
static const int64_t group_sizes[] = {1, 3, 8, 16, 20, 32, 64, 128, 65};

/* The same bits; of a NaN (infinities that cancel) neither sign nor payload is promised. */
static int same_element(const void *a, const void *b, hqq_dtype dtype)
{
    if (memcmp(a, b, (size_t)hqq_dtype_bytes(dtype)) == 0) return 1;
    return isnan(hqq_load(a, dtype, 0)) && isnan(hqq_load(b, dtype, 0));
}

/* Elements that differ between a block of the result and the same block of the whole. */
static int compare_block(const void *out, int64_t ld, const void *whole, int64_t K,
                         hqq_dtype dtype, int64_t row, int64_t rows, int64_t column,
                         int64_t columns)
{
    int bytes = hqq_dtype_bytes(dtype), wrong = 0;
    for (int64_t i = 0; i < rows; i++) {
        const char *line = (const char *)out + i * ld * bytes;
        const char *expected = (const char *)whole + ((row + i) * K + column) * bytes;
        for (int64_t k = 0; k < columns; k++) {
            if (same_element(line + k * bytes, expected + k * bytes, dtype)) continue;
            if (!wrong++)
                fprintf(stderr, "W[%lld,%lld]: %.9g, expected %.9g\n", (long long)(row + i),
                        (long long)(column + k), (double)hqq_load(line, dtype, k),
                        (double)hqq_load(expected, dtype, k));
        }
        for (int64_t b = columns * bytes; i + 1 < rows && b < ld * bytes; b++)
            if ((uint8_t)line[b] != CANARY && !wrong++)
                fprintf(stderr, "row %lld: written behind its last column\n", (long long)i);
    }
    return wrong;
}

static int check_block(const hqq_weight *w, const void *whole, hqq_dtype dtype, hqq_isa isa,
                       int64_t row, int64_t rows, int64_t column, int64_t columns)
{
    hqq_context context = {.isa = isa, .parallel_for = backwards_for};
    int64_t ld = columns + (rows % 3);
    size_t size = (size_t)(((rows - 1) * ld + columns) * hqq_dtype_bytes(dtype));
    void *out = exact_alloc(size);
    memset(out, CANARY, size);
    int wrong = hqq_dequantize(out, ld, dtype, w, row, row + rows, column, column + columns,
                               &context) != HQQ_OK;
    wrong += compare_block(out, ld, whole, w->in_features, dtype, row, rows, column, columns);
    if (wrong) {
        print_weight(w);
        fprintf(stderr, "%s, dtype %d, rows %lld + %lld, columns %lld + %lld: %d wrong\n",
                hqq_isa_name(isa), (int)dtype, (long long)row, (long long)rows,
                (long long)column, (long long)columns, wrong);
    }
    free(out);
    return wrong;
}

static int check_weight(const hqq_weight *w, hqq_isa isa, uint64_t *state)
{
    int64_t N = w->out_features, K = w->in_features;
    int wrong = 0;
    for (int d = 0; d < 3 && !wrong; d++) {
        hqq_dtype dtype = all_dtypes[d];
        void *whole = exact_alloc((size_t)(N * K * hqq_dtype_bytes(dtype)));
        for (int64_t e = 0; e < N * K; e++)
            hqq_store(whole, dtype, e, hqq_reference_element(w, e / K, e % K));
        wrong += check_block(w, whole, dtype, isa, 0, N, 0, K);
        for (int i = 0; i < 4 && !wrong; i++) {
            int64_t row = random_bits(state) % N, column = random_bits(state) % K;
            int64_t rows = 1 + random_bits(state) % (N - row);
            int64_t columns = 1 + random_bits(state) % (K - column);
            wrong += check_block(w, whole, dtype, isa, row, rows, column, columns);
        }
        free(whole);
    }
    return wrong;
}

static int check_formats(hqq_isa isa)
{
    uint64_t state = 88172645463325252u;
    int failures = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (size_t g = 0; g < sizeof group_sizes / sizeof *group_sizes + 2; g++)
            for (int b = 0; b < BIT_WIDTHS; b++)
                for (int axis = 0; axis < 2; axis++) {
                    int64_t N = shapes[s].N, K = shapes[s].K;
                    int64_t G = g == 0 ? K : g == 1 ? N : group_sizes[g - 2];
                    if (N * K % G != 0) continue;
                    hqq_dtype meta = all_dtypes[random_bits(&state) % 3];
                    hqq_weight w =
                        sample_weight(&state, N, K, G, all_bits[b], axis, meta, 0.01f);
                    failures += check_weight(&w, isa, &state) != 0;
                    free_weight(&w);
                }
    return failures;
}

/* Every meta dtype, with scales so small that the results are subnormal, and so large that
 * fp16 overflows; runs shorter and longer than a vector. */
static int check_extremes(hqq_isa isa)
{
    static const float scales[] = {0x1p-130f, 0x1p-126f, 0x1p-20f, 0x1p14f, 0x1p120f};
    uint64_t state = 362436069u;
    int failures = 0;
    for (int m = 0; m < 3; m++)
        for (size_t s = 0; s < sizeof scales / sizeof *scales; s++)
            for (int b = 0; b < BIT_WIDTHS; b++)
                for (int axis = 0; axis < 2; axis++)
                    for (int64_t G = 8; G <= 64; G += 56) {
                        hqq_weight w = sample_weight(&state, 24, 64, G, all_bits[b], axis,
                                                     all_dtypes[m], scales[s]);
                        failures += check_weight(&w, isa, &state) != 0;
                        free_weight(&w);
                    }
    return failures;
}

/* Codes at their places: with zero 0 and scale 1 a weight is its codes. */
static int check_codes(hqq_isa isa)
{
    hqq_context context = {.isa = isa};
    int failures = 0;
    for (int b = 0; b < BIT_WIDTHS; b++)
        for (int axis = 0; axis < 2; axis++) {
            enum { N = 40, K = 96, G = 32 };
            uint64_t state = 521288629u;
            hqq_weight w = sample_weight(&state, N, K, G, all_bits[b], axis, HQQ_F32, 1.0f);
            for (int64_t i = 0; i < N * K / G; i++) {
                hqq_store((void *)w.zero, HQQ_F32, i, 0.0f);
                hqq_store((void *)w.scale, HQQ_F32, i, 1.0f);
            }
            uint8_t codes[N * K];
            for (int64_t e = 0; e < N * K; e++)
                codes[e] = (uint8_t)((e * 7 + e / K) & ((1 << all_bits[b]) - 1));
            float out[N * K];
            if (hqq_pack((void *)w.packed, codes, &w, &context) != HQQ_OK) failures++;
            if (hqq_dequantize(out, K, HQQ_F32, &w, 0, N, 0, K, &context) != HQQ_OK) failures++;
            for (int64_t e = 0; e < N * K; e++) failures += out[e] != (float)codes[e];
            free_weight(&w);
        }
    return failures;
}

int main(void)
{
    int failures = for_each_isa(check_formats);
    failures += for_each_isa(check_extremes);
    failures += for_each_isa(check_codes);
    return failures != 0;
}

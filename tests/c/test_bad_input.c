/* Every entry point under hostile arguments: the right status, a message with the offending
 * values, and outputs that nobody has touched. */
#include "hqqlora.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* 1 where this is linked with the CUDA library, whose kernels the tests run on the CPU. */
#ifndef HQQ_TEST_CUDA
#define HQQ_TEST_CUDA 0
#endif

enum { N = 12, K = 32, G = 8, M = 3, R = 2, GROUPS = N * K / G };

/* ---- sound arguments, and outputs full of a pattern -------------------------------- */

static uint8_t codes_in[N * K];
static int32_t words_in[N * K]; /* aligned, enough for any nbits */
static float scale_in[GROUPS], zero_in[GROUPS];
static float x[M * K], dy[M * N], xa_in[M * R], A[R * K], B[N * R], bias[N], W[N * K];
static _Alignas(64) char scratch[1 << 20];

static struct {
    float y[M * N], xa[M * R], dx[M * K], dA[R * K], dB[N * R], out[N * K];
    uint8_t packed[N * K], codes[N * K];
    float scale[GROUPS], zero[GROUPS];
    int64_t words, word_bytes, groups;
    size_t bytes;
} outputs, pristine;

static const hqq_weight weight = {N, K, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in};
static const hqq_lora lora = {R, HQQ_F32, A, B, 0.5f, 0.0f, NULL, 0};

static int failures;

static int untouched(void)
{
    return memcmp(&outputs, &pristine, sizeof outputs) == 0;
}

/* `says`: parts that the message must have, separated by '|' */
static void expect(int line, const char *call, hqq_status expected, const char *says,
                   hqq_status got)
{
    char parts[256];
    const char *message = hqq_last_error();
    int ok = got == expected && untouched();
    snprintf(parts, sizeof parts, "%s", says);
    for (char *part = strtok(parts, "|"); part; part = strtok(NULL, "|"))
        ok = ok && strstr(message, part) != NULL;
    if (!ok) {
        failures++;
        printf("line %d: %s\n    expected %s, a message with '%s' and untouched outputs\n"
               "    got %s: '%s'%s\n",
               line, call, hqq_status_name(expected), says, hqq_status_name(got), message,
               untouched() ? "" : "; outputs were written");
    }
    outputs = pristine;
}

#define REFUSES(status, says, call) expect(__LINE__, #call, status, says, call)
#define INVALID(says, call)         REFUSES(HQQ_INVALID, says, call)

/* ---- weights that no entry point takes --------------------------------------------- */

#define BIG (INT64_C(1) << 40)

static const struct {
    const char *says;
    hqq_weight weight;
} bad_shapes[] = {
    {"nbits is 0", {N, K, G, 0, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"nbits is 5", {N, K, G, 5, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"nbits is 16", {N, K, G, 16, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"nbits is -4", {N, K, G, -4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"2147483647", {N, K, G, INT32_MAX, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"axis is 2", {N, K, G, 4, 2, HQQ_F32, words_in, scale_in, zero_in}},
    {"axis is -1", {N, K, G, 4, -1, HQQ_F32, words_in, scale_in, zero_in}},
    {"-12 x 32", {-N, K, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"12 x -32", {N, -K, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"-12 x -32", {-N, -K, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"-9223372036854775808", {INT64_MIN, K, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"1099511627776 x 1099511627776",
     {BIG, BIG, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"9223372036854775807", {INT64_MAX, 2, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"9223372036854775807", {INT64_MAX, 1, 1, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"1099511627776 x 4194304", {BIG, 1 << 22, 1, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"9223372036854775807 x 0", {INT64_MAX, 0, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"0 x 9223372036854775807", {0, INT64_MAX, G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"group_size is 9223372036854775807", {0, K, INT64_MAX, 4, 0, HQQ_F32, NULL, NULL, NULL}},
    {"group_size is 0", {N, K, 0, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"group_size is -8", {N, K, -G, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"group_size is -9223372036854775808",
     {N, K, INT64_MIN, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"7|384|12 x 32", {N, K, 7, 4, 1, HQQ_F32, words_in, scale_in, zero_in}},
    {"768|384", {N, K, 768, 4, 0, HQQ_F32, words_in, scale_in, zero_in}},
    {"meta_dtype is 3", {N, K, G, 4, 1, (hqq_dtype)3, words_in, scale_in, zero_in}},
    {"meta_dtype is -1", {N, K, G, 4, 1, (hqq_dtype)-1, words_in, scale_in, zero_in}},
};

static const struct {
    const char *says;
    hqq_weight weight;
} bad_arrays[] = {
    {"packed is NULL", {N, K, G, 4, 1, HQQ_F32, NULL, scale_in, zero_in}},
    {"scale is NULL", {N, K, G, 4, 1, HQQ_F32, words_in, NULL, zero_in}},
    {"zero is NULL", {N, K, G, 4, 1, HQQ_F32, words_in, scale_in, NULL}},
    {"not aligned", {N, K, G, 3, 1, HQQ_F32, (char *)words_in + 1, scale_in, zero_in}},
};

static hqq_status layout_of(const hqq_weight *w)
{
    return hqq_layout_of(&outputs.words, &outputs.word_bytes, &outputs.groups, w);
}

static hqq_status quantize(const hqq_weight *w)
{
    hqq_quantize_options options = hqq_quantize_defaults();
    return hqq_quantize(outputs.packed, outputs.scale, outputs.zero, W, HQQ_F32, w, &options,
                        NULL);
}

static hqq_status pack(const hqq_weight *w)
{
    return hqq_pack(outputs.packed, codes_in, w, NULL);
}

static hqq_status unpack(const hqq_weight *w)
{
    return hqq_unpack(outputs.codes, w, NULL);
}

static hqq_status dequantize(const hqq_weight *w)
{
    return hqq_dequantize(outputs.out, K, HQQ_F32, w, 0, N, 0, K, NULL);
}

static hqq_status workspace_size(const hqq_weight *w)
{
    return hqq_workspace_size(&outputs.bytes, w, NULL, M, HQQ_F32, NULL);
}

static hqq_status linear(const hqq_weight *w)
{
    return hqq_linear(outputs.y, x, K, w, bias, HQQ_F32, M, HQQ_F32, scratch, sizeof scratch,
                      NULL);
}

static hqq_status dgrad(const hqq_weight *w)
{
    return hqq_linear_dgrad(outputs.dx, dy, N, w, M, HQQ_F32, scratch, sizeof scratch, NULL);
}

static hqq_status lora_linear(const hqq_weight *w)
{
    return hqq_lora_linear(outputs.y, outputs.xa, x, K, w, bias, HQQ_F32, &lora, M, HQQ_F32,
                           scratch, sizeof scratch, NULL);
}

static hqq_status lora_backward(const hqq_weight *w)
{
    return hqq_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in, w,
                                    &lora, M, HQQ_F32, scratch, sizeof scratch, NULL);
}

typedef hqq_status (*entry)(const hqq_weight *);
static const entry shape_entries[] = {layout_of,   quantize,     pack,           unpack,
                                      dequantize,  linear,       workspace_size, dgrad,
                                      lora_linear, lora_backward};
static const entry array_entries[] = {dequantize, linear, dgrad, lora_linear, lora_backward};

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static void walk_bad_weights(void)
{
    for (int e = 0; e < COUNT(shape_entries); e++) {
        INVALID("weight is NULL", shape_entries[e](NULL));
        for (int i = 0; i < COUNT(bad_shapes); i++)
            INVALID(bad_shapes[i].says, shape_entries[e](&bad_shapes[i].weight));
    }
    for (int e = 0; e < COUNT(array_entries); e++)
        for (int i = 0; i < COUNT(bad_arrays); i++)
            INVALID(bad_arrays[i].says, array_entries[e](&bad_arrays[i].weight));
    INVALID("packed is NULL", unpack(&bad_arrays[0].weight));
    INVALID("not aligned", unpack(&bad_arrays[3].weight));
}

/* ---- format and quantizer ---------------------------------------------------------- */

static void walk_format(void)
{
    hqq_weight three = weight;
    three.nbits = 3;
    INVALID("packed is NULL", hqq_pack(NULL, codes_in, &weight, NULL));
    INVALID("codes is NULL", hqq_pack(outputs.packed, NULL, &weight, NULL));
    INVALID("codes is NULL", hqq_unpack(NULL, &weight, NULL));
    INVALID("not aligned", hqq_pack((char *)outputs.words + 1, codes_in, &three, NULL));
    if (HQQ_TEST_CUDA) return; /* nobody waits for the device to look at the codes */
    codes_in[77] = 16;         /* one more than 4 bits hold */
    INVALID("codes[77]|16|15", pack(&weight));
    codes_in[77] = 0;
}

static hqq_status quantize_with(hqq_quantize_options options)
{
    return hqq_quantize(outputs.packed, outputs.scale, outputs.zero, W, HQQ_F32, &weight,
                        &options, NULL);
}

static void walk_quantizer(void)
{
    hqq_quantize_options o = hqq_quantize_defaults();
    hqq_weight three = weight;
    three.nbits = 3;
    INVALID("options is NULL", hqq_quantize(outputs.packed, outputs.scale, outputs.zero, W,
                                            HQQ_F32, &weight, NULL, NULL));
    INVALID("packed is NULL",
            hqq_quantize(NULL, outputs.scale, outputs.zero, W, HQQ_F32, &weight, &o, NULL));
    INVALID("scale is NULL",
            hqq_quantize(outputs.packed, NULL, outputs.zero, W, HQQ_F32, &weight, &o, NULL));
    INVALID("zero is NULL",
            hqq_quantize(outputs.packed, outputs.scale, NULL, W, HQQ_F32, &weight, &o, NULL));
    INVALID("W is NULL", hqq_quantize(outputs.packed, outputs.scale, outputs.zero, NULL,
                                      HQQ_F32, &weight, &o, NULL));
    INVALID("W_dtype is 9", hqq_quantize(outputs.packed, outputs.scale, outputs.zero, W,
                                         (hqq_dtype)9, &weight, &o, NULL));
    INVALID("not aligned", hqq_quantize((char *)outputs.out + 2, outputs.scale, outputs.zero, W,
                                        HQQ_F32, &three, &o, NULL));

#define OPTION(field, value, says)                    \
    do {                                              \
        hqq_quantize_options bad = o;                 \
        bad.field = value;                            \
        INVALID(#field "|" says, quantize_with(bad)); \
    } while (0)
    OPTION(solver, (hqq_solver)3, "3");
    OPTION(solver, (hqq_solver)-1, "-1");
    OPTION(iters, 0, "0");
    OPTION(iters, -20, "-20");
    OPTION(iters, INT32_MAX, "2147483647");
    OPTION(lp_norm, 0.0f, "0");
    OPTION(lp_norm, 1.5f, "1.5");
    OPTION(lp_norm, NAN, "nan");
    OPTION(beta, -10.0f, "-10");
    OPTION(beta, INFINITY, "inf");
    OPTION(kappa, 0.0f, "0");
    OPTION(kappa, NAN, "nan");

    if (HQQ_TEST_CUDA) return; /* nor at the weights */
    static const float non_finite[] = {NAN, INFINITY, -INFINITY};
    static const int places[] = {0, 2 * K + 5, N * K - 1};
    for (int solver = 0; solver <= HQQ_SOLVER_MINMAX; solver++)
        for (int v = 0; v < COUNT(non_finite); v++)
            for (int p = 0; p < COUNT(places); p++) {
                hqq_quantize_options options = o;
                options.solver = (hqq_solver)solver;
                char row_and_column[32];
                snprintf(row_and_column, sizeof row_and_column, "%d|%d", places[p] / K,
                         places[p] % K);
                float kept = W[places[p]];
                W[places[p]] = non_finite[v];
                REFUSES(HQQ_NON_FINITE, row_and_column, quantize_with(options));
                W[places[p]] = kept;
            }
}

/* ---- dequantize -------------------------------------------------------------------- */

static hqq_status block(int64_t row_begin, int64_t row_end, int64_t column_begin,
                        int64_t column_end)
{
    return hqq_dequantize(outputs.out, K, HQQ_F32, &weight, row_begin, row_end, column_begin,
                          column_end, NULL);
}

static void walk_dequantize(void)
{
    INVALID("out is NULL", hqq_dequantize(NULL, K, HQQ_F32, &weight, 0, N, 0, K, NULL));
    INVALID("31|32", hqq_dequantize(outputs.out, K - 1, HQQ_F32, &weight, 0, N, 0, K, NULL));
    INVALID("-32", hqq_dequantize(outputs.out, -K, HQQ_F32, &weight, 0, N, 0, K, NULL));
    INVALID("out_dtype is 5",
            hqq_dequantize(outputs.out, K, (hqq_dtype)5, &weight, 0, N, 0, K, NULL));
    INVALID("rows|-1|12", block(-1, N, 0, K));
    INVALID("rows|13|12", block(0, N + 1, 0, K));
    INVALID("rows|5 to 4", block(5, 4, 0, K));
    INVALID("columns|-9223372036854775808", block(0, N, INT64_MIN, K));
    INVALID("columns|9223372036854775807|32", block(0, N, 0, INT64_MAX));
    INVALID("columns|32 to 31", block(0, N, K, K - 1));
}

/* ---- products ---------------------------------------------------------------------- */

static void walk_products(void)
{
    void *w = scratch;
    size_t room = sizeof scratch;
#define LINEAR(y, x, ldx, bias, bias_dtype, M, dtype) \
    hqq_linear(y, x, ldx, &weight, bias, bias_dtype, M, dtype, w, room, NULL)
#define DGRAD(dx, dy, lddy, M, dtype) \
    hqq_linear_dgrad(dx, dy, lddy, &weight, M, dtype, w, room, NULL)
    INVALID("y is NULL", LINEAR(NULL, x, K, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x is NULL", LINEAR(outputs.y, NULL, K, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x|31|32", LINEAR(outputs.y, x, K - 1, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x|-32", LINEAR(outputs.y, x, -K, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x|3 x 32", LINEAR(outputs.y, x, INT64_MAX, bias, HQQ_F32, M, HQQ_F32));
    INVALID("-3", LINEAR(outputs.y, x, K, bias, HQQ_F32, -M, HQQ_F32));
    INVALID("9223372036854775807", LINEAR(outputs.y, x, K, bias, HQQ_F32, INT64_MAX, HQQ_F32));
    INVALID("dtype is 3", LINEAR(outputs.y, x, K, bias, HQQ_F32, M, (hqq_dtype)3));
    INVALID("bias_dtype is -2", LINEAR(outputs.y, x, K, bias, (hqq_dtype)-2, M, HQQ_F32));
    INVALID("dx is NULL", DGRAD(NULL, dy, N, M, HQQ_F32));
    INVALID("dy is NULL", DGRAD(outputs.dx, NULL, N, M, HQQ_F32));
    INVALID("dy|11|12", DGRAD(outputs.dx, dy, N - 1, M, HQQ_F32));
    INVALID("-3", DGRAD(outputs.dx, dy, N, -M, HQQ_F32));
    INVALID("-9223372036854775808", DGRAD(outputs.dx, dy, N, INT64_MIN, HQQ_F32));
    INVALID("9223372036854775807", DGRAD(outputs.dx, dy, N, INT64_MAX, HQQ_F32));
    INVALID("dtype is 99", DGRAD(outputs.dx, dy, N, M, (hqq_dtype)99));

    INVALID("bytes is NULL", hqq_workspace_size(NULL, &weight, &lora, M, HQQ_F32, NULL));
    INVALID("-1", hqq_workspace_size(&outputs.bytes, &weight, &lora, -1, HQQ_F32, NULL));
    INVALID("9223372036854775807",
            hqq_workspace_size(&outputs.bytes, &weight, &lora, INT64_MAX, HQQ_F32, NULL));
    INVALID("dtype is 3",
            hqq_workspace_size(&outputs.bytes, &weight, &lora, M, (hqq_dtype)3, NULL));
}

static void walk_context(void)
{
    static const struct {
        const char *says;
        hqq_context context;
    } bad[] = {
        {"isa is 5", {.isa = (hqq_isa)5}},
        {"isa is -1", {.isa = (hqq_isa)-1}},
        {"kernel is 5", {.kernel = (hqq_kernel)5}},
        {"kernel is 2147483647", {.kernel = (hqq_kernel)INT_MAX}},
    };
    hqq_quantize_options o = hqq_quantize_defaults();
    for (int i = 0; i < COUNT(bad); i++) {
        const hqq_context *c = &bad[i].context;
        const char *says = bad[i].says;
        INVALID(says, hqq_quantize(outputs.packed, outputs.scale, outputs.zero, W, HQQ_F32,
                                   &weight, &o, c));
        INVALID(says, hqq_pack(outputs.packed, codes_in, &weight, c));
        INVALID(says, hqq_unpack(outputs.codes, &weight, c));
        INVALID(says, hqq_dequantize(outputs.out, K, HQQ_F32, &weight, 0, N, 0, K, c));
        INVALID(says, hqq_workspace_size(&outputs.bytes, &weight, &lora, M, HQQ_F32, c));
        INVALID(says,
                hqq_linear(outputs.y, x, K, &weight, NULL, HQQ_F32, M, HQQ_F32, NULL, 0, c));
        INVALID(says, hqq_linear_dgrad(outputs.dx, dy, N, &weight, M, HQQ_F32, NULL, 0, c));
        INVALID(says, hqq_lora_linear(outputs.y, outputs.xa, x, K, &weight, NULL, HQQ_F32,
                                      &lora, M, HQQ_F32, NULL, 0, c));
        INVALID(says, hqq_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K,
                                               xa_in, &weight, &lora, M, HQQ_F32, NULL, 0, c));
    }
}

/* A workspace that is given must be aligned and large enough. */
static void walk_workspace(void)
{
    for (int kernel = HQQ_KERNEL_DIRECT; kernel <= HQQ_KERNEL_TILED; kernel++) {
        hqq_context c = {.kernel = (hqq_kernel)kernel};
        size_t needed = 0;
        if (hqq_workspace_size(&needed, &weight, &lora, M, HQQ_F32, &c) != HQQ_OK ||
            needed > sizeof scratch - 64) {
            failures++;
            printf("a %zu-byte workspace for a small product\n", needed);
            return;
        }
        if (needed == 0) continue;
        char few[64];
        snprintf(few, sizeof few, "%zu|%zu", needed - 1, needed);
        REFUSES(HQQ_NO_MEMORY, few,
                hqq_lora_linear(outputs.y, outputs.xa, x, K, &weight, bias, HQQ_F32, &lora, M,
                                HQQ_F32, scratch, needed - 1, &c));
        REFUSES(HQQ_NO_MEMORY, few,
                hqq_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in,
                                         &weight, &lora, M, HQQ_F32, scratch, needed - 1, &c));
        INVALID("aligned", hqq_lora_linear(outputs.y, outputs.xa, x, K, &weight, bias, HQQ_F32,
                                           &lora, M, HQQ_F32, scratch + 4, needed, &c));
        INVALID("aligned",
                hqq_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in,
                                         &weight, &lora, M, HQQ_F32, scratch + 32, needed, &c));
    }
}

/* ---- adapters ---------------------------------------------------------------------- */

static void walk_adapters(void)
{
    static const struct {
        const char *says;
        hqq_lora lora;
    } bad[] = {
        {"rank is -1", {-1, HQQ_F32, A, B, 0.5f, 0, NULL, 0}},
        {"rank is 257|256", {257, HQQ_F32, A, B, 0.5f, 0, NULL, 0}},
        {"rank is 9223372036854775807", {INT64_MAX, HQQ_F32, A, B, 0.5f, 0, NULL, 0}},
        {"lora.dtype is 3", {R, (hqq_dtype)3, A, B, 0.5f, 0, NULL, 0}},
        {"lora.dtype is 2|(0)", {R, HQQ_BF16, A, B, 0.5f, 0, NULL, 0}}, /* x is HQQ_F32 */
        {"A is NULL|2", {R, HQQ_F32, NULL, B, 0.5f, 0, NULL, 0}},
        {"B is NULL|2", {R, HQQ_F32, A, NULL, 0.5f, 0, NULL, 0}},
        {"scaling is nan", {R, HQQ_F32, A, B, NAN, 0, NULL, 0}},
        {"scaling is inf", {R, HQQ_F32, A, B, INFINITY, 0, NULL, 0}},
        {"dropout is 1", {R, HQQ_F32, A, B, 0.5f, 1.0f, NULL, 0}},
        {"dropout is -0.1", {R, HQQ_F32, A, B, 0.5f, -0.1f, NULL, 0}},
        {"dropout is nan", {R, HQQ_F32, A, B, 0.5f, NAN, NULL, 0}},
        {"seed is NULL|0.25", {R, HQQ_F32, A, B, 0.5f, 0.25f, NULL, 7}},
        {"seed|8 bytes", {R, HQQ_F32, A, B, 0.5f, 0.25f, (const void *)(scratch + 4), 7}},
    };
#define LORA(y, x, ldx, lora)                                                                 \
    hqq_lora_linear(y, outputs.xa, x, ldx, &weight, bias, HQQ_F32, lora, M, HQQ_F32, scratch, \
                    sizeof scratch, NULL)
#define LORA_BACKWARD(dx, dA, dB, dy, lddy, x, ldx, xa, lora, M)                          \
    hqq_lora_linear_backward(dx, dA, dB, dy, lddy, x, ldx, xa, &weight, lora, M, HQQ_F32, \
                             scratch, sizeof scratch, NULL)
    for (int i = 0; i < COUNT(bad); i++) {
        const hqq_lora *l = &bad[i].lora;
        const char *says = bad[i].says;
        INVALID(says, LORA(outputs.y, x, K, l));
        INVALID(says,
                LORA_BACKWARD(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in, l, M));
        INVALID(says, hqq_workspace_size(&outputs.bytes, &weight, l, M, HQQ_F32, NULL));
    }
    INVALID("lora is NULL", LORA(outputs.y, x, K, NULL));
    INVALID("y is NULL", LORA(NULL, x, K, &lora));
    INVALID("x is NULL", LORA(outputs.y, NULL, K, &lora));
    INVALID("x|31|32", LORA(outputs.y, x, K - 1, &lora));
    INVALID("lora is NULL",
            LORA_BACKWARD(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in, NULL, M));
    INVALID("dy is NULL",
            LORA_BACKWARD(outputs.dx, NULL, NULL, NULL, N, x, K, xa_in, &lora, M));
    INVALID("x is NULL",
            LORA_BACKWARD(NULL, outputs.dA, NULL, dy, N, NULL, K, xa_in, &lora, M));
    INVALID("x is NULL", LORA_BACKWARD(NULL, NULL, outputs.dB, dy, N, NULL, K, NULL, &lora, M));
    INVALID("dy|1|12", LORA_BACKWARD(outputs.dx, NULL, NULL, dy, 1, x, K, xa_in, &lora, M));
    INVALID("x|2|32", LORA_BACKWARD(NULL, outputs.dA, NULL, dy, N, x, 2, xa_in, &lora, M));
    INVALID("-3",
            LORA_BACKWARD(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in, &lora, -M));
}

/* ---- what fuzzing found: sizes that overflow beside an empty weight, pointers -------- */

static void walk_products_of_nothing(void)
{
    const hqq_weight nothing = {.group_size = 1, .nbits = 4, .axis = 1};
    const hqq_weight no_rows = {.in_features = 3, .group_size = 1, .nbits = 4, .axis = 1};
    const hqq_weight huge = {.in_features = INT64_C(1) << 56, .group_size = 1, .nbits = 4};
    hqq_lora wide = lora;
    wide.rank = 255;
    INVALID("9223372036854775807|rows of 2",
            hqq_lora_linear(NULL, outputs.xa, NULL, 0, &nothing, NULL, HQQ_F32, &lora,
                            INT64_MAX, HQQ_F32, NULL, 0, NULL));
    INVALID("9223372036854775807|rows of 3",
            hqq_linear_dgrad(outputs.dx, NULL, 0, &no_rows, INT64_MAX, HQQ_F32, NULL, 0, NULL));
    INVALID("lora.rank is 255|0 x 72057594037927936",
            hqq_lora_linear_backward(NULL, outputs.dA, NULL, NULL, 0, NULL, 0, NULL, &huge,
                                     &wide, 0, HQQ_F32, NULL, 0, NULL));
}

static void walk_misaligned(void)
{
    static int64_t room[4];
    void *between = (char *)outputs.packed + 1;
    hqq_routing routing = {.experts = 2, .offsets = (void *)((char *)room + 1)};
    INVALID("words|not aligned", hqq_layout_of(between, NULL, NULL, &weight));
    INVALID("groups|not aligned", hqq_layout_of(NULL, NULL, between, &weight));
    INVALID("bytes|not aligned", hqq_workspace_size(between, &weight, NULL, M, HQQ_F32, NULL));
    INVALID("routing.offsets|not aligned",
            hqq_grouped_workspace_size(&outputs.bytes, &weight, NULL, &routing, HQQ_F32, NULL));
}

static void walk_experts(void)
{
    static const int64_t offsets[41];
    const hqq_routing routing = {.experts = 40, .offsets = offsets};
    hqq_weight huge = weight;
    huge.out_features = INT64_C(1) << 56;
    huge.in_features = 1;
    INVALID("routing.experts is 40|72057594037927936 x 1",
            hqq_grouped_linear(outputs.y, x, 1, &huge, &routing, HQQ_F32, NULL, 0, NULL));
}

/* ---- callbacks that fail ----------------------------------------------------------- */

static int32_t no_threads(int64_t begin, int64_t end, int64_t grain,
                          void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)begin, (void)end, (void)grain, (void)fn, (void)data;
    return 11;
}

static int32_t no_gemm(void *C, int64_t ldc, const void *a, int64_t lda, int32_t transpose_a,
                       const void *b, int64_t ldb, int32_t transpose_b, int64_t m, int64_t n,
                       int64_t k, float beta, hqq_dtype dtype, void *gemm_data)
{
    (void)C, (void)ldc, (void)a, (void)lda, (void)transpose_a, (void)b, (void)ldb;
    (void)transpose_b, (void)m, (void)n, (void)k, (void)beta, (void)dtype;
    ++*(int *)gemm_data;
    return 13;
}

/* A failing callback is reported wherever a kernel calls it; outputs may then be half done. */
static void walk_callbacks(void)
{
    static float large_x[64 * K], large_dy[64 * N], large_y[64 * K];
    for (int kernel = HQQ_KERNEL_DIRECT; kernel <= HQQ_KERNEL_TILED; kernel++)
        for (int transpose = 0; transpose <= 1; transpose++) {
            int gemm_calls = 0;
            hqq_context c = {
                .gemm = no_gemm, .gemm_data = &gemm_calls, .kernel = (hqq_kernel)kernel};
            hqq_status status = transpose
                                    ? hqq_linear_dgrad(large_y, large_dy, N, &weight, 64,
                                                       HQQ_F32, scratch, sizeof scratch, &c)
                                    : hqq_linear(large_y, large_x, K, &weight, NULL, HQQ_F32,
                                                 64, HQQ_F32, scratch, sizeof scratch, &c);
            hqq_status expected = gemm_calls ? HQQ_CALLBACK : HQQ_OK;
            if (status != expected || (gemm_calls && !strstr(hqq_last_error(), "gemm"))) {
                failures++;
                printf("gemm failed %d times: %s '%s'\n", gemm_calls, hqq_status_name(status),
                       hqq_last_error());
            }
        }
    hqq_context c = {.parallel_for = no_threads};
    hqq_status status = hqq_linear(large_y, large_x, K, &weight, NULL, HQQ_F32, 64, HQQ_F32,
                                   scratch, sizeof scratch, &c);
    /* a product this small may run on the calling thread alone */
    if (status != HQQ_OK &&
        (status != HQQ_CALLBACK || !strstr(hqq_last_error(), "parallel_for"))) {
        failures++;
        printf("parallel_for failed: %s '%s'\n", hqq_status_name(status), hqq_last_error());
    }
}

/* ---- what looks hostile but is sound ----------------------------------------------- */

#define ACCEPTS(call)                                                                        \
    do {                                                                                     \
        hqq_status got = (call);                                                             \
        if (got != HQQ_OK || hqq_last_error()[0] != '\0') {                                  \
            failures++;                                                                      \
            printf("line %d: %s\n    got %s: '%s'\n", __LINE__, #call, hqq_status_name(got), \
                   hqq_last_error());                                                        \
        }                                                                                    \
    } while (0)

/* Found by fuzzing: divided by the columns that there are none of. */
static void walk_experts_of_nothing(void)
{
    static const int64_t offsets[] = {0, 1, 2, 3, 4, 5};
    const hqq_routing routing = {.experts = 5, .offsets = offsets};
    const hqq_weight nothing = {.group_size = 1, .nbits = 4, .axis = 1};
    const hqq_context parallel = {.parallel_for = no_threads};
    ACCEPTS(hqq_grouped_workspace_size(&outputs.bytes, &nothing, NULL, &routing, HQQ_F32,
                                       &parallel));
    hqq_status status = hqq_grouped_lora_linear(NULL, outputs.xa, NULL, 0, &nothing, &lora,
                                                &routing, HQQ_F32, NULL, 0, &parallel);
    if (status != HQQ_OK && status != HQQ_CALLBACK) {
        failures++;
        printf("experts of nothing: %s '%s'\n", hqq_status_name(status), hqq_last_error());
    }
    outputs = pristine;
}

static void walk_sound(void)
{
    hqq_weight no_rows = {.in_features = K, .group_size = G, .nbits = 4, .axis = 1};
    hqq_weight no_columns = {.out_features = N, .group_size = G, .nbits = 4};
    hqq_weight nothing = {.group_size = 1, .nbits = 3};
    for (int e = 0; e < COUNT(shape_entries); e++) {
        ACCEPTS(shape_entries[e](&weight));
        if (shape_entries[e] == dequantize) continue; /* of rows that the empty lack */
        ACCEPTS(shape_entries[e](&no_rows));
        ACCEPTS(shape_entries[e](&no_columns));
        ACCEPTS(shape_entries[e](&nothing));
    }
    ACCEPTS(hqq_dequantize(NULL, 0, HQQ_F32, &no_rows, 0, 0, 0, K, NULL));
    ACCEPTS(hqq_dequantize(NULL, 0, HQQ_F32, &no_columns, 0, N, 0, 0, NULL));
    /* no time is spent on rows without columns */
    ACCEPTS(
        hqq_linear(NULL, NULL, 0, &nothing, NULL, HQQ_F32, INT64_MAX, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(hqq_linear_dgrad(NULL, NULL, 0, &nothing, INT64_MAX, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(hqq_layout_of(NULL, NULL, NULL, &weight));
    ACCEPTS(hqq_linear(NULL, NULL, 0, &weight, NULL, HQQ_F32, 0, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(hqq_linear_dgrad(NULL, NULL, 0, &weight, 0, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(block(4, 4, 0, K));
    ACCEPTS(hqq_dequantize(NULL, 0, HQQ_F32, &weight, 4, 4, 2, 2, NULL));
    ACCEPTS(LORA_BACKWARD(NULL, NULL, NULL, dy, N, NULL, K, NULL, &lora, M));
    ACCEPTS(LORA_BACKWARD(outputs.dx, NULL, NULL, dy, N, NULL, K, NULL, &lora, M));
    ACCEPTS(LORA_BACKWARD(NULL, NULL, outputs.dB, dy, N, NULL, K, xa_in, &lora, M));
    ACCEPTS(LORA_BACKWARD(NULL, NULL, outputs.dB, dy, N, x, K, NULL, &lora, M));
    hqq_lora rank_0 = {.rank = 0};
    ACCEPTS(LORA(outputs.y, x, K, &rank_0));
    /* one row: its stride is never used */
    ACCEPTS(hqq_linear(outputs.y, x, -1, &weight, NULL, HQQ_F32, 1, HQQ_F32, scratch,
                       sizeof scratch, NULL));
    /* one that is not given is made, on a CPU */
    hqq_context blocked = {.kernel = HQQ_KERNEL_BLOCKED};
    hqq_status made =
        hqq_linear(outputs.y, x, K, &weight, NULL, HQQ_F32, M, HQQ_F32, NULL, 0, &blocked);
    if (made != (HQQ_TEST_CUDA ? HQQ_NO_MEMORY : HQQ_OK) ||
        (HQQ_TEST_CUDA && !strstr(hqq_last_error(), "workspace is NULL"))) {
        failures++;
        printf("no workspace: %s '%s'\n", hqq_status_name(made), hqq_last_error());
    }
    /* a choice is a choice, whatever it is asked about */
    for (int i = 0; i < COUNT(bad_shapes); i++)
        for (int isa = -1; isa <= 5; isa++)
            for (int few = 0; few <= 1; few++) {
                hqq_kernel chosen = hqq_choose_kernel(
                    &bad_shapes[i].weight, few ? 2 : INT64_MAX, HQQ_F32, isa, (hqq_isa)isa);
                if (chosen < HQQ_KERNEL_AUTO || chosen > HQQ_KERNEL_TILED) failures++;
            }
}

int main(void)
{
    for (int i = 0; i < GROUPS; i++) scale_in[i] = 0.01f;
    for (int i = 0; i < N * K; i++) W[i] = 0.001f * (float)(i % 97 - 48);
    memset(&pristine, 0xa5, sizeof pristine);
    outputs = pristine;
    walk_bad_weights();
    walk_format();
    walk_quantizer();
    walk_dequantize();
    walk_products();
    walk_context();
    walk_workspace();
    walk_adapters();
    walk_products_of_nothing();
    walk_misaligned();
    walk_experts();
    walk_callbacks();
    walk_experts_of_nothing();
    walk_sound();
    if (failures) printf("%d failures\n", failures);
    return failures != 0;
}

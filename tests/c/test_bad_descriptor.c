/* Every entry point given a weight or a context that none takes. */
#include "bad_input.h"

/* ---- weights that no entry point takes --------------------------------------------- */

#define BIG (INT64_C(1) << 40)

#define OWN HQQ_PACKING_HQQ

static const struct {
    const char *says;
    hqq_weight weight;
} bad_shapes[] = {
    {"nbits is 0", {N, K, G, 0, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"nbits is 5", {N, K, G, 5, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"nbits is 16", {N, K, G, 16, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"nbits is -4", {N, K, G, -4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"2147483647", {N, K, G, INT32_MAX, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"axis is 2", {N, K, G, 4, 2, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"axis is -1", {N, K, G, 4, -1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"-12 x 32", {-N, K, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"12 x -32", {N, -K, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"-12 x -32", {-N, -K, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"-9223372036854775808",
     {INT64_MIN, K, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"1099511627776 x 1099511627776",
     {BIG, BIG, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"9223372036854775807", {INT64_MAX, 2, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"9223372036854775807", {INT64_MAX, 1, 1, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"1099511627776 x 4194304",
     {BIG, 1 << 22, 1, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"9223372036854775807 x 0",
     {INT64_MAX, 0, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"0 x 9223372036854775807",
     {0, INT64_MAX, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"group_size is 9223372036854775807",
     {0, K, INT64_MAX, 4, 0, HQQ_F32, OWN, NULL, NULL, NULL}},
    {"group_size is 0", {N, K, 0, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"group_size is -8", {N, K, -G, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"group_size is -9223372036854775808",
     {N, K, INT64_MIN, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"7|384|12 x 32", {N, K, 7, 4, 1, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"768|384", {N, K, 768, 4, 0, HQQ_F32, OWN, words_in, scale_in, zero_in}},
    {"meta_dtype is 3", {N, K, G, 4, 1, (hqq_dtype)3, OWN, words_in, scale_in, zero_in}},
    {"meta_dtype is -1", {N, K, G, 4, 1, (hqq_dtype)-1, OWN, words_in, scale_in, zero_in}},
};

static const struct {
    const char *says;
    hqq_weight weight;
} bad_arrays[] = {
    {"packed is NULL", {N, K, G, 4, 1, HQQ_F32, OWN, NULL, scale_in, zero_in}},
    {"scale is NULL", {N, K, G, 4, 1, HQQ_F32, OWN, words_in, NULL, zero_in}},
    {"zero is NULL", {N, K, G, 4, 1, HQQ_F32, OWN, words_in, scale_in, NULL}},
    {"not aligned", {N, K, G, 3, 1, HQQ_F32, OWN, (char *)words_in + 1, scale_in, zero_in}},
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

static void walk_context(void)
{
    static const struct {
        const char *says;
        hqq_context context;
    } bad[] = {
        {"isa is 6", {.isa = (hqq_isa)6}},
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

/* ---- what looks hostile but is sound ----------------------------------------------- */

static void walk_empty_weights(void)
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
    ACCEPTS(hqq_layout_of(NULL, NULL, NULL, &weight));
}

/* A choice is a choice, whatever it is asked about. */
static void walk_choices(void)
{
    const hqq_dtype dtypes[] = {HQQ_F32, HQQ_BF16};
    for (int i = 0; i <= COUNT(bad_shapes); i++)
        for (int isa = -1; isa <= 5; isa++)
            for (int way = 0; way < 8; way++) { /* few tokens, dgrad, dtype */
                const hqq_weight *bad = i < COUNT(bad_shapes) ? &bad_shapes[i].weight : NULL;
                hqq_kernel chosen = hqq_choose_kernel(bad, way & 1 ? 2 : INT64_MAX,
                                                      dtypes[way >> 2], way & 2, (hqq_isa)isa);
                if (chosen < HQQ_KERNEL_AUTO || chosen > LAST_NAMED_KERNEL) failures++;
            }
    /* found by fuzzing: no weight; dtypes that are none, which C++ must not even load */
    hqq_weight odd = weight;
    odd.meta_dtype = (hqq_dtype)INT_MIN;
    const hqq_kernel chosen[] = {
        hqq_choose_kernel(NULL, 2, HQQ_F16, 0, HQQ_ISA_AUTO),
        hqq_choose_kernel(&odd, 2, HQQ_F16, 0, HQQ_ISA_AUTO),
        hqq_choose_kernel(&weight, 2, (hqq_dtype)INT_MIN, 0, HQQ_ISA_AUTO),
    };
    for (int i = 0; i < COUNT(chosen); i++)
        if (chosen[i] < HQQ_KERNEL_AUTO || chosen[i] > LAST_NAMED_KERNEL) failures++;
}

int main(void)
{
    set_up();
    walk_bad_weights();
    walk_context();
    walk_empty_weights();
    walk_choices();
    return report();
}

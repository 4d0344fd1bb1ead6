/* Packing, quantizing and dequantizing with arguments that do not fit. */
#include "bad_input.h"

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
    INVALID("codes[77]|16|15", hqq_pack(outputs.packed, codes_in, &weight, NULL));
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

    static float importance[K + 1];
    hqq_quantize_options weighted = o;
    weighted.importance = importance;
    ACCEPTS(quantize_with(weighted)); /* all 0 */
    weighted.importance = (const float *)((const char *)importance + 1);
    INVALID("options.importance|not aligned", quantize_with(weighted));
    weighted.importance = importance;
    weighted.solver = HQQ_SOLVER_REFERENCE;
    INVALID("options.importance|default solver|options.solver is 1", quantize_with(weighted));
    weighted.solver = HQQ_SOLVER_MINMAX;
    INVALID("options.importance|default solver|options.solver is 2", quantize_with(weighted));

    if (HQQ_TEST_CUDA) return; /* nor at the weights */
    weighted.solver = HQQ_SOLVER_DEFAULT;
    importance[3] = -1.0f;
    INVALID("options.importance[3]|-1", quantize_with(weighted));
    importance[3] = 0.0f;
    importance[K - 1] = NAN;
    INVALID("options.importance[31]|nan", quantize_with(weighted));
    importance[K - 1] = INFINITY;
    INVALID("options.importance[31]|inf", quantize_with(weighted));
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

    ACCEPTS(block(4, 4, 0, K));
    ACCEPTS(hqq_dequantize(NULL, 0, HQQ_F32, &weight, 4, 4, 2, 2, NULL));
    hqq_weight no_rows = {.in_features = K, .group_size = G, .nbits = 4, .axis = 1};
    hqq_weight no_columns = {.out_features = N, .group_size = G, .nbits = 4};
    ACCEPTS(hqq_dequantize(NULL, 0, HQQ_F32, &no_rows, 0, 0, 0, K, NULL));
    ACCEPTS(hqq_dequantize(NULL, 0, HQQ_F32, &no_columns, 0, N, 0, 0, NULL));
}

int main(void)
{
    set_up();
    walk_format();
    walk_quantizer();
    walk_dequantize();
    return report();
}

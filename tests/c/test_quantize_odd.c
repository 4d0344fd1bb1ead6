/* Groups that have nothing usual about them: constant, tiny, huge, far from zero, of a single
 * element. Whatever finite numbers come in, finite scales and zeros go out, and no group
 * depends on its neighbours. */
#include "quantized_sample.h"

enum { ODD_G = 8 };
static const float odd_groups[][ODD_G] = {
    {0},
    {-0.0f, 0, -0.0f, 0, 0, 0, 0, 0},
    {3, 3, 3, 3, 3, 3, 3, 3},
    {-0.7f, -0.7f, -0.7f, -0.7f, -0.7f, -0.7f, -0.7f, -0.7f},
    {1e-5f, 1e-5f, 1e-5f, 1e-5f, 1e-5f, 1e-5f, 1e-5f, 1e-5f},
    {-1e-9f, -1e-9f, -1e-9f, -1e-9f, -1e-9f, -1e-9f, -1e-9f, -1e-9f},
    {1e-44f, 1e-44f, 1e-44f, 1e-44f, 1e-44f, 1e-44f, 1e-44f, 1e-44f},
    {0, 1e-44f, 2e-44f, 3e-44f, -1e-44f, 0, 0, 0},
    {0, 1e-38f, 2e-39f, 3e-38f, -1e-38f, 0, 0, 0},
    {1e-12f, 2e-12f, -3e-12f, 4e-12f, 5e-12f, 6e-12f, 7e-12f, -8e-12f},
    {3e4f, 3e4f, 3e4f, 3e4f, 3e4f, 3e4f, 3e4f, 3e4f},
    {-1e9f, -1e9f, -1e9f, -1e9f, -1e9f, -1e9f, -1e9f, -1e9f},
    {FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX},
    {FLT_MAX, -FLT_MAX, 0, 1, -1, FLT_MAX, FLT_MAX / 2, -FLT_MAX / 3},
    {-FLT_MAX, 0, 0, 0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 0, 1},
    {1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1.0000001f, 1, 1, 1, 1, 1, 1},
    {1e4f, 1e4f + 0.01f, 1e4f, 1e4f, 1e4f, 1e4f, 1e4f, 1e4f},
    {100, 100.01f, 100.02f, 100.03f, 100.04f, 100.05f, 100.06f, 100.07f},
    {-1000, -1000.1f, -1000.2f, -1000.3f, -1000.4f, -1000.5f, -1000.6f, -1000.7f},
    {5e5f, 5e5f + 1, 5e5f + 2, 5e5f + 3, 5e5f + 4, 5e5f + 5, 5e5f + 6, 5e5f + 7},
    {0.1f, -0.2f, 0.3f, -0.4f, 0.5f, -0.6f, 0.7f, -0.8f},
};
enum { ODD_GROUPS = sizeof odd_groups / sizeof *odd_groups };

/* The largest error that a group may keep: a constant only the rounding of the storage type
 * (and of numbers below or above it), anything else its spread. */
static double allowed_error(const float *group, hqq_dtype meta)
{
    double low = INFINITY, high = -INFINITY;
    for (int i = 0; i < ODD_G; i++) {
        low = fmin(low, (double)group[i]);
        high = fmax(high, (double)group[i]);
    }
    double size = fmax(fabs(low), fabs(high));
    double unit = meta == HQQ_F32 ? 0x1p-23 : meta == HQQ_F16 ? 0x1p-10 : 0x1p-7;
    double beyond = meta == HQQ_F16 ? fmax(0, size - 65504) : 0;
    double below = meta == HQQ_F16 ? 0x1p-24 : 0x1p-126;
    return (high - low) + size * unit + beyond + below;
}

static int check_odd_errors(const result *r)
{
    int failed = 0;
    for (int g = 0; g < ODD_GROUPS; g++) {
        double scale = (double)hqq_load(r->weight.scale, r->weight.meta_dtype, g);
        double zero = (double)hqq_load(r->weight.zero, r->weight.meta_dtype, g);
        for (int i = 0; i < ODD_G; i++) {
            int64_t e = element_of(&r->layout, g, i);
            double back = (hqq_code_at(r->weight.packed, &r->layout, e) - zero) * scale;
            double off = fabs((double)odd_groups[g][i] - back);
            if (off <= allowed_error(odd_groups[g], r->weight.meta_dtype)) continue;
            failed = 1;
            fprintf(stderr, "group %d: %g became %g (scale %g, zero %g)\n", g,
                    (double)odd_groups[g][i], back, scale, zero);
            break;
        }
    }
    return failed;
}

/* Beside other groups in the lanes of a vector, a group comes out as it does alone. */
static int check_odd_alone(const result *all, const hqq_quantize_options *options,
                           const hqq_context *context)
{
    int failed = 0;
    for (int g = 0; g < ODD_GROUPS; g++) {
        hqq_weight own = all->weight;
        own.out_features = own.axis == 1 ? 1 : ODD_G;
        own.in_features = own.axis == 1 ? ODD_G : 1;
        result one = quantize(odd_groups[g], HQQ_F32, own, options, context);
        size_t bytes = (size_t)hqq_dtype_bytes(own.meta_dtype);
        int same = memcmp(one.weight.scale, (const char *)all->weight.scale + (size_t)g * bytes,
                          bytes) == 0 &&
                   memcmp(one.weight.zero, (const char *)all->weight.zero + (size_t)g * bytes,
                          bytes) == 0;
        for (int i = 0; i < ODD_G; i++)
            same &=
                hqq_code_at(one.weight.packed, &one.layout, i) ==
                hqq_code_at(all->weight.packed, &all->layout, element_of(&all->layout, g, i));
        if (!same) fprintf(stderr, "group %d differs from the same group alone\n", g);
        failed |= !same;
        free_weight(&one.weight);
    }
    return failed;
}

static int check_odd(hqq_isa isa)
{
    int failures = 0;
    hqq_context context = {.isa = isa};
    for (int axis = 0; axis < 2; axis++) {
        hqq_weight w = {.out_features = axis == 1 ? ODD_GROUPS : ODD_G,
                        .in_features = axis == 1 ? ODD_G : ODD_GROUPS,
                        .group_size = ODD_G,
                        .axis = axis};
        hqq_layout l = hqq_layout_make(w.out_features, w.in_features, ODD_G, 8, axis);
        float W[ODD_GROUPS * ODD_G];
        for (int g = 0; g < ODD_GROUPS; g++)
            for (int i = 0; i < ODD_G; i++) W[element_of(&l, g, i)] = odd_groups[g][i];
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int m = 0; m < 3; m++)
                for (int solver = 0; solver < 3; solver++) {
                    hqq_quantize_options options = hqq_quantize_defaults();
                    options.solver = (hqq_solver)solver;
                    options.early_stop = 0; /* it looks at all groups together */
                    w.nbits = all_bits[b];
                    w.meta_dtype = all_dtypes[m];
                    result r = quantize(W, HQQ_F32, w, &options, &context);
                    int failed = check_odd_alone(&r, &options, &context);
                    if (solver == HQQ_SOLVER_DEFAULT) failed |= check_odd_errors(&r);
                    failed |= check_result(&r, W, HQQ_F32,
                                           solver == HQQ_SOLVER_DEFAULT ? 0 : INFINITY);
                    if (failed) {
                        print_weight(&w);
                        fprintf(stderr, "%s\n", solver_names[solver]);
                    }
                    failures += failed;
                    free_weight(&r.weight);
                }
    }
    return failures;
}

/* One element a group is kept up to the rounding of the storage type. */
static int check_single_elements(hqq_isa isa)
{
    uint64_t state = 521288629u;
    int failures = 0;
    hqq_context context = {.isa = isa};
    hqq_quantize_options options = hqq_quantize_defaults();
    enum { N = 9, K = 14 };
    float *W = random_array(&state, N * K, HQQ_F32, -2.0f, 2.0f);
    for (int b = 0; b < BIT_WIDTHS; b++)
        for (int m = 0; m < 3; m++)
            for (int axis = 0; axis < 2; axis++) {
                hqq_weight w = {.out_features = N,
                                .in_features = K,
                                .group_size = 1,
                                .nbits = all_bits[b],
                                .axis = axis,
                                .meta_dtype = all_dtypes[m]};
                result r = quantize(W, HQQ_F32, w, &options, &context);
                float back[N * K];
                failures += hqq_dequantize(back, K, HQQ_F32, &r.weight, 0, N, 0, K, NULL) != 0;
                for (int e = 0; e < N * K; e++) {
                    char stored[4];
                    hqq_store(stored, w.meta_dtype, 0, W[e]);
                    failures += back[e] != hqq_load(stored, w.meta_dtype, 0);
                }
                free_weight(&r.weight);
            }
    free(W);
    return failures;
}

/* Groups of x and -x: moving the lower end up is as good as moving the upper one down, so the
 * range search has ties that the last bits of its sums decide, on every instruction set alike.
 */
static int check_ties(hqq_isa isa)
{
    uint64_t state = 362436069u;
    int failures = 0;
    enum { N = 48, K = 128, G = 64 };
    hqq_context plain = {.isa = HQQ_ISA_PORTABLE}, context = {.isa = isa};
    hqq_quantize_options options = hqq_quantize_defaults();
    float *W = random_array(&state, N * K, HQQ_F32, -2.0f, 2.0f);
    for (int e = 0; e < N * K; e += 2) W[e + 1] = -W[e];
    for (int b = 0; b < BIT_WIDTHS; b++) {
        hqq_weight w = {.out_features = N,
                        .in_features = K,
                        .group_size = G,
                        .nbits = all_bits[b],
                        .axis = 1};
        result expected = quantize(W, HQQ_F32, w, &options, &plain);
        result got = quantize(W, HQQ_F32, w, &options, &context);
        if (!same_result(&expected, &got)) {
            failures++;
            fprintf(stderr, "%d bits, ties: %s differs from portable\n", w.nbits,
                    hqq_isa_name(isa));
        }
        free_weight(&expected.weight);
        free_weight(&got.weight);
    }
    free(W);
    return failures;
}

int main(void)
{
    int failures = for_each_isa(check_odd);
    failures += for_each_isa(check_ties);
    failures += for_each_isa(check_single_elements);
    return failures != 0;
}

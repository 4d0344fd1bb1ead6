/* The quantizer: every format, dtype and solver gives finite scales and zeros with the nearest
 * codes, the same bytes on every instruction set and in every order of work; hqq's solver
 * against a plain transcription; refusals. */
#include "quantized_sample.h"

/* Fewer shapes, where each is slow (the emulator with its race checker). */
static int is_quick(void)
{
    return getenv("HQQLORA_TEST_QUICK") != NULL;
}

/* ---- every format ---------------------------------------------------------------------- */

typedef struct shape {
    int64_t N, K, G;
} shape;

static const shape shapes[] = {{1, 1, 1},    {3, 5, 5},      {7, 9, 3},        {5, 64, 16},
                               {48, 64, 64}, {9, 33, 11},    {33, 31, 31},     {2, 13, 26},
                               {40, 48, 8},  {64, 96, 32},   {257, 3, 3},      {70, 130, 26},
                               {12, 96, 96}, {2, 1700, 850}, {1, 20000, 20000}};

static int check_format(const shape *s, int nbits, int axis, hqq_isa isa, uint64_t *state)
{
    hqq_dtype dtype = all_dtypes[random_bits(state) % 3];
    hqq_weight w = {.out_features = s->N,
                    .in_features = s->K,
                    .group_size = s->G,
                    .nbits = nbits,
                    .axis = axis,
                    .meta_dtype = all_dtypes[random_bits(state) % 3]};
    void *W = random_array(state, s->N * s->K, dtype, -0.1f, 0.12f);
    int failed = 0;
    for (int solver = 0; solver < 3 && !failed; solver++) {
        hqq_quantize_options options = hqq_quantize_defaults();
        options.solver = (hqq_solver)solver;
        hqq_context plain = {.isa = HQQ_ISA_PORTABLE};
        hqq_context context = {.isa = isa, .parallel_for = backwards_for};
        result expected = quantize(W, dtype, w, &options, &plain);
        result got = quantize(W, dtype, w, &options, &context);
        double coarse = w.meta_dtype == HQQ_F32   ? 0
                        : w.meta_dtype == HQQ_F16 ? 0x1p-11
                                                  : 0x1p-8;
        failed = check_result(&got, W, dtype, solver == HQQ_SOLVER_DEFAULT ? 0 : coarse);
        if (!same_result(&expected, &got)) {
            failed = 1;
            fprintf(stderr, "%s differs from portable\n", hqq_isa_name(isa));
        }
        if (failed) {
            print_weight(&w);
            fprintf(stderr, "W dtype %d, %s\n", (int)dtype, solver_names[solver]);
        }
        free_weight(&expected.weight);
        free_weight(&got.weight);
    }
    free(W);
    return failed;
}

static int check_formats(hqq_isa isa)
{
    uint64_t state = 88172645463325252u;
    int failures = 0;
    for (size_t s = is_quick(); s < sizeof shapes / sizeof *shapes; s += is_quick() ? 3 : 1)
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int axis = 0; axis < 2; axis++)
                failures += check_format(&shapes[s], all_bits[b], axis, isa, &state);
    return failures;
}

/* ---- hqq's solver, transcribed plainly ------------------------------------------------- */

static float sign_of(float x)
{
    return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f;
}

/* One step of hqq for all groups, sums in double. Returns the mean |error|. */
static float plain_step(const float *W, const hqq_layout *l, const float *multiplier,
                        float *zero, float beta, float lp_norm)
{
    double error = 0, levels = hqq_max_code(l->nbits);
    for (int64_t g = 0; g < l->groups; g++) {
        double sum = 0;
        for (int64_t i = 0; i < l->G; i++) {
            float w = W[element_of(l, g, i)];
            float q = (float)clip((double)rintf(w * multiplier[g] + zero[g]), levels);
            float e = w - (q - zero[g]) / multiplier[g];
            float power = lp_norm == 1.0f ? 1.0f : powf(fabsf(e), lp_norm - 1.0f);
            float kept = fmaxf(fabsf(e) - power / beta, 0.0f) * sign_of(e);
            sum += (double)(q - (w - kept) * multiplier[g]);
            error += (double)fabsf(e);
        }
        zero[g] = (float)(sum / (double)l->G);
    }
    return (float)(error / (double)l->elements);
}

static void plain_hqq(const float *W, const hqq_layout *l, const hqq_quantize_options *o,
                      float *multiplier, float *zero)
{
    for (int64_t g = 0; g < l->groups; g++) {
        float low = INFINITY, high = -INFINITY;
        for (int64_t i = 0; i < l->G; i++) {
            low = fminf(low, W[element_of(l, g, i)]);
            high = fmaxf(high, W[element_of(l, g, i)]);
        }
        float range = high - low;
        multiplier[g] =
            range <= 1e-4f ? 1.0f : fminf((float)hqq_max_code(l->nbits) / range, 2e4f);
        zero[g] = -low * multiplier[g];
        if (o->round_zero) zero[g] = rintf(zero[g]);
    }
    float least = INFINITY, beta = o->beta;
    for (int step = 0; step < o->iters; step++, beta *= o->kappa) {
        float error = plain_step(W, l, multiplier, zero, beta, o->lp_norm);
        if (o->early_stop && !(error < least)) return;
        least = error;
    }
}

/* Sums are not added in hqq's order here, so that zero may differ in its last bits and, rarely,
 * a code by one. */
static int compare_with_plain(const shape *s, int nbits, int axis, hqq_quantize_options options,
                              float size, hqq_isa isa)
{
    uint64_t state = 2463534242u;
    hqq_weight w = {.out_features = s->N,
                    .in_features = s->K,
                    .group_size = s->G,
                    .nbits = nbits,
                    .axis = axis,
                    .meta_dtype = HQQ_F32};
    float *W = random_array(&state, s->N * s->K, HQQ_F32, -size, size);
    hqq_context context = {.isa = isa};
    result r = quantize(W, HQQ_F32, w, &options, &context);
    const hqq_layout *l = &r.layout;
    float *multiplier = exact_alloc((size_t)l->groups * 4);
    float *zero = exact_alloc((size_t)l->groups * 4);
    plain_hqq(W, l, &options, multiplier, zero);
    int64_t off_codes = 0, off_metas = r.status != HQQ_OK;
    for (int64_t g = 0; g < l->groups; g++) {
        off_metas += fabsf(((const float *)r.weight.scale)[g] * multiplier[g] - 1.0f) > 1e-6f;
        off_metas += fabsf(((const float *)r.weight.zero)[g] - zero[g]) > 0.02f;
        for (int64_t i = 0; i < l->G; i++) {
            int64_t e = element_of(l, g, i);
            double q = clip((double)rintf(W[e] * multiplier[g] + zero[g]), hqq_max_code(nbits));
            off_codes += q != hqq_code_at(r.weight.packed, l, e);
        }
    }
    int failed = off_metas > 0 || off_codes * 1000 > l->elements;
    if (failed) {
        print_weight(&w);
        fprintf(stderr, "%s: %lld scales or zeros and %lld codes differ\n", hqq_isa_name(isa),
                (long long)off_metas, (long long)off_codes);
    }
    free(W);
    free(multiplier);
    free(zero);
    free_weight(&r.weight);
    return failed;
}

static int check_reference(hqq_isa isa)
{
    static const shape some[] = {{64, 64, 64}, {32, 96, 24}, {40, 50, 10}, {8, 1024, 1024}};
    int failures = 0;
    for (size_t s = is_quick() ? 2 : 0; s < (is_quick() ? 3 : sizeof some / sizeof *some); s++)
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int axis = 0; axis < 2; axis++)
                for (int variant = 0; variant < 6; variant++) {
                    hqq_quantize_options o = hqq_quantize_defaults();
                    o.solver = HQQ_SOLVER_REFERENCE;
                    if (variant == 1) o.early_stop = 0;
                    if (variant == 2) o.round_zero = 1;
                    if (variant == 3) o.kappa = 1.01f;
                    if (variant == 4) o.lp_norm = 1.0f;
                    if (variant == 5) o.beta = 1e4f, o.iters = 7;
                    /* from errors that are never shrunk to errors that always are */
                    float size = variant == 0 ? 0.1f : 3.0f;
                    failures += compare_with_plain(&some[s], all_bits[b], axis, o, size, isa);
                }
    return failures;
}

/* Groups far from zero beside groups at it: what one needs in a step must not show in another,
 * so that every width of lanes gives the same bits. */
static int check_wild(hqq_isa isa)
{
    enum { N = 96, K = 64, G = 32 };
    uint64_t state = 521288629u;
    int failures = 0;
    for (int axis = 0; axis < 2; axis++)
        for (int repeat = 0; repeat < 8; repeat++) {
            float *W = random_array(&state, N * K, HQQ_F32, -1.0f, 1.0f);
            hqq_layout l = hqq_layout_make(N, K, G, 4, axis);
            for (int64_t g = 0; g < l.groups; g++) {
                float offset = powf(10.0f, (float)(random_bits(&state) % 10));
                for (int64_t i = 0; i < G; i++) {
                    float *w = W + element_of(&l, g, i);
                    *w = *w * 4.0f + offset; /* so that e, of a few units, has lost its bits */
                }
            }
            hqq_weight w = {.out_features = N,
                            .in_features = K,
                            .group_size = G,
                            .nbits = 4,
                            .axis = axis,
                            .meta_dtype = HQQ_F32};
            hqq_quantize_options o = hqq_quantize_defaults();
            o.solver = HQQ_SOLVER_REFERENCE;
            o.early_stop = 0;
            hqq_context plain = {.isa = HQQ_ISA_PORTABLE}, context = {.isa = isa};
            result a = quantize(W, HQQ_F32, w, &o, &plain);
            result b = quantize(W, HQQ_F32, w, &o, &context);
            if (!same_result(&a, &b)) {
                fprintf(stderr, "axis %d, case %d: not the portable result\n", axis, repeat);
                failures++;
            }
            free(W);
            free_weight(&a.weight);
            free_weight(&b.weight);
        }
    return failures;
}

/* ---- refusals -------------------------------------------------------------------------- */

static int check_non_finite(hqq_isa isa)
{
    static const struct {
        int64_t at;
        float value;
        const char *message;
    } cases[] = {{5 * 70 + 3, NAN, "W[5, 3] is nan"},
                 {0, INFINITY, "W[0, 0] is inf"},
                 {700 * 70 - 1, -INFINITY, "W[699, 69] is -inf"}};
    uint64_t state = 362436069u;
    int failures = 0;
    enum { N = 700, K = 70, G = 10 };
    for (int d = 0; d < 3; d++)
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            void *W = random_array(&state, N * K, all_dtypes[d], -1.0f, 1.0f);
            hqq_store(W, all_dtypes[d], cases[c].at, cases[c].value);
            hqq_store(W, all_dtypes[d], N * K - 1, -INFINITY); /* the first one is named */
            hqq_weight w = {.out_features = N,
                            .in_features = K,
                            .group_size = G,
                            .nbits = 4,
                            .axis = (int)c % 2,
                            .meta_dtype = HQQ_F16};
            hqq_quantize_options options = hqq_quantize_defaults();
            hqq_context context = {.isa = isa, .parallel_for = backwards_for};
            result r = quantize(W, all_dtypes[d], w, &options, &context);
            int ok = r.status == HQQ_NON_FINITE && strstr(hqq_last_error(), cases[c].message);
            for (int64_t i = 0; i < r.layout.words; i++)
                ok = ok && ((const uint8_t *)r.weight.packed)[i] == 0xa5;
            for (int64_t i = 0; i < r.layout.groups * 2; i++)
                ok = ok && ((const uint8_t *)r.weight.scale)[i] == 0xa5 &&
                     ((const uint8_t *)r.weight.zero)[i] == 0xa5;
            if (!ok) fprintf(stderr, "case %zu: %s\n", c, hqq_last_error());
            failures += !ok;
            free(W);
            free_weight(&r.weight);
        }
    return failures;
}

int main(void)
{
    int failures = for_each_isa(check_formats);
    failures += for_each_isa(check_reference);
    failures += for_each_isa(check_wild);
    if (!HQQ_TEST_CUDA) /* there, groups of NaN are the answer: nobody waits for the device */
        failures += for_each_isa(check_non_finite);
    return failures != 0;
}

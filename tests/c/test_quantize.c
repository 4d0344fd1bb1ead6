/* The quantizer: every format, dtype and solver gives finite scales and zeros with the nearest
 * codes, the same bytes on every instruction set and in every order of work; hqq's solver
 * against a plain transcription; groups that have nothing usual about them. */
#include "sample_weight.h"

#include <float.h>

#include "format.h"

static const char *const solver_names[] = {"default", "reference", "minmax"};

/* A quantized copy of W, in buffers of exactly its size. */
typedef struct result {
    hqq_weight weight;
    hqq_layout layout;
    hqq_status status;
} result;

static result quantize(const void *W, hqq_dtype dtype, hqq_weight shape,
                       const hqq_quantize_options *options, const hqq_context *context)
{
    result r = {.weight = shape};
    r.layout = hqq_layout_make(shape.out_features, shape.in_features, shape.group_size,
                               shape.nbits, shape.axis);
    size_t packed_bytes = (size_t)(r.layout.words * r.layout.word_bytes);
    size_t meta_bytes = (size_t)(r.layout.groups * hqq_dtype_bytes(shape.meta_dtype));
    void *packed = exact_alloc(packed_bytes);
    void *scale = exact_alloc(meta_bytes), *zero = exact_alloc(meta_bytes);
    memset(packed, 0xa5, packed_bytes);
    memset(scale, 0xa5, meta_bytes);
    memset(zero, 0xa5, meta_bytes);
    r.weight.packed = packed;
    r.weight.scale = scale;
    r.weight.zero = zero;
    r.status = hqq_quantize(packed, scale, zero, W, dtype, &shape, options, context);
    return r;
}

static int same_result(const result *a, const result *b)
{
    size_t meta_bytes = (size_t)(a->layout.groups * hqq_dtype_bytes(a->weight.meta_dtype));
    return memcmp(a->weight.packed, b->weight.packed,
                  (size_t)(a->layout.words * a->layout.word_bytes)) == 0 &&
           memcmp(a->weight.scale, b->weight.scale, meta_bytes) == 0 &&
           memcmp(a->weight.zero, b->weight.zero, meta_bytes) == 0;
}

static int64_t element_of(const hqq_layout *l, int64_t group, int64_t i)
{
    return l->axis == 1 ? group * l->G + i : i * l->groups + group;
}

static double clip(double t, double levels) { return t < 0 ? 0 : t > levels ? levels : t; }

/* Finite scales above 0, finite zeros, zero bits where no code is, and each code within half a
 * step (and rounding) of its weight. `slack` is the relative error of scale and zero that is
 * allowed for: of solvers that choose codes before they round the two. */
static int check_result(const result *r, const void *W, hqq_dtype dtype, double slack)
{
    const hqq_layout *l = &r->layout;
    double levels = hqq_max_code(l->nbits);
    int wrong = r->status != HQQ_OK;
    if (wrong) fprintf(stderr, "%s\n", hqq_last_error());
    for (int64_t g = 0; g < l->groups && !wrong; g++) {
        double scale = (double)hqq_load(r->weight.scale, r->weight.meta_dtype, g);
        double zero = (double)hqq_load(r->weight.zero, r->weight.meta_dtype, g);
        if (!(scale > 0 && isfinite(scale) && isfinite(zero))) {
            fprintf(stderr, "group %lld: scale %g, zero %g\n", (long long)g, scale, zero);
            return 1;
        }
        for (int64_t i = 0; i < l->G; i++) {
            int64_t e = element_of(l, g, i);
            double position = (double)hqq_load(W, dtype, e) / scale;
            double rounding = (4 * (double)FLT_EPSILON + slack) *
                              (fabs(position) + fabs(zero) + levels);
            double off = clip(position + zero, levels) - hqq_code_at(r->weight.packed, l, e);
            if (fabs(off) <= 0.5 + rounding) continue;
            if (!wrong++)
                fprintf(stderr, "element %lld: %g is %g steps off its code %d\n", (long long)e,
                        (double)hqq_load(W, dtype, e), off,
                        hqq_code_at(r->weight.packed, l, e));
        }
    }
    for (int64_t word = 0; word < l->words; word++) {
        uint32_t used = 0;
        for (int slot = 0; slot < l->per; slot++)
            if (slot * l->words + word < l->elements)
                used |= (uint32_t)hqq_max_code(l->nbits) << hqq_slot_shift(l->nbits, slot);
        wrong += (hqq_word_at(r->weight.packed, l->nbits, word) & ~used) != 0;
    }
    return wrong;
}

/* ---- every format ---------------------------------------------------------------------- */

typedef struct shape {
    int64_t N, K, G;
} shape;

static const shape shapes[] = {{1, 1, 1},    {3, 5, 5},      {7, 9, 3},     {5, 64, 16},
                               {48, 64, 64}, {9, 33, 11},    {33, 31, 31},  {2, 13, 26},
                               {40, 48, 8},  {64, 96, 32},   {257, 3, 3},   {70, 130, 26},
                               {12, 96, 96}, {2, 1700, 850}, {1, 20000, 20000}};

static int check_format(const shape *s, int nbits, int axis, hqq_isa isa, uint64_t *state)
{
    hqq_dtype dtype = all_dtypes[random_bits(state) % 3];
    hqq_weight w = {.out_features = s->N, .in_features = s->K, .group_size = s->G,
                    .nbits = nbits, .axis = axis,
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
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int b = 0; b < 5; b++)
            for (int axis = 0; axis < 2; axis++)
                failures += check_format(&shapes[s], all_bits[b], axis, isa, &state);
    return failures;
}

/* ---- hqq's solver, transcribed plainly ------------------------------------------------- */

static float sign_of(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }

/* One step of hqq for all groups, sums in double. Returns the mean |error|. */
static float plain_step(const float *W, const hqq_layout *l, const float *multiplier, float *zero,
                        float beta, float lp_norm)
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
        multiplier[g] = range <= 1e-4f ? 1.0f : fminf((float)hqq_max_code(l->nbits) / range, 2e4f);
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
    hqq_weight w = {.out_features = s->N, .in_features = s->K, .group_size = s->G,
                    .nbits = nbits, .axis = axis, .meta_dtype = HQQ_F32};
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
    for (size_t s = 0; s < sizeof some / sizeof *some; s++)
        for (int b = 0; b < 5; b++)
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

/* ---- unusual groups -------------------------------------------------------------------- */

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
            same &= hqq_code_at(one.weight.packed, &one.layout, i) ==
                    hqq_code_at(all->weight.packed, &all->layout,
                                element_of(&all->layout, g, i));
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
                        .in_features = axis == 1 ? ODD_G : ODD_GROUPS, .group_size = ODD_G,
                        .axis = axis};
        hqq_layout l = hqq_layout_make(w.out_features, w.in_features, ODD_G, 8, axis);
        float W[ODD_GROUPS * ODD_G];
        for (int g = 0; g < ODD_GROUPS; g++)
            for (int i = 0; i < ODD_G; i++) W[element_of(&l, g, i)] = odd_groups[g][i];
        for (int b = 0; b < 5; b++)
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
    for (int b = 0; b < 5; b++)
        for (int m = 0; m < 3; m++)
            for (int axis = 0; axis < 2; axis++) {
                hqq_weight w = {.out_features = N, .in_features = K, .group_size = 1,
                                .nbits = all_bits[b], .axis = axis,
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
            hqq_weight w = {.out_features = N, .in_features = K, .group_size = G, .nbits = 4,
                            .axis = (int)c % 2, .meta_dtype = HQQ_F16};
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
    failures += for_each_isa(check_odd);
    failures += for_each_isa(check_single_elements);
    failures += for_each_isa(check_non_finite);
    return failures != 0;
}

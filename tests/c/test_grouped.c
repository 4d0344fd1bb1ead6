/* Products of mixtures of experts against the products of each expert alone, bit for bit: all
 * bits, both axes and dtypes; experts without rows, one with all rows, a single one; exact
 * buffers. */
#include "sample_weight.h"

enum { MOST_EXPERTS = 6, R = 3 };

static const int64_t routings[][MOST_EXPERTS + 1] = {
    {0, 2, 2, 7, 8, 8, 40},    /* without rows, with few, with many */
    {0, 1, 2, 3, 4, 5, 6},     /* few each: side by side */
    {0, 0, 0, 25, 25, 25, 25}, /* all in one */
    {0, 0, 0, 0, 0, 0, 0},     /* no rows at all */
};

typedef struct problem {
    int64_t E, M, N, K, words, word_bytes, groups;
    hqq_routing routing;
    hqq_dtype dtype, lora_dtype;
    hqq_weight stacked, of[MOST_EXPERTS];
    hqq_lora lora;
    void *x, *dy, *A, *B;
    hqq_context context;
} problem;

static const uint64_t seed = UINT64_MAX - 5; /* the experts' go round 2^64 */

static void *stack(const problem *p, size_t bytes, const void *(*part)(const hqq_weight *))
{
    char *all = exact_alloc((size_t)p->E * bytes);
    for (int64_t e = 0; e < p->E; e++) memcpy(all + (size_t)e * bytes, part(&p->of[e]), bytes);
    return all;
}
static const void *packed_of(const hqq_weight *w)
{
    return w->packed;
}
static const void *scale_of(const hqq_weight *w)
{
    return w->scale;
}
static const void *zero_of(const hqq_weight *w)
{
    return w->zero;
}

static problem make_problem(uint64_t *state, int64_t E, const int64_t *offsets, int nbits,
                            int axis, hqq_dtype dtype, hqq_context context)
{
    problem p = {.E = E, .M = offsets[E], .N = 32, .K = 64, .dtype = dtype, .context = context};
    p.routing = (hqq_routing){.experts = E, .offsets = offsets};
    p.lora_dtype = random_bits(state) % 2 ? HQQ_F32 : dtype;
    hqq_dtype meta = all_dtypes[random_bits(state) % 3];
    for (int64_t e = 0; e < E; e++)
        p.of[e] = sample_weight(state, p.N, p.K, 32, nbits, axis, meta, 0.02f);
    hqq_layout_of(&p.words, &p.word_bytes, &p.groups, &p.of[0]);
    size_t meta_bytes = (size_t)(p.groups * hqq_dtype_bytes(meta));
    p.stacked = p.of[0];
    p.stacked.packed = stack(&p, (size_t)(p.words * p.word_bytes), packed_of);
    p.stacked.scale = stack(&p, meta_bytes, scale_of);
    p.stacked.zero = stack(&p, meta_bytes, zero_of);
    p.x = random_array(state, p.M * p.K, dtype, -1, 1);
    p.dy = random_array(state, p.M * p.N, dtype, -1, 1);
    p.A = random_array(state, E * R * p.K, p.lora_dtype, -1, 1);
    p.B = random_array(state, E * p.N * R, p.lora_dtype, -1, 1);
    p.lora = (hqq_lora){.rank = R,
                        .dtype = p.lora_dtype,
                        .A = p.A,
                        .B = p.B,
                        .scaling = 0.5f,
                        .dropout = 0.25f,
                        .seed = &seed,
                        .seed_offset = 4};
    return p;
}

static void free_problem(problem *p)
{
    for (int64_t e = 0; e < p->E; e++) free_weight(&p->of[e]);
    free_weight(&p->stacked);
    free(p->x);
    free(p->dy);
    free(p->A);
    free(p->B);
}

/* Aligned and full of NaN. */
static void *workspace_of(size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (!memory) exit(2);
    memset(memory, 0xff, bytes);
    return memory;
}

static int succeeded(const char *what, hqq_status status)
{
    if (status == HQQ_OK) return 1;
    fprintf(stderr, "%s: %s\n", what, hqq_last_error());
    return 0;
}

typedef struct results {
    void *y, *lora_y, *dx, *lora_dx, *dA, *dB;
    float *xa;
    size_t y_bytes, dx_bytes, dA_bytes, dB_bytes, xa_bytes;
} results;

static results make_results(const problem *p)
{
    size_t size = (size_t)hqq_dtype_bytes(p->dtype);
    size_t lora_size = (size_t)hqq_dtype_bytes(p->lora_dtype);
    results r = {.y_bytes = (size_t)(p->M * p->N) * size,
                 .dx_bytes = (size_t)(p->M * p->K) * size,
                 .dA_bytes = (size_t)(p->E * R * p->K) * lora_size,
                 .dB_bytes = (size_t)(p->E * p->N * R) * lora_size,
                 .xa_bytes = (size_t)(p->M * R) * sizeof(float)};
    r.y = exact_alloc(r.y_bytes);
    r.lora_y = exact_alloc(r.y_bytes);
    r.dx = exact_alloc(r.dx_bytes);
    r.lora_dx = exact_alloc(r.dx_bytes);
    r.dA = exact_alloc(r.dA_bytes);
    r.dB = exact_alloc(r.dB_bytes);
    r.xa = exact_alloc(r.xa_bytes);
    memset(r.dA, 0xff, r.dA_bytes);
    memset(r.dB, 0xff, r.dB_bytes);
    return r;
}

static void free_results(results *r)
{
    free(r->y);
    free(r->lora_y);
    free(r->dx);
    free(r->lora_dx);
    free(r->dA);
    free(r->dB);
    free(r->xa);
}

static int compute_grouped(const problem *p, results *r)
{
    size_t bytes;
    const hqq_context *c = &p->context;
    if (!succeeded("size", hqq_grouped_workspace_size(&bytes, &p->stacked, &p->lora,
                                                      &p->routing, p->dtype, c)))
        return 0;
    void *w = workspace_of(bytes);
    int ok =
        succeeded("linear", hqq_grouped_linear(r->y, p->x, p->K, &p->stacked, &p->routing,
                                               p->dtype, w, bytes, c)) &&
        succeeded("dgrad", hqq_grouped_linear_dgrad(r->dx, p->dy, p->N, &p->stacked,
                                                    &p->routing, p->dtype, w, bytes, c)) &&
        succeeded("lora",
                  hqq_grouped_lora_linear(r->lora_y, r->xa, p->x, p->K, &p->stacked, &p->lora,
                                          &p->routing, p->dtype, w, bytes, c)) &&
        succeeded("backward", hqq_grouped_lora_linear_backward(
                                  r->lora_dx, r->dA, r->dB, p->dy, p->N, p->x, p->K, r->xa,
                                  &p->stacked, &p->lora, &p->routing, p->dtype, w, bytes, c));
    free(w);
    return ok;
}

/* Of an expert's mask, by the header; the sum wraps where the seed is large. */
HQQ_WRAPS static uint64_t seed_of_expert(int64_t e)
{
    return seed + 4 + (uint64_t)e;
}

static int compute_one_by_one(const problem *p, results *r)
{
    int ok = 1;
    for (int64_t e = 0; e < p->E && ok; e++) {
        int64_t row = p->routing.offsets[e], M = p->routing.offsets[e + 1] - row;
        const hqq_weight *weight = &p->of[e];
        hqq_lora lora = p->lora;
        lora.A = hqq_at(p->A, p->lora_dtype, e * R * p->K);
        lora.B = hqq_at(p->B, p->lora_dtype, e * p->N * R);
        uint64_t own_seed = seed_of_expert(e);
        lora.seed = &own_seed;
        lora.seed_offset = 0;
        const void *x = hqq_at(p->x, p->dtype, row * p->K);
        const void *dy = hqq_at(p->dy, p->dtype, row * p->N);
        float *xa = r->xa + row * R;
        size_t bytes;
        const hqq_context *c = &p->context;
        if (!succeeded("size", hqq_workspace_size(&bytes, weight, &lora, M, p->dtype, c)))
            return 0;
        void *w = workspace_of(bytes);
        ok = succeeded("linear", hqq_linear(hqq_at_mut(r->y, p->dtype, row * p->N), x, p->K,
                                            weight, NULL, HQQ_F32, M, p->dtype, w, bytes, c)) &&
             succeeded("dgrad", hqq_linear_dgrad(hqq_at_mut(r->dx, p->dtype, row * p->K), dy,
                                                 p->N, weight, M, p->dtype, w, bytes, c)) &&
             succeeded("lora", hqq_lora_linear(hqq_at_mut(r->lora_y, p->dtype, row * p->N), xa,
                                               x, p->K, weight, NULL, HQQ_F32, &lora, M,
                                               p->dtype, w, bytes, c)) &&
             succeeded("backward", hqq_lora_linear_backward(
                                       hqq_at_mut(r->lora_dx, p->dtype, row * p->K),
                                       hqq_at_mut(r->dA, p->lora_dtype, e * R * p->K),
                                       hqq_at_mut(r->dB, p->lora_dtype, e * p->N * R), dy, p->N,
                                       x, p->K, xa, weight, &lora, M, p->dtype, w, bytes, c));
        free(w);
    }
    return ok;
}

static int same(const char *what, const void *a, const void *b, size_t bytes)
{
    if (bytes == 0 || memcmp(a, b, bytes) == 0) return 1;
    fprintf(stderr, "%s differs between grouped and one by one\n", what);
    return 0;
}

static int check(uint64_t *state, int64_t E, const int64_t *offsets, int nbits, int axis,
                 hqq_dtype dtype, hqq_context context)
{
    problem p = make_problem(state, E, offsets, nbits, axis, dtype, context);
    results grouped = make_results(&p), single = make_results(&p);
    int ok = compute_grouped(&p, &grouped) && compute_one_by_one(&p, &single) &&
             same("y", grouped.y, single.y, grouped.y_bytes) &&
             same("dx", grouped.dx, single.dx, grouped.dx_bytes) &&
             same("lora y", grouped.lora_y, single.lora_y, grouped.y_bytes) &&
             same("xa", grouped.xa, single.xa, grouped.xa_bytes) &&
             same("lora dx", grouped.lora_dx, single.lora_dx, grouped.dx_bytes) &&
             same("dA", grouped.dA, single.dA, grouped.dA_bytes) &&
             same("dB", grouped.dB, single.dB, grouped.dB_bytes);
    if (!ok) {
        print_weight(&p.stacked);
        fprintf(stderr, "%lld experts, %lld rows, dtype %d, kernel %d\n", (long long)E,
                (long long)p.M, (int)dtype, (int)context.kernel);
    }
    free_results(&grouped);
    free_results(&single);
    free_problem(&p);
    return !ok;
}

static int check_bad_routing(void)
{
    static const int64_t starts_late[] = {1, 2}, falls[] = {0, 3, 2}, fine[] = {0, 1, 2};
    hqq_routing none = {0, fine}, null = {2, NULL}, late = {1, starts_late}, down = {2, falls};
    const hqq_routing *bad[] = {NULL, &none, &null, &late, &down};
    const char *words[] = {"routing is NULL", "at least 1", "offsets is NULL", "expected 0",
                           "offsets[2] is 2, less than the 3"};
    uint64_t state = 5;
    hqq_weight w = sample_weight(&state, 8, 8, 8, 4, 1, HQQ_F32, 0.1f);
    int failures = 0;
    for (int i = 0; i < 5; i++) {
        float y[16], x[16] = {0};
        size_t bytes;
        hqq_status first = hqq_grouped_linear(y, x, 8, &w, bad[i], HQQ_F32, NULL, 0, NULL);
        int told = strstr(hqq_last_error(), words[i]) != NULL;
        hqq_status second = hqq_grouped_workspace_size(&bytes, &w, NULL, bad[i], HQQ_F32, NULL);
        if (first == HQQ_INVALID && second == HQQ_INVALID && told) continue;
        fprintf(stderr, "bad routing %d: %d, %d, %s\n", i, (int)first, (int)second,
                hqq_last_error());
        failures++;
    }
    free_weight(&w);
    return failures;
}

/* An x that is not read, because dx alone is wanted, may have any stride. */
static int check_unread_x(void)
{
    uint64_t state = 7;
    problem p = make_problem(&state, 6, routings[0], 4, 1, HQQ_F32, (hqq_context){0});
    results want = make_results(&p), got = make_results(&p);
    size_t bytes = 0;
    int ok = compute_grouped(&p, &want) &&
             succeeded("size", hqq_grouped_workspace_size(&bytes, &p.stacked, &p.lora,
                                                          &p.routing, p.dtype, NULL));
    void *w = workspace_of(bytes);
    ok = ok &&
         succeeded("backward", hqq_grouped_lora_linear_backward(
                                   got.lora_dx, NULL, NULL, p.dy, p.N, p.x, INT64_MAX, NULL,
                                   &p.stacked, &p.lora, &p.routing, p.dtype, w, bytes, NULL)) &&
         same("lora dx", got.lora_dx, want.lora_dx, want.dx_bytes);
    free(w);
    free_results(&want);
    free_results(&got);
    free_problem(&p);
    return !ok;
}

int main(void)
{
    uint64_t state = 19;
    int failures = check_bad_routing() + check_unread_x();
    for (int b = 0; b < BIT_WIDTHS; b++)
        for (int axis = 0; axis < 2; axis++)
            for (int d = 0; d < 3; d++)
                for (int r = 0; r < 4; r++) {
                    if (HQQ_TEST_CUDA && (b + axis + d + r) % 3) continue; /* slow */
                    hqq_context context = {.parallel_for = backwards_for};
                    if ((b + d + r) % 3 == 0)
                        context.kernel =
                            (hqq_kernel)(1 + random_bits(&state) % (uint32_t)LAST_KERNEL);
                    failures += check(&state, MOST_EXPERTS, routings[r], all_bits[b], axis,
                                      all_dtypes[d], context);
                }
    static const int64_t single[] = {0, 5};
    failures += check(&state, 1, single, 4, 1, HQQ_F32, (hqq_context){0});
    return failures != 0;
}

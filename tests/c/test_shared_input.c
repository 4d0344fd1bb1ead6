/*
 * The halves of an adapter, which layers that share their input call: bit for bit what the
 * whole calls give, one layer alone or two with their A one under another; empty shapes; bad
 * input.
 *
 * The numbers are small integers, so that every sum is exact in whatever order.
 */
#include "sample_weight.h"

enum { LAYERS = 2 };
#define COUNT_OF(array) ((int)(sizeof(array) / sizeof *(array)))

typedef struct problem {
    hqq_weight weight[LAYERS]; /* [N,K], of two N */
    hqq_lora lora[LAYERS];
    hqq_dtype dtype;
    int64_t M, K, ldx;
    void *x, *A, *dy[LAYERS]; /* A: those of both layers */
} problem;

static void *integers(uint64_t *state, int64_t n, hqq_dtype dtype)
{
    void *data = exact_alloc((size_t)(n * hqq_dtype_bytes(dtype)));
    for (int64_t i = 0; i < n; i++)
        hqq_store(data, dtype, i, (float)(random_bits(state) % 3) - 1);
    return data;
}

static problem make_problem(uint64_t *state, int64_t M, const int64_t *N, int64_t K,
                            const int64_t *R, hqq_dtype dtype, hqq_dtype lora_dtype)
{
    problem p = {.M = M, .K = K, .ldx = K + 3, .dtype = dtype};
    p.x = integers(state, (M > 0 ? M - 1 : 0) * p.ldx + K, dtype);
    p.A = integers(state, (R[0] + R[1]) * K, lora_dtype);
    for (int i = 0; i < LAYERS; i++) {
        p.weight[i] = sample_weight(state, N[i], K, 8, 4, 1, HQQ_F32, 0.5f);
        int64_t groups = N[i] * K / 8;
        for (int64_t g = 0; g < groups; g++) {
            hqq_store((void *)p.weight[i].scale, HQQ_F32, g, 1);
            hqq_store((void *)p.weight[i].zero, HQQ_F32, g, 8);
        }
        p.dy[i] = integers(state, M * N[i], dtype);
        p.lora[i] = (hqq_lora){.rank = R[i],
                               .dtype = lora_dtype,
                               .A = hqq_at(p.A, lora_dtype, i ? R[0] * K : 0),
                               .B = integers(state, N[i] * R[i], lora_dtype),
                               .scaling = 0.5f};
    }
    return p;
}

static void free_problem(problem *p)
{
    for (int i = 0; i < LAYERS; i++) {
        free_weight(&p->weight[i]);
        free(p->dy[i]);
        free((void *)p->lora[i].B);
    }
    free(p->x);
    free(p->A);
}

/* A workspace of exactly the size that the library names, for one call. */
typedef struct room {
    void *memory;
    size_t bytes;
} room;

static room make_room(const hqq_weight *weight, const hqq_lora *lora, const problem *p,
                      const hqq_context *context)
{
    room r = {0};
    hqq_lora shape = {.rank = lora->rank, .dtype = lora->dtype};
    if (hqq_shared_input_workspace_size(&r.bytes, weight, &shape, p->M, p->dtype, context) !=
        HQQ_OK)
        fprintf(stderr, "size: %s\n", hqq_last_error());
    r.memory = aligned_alloc(64, r.bytes ? (r.bytes + 63) / 64 * 64 : 64);
    return r;
}

static int failed_call(const char *what, hqq_status status)
{
    if (status == HQQ_OK) return 0;
    fprintf(stderr, "%s: %s\n", what, hqq_last_error());
    return 1;
}

static int differ(const char *what, const void *got, const void *want, int64_t n,
                  hqq_dtype dtype, const hqq_context *context)
{
    for (int64_t i = 0; i < n; i++) {
        double a = (double)hqq_load(got, dtype, i), b = (double)hqq_load(want, dtype, i);
        if (a == b) continue;
        fprintf(stderr, "%s[%lld] is %g, of the whole call %g; kernel %d, dtype %d\n", what,
                (long long)i, a, b, (int)context->kernel, (int)dtype);
        return 1;
    }
    return 0;
}

/* xa of both layers in one product, and its columns apart. */
static int project(float *xas[LAYERS], const problem *p, const hqq_context *context)
{
    hqq_lora both = {.rank = p->lora[0].rank + p->lora[1].rank,
                     .dtype = p->lora[0].dtype,
                     .A = p->A,
                     .dropout = 0.5f}; /* not read */
    hqq_weight shape = {.in_features = p->K, .group_size = 1, .nbits = 8, .axis = 1};
    room r = make_room(&shape, &both, p, context);
    float *xa = exact_alloc((size_t)(p->M * both.rank) * sizeof(float));
    int failures =
        failed_call("project", hqq_lora_project(xa, p->x, p->ldx, &both, p->M, p->K, p->dtype,
                                                r.memory, r.bytes, context));
    for (int i = 0; i < LAYERS; i++) {
        int64_t R = p->lora[i].rank;
        for (int64_t j = 0; j < p->M * R; j++)
            xas[i][j] = xa[j / R * both.rank + (i ? p->lora[0].rank : 0) + j % R];
    }
    free(xa);
    free(r.memory);
    return failures;
}

static int check_layer(const problem *p, int i, const float *xa, const hqq_context *context)
{
    const hqq_weight *w = &p->weight[i];
    const hqq_lora *lora = &p->lora[i];
    int64_t M = p->M, N = w->out_features, K = p->K, R = lora->rank;
    size_t element = (size_t)hqq_dtype_bytes(p->dtype);
    size_t factor = (size_t)hqq_dtype_bytes(lora->dtype);
    void *y[2], *dx[2], *dA[2], *dB[2];
    float *whole_xa = exact_alloc((size_t)(M * R) * sizeof(float));
    float *dyb = exact_alloc((size_t)(M * R) * sizeof(float));
    for (int j = 0; j < 2; j++) {
        y[j] = exact_alloc((size_t)(M * N) * element);
        dx[j] = exact_alloc((size_t)(M * K) * element);
        dA[j] = exact_alloc((size_t)(R * K) * factor);
        dB[j] = exact_alloc((size_t)(N * R) * factor);
    }
    size_t bytes;
    int failures =
        failed_call("size", hqq_workspace_size(&bytes, w, lora, M, p->dtype, context));
    void *memory = aligned_alloc(64, bytes ? bytes : 64);
    failures +=
        failed_call("whole", hqq_lora_linear(y[1], whole_xa, p->x, p->ldx, w, NULL, HQQ_F32,
                                             lora, M, p->dtype, memory, bytes, context));
    failures +=
        failed_call("whole", hqq_lora_linear_backward(dx[1], dA[1], dB[1], p->dy[i], N, p->x,
                                                      p->ldx, whole_xa, w, lora, M, p->dtype,
                                                      memory, bytes, context));
    free(memory);

    room r = make_room(w, lora, p, context);
    hqq_lora only_B = *lora, only_A = *lora;
    only_B.A = only_A.B = NULL;
    failures += failed_call("y", hqq_lora_linear_from_xa(y[0], xa, p->x, p->ldx, w, NULL,
                                                         HQQ_F32, &only_B, M, p->dtype,
                                                         r.memory, r.bytes, context));
    hqq_weight shape = {.out_features = N, .group_size = 1, .nbits = 8, .axis = 1};
    room small = make_room(&shape, lora, p, context);
    failures += failed_call(
        "factors", hqq_lora_factor_gradients(dyb, dB[0], p->dy[i], N, xa, &only_B, M, N,
                                             p->dtype, small.memory, small.bytes, context));
    failures += failed_call(
        "dx, dA", hqq_lora_input_gradients(dx[0], dA[0], p->dy[i], N, dyb, p->x, p->ldx, w,
                                           &only_A, M, p->dtype, r.memory, r.bytes, context));
    if (!failures) {
        failures += differ("xa", xa, whole_xa, M * R, HQQ_F32, context);
        failures += differ("y", y[0], y[1], M * N, p->dtype, context);
        failures += differ("dx", dx[0], dx[1], M * K, p->dtype, context);
        failures += differ("dA", dA[0], dA[1], R * K, lora->dtype, context);
        failures += differ("dB", dB[0], dB[1], N * R, lora->dtype, context);
    }
    for (int j = 0; j < 2; j++) free(y[j]), free(dx[j]), free(dA[j]), free(dB[j]);
    free(whole_xa);
    free(dyb);
    free(r.memory);
    free(small.memory);
    return failures;
}

static int check_problem(problem *p)
{
    int failures = 0;
    for (int kernel = HQQ_KERNEL_AUTO; kernel <= (int)LAST_KERNEL && !failures; kernel++) {
        hqq_context context = {.kernel = (hqq_kernel)kernel};
        float *xas[LAYERS];
        for (int i = 0; i < LAYERS; i++)
            xas[i] = exact_alloc((size_t)(p->M * p->lora[i].rank) * sizeof(float));
        failures += project(xas, p, &context);
        for (int i = 0; i < LAYERS && !failures; i++)
            failures += check_layer(p, i, xas[i], &context);
        for (int i = 0; i < LAYERS; i++) free(xas[i]);
    }
    free_problem(p);
    return failures;
}

/* ---- what has a size of 0 ---------------------------------------------------------------- */

static int check_empty(void)
{
    float xa[6] = {7, 7, 7, 7, 7, 7}, dB[6] = {7, 7, 7, 7, 7, 7}, dx[8], A[8];
    const float dyb[2] = {2, 3}; /* M 2, R 1 */
    hqq_lora lora = {.rank = 2, .dtype = HQQ_F32, .A = A, .B = A, .scaling = 1};
    int failures = 0;
    failures += failed_call("K = 0",
                            hqq_lora_project(xa, NULL, 0, &lora, 3, 0, HQQ_F32, NULL, 0, NULL));
    failures += failed_call("M = 0", hqq_lora_factor_gradients(NULL, dB, NULL, 3, NULL, &lora,
                                                               0, 3, HQQ_F32, NULL, 0, NULL));
    for (int i = 0; i < 6; i++) failures += xa[i] != 0 || dB[i] != 0;
    failures += failed_call("N = 0", hqq_lora_factor_gradients(dB, NULL, NULL, 0, NULL, &lora,
                                                               3, 0, HQQ_F32, NULL, 0, NULL));
    for (int i = 0; i < 6; i++) failures += dB[i] != 0;
    float y[1], dA[8];
    uint64_t state = 9;
    hqq_weight w = sample_weight(&state, 3, 4, 4, 4, 1, HQQ_F32, 1);
    hqq_lora only_B = {.rank = 2, .dtype = HQQ_F32, .B = A}, only_A = lora;
    only_A.B = NULL;
    failures += failed_call("y", hqq_lora_linear_from_xa(y, NULL, NULL, 4, &w, NULL, HQQ_F32,
                                                         &only_B, 0, HQQ_F32, NULL, 0, NULL));
    for (int i = 0; i < 8; i++) dA[i] = 7;
    failures += failed_call("dA", hqq_lora_input_gradients(NULL, dA, NULL, 3, NULL, NULL, 4, &w,
                                                           &only_A, 0, HQQ_F32, NULL, 0, NULL));
    for (int i = 0; i < 8; i++) failures += dA[i] != 0;
    free_weight(&w);
    /* of a layer without outputs dx is the others' part alone */
    for (int i = 0; i < 4; i++) A[i] = (float)i;
    lora.rank = 1;
    hqq_weight none = {.in_features = 4, .group_size = 1, .nbits = 8, .axis = 1};
    failures +=
        failed_call("dx", hqq_lora_input_gradients(dx, NULL, NULL, 0, dyb, NULL, 4, &none,
                                                   &lora, 2, HQQ_F32, NULL, 0, NULL));
    for (int i = 0; i < 8; i++) failures += dx[i] != dyb[i / 4] * A[i % 4];
    if (failures) fprintf(stderr, "%d failures with sizes of 0\n", failures);
    return failures;
}

/* ---- bad input --------------------------------------------------------------------------- */

static int accepted(const char *says, hqq_status status)
{
    if (status != HQQ_OK && strstr(hqq_last_error(), says)) return 0;
    fprintf(stderr, "\"%s\" was expected, not \"%s\"\n", says, hqq_last_error());
    return 1;
}

static int check_bad_input(void)
{
    uint64_t state = 5;
    const int64_t N[] = {16, 8}, R[] = {2, 3};
    problem p = make_problem(&state, 4, N, 16, R, HQQ_BF16, HQQ_F32);
    static float out[256], in[256];
    const hqq_weight *w = &p.weight[0];
    hqq_lora no_A = p.lora[0], no_B = p.lora[0], deep = p.lora[0], half = p.lora[0];
    no_A.A = no_B.B = NULL;
    deep.rank = 257;
    half.dtype = HQQ_F16;
    static _Alignas(64) char room_for_all[1 << 20];
    void *workspace = room_for_all;
    size_t size = sizeof room_for_all;
    int64_t K = 16;
    int failures = 0;
#define PROJECT(xa, lora) \
    hqq_lora_project(xa, p.x, p.ldx, lora, 4, K, HQQ_BF16, workspace, size, NULL)
    failures += accepted("lora is NULL", PROJECT(out, NULL));
    failures += accepted("lora.A is NULL", PROJECT(out, &no_A));
    failures += accepted("rank is 257", PROJECT(out, &deep));
    failures += accepted("lora.dtype is 1", PROJECT(out, &half));
    failures += accepted("xa is NULL", PROJECT(NULL, &no_B));
    failures += accepted("x is NULL", hqq_lora_project(out, NULL, K, &no_B, 4, K, HQQ_BF16,
                                                       workspace, size, NULL));
#define FROM_XA(xa, lora)                                                             \
    hqq_lora_linear_from_xa(out, xa, p.x, p.ldx, w, NULL, HQQ_F32, lora, 4, HQQ_BF16, \
                            workspace, size, NULL)
    failures += accepted("lora is NULL", FROM_XA(in, NULL));
    failures += accepted("lora.B is NULL", FROM_XA(in, &no_B));
    failures += accepted("xa is NULL", FROM_XA(NULL, &no_A));
    failures += accepted("xa at", FROM_XA((const float *)((const char *)in + 1), &no_A));
#define FACTORS(dyb, dB, xa, lora)                                                        \
    hqq_lora_factor_gradients(dyb, dB, p.dy[0], 16, xa, lora, 4, 16, HQQ_BF16, workspace, \
                              size, NULL)
    failures += accepted("lora is NULL", FACTORS(out, out, in, NULL));
    failures += accepted("lora.B is NULL", FACTORS(out, NULL, in, &no_B));
    failures += accepted("xa is NULL", FACTORS(NULL, out, NULL, &no_A));
#define INPUTS(dx, dA, dyb, x, lora)                                                   \
    hqq_lora_input_gradients(dx, dA, p.dy[0], 16, dyb, x, p.ldx, w, lora, 4, HQQ_BF16, \
                             workspace, size, NULL)
    failures += accepted("lora is NULL", INPUTS(out, NULL, in, p.x, NULL));
    failures += accepted("lora.A is NULL", INPUTS(out, NULL, in, p.x, &no_A));
    failures += accepted("dyb is NULL", INPUTS(out, NULL, NULL, p.x, &no_B));
    failures += accepted("x is NULL", INPUTS(NULL, out, in, NULL, &no_B));
    size_t needed;
    failures += accepted("lora is NULL",
                         hqq_shared_input_workspace_size(&needed, w, NULL, 4, HQQ_BF16, NULL));
    failures += accepted(
        "M is -1", hqq_shared_input_workspace_size(&needed, w, &no_A, -1, HQQ_BF16, NULL));
    if (hqq_shared_input_workspace_size(&needed, w, &no_A, 4, HQQ_BF16, NULL) != HQQ_OK)
        return failures + 1;
    size = needed - 1;
    failures += accepted("are needed", FROM_XA(in, &no_A));
    failures += accepted("are needed", INPUTS(out, NULL, in, p.x, &no_B));
    size = sizeof room_for_all;
    workspace = room_for_all + 4;
    failures += accepted("aligned", FROM_XA(in, &no_A));
    for (int i = 0; i < COUNT_OF(out); i++) failures += out[i] != 0; /* nothing was written */
    free_problem(&p);
    return failures;
}

int main(void)
{
    static const int64_t rows[] = {1, 5, 33, 130};
    uint64_t state = 3;
    int failures = 0;
    for (int i = 0; i < 4; i++)
        for (int d = 0; d < 3; d++) {
            const int64_t N[] = {24, 40}, R[] = {d == 1 ? 16 : 3, 8};
            problem p = make_problem(&state, rows[i], N, 64, R, all_dtypes[d],
                                     i % 2 ? HQQ_F32 : all_dtypes[d]);
            failures += check_problem(&p);
        }
    failures += check_empty();
    failures += check_bad_input();
    printf("test_shared_input: %s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}

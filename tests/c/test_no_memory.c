/* Every allocation of every entry point fails once: the call says so with HQQ_NO_MEMORY and a
 * message, nothing is leaked, and the same call succeeds when there is memory again. The linker
 * sends the library's allocations here (--wrap). */
#include "sample_weight.h"

#include <stdatomic.h>

/* ---- allocations that fail, and their count ------------------------------------------ */

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
void __real_free(void *memory);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
void __wrap_free(void *memory);

static int counting;      /* whether a call of the library is under way */
static atomic_long taken; /* allocations that were asked for in it */
static atomic_long held;  /* minus those given back */
static long failing;      /* the one that fails; 0: none */

static int fails(void)
{
    if (!counting) return 0;
    if (atomic_fetch_add(&taken, 1) + 1 == failing) return 1;
    atomic_fetch_add(&held, 1);
    return 0;
}

void *__wrap_malloc(size_t bytes)
{
    return fails() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes)
{
    return fails() ? NULL : __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes)
{
    if (counting && old) abort(); /* nobody does: it would have to be counted */
    return fails() ? NULL : __real_realloc(old, bytes);
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
    return fails() ? NULL : __real_aligned_alloc(alignment, bytes);
}

void __wrap_free(void *memory)
{
    if (counting && memory) atomic_fetch_sub(&held, 1);
    __real_free(memory);
}

/* ---- the calls ------------------------------------------------------------------------ */

enum { N = 96, K = 128, G = 32, M = 40, R = 4, E = 5, PATTERN = 0xa5 };

static float W[N * K], x[M * K], dy[M * N], A[E * R * K], B[E * N * R], bias[N];
static hqq_weight weight, experts; /* of one and of E */
static const uint64_t seed = 1;
static hqq_lora lora = {.rank = R,
                        .dtype = HQQ_F32,
                        .A = A,
                        .B = B,
                        .scaling = 0.5f,
                        .dropout = 0.1f,
                        .seed = &seed};
static const int64_t offsets[] = {0, 8, 11, 11, 20, M};
static const hqq_routing routing = {.experts = E, .offsets = offsets};

static struct {
    float y[M * N], xa[M * R], dx[M * K], dA[E * R * K], dB[E * N * R], W[N * K];
    uint8_t packed[N * K], codes[N * K];
    float scale[N * K / G], zero[N * K / G];
    size_t bytes;
} outputs, good;

static hqq_status quantize_with(hqq_solver solver, const hqq_context *c)
{
    hqq_quantize_options options = hqq_quantize_defaults();
    options.solver = solver;
    return hqq_quantize(outputs.packed, outputs.scale, outputs.zero, W, HQQ_F32, &weight,
                        &options, c);
}

static hqq_status quantize(const hqq_context *c)
{
    return quantize_with(HQQ_SOLVER_DEFAULT, c);
}

static hqq_status quantize_reference(const hqq_context *c)
{
    return quantize_with(HQQ_SOLVER_REFERENCE, c);
}

static hqq_status unpack_and_pack(const hqq_context *c)
{
    hqq_status status = hqq_unpack(outputs.codes, &weight, c);
    return status != HQQ_OK ? status : hqq_pack(outputs.packed, outputs.codes, &weight, c);
}

static hqq_status dequantize(const hqq_context *c)
{
    return hqq_dequantize(outputs.W, K, HQQ_F32, &weight, 0, N, 0, K, c);
}

static hqq_status sizes(const hqq_context *c)
{
    hqq_status status = hqq_workspace_size(&outputs.bytes, &weight, &lora, M, HQQ_F32, c);
    if (status != HQQ_OK) return status;
    return hqq_grouped_workspace_size(&outputs.bytes, &experts, &lora, &routing, HQQ_F32, c);
}

static hqq_status linear(const hqq_context *c)
{
    return hqq_linear(outputs.y, x, K, &weight, bias, HQQ_F32, M, HQQ_F32, NULL, 0, c);
}

static hqq_status dgrad(const hqq_context *c)
{
    return hqq_linear_dgrad(outputs.dx, dy, N, &weight, M, HQQ_F32, NULL, 0, c);
}

static hqq_status lora_linear(const hqq_context *c)
{
    return hqq_lora_linear(outputs.y, outputs.xa, x, K, &weight, bias, HQQ_F32, &lora, M,
                           HQQ_F32, NULL, 0, c);
}

static hqq_status lora_backward(const hqq_context *c)
{
    return hqq_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, NULL,
                                    &weight, &lora, M, HQQ_F32, NULL, 0, c);
}

static hqq_status grouped_linear(const hqq_context *c)
{
    return hqq_grouped_linear(outputs.y, x, K, &experts, &routing, HQQ_F32, NULL, 0, c);
}

static hqq_status grouped_dgrad(const hqq_context *c)
{
    return hqq_grouped_linear_dgrad(outputs.dx, dy, N, &experts, &routing, HQQ_F32, NULL, 0, c);
}

static hqq_status grouped_lora_linear(const hqq_context *c)
{
    return hqq_grouped_lora_linear(outputs.y, outputs.xa, x, K, &experts, &lora, &routing,
                                   HQQ_F32, NULL, 0, c);
}

static hqq_status grouped_lora_backward(const hqq_context *c)
{
    return hqq_grouped_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K,
                                            NULL, &experts, &lora, &routing, HQQ_F32, NULL, 0,
                                            c);
}

static const struct {
    const char *name;
    hqq_status (*call)(const hqq_context *);
    int least; /* allocations, with some kernel: else this test would test nothing */
} calls[] = {
    {"quantize", quantize, 1},
    {"quantize, reference solver", quantize_reference, 2},
    {"unpack and pack", unpack_and_pack, 0},
    {"dequantize", dequantize, 0},
    {"workspace sizes", sizes, 0},
    {"linear", linear, 1},
    {"linear_dgrad", dgrad, 1},
    {"lora_linear", lora_linear, 3},
    {"lora_linear_backward", lora_backward, 5},
    {"grouped_linear", grouped_linear, 1},
    {"grouped_linear_dgrad", grouped_dgrad, 1},
    {"grouped_lora_linear", grouped_lora_linear, 3},
    {"grouped_lora_linear_backward", grouped_lora_backward, 5},
};
enum { CALLS = sizeof calls / sizeof *calls };

/* ---- failing each --------------------------------------------------------------------- */

static long failed_allocations;

static hqq_status run(int i, long failing_one, const hqq_context *context)
{
    memset(&outputs, PATTERN, sizeof outputs);
    atomic_store(&taken, 0);
    atomic_store(&held, 0);
    failing = failing_one;
    counting = 1;
    hqq_status status = calls[i].call(context);
    counting = 0;
    return status;
}

static int untouched(void)
{
    for (size_t b = 0; b < sizeof outputs; b++)
        if (((const uint8_t *)&outputs)[b] != PATTERN) return 0;
    return 1;
}

/* The failures of a call with one context; *most: its allocations, if they are the most. */
static int check(int i, const hqq_context *context, long *most)
{
    int wrong = run(i, 0, context) != HQQ_OK || atomic_load(&held) != 0;
    long allocations = atomic_load(&taken);
    good = outputs;
    for (long which = 1; which <= allocations && !wrong; which++) {
        hqq_status status = run(i, which, context);
        wrong = status != HQQ_NO_MEMORY || !strstr(hqq_last_error(), "allocate") ||
                atomic_load(&held) != 0;
        /* the first comes before any work */
        if (which == 1) wrong = wrong || !untouched();
        failed_allocations++;
        if (wrong)
            printf("allocation %ld of %ld: status %d '%s', %ld not given back%s\n", which,
                   allocations, (int)status, hqq_last_error(), atomic_load(&held),
                   which == 1 && !untouched() ? ", outputs were written" : "");
    }
    wrong = wrong || run(i, 0, context) != HQQ_OK || memcmp(&outputs, &good, sizeof good) != 0;
    if (wrong)
        printf("%s, kernel %d, %s\n", calls[i].name, (int)context->kernel,
               context->parallel_for ? "in parts" : "on this thread");
    if (allocations > *most) *most = allocations;
    return wrong;
}

int main(void)
{
    uint64_t state = 12;
    for (int i = 0; i < N * K; i++) W[i] = random_float(&state, -0.1f, 0.1f);
    for (int i = 0; i < M * K; i++) x[i] = random_float(&state, -1, 1);
    for (int i = 0; i < M * N; i++) dy[i] = random_float(&state, -1, 1);
    for (int i = 0; i < E * R * K; i++) A[i] = random_float(&state, -1, 1);
    for (int i = 0; i < E * R * N; i++) B[i] = random_float(&state, -1, 1);
    weight = sample_weight(&state, N, K, G, 4, 1, HQQ_F32, 0.01f);
    hqq_weight all = sample_weight(&state, E * N, K, G, 4, 1, HQQ_F32, 0.01f);
    experts = all;
    experts.out_features = N;

    int failures = 0;
    for (int i = 0; i < CALLS; i++) {
        long most = 0;
        for (int kernel = HQQ_KERNEL_AUTO; kernel <= LAST_NAMED_KERNEL; kernel++)
            for (int parts = 0; parts <= 1; parts++) {
                hqq_context context = {.parallel_for = parts ? backwards_for : NULL,
                                       .kernel = (hqq_kernel)kernel};
                failures += check(i, &context, &most);
            }
        if (most < calls[i].least) {
            printf("%s allocates %ld times; expected at least %d\n", calls[i].name, most,
                   calls[i].least);
            failures++;
        }
        printf("%-30s %ld allocations at most\n", calls[i].name, most);
    }
    printf("%ld allocations failed\n", failed_allocations);
    free_weight(&weight);
    free_weight(&all);
    return failures != 0;
}

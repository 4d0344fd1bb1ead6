/* What the stages of a product wait for (kernels/parallel.h) is enough: each product is
 * computed again with its stages in unfavourable orders that their waits allow, as if every
 * thread that is ahead were held up, and one stage longer than all others, each stage in its
 * turn; and gives the same bits. The linker sends the library's calls of hqq_run_stages here
 * (--wrap). */
#include "parallel.h"
#include "sample_weight.h"
#include "status.h"

hqq_status __real_hqq_run_stages(hqq_stages *stages, const hqq_context *context);
hqq_status __wrap_hqq_run_stages(hqq_stages *stages, const hqq_context *context);

static int unfavourable;
static int held;        /* the stage that is held up the longest; 0 ... */
static int most_stages; /* of a product */

static int is_ready(const hqq_stages *stages, const int *done, int s)
{
    int ready = !done[s];
    for (int before = 0; before < stages->list[s].after; before++) ready &= done[before];
    return ready;
}

/* The last stage that may run and has not, but not `held` while there is another. */
static int next_stage(const hqq_stages *stages, const int *done)
{
    for (int s = stages->count - 1; s >= 0; s--)
        if (s != held && is_ready(stages, done, s)) return s;
    return held < stages->count && is_ready(stages, done, held) ? held : -1;
}

hqq_status __wrap_hqq_run_stages(hqq_stages *stages, const hqq_context *context)
{
    if (stages->count > most_stages) most_stages = stages->count;
    if (!unfavourable) return __real_hqq_run_stages(stages, context);
    int *done = calloc((size_t)stages->count + 1, sizeof *done);
    void *scratch = exact_alloc(stages->scratch_bytes + 1);
    hqq_status status = stages->status;
    for (int s; status == HQQ_OK && (s = next_stage(stages, done)) >= 0; done[s] = 1) {
        const hqq_stage *stage = &stages->list[s];
        for (int64_t i = stage->chunks - 1; i >= 0 && status == HQQ_OK; i--)
            status = stage->fn(stage->first + i, scratch, stage->data);
    }
    free(scratch);
    free(done);
    free(stages->list);
    *stages = (hqq_stages){0};
    return status;
}

enum { M = 300, N = 200, K = 640, G = 20, R = 3 };
static const uint64_t seed = 5;

typedef struct results {
    float y[M * N], xa[M * R], dx[M * K], dA[R * K], dB[N * R];
} results;

/* Forward and backward, with xa and without. */
static hqq_status run(results *r, int keeps_xa, const hqq_weight *weight, const hqq_lora *lora,
                      const void *x, const void *dy, hqq_dtype dtype,
                      const hqq_context *context)
{
    memset(r, 0, sizeof *r);
    HQQ_TRY(hqq_lora_linear(r->y, r->xa, x, K, weight, NULL, HQQ_F32, lora, M, dtype, NULL, 0,
                            context));
    return hqq_lora_linear_backward(r->dx, r->dA, r->dB, dy, N, x, K, keeps_xa ? r->xa : NULL,
                                    weight, lora, M, dtype, NULL, 0, context);
}

static int check_dtype(hqq_isa isa, hqq_dtype dtype, int dropped)
{
    uint64_t state = 11;
    hqq_weight weight = sample_weight(&state, N, K, G, 4, 1, HQQ_F32, 0.1f);
    void *A = random_array(&state, R * K, HQQ_F32, -1, 1);
    void *B = random_array(&state, N * R, HQQ_F32, -1, 1);
    void *x = random_array(&state, M * K, dtype, -1, 1);
    void *dy = random_array(&state, M * N, dtype, -1, 1);
    hqq_lora lora = {.rank = R, .dtype = HQQ_F32, .A = A, .B = B, .scaling = 0.5f};
    lora.dropout = dropped ? 0.25f : 0.0f;
    lora.seed = &seed;
    hqq_context context = {.isa = isa};
    static results usual, other;
    int failed = 0;
    for (int keeps_xa = 0; keeps_xa < 2 && !failed; keeps_xa++) {
        unfavourable = 0;
        failed |= run(&usual, keeps_xa, &weight, &lora, x, dy, dtype, &context) != HQQ_OK;
        unfavourable = 1;
        int stages = most_stages;
        for (held = 0; held <= stages && !failed; held++) {
            failed |= run(&other, keeps_xa, &weight, &lora, x, dy, dtype, &context) != HQQ_OK;
            failed |= memcmp(&usual, &other, sizeof usual) != 0;
        }
    }
    if (failed) fprintf(stderr, "dtype %d: a stage does not wait for enough\n", (int)dtype);
    free_weight(&weight);
    free(A), free(B), free(x), free(dy);
    return failed;
}

/* dgrad in fp32 of so many rows of W that panels take them in parts: a part's sums go on with
 * those of the part before. group: of rows that are decoded in strips (16), and that are not.
 */
static int check_parts(hqq_isa isa, int64_t group)
{
    enum { TOKENS = 260, ROWS = 2100, COLUMNS = 320 };
    uint64_t state = 12;
    hqq_weight weight = sample_weight(&state, ROWS, COLUMNS, group, 4, 1, HQQ_F32, 0.1f);
    float *dy = random_array(&state, TOKENS * ROWS, HQQ_F32, -1, 1);
    hqq_context context = {.isa = isa};
    static float usual[TOKENS * COLUMNS], other[TOKENS * COLUMNS];
    unfavourable = most_stages = 0;
    int failed = hqq_linear_dgrad(usual, dy, ROWS, &weight, TOKENS, HQQ_F32, NULL, 0,
                                  &context) != HQQ_OK;
    unfavourable = 1;
    int stages = most_stages;
    for (held = 0; held <= stages && !failed; held++) {
        memset(other, 0, sizeof other);
        failed |= hqq_linear_dgrad(other, dy, ROWS, &weight, TOKENS, HQQ_F32, NULL, 0,
                                   &context) != HQQ_OK;
        failed |= memcmp(usual, other, sizeof usual) != 0;
    }
    /* two parts of each of five panels: decoding, and two halves of the tokens */
    if (isa >= HQQ_ISA_AVX512 && isa < HQQ_ISA_AMX) failed |= most_stages != 2 * 5 * 3;
    if (failed) fprintf(stderr, "groups of %d: a part does not wait\n", (int)group);
    free_weight(&weight);
    free(dy);
    return failed;
}

static int check_isa(hqq_isa isa)
{
    int failures = check_parts(isa, 16) + check_parts(isa, 20);
    most_stages = 0;
    for (int d = 0; d < 3; d++) failures += check_dtype(isa, all_dtypes[d], d == 2);
    /* one loop for all: dy B, dB, dA, and the panels of dx */
    if (isa >= HQQ_ISA_AVX512_BF16 && isa < HQQ_ISA_AMX) failures += most_stages < 15;
    return failures;
}

int main(void)
{
    return for_each_isa(check_isa) != 0;
}

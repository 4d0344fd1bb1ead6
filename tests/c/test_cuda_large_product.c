/* Products of the CUDA library that go through blocks and a GEMM: what a lent GEMM is asked
 * for, that blocks tile the whole output, which kernel is chosen where, and that a workspace
 * may hold anything. */
#include "sample_weight.h"

static _Alignas(64) char room[4 << 20];

/* ---- the GEMM that a caller lends ------------------------------------------------------- */

typedef struct gemm_record {
    int calls, transposed, added, transposed_a;
    int64_t columns, m, k; /* the sum of n, and the last of the others */
    const void *first_A, *last_C;
} gemm_record;

static int32_t recording_gemm(void *C, int64_t ldc, const void *A, int64_t lda,
                              int32_t transpose_a, const void *B, int64_t ldb,
                              int32_t transpose_b, int64_t m, int64_t n, int64_t k, float beta,
                              hqq_dtype dtype, void *data)
{
    gemm_record *r = data;
    r->calls++;
    r->transposed += transpose_b;
    r->transposed_a += transpose_a;
    r->added += beta != 0.0f;
    r->columns += n;
    r->m = m;
    r->k = k;
    r->first_A = A;
    r->last_C = C;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += hqq_load(A, dtype, i * lda + l) *
                       hqq_load(B, dtype, transpose_b ? j * ldb + l : l * ldb + j);
            if (beta != 0.0f) sum += hqq_load(C, dtype, i * ldc + j);
            hqq_store(C, dtype, i * ldc + j, sum);
        }
    return 0;
}

static int expect(int holds, const char *what)
{
    if (!holds) printf("not so: %s (%s)\n", what, hqq_last_error());
    return !holds;
}

/* Forward and dgrad with a bias or none: the lent GEMM sees blocks of the dequantized weight
 * that cover all outputs, and the result is that of the library's own. */
static int check_lent_gemm(hqq_dtype dtype)
{
    enum { M = 70, N = 200, K = 136 };
    uint64_t state = 99;
    int failures = 0;
    for (int transpose = 0; transpose < 2; transpose++) {
        int64_t O = transpose ? K : N, L = transpose ? N : K;
        hqq_weight w = sample_weight(&state, N, K, 8, 4, 1, HQQ_F32, 0.02f);
        void *in = random_array(&state, M * L, dtype, -1, 1);
        void *bias = transpose ? NULL : random_array(&state, N, HQQ_F32, -1, 1);
        size_t bytes = (size_t)(M * O * hqq_dtype_bytes(dtype));
        void *lent = exact_alloc(bytes), *own = exact_alloc(bytes);
        gemm_record record = {0};
        hqq_context with = {.gemm = recording_gemm, .gemm_data = &record}, without = {0};
        for (int turn = 0; turn < 2; turn++) {
            void *out = turn ? own : lent;
            hqq_context *context = turn ? &without : &with;
            hqq_status status = transpose ? hqq_linear_dgrad(out, in, N, &w, M, dtype, room,
                                                             sizeof room, context)
                                          : hqq_linear(out, in, K, &w, bias, HQQ_F32, M, dtype,
                                                       room, sizeof room, context);
            failures += expect(status == HQQ_OK, "the product is computed");
        }
        failures += expect(record.calls >= 2, "several blocks");
        failures += expect(record.columns == O, "blocks cover the outputs");
        failures += expect(record.m == M && record.k == L && !record.transposed_a,
                           "each is a product of all rows over the whole sum");
        failures += expect(record.transposed == (transpose ? 0 : record.calls),
                           "forward blocks are [n,k], dgrad blocks [n,k] of other columns");
        failures += expect(record.added == (bias ? record.calls : 0),
                           "beta is 1 where there is something to add to");
        failures += expect(record.first_A == in, "x is not copied");
        for (int64_t i = 0; i < M * O; i++) {
            double a = (double)hqq_load(lent, dtype, i), b = (double)hqq_load(own, dtype, i);
            if (fabs(a - b) <= 0.01 * fabs(b) + 0.01) continue;
            printf("element %lld: %g with a lent GEMM, %g without\n", (long long)i, a, b);
            failures++;
            break;
        }
        free(in);
        free(bias);
        free(lent);
        free(own);
        free_weight(&w);
    }
    return failures;
}

/* ---- the choice of a kernel ------------------------------------------------------------- */

static hqq_kernel choice(hqq_weight w, int64_t M, hqq_dtype dtype)
{
    hqq_kernel forward = hqq_choose_kernel(&w, M, dtype, 0, HQQ_ISA_AUTO);
    hqq_kernel dgrad = hqq_choose_kernel(&w, M, dtype, 1, HQQ_ISA_AUTO);
    return forward == dgrad ? forward : HQQ_KERNEL_AUTO; /* no test here sees them differ */
}

static int check_choice(void)
{
    static _Alignas(16) const uint8_t packed[32];
    const hqq_weight w = {.out_features = 128,
                          .in_features = 256,
                          .group_size = 64,
                          .nbits = 4,
                          .axis = 1,
                          .meta_dtype = HQQ_BF16,
                          .packed = packed};
    int failures = 0;
#define CHOOSES(kernel, M, dtype, change)                                     \
    do {                                                                      \
        hqq_weight changed = w;                                               \
        change;                                                               \
        failures += expect(choice(changed, M, dtype) == HQQ_KERNEL_##kernel,  \
                           #kernel " for " #M " rows, " #dtype ", " #change); \
    } while (0)
    CHOOSES(DIRECT, 1, HQQ_BF16, (void)0);
    CHOOSES(DIRECT, 192, HQQ_BF16, changed.axis = 0);
    CHOOSES(TILED, 193, HQQ_BF16, (void)0);
    CHOOSES(BLOCKED, 193, HQQ_BF16, changed.axis = 0);
    CHOOSES(BLOCKED, 9, HQQ_F32, changed.meta_dtype = HQQ_F32);
    for (int b = 0; b < BIT_WIDTHS; b++)
        if (hqq_word_bytes(all_bits[b]) == 1)
            CHOOSES(DIRECT, 16, HQQ_BF16, changed.nbits = all_bits[b]);
    CHOOSES(DIRECT, 16, HQQ_BF16, changed.axis = 0);
    CHOOSES(DIRECT, 16, HQQ_F16, changed.meta_dtype = HQQ_F16);
    CHOOSES(BLOCKED, 16, HQQ_BF16, changed.nbits = 3);
    CHOOSES(BLOCKED, 16, HQQ_BF16, changed.group_size = 32);
    CHOOSES(BLOCKED, 16, HQQ_BF16, changed.in_features = 200; changed.group_size = 200);
    CHOOSES(BLOCKED, 16, HQQ_BF16, changed.packed = packed + 1);
    return failures;
}

/* A kernel that cannot serve may be forced all the same: the blocked one then does. */
static int check_forced(void)
{
    enum { M = 3, N = 20, K = 70 };
    uint64_t state = 5;
    hqq_weight w = sample_weight(&state, N, K, 35, 3, 1, HQQ_F32, 0.02f);
    float *x = random_array(&state, M * K, HQQ_F32, -1, 1), direct[M * N], blocked[M * N];
    hqq_context force = {.kernel = HQQ_KERNEL_DIRECT};
    int failures = expect(hqq_linear(direct, x, K, &w, NULL, HQQ_F32, M, HQQ_F32, room,
                                     sizeof room, &force) == HQQ_OK,
                          "a forced kernel that cannot serve gives way");
    force.kernel = HQQ_KERNEL_BLOCKED;
    hqq_linear(blocked, x, K, &w, NULL, HQQ_F32, M, HQQ_F32, room, sizeof room, &force);
    failures += expect(memcmp(direct, blocked, sizeof direct) == 0, "to the blocked one");
    failures += expect(hqq_linear(direct, x, -7, &w, NULL, HQQ_F32, 1, HQQ_F32, room,
                                  sizeof room, &force) == HQQ_OK &&
                           memcmp(direct, blocked, N * sizeof(float)) == 0,
                       "the stride of a single row does not matter");
    free(x);
    free_weight(&w);
    return failures;
}

/* ---- the workspace ---------------------------------------------------------------------- */

/* Split sums meet in the workspace: whatever was there before, they give the same bits. */
static int check_any_workspace(void)
{
    enum { M = 5, SHAPES = 3, TURNS = 4, N_MOST = 192 };
    static const int64_t shapes[SHAPES][2] = {{64, 2048}, {192, 1536}, {128, 2048}};
    uint16_t first[SHAPES][M * N_MOST], again[M * N_MOST];
    uint64_t state = 17;
    int failures = 0;
    hqq_weight w[SHAPES];
    uint16_t *x = random_array(&state, M * 2048, HQQ_BF16, -1, 1);
    for (int s = 0; s < SHAPES; s++) {
        size_t bytes = 0;
        w[s] = sample_weight(&state, shapes[s][0], shapes[s][1], 64, 4, 1, HQQ_BF16, 0.02f);
        hqq_workspace_size(&bytes, &w[s], NULL, M, HQQ_BF16, NULL);
        failures += expect(bytes > 0 && bytes <= sizeof room, "the sum is split");
    }
    for (int turn = 0; turn < TURNS; turn++) {
        if (turn < 2) memset(room, turn ? 0 : 0xff, sizeof room);
        for (int s = 0; s < SHAPES; s++) { /* from turn 2 on in what another has left */
            uint16_t *y = turn ? again : first[s];
            int64_t N = shapes[s][0], K = shapes[s][1];
            failures += expect(hqq_linear(y, x, K, &w[s], NULL, HQQ_F32, M, HQQ_BF16, room,
                                          sizeof room, NULL) == HQQ_OK &&
                                   memcmp(y, first[s], (size_t)(M * N) * sizeof *y) == 0,
                               "the workspace's contents do not matter");
            static const char clear[16];
            failures += expect(memcmp(room, clear, sizeof clear) == 0,
                               "whoever adds the parts clears the marks of their arrival");
        }
    }
    for (int s = 0; s < SHAPES; s++) free_weight(&w[s]);
    free(x);
    return failures;
}

int main(void)
{
    int failures = check_choice() + check_forced() + check_any_workspace();
    for (int d = 0; d < 3; d++) failures += check_lent_gemm(all_dtypes[d]);
    return failures != 0;
}

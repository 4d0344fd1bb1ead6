/* Products with arguments that do not fit: plain ones, those of adapters and of experts, their
 * workspaces, and callbacks that fail. */
#include "bad_input.h"

/* ---- plain products ---------------------------------------------------------------- */

static void walk_products(void)
{
    void *w = scratch;
    size_t room = sizeof scratch;
#define LINEAR(y, x, ldx, bias, bias_dtype, M, dtype) \
    hqq_linear(y, x, ldx, &weight, bias, bias_dtype, M, dtype, w, room, NULL)
#define DGRAD(dx, dy, lddy, M, dtype) \
    hqq_linear_dgrad(dx, dy, lddy, &weight, M, dtype, w, room, NULL)
    INVALID("y is NULL", LINEAR(NULL, x, K, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x is NULL", LINEAR(outputs.y, NULL, K, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x|31|32", LINEAR(outputs.y, x, K - 1, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x|-32", LINEAR(outputs.y, x, -K, bias, HQQ_F32, M, HQQ_F32));
    INVALID("x|3 x 32", LINEAR(outputs.y, x, INT64_MAX, bias, HQQ_F32, M, HQQ_F32));
    INVALID("-3", LINEAR(outputs.y, x, K, bias, HQQ_F32, -M, HQQ_F32));
    INVALID("9223372036854775807", LINEAR(outputs.y, x, K, bias, HQQ_F32, INT64_MAX, HQQ_F32));
    INVALID("dtype is 3", LINEAR(outputs.y, x, K, bias, HQQ_F32, M, (hqq_dtype)3));
    INVALID("bias_dtype is -2", LINEAR(outputs.y, x, K, bias, (hqq_dtype)-2, M, HQQ_F32));
    INVALID("dx is NULL", DGRAD(NULL, dy, N, M, HQQ_F32));
    INVALID("dy is NULL", DGRAD(outputs.dx, NULL, N, M, HQQ_F32));
    INVALID("dy|11|12", DGRAD(outputs.dx, dy, N - 1, M, HQQ_F32));
    INVALID("-3", DGRAD(outputs.dx, dy, N, -M, HQQ_F32));
    INVALID("-9223372036854775808", DGRAD(outputs.dx, dy, N, INT64_MIN, HQQ_F32));
    INVALID("9223372036854775807", DGRAD(outputs.dx, dy, N, INT64_MAX, HQQ_F32));
    INVALID("dtype is 99", DGRAD(outputs.dx, dy, N, M, (hqq_dtype)99));

    INVALID("bytes is NULL", hqq_workspace_size(NULL, &weight, &lora, M, HQQ_F32, NULL));
    INVALID("-1", hqq_workspace_size(&outputs.bytes, &weight, &lora, -1, HQQ_F32, NULL));
    INVALID("9223372036854775807",
            hqq_workspace_size(&outputs.bytes, &weight, &lora, INT64_MAX, HQQ_F32, NULL));
    INVALID("dtype is 3",
            hqq_workspace_size(&outputs.bytes, &weight, &lora, M, (hqq_dtype)3, NULL));
}

/* A workspace that is given must be aligned and large enough. */
static void walk_workspace(void)
{
    for (int kernel = HQQ_KERNEL_DIRECT; kernel <= LAST_NAMED_KERNEL; kernel++) {
        hqq_context c = {.kernel = (hqq_kernel)kernel};
        size_t needed = 0;
        if (hqq_workspace_size(&needed, &weight, &lora, M, HQQ_F32, &c) != HQQ_OK ||
            needed > sizeof scratch - 64) {
            failures++;
            printf("a %zu-byte workspace for a small product\n", needed);
            return;
        }
        if (needed == 0) continue;
        char few[64];
        snprintf(few, sizeof few, "%zu|%zu", needed - 1, needed);
        REFUSES(HQQ_NO_MEMORY, few,
                hqq_lora_linear(outputs.y, outputs.xa, x, K, &weight, bias, HQQ_F32, &lora, M,
                                HQQ_F32, scratch, needed - 1, &c));
        REFUSES(HQQ_NO_MEMORY, few,
                hqq_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in,
                                         &weight, &lora, M, HQQ_F32, scratch, needed - 1, &c));
        INVALID("aligned", hqq_lora_linear(outputs.y, outputs.xa, x, K, &weight, bias, HQQ_F32,
                                           &lora, M, HQQ_F32, scratch + 4, needed, &c));
        INVALID("aligned",
                hqq_lora_linear_backward(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in,
                                         &weight, &lora, M, HQQ_F32, scratch + 32, needed, &c));
    }
}

/* ---- adapters ---------------------------------------------------------------------- */

static void walk_adapters(void)
{
    static const struct {
        const char *says;
        hqq_lora lora;
    } bad[] = {
        {"rank is -1", {-1, HQQ_F32, A, B, 0.5f, 0, NULL, 0}},
        {"rank is 257|256", {257, HQQ_F32, A, B, 0.5f, 0, NULL, 0}},
        {"rank is 9223372036854775807", {INT64_MAX, HQQ_F32, A, B, 0.5f, 0, NULL, 0}},
        {"lora.dtype is 3", {R, (hqq_dtype)3, A, B, 0.5f, 0, NULL, 0}},
        {"lora.dtype is 2|(0)", {R, HQQ_BF16, A, B, 0.5f, 0, NULL, 0}}, /* x is HQQ_F32 */
        {"A is NULL|2", {R, HQQ_F32, NULL, B, 0.5f, 0, NULL, 0}},
        {"B is NULL|2", {R, HQQ_F32, A, NULL, 0.5f, 0, NULL, 0}},
        {"scaling is nan", {R, HQQ_F32, A, B, NAN, 0, NULL, 0}},
        {"scaling is inf", {R, HQQ_F32, A, B, INFINITY, 0, NULL, 0}},
        {"dropout is 1", {R, HQQ_F32, A, B, 0.5f, 1.0f, NULL, 0}},
        {"dropout is -0.1", {R, HQQ_F32, A, B, 0.5f, -0.1f, NULL, 0}},
        {"dropout is nan", {R, HQQ_F32, A, B, 0.5f, NAN, NULL, 0}},
        {"seed is NULL|0.25", {R, HQQ_F32, A, B, 0.5f, 0.25f, NULL, 7}},
        {"seed|8 bytes", {R, HQQ_F32, A, B, 0.5f, 0.25f, (const void *)(scratch + 4), 7}},
    };
#define LORA(y, x, ldx, lora)                                                                 \
    hqq_lora_linear(y, outputs.xa, x, ldx, &weight, bias, HQQ_F32, lora, M, HQQ_F32, scratch, \
                    sizeof scratch, NULL)
#define LORA_BACKWARD(dx, dA, dB, dy, lddy, x, ldx, xa, lora, M)                          \
    hqq_lora_linear_backward(dx, dA, dB, dy, lddy, x, ldx, xa, &weight, lora, M, HQQ_F32, \
                             scratch, sizeof scratch, NULL)
    for (int i = 0; i < COUNT(bad); i++) {
        const hqq_lora *l = &bad[i].lora;
        const char *says = bad[i].says;
        INVALID(says, LORA(outputs.y, x, K, l));
        INVALID(says,
                LORA_BACKWARD(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in, l, M));
        INVALID(says, hqq_workspace_size(&outputs.bytes, &weight, l, M, HQQ_F32, NULL));
    }
    INVALID("lora is NULL", LORA(outputs.y, x, K, NULL));
    INVALID("y is NULL", LORA(NULL, x, K, &lora));
    INVALID("x is NULL", LORA(outputs.y, NULL, K, &lora));
    INVALID("x|31|32", LORA(outputs.y, x, K - 1, &lora));
    INVALID("lora is NULL",
            LORA_BACKWARD(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in, NULL, M));
    INVALID("dy is NULL",
            LORA_BACKWARD(outputs.dx, NULL, NULL, NULL, N, x, K, xa_in, &lora, M));
    INVALID("x is NULL",
            LORA_BACKWARD(NULL, outputs.dA, NULL, dy, N, NULL, K, xa_in, &lora, M));
    INVALID("x is NULL", LORA_BACKWARD(NULL, NULL, outputs.dB, dy, N, NULL, K, NULL, &lora, M));
    INVALID("dy|1|12", LORA_BACKWARD(outputs.dx, NULL, NULL, dy, 1, x, K, xa_in, &lora, M));
    INVALID("x|2|32", LORA_BACKWARD(NULL, outputs.dA, NULL, dy, N, x, 2, xa_in, &lora, M));
    INVALID("-3",
            LORA_BACKWARD(outputs.dx, outputs.dA, outputs.dB, dy, N, x, K, xa_in, &lora, -M));
}

/* ---- what fuzzing found: sizes that overflow beside an empty weight, pointers -------- */

static void walk_products_of_nothing(void)
{
    const hqq_weight nothing = {.group_size = 1, .nbits = 4, .axis = 1};
    const hqq_weight no_rows = {.in_features = 3, .group_size = 1, .nbits = 4, .axis = 1};
    const hqq_weight huge = {.in_features = INT64_C(1) << 56, .group_size = 1, .nbits = 4};
    hqq_lora wide = lora;
    wide.rank = 255;
    INVALID("9223372036854775807|rows of 2",
            hqq_lora_linear(NULL, outputs.xa, NULL, 0, &nothing, NULL, HQQ_F32, &lora,
                            INT64_MAX, HQQ_F32, NULL, 0, NULL));
    INVALID("9223372036854775807|rows of 3",
            hqq_linear_dgrad(outputs.dx, NULL, 0, &no_rows, INT64_MAX, HQQ_F32, NULL, 0, NULL));
    INVALID("lora.rank is 255|0 x 72057594037927936",
            hqq_lora_linear_backward(NULL, outputs.dA, NULL, NULL, 0, NULL, 0, NULL, &huge,
                                     &wide, 0, HQQ_F32, NULL, 0, NULL));
    INVALID("dyb is 9223372036854775807 x 2|2^56",
            hqq_lora_factor_gradients(outputs.xa, NULL, NULL, 0, NULL, &lora, INT64_MAX, 0,
                                      HQQ_F32, NULL, 0, NULL));
}

static void walk_misaligned(void)
{
    static int64_t room[4];
    void *between = (char *)outputs.packed + 1;
    hqq_routing routing = {.experts = 2, .offsets = (void *)((char *)room + 1)};
    INVALID("words|not aligned", hqq_layout_of(between, NULL, NULL, &weight));
    INVALID("groups|not aligned", hqq_layout_of(NULL, NULL, between, &weight));
    INVALID("bytes|not aligned", hqq_workspace_size(between, &weight, NULL, M, HQQ_F32, NULL));
    INVALID("routing.offsets|not aligned",
            hqq_grouped_workspace_size(&outputs.bytes, &weight, NULL, &routing, HQQ_F32, NULL));
}

static void walk_experts(void)
{
    static const int64_t offsets[41];
    const hqq_routing routing = {.experts = 40, .offsets = offsets};
    hqq_weight huge = weight;
    huge.out_features = INT64_C(1) << 56;
    huge.in_features = 1;
    INVALID("routing.experts is 40|72057594037927936 x 1",
            hqq_grouped_linear(outputs.y, x, 1, &huge, &routing, HQQ_F32, NULL, 0, NULL));
}

/* ---- callbacks that fail ----------------------------------------------------------- */

static int32_t no_threads(int64_t begin, int64_t end, int64_t grain,
                          void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)begin, (void)end, (void)grain, (void)fn, (void)data;
    return 11;
}

static int32_t no_gemm(void *C, int64_t ldc, const void *a, int64_t lda, int32_t transpose_a,
                       const void *b, int64_t ldb, int32_t transpose_b, int64_t m, int64_t n,
                       int64_t k, float beta, hqq_dtype dtype, void *gemm_data)
{
    (void)C, (void)ldc, (void)a, (void)lda, (void)transpose_a, (void)b, (void)ldb;
    (void)transpose_b, (void)m, (void)n, (void)k, (void)beta, (void)dtype;
    ++*(int *)gemm_data;
    return 13;
}

/* A failing callback is reported wherever a kernel calls it; outputs may then be half done. */
static void walk_callbacks(void)
{
    static float large_x[64 * K], large_dy[64 * N], large_y[64 * K];
    for (int kernel = HQQ_KERNEL_DIRECT; kernel <= LAST_NAMED_KERNEL; kernel++)
        for (int transpose = 0; transpose <= 1; transpose++) {
            int gemm_calls = 0;
            hqq_context c = {
                .gemm = no_gemm, .gemm_data = &gemm_calls, .kernel = (hqq_kernel)kernel};
            hqq_status status = transpose
                                    ? hqq_linear_dgrad(large_y, large_dy, N, &weight, 64,
                                                       HQQ_F32, scratch, sizeof scratch, &c)
                                    : hqq_linear(large_y, large_x, K, &weight, NULL, HQQ_F32,
                                                 64, HQQ_F32, scratch, sizeof scratch, &c);
            hqq_status expected = gemm_calls ? HQQ_CALLBACK : HQQ_OK;
            if (status != expected || (gemm_calls && !strstr(hqq_last_error(), "gemm"))) {
                failures++;
                printf("gemm failed %d times: %s '%s'\n", gemm_calls, hqq_status_name(status),
                       hqq_last_error());
            }
        }
    hqq_context c = {.parallel_for = no_threads};
    hqq_status status = hqq_linear(large_y, large_x, K, &weight, NULL, HQQ_F32, 64, HQQ_F32,
                                   scratch, sizeof scratch, &c);
    /* a product this small may run on the calling thread alone */
    if (status != HQQ_OK &&
        (status != HQQ_CALLBACK || !strstr(hqq_last_error(), "parallel_for"))) {
        failures++;
        printf("parallel_for failed: %s '%s'\n", hqq_status_name(status), hqq_last_error());
    }
}

/* ---- what looks hostile but is sound ----------------------------------------------- */

/* Found by fuzzing: divided by the columns that there are none of. */
static void walk_experts_of_nothing(void)
{
    static const int64_t offsets[] = {0, 1, 2, 3, 4, 5};
    const hqq_routing routing = {.experts = 5, .offsets = offsets};
    const hqq_weight nothing = {.group_size = 1, .nbits = 4, .axis = 1};
    const hqq_context parallel = {.parallel_for = no_threads};
    ACCEPTS(hqq_grouped_workspace_size(&outputs.bytes, &nothing, NULL, &routing, HQQ_F32,
                                       &parallel));
    hqq_status status = hqq_grouped_lora_linear(NULL, outputs.xa, NULL, 0, &nothing, &lora,
                                                &routing, HQQ_F32, NULL, 0, &parallel);
    if (status != HQQ_OK && status != HQQ_CALLBACK) {
        failures++;
        printf("experts of nothing: %s '%s'\n", hqq_status_name(status), hqq_last_error());
    }
    outputs = pristine;
}

static void walk_sound(void)
{
    hqq_weight nothing = {.group_size = 1, .nbits = 3};
    /* no time is spent on rows without columns */
    ACCEPTS(
        hqq_linear(NULL, NULL, 0, &nothing, NULL, HQQ_F32, INT64_MAX, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(hqq_linear_dgrad(NULL, NULL, 0, &nothing, INT64_MAX, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(hqq_linear(NULL, NULL, 0, &weight, NULL, HQQ_F32, 0, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(hqq_linear_dgrad(NULL, NULL, 0, &weight, 0, HQQ_F32, NULL, 0, NULL));
    ACCEPTS(LORA_BACKWARD(NULL, NULL, NULL, dy, N, NULL, K, NULL, &lora, M));
    ACCEPTS(LORA_BACKWARD(outputs.dx, NULL, NULL, dy, N, NULL, K, NULL, &lora, M));
    ACCEPTS(LORA_BACKWARD(NULL, NULL, outputs.dB, dy, N, NULL, K, xa_in, &lora, M));
    ACCEPTS(LORA_BACKWARD(NULL, NULL, outputs.dB, dy, N, x, K, NULL, &lora, M));
    hqq_lora rank_0 = {.rank = 0};
    ACCEPTS(LORA(outputs.y, x, K, &rank_0));
    /* one row: its stride is never used */
    ACCEPTS(hqq_linear(outputs.y, x, -1, &weight, NULL, HQQ_F32, 1, HQQ_F32, scratch,
                       sizeof scratch, NULL));
    /* found by fuzzing: 2^63 times 4 bytes */
    ACCEPTS(hqq_lora_project(outputs.xa, x, INT64_MIN, &lora, 1, K, HQQ_F32, scratch,
                             sizeof scratch, NULL));
    ACCEPTS(hqq_lora_factor_gradients(outputs.xa, outputs.dB, dy, INT64_MIN, xa_in, &lora, 1, N,
                                      HQQ_F32, scratch, sizeof scratch, NULL));
    /* one that is not given is made, on a CPU */
    hqq_context blocked = {.kernel = HQQ_KERNEL_BLOCKED};
    hqq_status made =
        hqq_linear(outputs.y, x, K, &weight, NULL, HQQ_F32, M, HQQ_F32, NULL, 0, &blocked);
    if (made != (HQQ_TEST_CUDA ? HQQ_NO_MEMORY : HQQ_OK) ||
        (HQQ_TEST_CUDA && !strstr(hqq_last_error(), "workspace is NULL"))) {
        failures++;
        printf("no workspace: %s '%s'\n", hqq_status_name(made), hqq_last_error());
    }
}

int main(void)
{
    set_up();
    walk_products();
    walk_workspace();
    walk_adapters();
    walk_products_of_nothing();
    walk_misaligned();
    walk_experts();
    walk_callbacks();
    walk_experts_of_nothing();
    walk_sound();
    return report();
}

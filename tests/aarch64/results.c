/* Writes to standard output what the library computes here, and from what, for results.py to
 * compare with another processor's: of each case a line
 *
 *     case M N K G R nbits axis dtype
 *
 * and then arrays, each a line "name dtype elements" and its bytes. dtype is an hqq_dtype, or
 * -1 for bytes. */
#include <inttypes.h>
#include <stdio.h>

#include "../c/sample_weight.h"

static const float dropout = 0.25f, scaling = 0.5f;
static const uint64_t seed = 77;

static const char *const kernel_names[] = {"auto", "reference", "direct", "blocked", "tiled"};

typedef struct sizes {
    int64_t M, N, K, G, R;
    int nbits, axis;
    hqq_dtype dtype; /* of everything but A and B */
} sizes;

static void must(hqq_status status)
{
    if (status == HQQ_OK) return;
    fprintf(stderr, "%s\n", hqq_last_error());
    exit(1);
}

static void put_bytes(const char *name, const void *data, int64_t bytes)
{
    printf("%s -1 %" PRId64 "\n", name, bytes);
    fwrite(data, 1, (size_t)bytes, stdout);
}

static void put(const char *name, const void *data, int64_t elements, hqq_dtype dtype)
{
    printf("%s %d %" PRId64 "\n", name, (int)dtype, elements);
    fwrite(data, (size_t)hqq_dtype_bytes(dtype), (size_t)elements, stdout);
}

/* Puts what a kernel made under "kernel name", and frees it. */
static void put_result(hqq_kernel kernel, const char *name, void *data, int64_t elements,
                       hqq_dtype dtype)
{
    char full[64];
    snprintf(full, sizeof full, "%s_%s", kernel_names[kernel], name);
    put(full, data, elements, dtype);
    free(data);
}

static void put_quantized(const sizes *s, const hqq_weight *like, const void *W)
{
    int64_t words, word_bytes, groups;
    must(hqq_layout_of(&words, &word_bytes, &groups, like));
    void *packed = exact_alloc((size_t)(words * word_bytes));
    void *scale = exact_alloc((size_t)groups * 4), *zero = exact_alloc((size_t)groups * 4);
    for (int solver = HQQ_SOLVER_DEFAULT; solver <= HQQ_SOLVER_MINMAX; solver++) {
        hqq_quantize_options options = hqq_quantize_defaults();
        char name[64];
        options.solver = (hqq_solver)solver;
        must(hqq_quantize(packed, scale, zero, W, s->dtype, like, &options, NULL));
        snprintf(name, sizeof name, "solver%d_W_q", solver);
        put_bytes(name, packed, words * word_bytes);
        snprintf(name, sizeof name, "solver%d_scale", solver);
        put(name, scale, groups, like->meta_dtype);
        snprintf(name, sizeof name, "solver%d_zero", solver);
        put(name, zero, groups, like->meta_dtype);
    }
    free(packed);
    free(scale);
    free(zero);
}

static void put_dequantized(const sizes *s, const hqq_weight *w)
{
    static const char *const names[] = {"W_f32", "W_f16", "W_bf16"};
    void *W = exact_alloc((size_t)(s->N * s->K) * 4);
    for (int dtype = HQQ_F32; dtype <= HQQ_BF16; dtype++) {
        must(hqq_dequantize(W, s->K, (hqq_dtype)dtype, w, 0, s->N, 0, s->K, NULL));
        put(names[dtype], W, s->N * s->K, (hqq_dtype)dtype);
    }
    free(W);
}

static void put_products(const sizes *s, const hqq_weight *w, const hqq_lora *lora,
                         const void *x, const void *dy, hqq_kernel kernel)
{
    hqq_context context = {.kernel = kernel};
    int64_t M = s->M, N = s->N, K = s->K, R = s->R;
    void *y = exact_alloc((size_t)(M * N) * 4), *dx = exact_alloc((size_t)(M * K) * 4);
    must(hqq_linear(y, x, K, w, NULL, HQQ_F32, M, s->dtype, NULL, 0, &context));
    must(hqq_linear_dgrad(dx, dy, N, w, M, s->dtype, NULL, 0, &context));
    put_result(kernel, "y", y, M * N, s->dtype);
    put_result(kernel, "dx", dx, M * K, s->dtype);

    float *xa = exact_alloc((size_t)(M * R) * 4);
    void *dA = exact_alloc((size_t)(R * K) * 4), *dB = exact_alloc((size_t)(N * R) * 4);
    y = exact_alloc((size_t)(M * N) * 4);
    dx = exact_alloc((size_t)(M * K) * 4);
    must(hqq_lora_linear(y, xa, x, K, w, NULL, HQQ_F32, lora, M, s->dtype, NULL, 0, &context));
    must(hqq_lora_linear_backward(dx, dA, dB, dy, N, x, K, xa, w, lora, M, s->dtype, NULL, 0,
                                  &context));
    put_result(kernel, "lora_y", y, M * N, s->dtype);
    put_result(kernel, "xa", xa, M * R, HQQ_F32);
    put_result(kernel, "lora_dx", dx, M * K, s->dtype);
    put_result(kernel, "dA", dA, R * K, HQQ_F32);
    put_result(kernel, "dB", dB, N * R, HQQ_F32);
}

static void put_case(const sizes *s)
{
    uint64_t state = (uint64_t)(s->nbits * 100 + s->axis * 10 + (int)s->dtype + 1);
    hqq_weight w = sample_weight(&state, s->N, s->K, s->G, s->nbits, s->axis, s->dtype,
                                 0.1f / (float)(1 << s->nbits));
    int64_t words, word_bytes, groups;
    must(hqq_layout_of(&words, &word_bytes, &groups, &w));
    void *W = random_array(&state, s->N * s->K, s->dtype, -0.1f, 0.1f);
    void *x = random_array(&state, s->M * s->K, s->dtype, -1.0f, 1.0f);
    void *dy = random_array(&state, s->M * s->N, s->dtype, -1.0f, 1.0f);
    float *A = random_array(&state, s->R * s->K, HQQ_F32, -0.2f, 0.2f);
    float *B = random_array(&state, s->N * s->R, HQQ_F32, -0.2f, 0.2f);
    hqq_lora lora = {.rank = s->R,
                     .dtype = HQQ_F32,
                     .A = A,
                     .B = B,
                     .scaling = scaling,
                     .dropout = dropout,
                     .seed = &seed};

    printf("case %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %d %d %d\n", s->M,
           s->N, s->K, s->G, s->R, s->nbits, s->axis, (int)s->dtype);
    put_bytes("W_q", w.packed, words * word_bytes);
    put("scale", w.scale, groups, w.meta_dtype);
    put("zero", w.zero, groups, w.meta_dtype);
    put("W", W, s->N * s->K, s->dtype);
    put("x", x, s->M * s->K, s->dtype);
    put("dy", dy, s->M * s->N, s->dtype);
    put("A", A, s->R * s->K, HQQ_F32);
    put("B", B, s->N * s->R, HQQ_F32);
    put_quantized(s, &w, W);
    put_dequantized(s, &w);
    for (int kernel = HQQ_KERNEL_REFERENCE; kernel <= HQQ_KERNEL_TILED; kernel++)
        put_products(s, &w, &lora, x, dy, (hqq_kernel)kernel);

    free_weight(&w);
    free(W);
    free(x);
    free(dy);
    free(A);
    free(B);
}

/* Every number of bits, axis and dtype; groups that fill vectors, and odd ones across rows. */
int main(void)
{
    for (int i = 0; i < 5; i++)
        for (int axis = 0; axis < 2; axis++)
            for (int d = 0; d < 3; d++) {
                sizes even = {5, 64, 96, 32, 4, all_bits[i], axis, all_dtypes[d]};
                sizes odd = {3, 21, 35, 15, 3, all_bits[i], axis, all_dtypes[d]};
                put_case(&even);
                put_case(&odd);
            }
    return ferror(stdout) != 0;
}

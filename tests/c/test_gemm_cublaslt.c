/* The GEMM over cuBLASLt, against a stand-in for it that is column-major as the real one and
 * runs on the CPU: operands and strides, the choice of algorithms and its cache, errors. */
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "fake_cublaslt.h"
#include "gemm.h"
#include "sample_weight.h"
#include "status.h"

/* of the CUDA runtime, which is not there */
static int current_device;
cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t error)
{
    (void)error;
    return "an error";
}

static fake_cublaslt_record *fake;
static int failures;

static void expect(int holds, const char *what)
{
    if (holds) return;
    failures++;
    printf("not so: %s (%s)\n", what, hqq_last_error());
}

static _Alignas(256) char room[1 << 16];

/* C = A op(B) + beta C, rows of each further apart than they are long. */
static void check_product(uint64_t *state, int64_t m, int64_t n, int64_t k, int transpose_b,
                          float beta, hqq_dtype dtype)
{
    int64_t lda = k + 3, ldb = (transpose_b ? k : n) + 2, ldc = n + 5;
    void *A = random_array(state, m * lda, dtype, -1, 1);
    void *B = random_array(state, (transpose_b ? n : k) * ldb, dtype, -1, 1);
    void *C = random_array(state, m * ldc, dtype, -1, 1);
    void *before = exact_alloc((size_t)(m * ldc * hqq_dtype_bytes(dtype)));
    memcpy(before, C, (size_t)(m * ldc * hqq_dtype_bytes(dtype)));
    expect(hqq_cuda_gemm(C, ldc, A, lda, B, ldb, transpose_b, m, n, k, beta, dtype, room + 64,
                         sizeof room - 64, NULL) == HQQ_OK,
           "the product is computed");
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < ldc; j++) {
            double got = (double)hqq_load(C, dtype, i * ldc + j), sum = 0;
            double old = (double)hqq_load(before, dtype, i * ldc + j);
            for (int64_t l = 0; j < n && l < k; l++)
                sum += (double)hqq_load(A, dtype, i * lda + l) *
                       (double)hqq_load(B, dtype, transpose_b ? j * ldb + l : l * ldb + j);
            double want = j < n ? sum + (double)beta * old : old;
            if (fabs(got - want) <= (j < n ? 0.01 + 0.01 * fabs(want) : 0)) continue;
            failures++;
            printf("%lld x %lld x %lld, transpose_b %d, beta %g, dtype %d: C[%lld,%lld] is %g, "
                   "not %g\n",
                   (long long)m, (long long)n, (long long)k, transpose_b, (double)beta,
                   (int)dtype, (long long)i, (long long)j, got, want);
            i = m;
            break;
        }
    free(A);
    free(B);
    free(C);
    free(before);
}

static void check_products(void)
{
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {7, 3, 5}, {16, 64, 33}};
    uint64_t state = 1;
    for (int s = 0; s < 4; s++)
        for (int variant = 0; variant < 12; variant++)
            check_product(&state, shapes[s][0], shapes[s][1], shapes[s][2], variant % 2,
                          (float)(variant / 2 % 2), all_dtypes[variant / 4]);
    expect(fake->wrong_algorithm == 0, "each product runs the algorithm chosen for it");
    expect(fake->reductions == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
           "parts of split sums are added in fp32");
    expect(fake->workspace_bytes == sizeof room - 256, "the workspace is aligned to 256 bytes");
}

/* a product of zeros, in memory of its own, aligned alike at each call */
static void multiply_zeros(int64_t m, int64_t n, int64_t k)
{
    static _Alignas(256) float a[1024], b[1024], c[1024];
    expect(hqq_cuda_gemm(c, n, a, k, b, n, 0, m, n, k, 0.0f, HQQ_F32, NULL, 0, NULL) == HQQ_OK,
           "the product of zeros is computed");
}

/* More products than the cache has places, twice: right all along, and those of the second
 * round that are still there are not asked for again. Alignment is part of a choice, so what
 * is counted lies in the same memory in both rounds. */
static void check_cache(void)
{
    uint64_t state = 2;
    for (int round = 0; round < 2; round++)
        for (int64_t m = 1; m <= 300; m++) check_product(&state, m, 2, 1, 1, 0.0f, HQQ_F32);
    int before = fake->heuristics;
    for (int round = 0; round < 2; round++)
        for (int64_t m = 1; m <= 300; m++) multiply_zeros(m, 3, 1);
    int asked = fake->heuristics - before;
    expect(fake->wrong_algorithm == 0, "no algorithm of another product");
    expect(asked > 300 && asked < 600, "a cache, and of limited size");
    before = fake->heuristics;
    for (int i = 0; i < 3; i++) multiply_zeros(2, 2, 2);
    expect(fake->heuristics - before == 1, "the same product again is not asked for");
}

/* Pointers of little alignment are said to be so, and are another choice. */
static void check_alignment(void)
{
    static _Alignas(256) float a[64], b[128], c[64];
    int before = fake->heuristics;
    hqq_cuda_gemm(c, 4, a, 4, b, 4, 0, 4, 4, 4, 0.0f, HQQ_F32, NULL, 0, NULL);
    expect(fake->align_first == 256 && fake->align_second == 256 && fake->align_result == 256,
           "256 bytes");
    hqq_cuda_gemm(c + 4, 4, a + 1, 4, b + 2, 4, 0, 4, 4, 4, 0.0f, HQQ_F32, NULL, 0, NULL);
    expect(fake->heuristics == before + 2, "another alignment is another product");
    expect(fake->align_first == 8 && fake->align_second == 4 && fake->align_result == 16,
           "of B, A and C");
    expect(fake->workspace_bytes == 0, "no workspace is no workspace");
}

static void check_devices_and_errors(void)
{
    float a[4] = {0}, b[4] = {0}, c[4] = {0};
    int handles = fake->handles;
    current_device = 3;
    for (int i = 0; i < 2; i++)
        hqq_cuda_gemm(c, 2, a, 2, b, 2, 0, 2, 2, 2, 0.0f, HQQ_F32, NULL, 0, NULL);
    expect(fake->handles == handles + 1, "one handle a device");
    current_device = 64;
    expect(hqq_cuda_gemm(c, 2, a, 2, b, 2, 0, 2, 2, 2, 0.0f, HQQ_F32, NULL, 0, NULL) ==
                   HQQ_UNSUPPORTED &&
               strstr(hqq_last_error(), "device 64"),
           "a device too many");
    current_device = 0;
    fake->refuse = 1;
    expect(hqq_cuda_gemm(c, 2, a, 2, b, 2, 0, 2, 2, 1, 0.0f, HQQ_F32, NULL, 0, NULL) ==
                   HQQ_DEVICE &&
               strstr(hqq_last_error(), "CUBLAS_STATUS_NOT_SUPPORTED") &&
               strstr(hqq_last_error(), "2 x 2 x 1"),
           "a refusal is passed on, with the sizes");
    fake->refuse = 0;
    expect(hqq_cuda_gemm(c, 2, a, 2, b, 2, 0, 2, 2, 9, 0.0f, HQQ_F32, NULL, 0, NULL) != HQQ_OK,
           "strides shorter than rows are refused");
    expect(fake->living == 0, "all descriptors are given back, after failures too");
}

int main(void)
{
    float one = 1, c = 0;
    if (hqq_cuda_gemm(&c, 1, &one, 1, &one, 1, 0, 1, 1, 1, 0.0f, HQQ_F32, NULL, 0, NULL) !=
        HQQ_OK) {
        printf("%s\n", hqq_last_error());
        return 1;
    }
    void *library = dlopen("libcublasLt.so.13", RTLD_LAZY | RTLD_NOLOAD);
    void *symbol = library ? dlsym(library, "fake_cublaslt") : NULL;
    if (!symbol) {
        printf("the cuBLASLt that was loaded is not the stand-in\n");
        return 1;
    }
    fake_cublaslt_fn *function;
    memcpy(&function, &symbol, sizeof symbol);
    fake = function();
    check_products();
    check_cache();
    check_alignment();
    check_devices_and_errors();
    return failures != 0;
}

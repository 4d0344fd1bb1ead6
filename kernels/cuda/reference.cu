/*
 * y, xa, dx, dA and dB by plain loops in double (reference_elements.h): slow, and beyond doubt.
 *
 * y, dx     a block does some outputs of one token; its threads first put that token's row of
 *           drop(x) A^T or dy B, R doubles, into shared memory.
 * dA, dB    a block does some columns k, or rows n, of one r; for 256 tokens at a time its
 *           threads put (dy B)[m,r] or (drop(x) A^T)[m,r] into shared memory.
 */
#include "cuda.cuh"
#include "reference.h"
#include "reference_elements.h"

enum { THREADS = 256 };

typedef struct reference_forward_job {
    hqq_forward f;
    hqq_weight weight;
    hqq_lora lora;
    int has_lora;
} reference_forward_job;

typedef struct reference_backward_job {
    hqq_backward b;
    hqq_weight weight;
    hqq_lora lora;
    int has_lora;
} reference_backward_job;

/* The descriptors live in the launch's arguments: the pointers to them are set on the device.
 */
template <class Problem, class Job>
HQQ_DEVICE_INLINE Problem on_device(Problem problem, const Job &job)
{
    problem.weight = &job.weight;
    problem.lora = job.has_lora ? &job.lora : NULL;
    return problem;
}

HQQ_DEVICE_INLINE int64_t tokens_from(int64_t m0, int64_t M)
{
    int64_t most = THREADS;
    return M - m0 < most ? M - m0 : most;
}

static __global__ void __launch_bounds__(THREADS)
    reference_forward(const reference_forward_job job)
{
    HQQ_SHARED(double[HQQ_MAX_RANK], xa);
    hqq_forward f = on_device(job.f, job);
    int64_t R = f.lora ? f.lora->rank : 0, N = f.weight->out_features, m = blockIdx.x;
    for (int64_t r = threadIdx.x; r < R; r += THREADS) {
        xa[r] = hqq_reference_forward_xa(&f, m, r);
        if (f.xa && blockIdx.y == 0) f.xa[m * R + r] = static_cast<float>(xa[r]);
    }
    __syncthreads();
    for (int64_t n = blockIdx.y * THREADS + threadIdx.x; n < N; n += gridDim.y * THREADS)
        hqq_store(f.y, f.dtype, m * N + n, static_cast<float>(hqq_reference_y(&f, xa, m, n)));
}

static __global__ void __launch_bounds__(THREADS) reference_dx(const reference_backward_job job)
{
    HQQ_SHARED(double[HQQ_MAX_RANK], dyb);
    hqq_backward b = on_device(job.b, job);
    int64_t R = b.lora ? b.lora->rank : 0, K = b.weight->in_features, m = blockIdx.x;
    for (int64_t r = threadIdx.x; r < R; r += THREADS) dyb[r] = hqq_reference_dyb(&b, m, r);
    __syncthreads();
    for (int64_t k = blockIdx.y * THREADS + threadIdx.x; k < K; k += gridDim.y * THREADS)
        hqq_store(b.dx, b.dtype, m * K + k,
                  static_cast<float>(hqq_reference_dx(&b, dyb, m, k)));
}

static __global__ void __launch_bounds__(THREADS) reference_dA(const reference_backward_job job)
{
    HQQ_SHARED(double[THREADS], dyb);
    hqq_backward b = on_device(job.b, job);
    hqq_dropout dropout = hqq_dropout_of(b.lora);
    int64_t K = b.weight->in_features, r = blockIdx.y;
    int64_t k = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    double sum = 0;
    for (int64_t m0 = 0; m0 < b.M; m0 += THREADS) {
        int64_t count = tokens_from(m0, b.M);
        __syncthreads();
        if (threadIdx.x < count) dyb[threadIdx.x] = hqq_reference_dyb(&b, m0 + threadIdx.x, r);
        __syncthreads();
        for (int64_t i = 0; k < K && i < count; i++)
            sum += dyb[i] * hqq_reference_dropped(b.x, b.dtype, b.ldx, m0 + i, k, K, &dropout);
    }
    if (k < K)
        hqq_store(b.dA, b.lora->dtype, r * K + k,
                  static_cast<float>(sum * static_cast<double>(b.lora->scaling)));
}

static __global__ void __launch_bounds__(THREADS) reference_dB(const reference_backward_job job)
{
    HQQ_SHARED(double[THREADS], xa);
    hqq_backward b = on_device(job.b, job);
    int64_t N = b.weight->out_features, R = b.lora->rank, r = blockIdx.y;
    int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    double sum = 0;
    for (int64_t m0 = 0; m0 < b.M; m0 += THREADS) {
        int64_t count = tokens_from(m0, b.M);
        __syncthreads();
        if (threadIdx.x < count)
            xa[threadIdx.x] = hqq_reference_saved_xa(&b, m0 + threadIdx.x, r);
        __syncthreads();
        for (int64_t i = 0; n < N && i < count; i++)
            sum += static_cast<double>(hqq_load(b.dy, b.dtype, (m0 + i) * b.lddy + n)) * xa[i];
    }
    if (n < N)
        hqq_store(b.dB, b.lora->dtype, n * R + r,
                  static_cast<float>(sum * static_cast<double>(b.lora->scaling)));
}

/* Blocks over `width` outputs; at least one (xa is wanted even where N is 0). */
static unsigned blocks_of(int64_t width, int64_t most)
{
    int64_t blocks = (width + THREADS - 1) / THREADS;
    return static_cast<unsigned>(blocks < 1 ? 1 : blocks > most ? most : blocks);
}

hqq_status hqq_cuda_reference_forward(const hqq_forward *f, void *stream)
{
    if (f->M == 0) return HQQ_OK;
    reference_forward_job job = {*f, *f->weight, {}, f->lora != NULL};
    if (f->lora) job.lora = *f->lora;
    dim3 grid(static_cast<unsigned>(f->M), blocks_of(f->weight->out_features, 65535));
    return hqq_launch(reference_forward, grid, dim3(THREADS), 0, stream, job);
}

hqq_status hqq_cuda_reference_backward(const hqq_backward *b, void *stream)
{
    reference_backward_job job = {*b, *b->weight, {}, b->lora != NULL};
    if (b->lora) job.lora = *b->lora;
    int64_t N = b->weight->out_features, K = b->weight->in_features;
    unsigned R = static_cast<unsigned>(b->lora ? b->lora->rank : 0);
    if (b->dx && b->M > 0 && K > 0)
        HQQ_TRY(hqq_launch(reference_dx, dim3(static_cast<unsigned>(b->M), blocks_of(K, 65535)),
                           dim3(THREADS), 0, stream, job));
    if (b->dA && K > 0)
        HQQ_TRY(hqq_launch(reference_dA, dim3(blocks_of(K, INT32_MAX), R), dim3(THREADS), 0,
                           stream, job));
    if (b->dB && N > 0)
        HQQ_TRY(hqq_launch(reference_dB, dim3(blocks_of(N, INT32_MAX), R), dim3(THREADS), 0,
                           stream, job));
    return HQQ_OK;
}

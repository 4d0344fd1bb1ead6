/* Many threads in the library at once: each keeps its own message, and each result is the one
 * that a thread alone gets, bit for bit. */
#include "hqqlora.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 8, ROUNDS = 40, N = 96, K = 288, G = 32, R = 4 };

/* Tokens: few; and as many as are served in two steps, the first of which prepares what all
 * threads read in the second (kernels/cpu/turned.h, panels.h). */
#if HQQ_TEST_CUDA
enum { FEW = 21, M = FEW };
#else
enum { FEW = 21, M = 300 };
#endif

static float W[N * K], x[M * K], dy[M * N], A[R * K], B[N * R];
static const uint64_t seed = 42;
static hqq_lora lora = {R, HQQ_F32, A, B, 0.5f, 0.1f, &seed, 0};

/* A thread's own workspace, for the library that allocates none. */
#if HQQ_TEST_CUDA
static _Thread_local _Alignas(64) char room[1 << 20];
#define WORKSPACE room, sizeof room
#else
#define WORKSPACE NULL, 0
#endif

typedef struct results {
    uint8_t packed[N * K];
    float scale[N * K / G], zero[N * K / G];
    float y[M * N], xa[M * R], dx[M * K], dA[R * K], dB[N * R];
} results;

/* ---- a parallel_for on two threads of our own -------------------------------------- */

typedef struct half {
    int64_t begin, end;
    void (*fn)(int64_t, int64_t, void *);
    void *data;
} half;

static void *run_half(void *data)
{
    half *h = data;
    if (h->begin < h->end) h->fn(h->begin, h->end, h->data);
    return NULL;
}

static int32_t two_threads(int64_t begin, int64_t end, int64_t grain,
                           void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)grain;
    int64_t middle = begin + (end - begin) / 2;
    half first = {begin, middle, fn, data}, second = {middle, end, fn, data};
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_half, &first) != 0) return 1;
    run_half(&second);
    return pthread_join(thread, NULL);
}

/* ---- one round of work ------------------------------------------------------------- */

static hqq_status run(results *r, int thread, const hqq_context *context)
{
    int nbits = "\4\2\10\1"[thread % 4], axis = thread / 4, tokens = thread & 2 ? M : FEW;
    hqq_weight weight = {N,         K,        G,      nbits, axis, HQQ_F32, HQQ_PACKING_HQQ,
                         r->packed, r->scale, r->zero};
    hqq_quantize_options options = hqq_quantize_defaults();
    hqq_status status =
        hqq_quantize(r->packed, r->scale, r->zero, W, HQQ_F32, &weight, &options, context);
    if (status == HQQ_OK)
        status = hqq_lora_linear(r->y, r->xa, x, K, &weight, NULL, HQQ_F32, &lora, tokens,
                                 HQQ_F32, WORKSPACE, context);
    if (status == HQQ_OK)
        status = hqq_lora_linear_backward(r->dx, r->dA, r->dB, dy, N, x, K, r->xa, &weight,
                                          &lora, tokens, HQQ_F32, WORKSPACE, context);
    return status;
}

static results *alone[THREADS]; /* what each thread's work gives on one thread */

static void *thread_main(void *data)
{
    intptr_t thread = (intptr_t)data, failures = 0;
    /* half of the threads have a context of their own, the others one for all */
    hqq_context own = {.parallel_for = thread % 2 ? two_threads : NULL};
    static const hqq_context shared = {.parallel_for = two_threads};
    const hqq_context *context = thread < THREADS / 2 ? &own : &shared;
    results *mine = calloc(1, sizeof *mine);
    for (int round = 0; round < ROUNDS && mine; round++) {
        /* a wrong group size that only this thread uses in this round */
        int64_t wrong = 1000003 + 1000 * thread + round;
        char expected[64];
        hqq_weight bad = {N, K, wrong, 4, 1, HQQ_F32, HQQ_PACKING_HQQ, x, x, x};
        hqq_status status =
            hqq_linear(mine->y, x, K, &bad, NULL, HQQ_F32, M, HQQ_F32, NULL, 0, context);
        snprintf(expected, sizeof expected, "group_size %lld", (long long)wrong);
        if (round % 8 == 0) {
            hqq_status done = run(mine, (int)thread, context);
            if (done != HQQ_OK || memcmp(mine, alone[thread], sizeof *mine) != 0) {
                printf("thread %d: %s; not what one thread alone gets\n", (int)thread,
                       hqq_status_name(done));
                failures++;
            }
            status = hqq_layout_of(NULL, NULL, NULL, &bad);
        }
        if (status != HQQ_INVALID || !strstr(hqq_last_error(), expected)) {
            printf("thread %d: expected '%s', got '%s'\n", (int)thread, expected,
                   hqq_last_error());
            failures++;
        }
    }
    failures += !mine;
    free(mine);
    return (void *)failures;
}

static void fill(float *values, int count, float size)
{
    static uint32_t state = 1;
    for (int i = 0; i < count; i++) {
        state = (uint32_t)(state * UINT64_C(1664525) + 1013904223u);
        values[i] = size * ((float)(state >> 8) / (float)(1 << 24) - 0.5f);
    }
}

int main(void)
{
    fill(W, N * K, 0.1f);
    fill(x, M * K, 1);
    fill(dy, M * N, 1);
    fill(A, R * K, 0.2f);
    fill(B, N * R, 0.2f);
    intptr_t failures = 0;
    for (int t = 0; t < THREADS; t++) {
        alone[t] = calloc(1, sizeof *alone[t]);
        if (!alone[t] || run(alone[t], t, NULL) != HQQ_OK) {
            printf("alone: '%s'\n", hqq_last_error());
            return 1;
        }
    }
    pthread_t threads[THREADS];
    for (intptr_t t = 0; t < THREADS; t++)
        if (pthread_create(&threads[t], NULL, thread_main, (void *)t) != 0) return 1;
    for (int t = 0; t < THREADS; t++) {
        void *result = NULL;
        pthread_join(threads[t], &result);
        failures += (intptr_t)result;
    }
    if (hqq_last_error()[0] != '\0') {
        printf("another thread's message reached this one: '%s'\n", hqq_last_error());
        failures++;
    }
    for (int t = 0; t < THREADS; t++) free(alone[t]);
    return failures != 0;
}

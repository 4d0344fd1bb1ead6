/*
 * LoRA fine-tuning of one layer in plain C: quantize a weight to 4 bits, then train an adapter
 * on top of it to do what another one, the teacher, does to the same weight.
 *
 *     cc -std=c11 minimal.c -lhqqlora -o minimal && ./minimal
 */
#include <hqqlora.h>

#include <stdio.h>
#include <stdlib.h>

enum { N = 192, K = 256, G = 64, R = 4, M = 64, STEPS = 50 };

static float W[N * K];                          /* the dense weight */
static uint8_t packed[N * K / 2];               /* ... and in 4 bits, */
static float scale[N * K / G], zero[N * K / G]; /* with a scale and a zero for each group */

static float teacher_A[R * K], teacher_B[N * R];
static float A[R * K], B[N * R], dA[R * K], dB[N * R];
static float x[M * K], xa[M * R], y[M * N], target[M * N], dy[M * N];

static void check(hqq_status status)
{
    if (status == HQQ_OK) return;
    fprintf(stderr, "%s: %s\n", hqq_status_name(status), hqq_last_error());
    exit(1);
}

/* Random values between -size and size. */
static void randomize(float *values, int count, float size)
{
    for (int i = 0; i < count; i++)
        values[i] = size * (2 * (float)rand() / (float)RAND_MAX - 1);
}

/* The squared error of y, a mean over the M rows; its gradient goes to dy. */
static float squared_error(void)
{
    float loss = 0;
    for (int i = 0; i < M * N; i++) {
        float error = y[i] - target[i];
        loss += error * error / M;
        dy[i] = 2 * error / M;
    }
    return loss;
}

/* One step of gradient descent. */
static void descend(float *parameter, const float *gradient, int count)
{
    const float rate = 0.2f;
    for (int i = 0; i < count; i++) parameter[i] -= rate * gradient[i];
}

int main(void)
{
    hqq_weight weight = {
        .out_features = N,
        .in_features = K,
        .group_size = G,
        .nbits = 4,
        .axis = 1,
        .meta_dtype = HQQ_F32,
        .packed = packed,
        .scale = scale,
        .zero = zero,
    };
    hqq_quantize_options options = hqq_quantize_defaults();
    randomize(W, N * K, 0.1f);
    check(hqq_quantize(packed, scale, zero, W, HQQ_F32, &weight, &options, NULL));
    printf("%d x %d weight: %zu bytes in fp32, %zu quantized\n", N, K, sizeof W,
           sizeof packed + sizeof scale + sizeof zero);

    hqq_lora teacher = {.rank = R, .A = teacher_A, .B = teacher_B, .scaling = 2};
    hqq_lora student = {.rank = R, .A = A, .B = B, .scaling = 2};
    randomize(teacher_A, R * K, 0.1f);
    randomize(teacher_B, N * R, 0.1f);
    randomize(A, R * K, 0.1f); /* and B zero: at first, the adapter adds nothing */

    for (int step = 1; step <= STEPS; step++) {
        randomize(x, M * K, 1);
        check(hqq_lora_linear(target, NULL, x, K, &weight, NULL, HQQ_F32, &teacher, M, HQQ_F32,
                              NULL, 0, NULL));
        check(hqq_lora_linear(y, xa, x, K, &weight, NULL, HQQ_F32, &student, M, HQQ_F32, NULL,
                              0, NULL));
        float loss = squared_error();
        check(hqq_lora_linear_backward(NULL, dA, dB, dy, N, x, K, xa, &weight, &student, M,
                                       HQQ_F32, NULL, 0, NULL));
        descend(A, dA, R * K);
        descend(B, dB, N * R);
        if (step == 1 || step % 10 == 0) printf("step %2d  loss %.4f\n", step, (double)loss);
    }
    return 0;
}

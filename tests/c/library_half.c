/* What test_two_libraries.c asks of each library: the same work, linked to one of them. */
#include "library_half.h"

#include <stdlib.h>

static _Alignas(64) char room[1 << 20];

static float number(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) * 0x1p-24f - 0.5f;
}

static void fill(float *values, int count, float size)
{
    uint32_t state = (uint32_t)count;
    for (int i = 0; i < count; i++) values[i] = size * number(&state);
}

hqq_status HALF(work)(half_results *r)
{
    static float W[HALF_N * HALF_K], x[HALF_M * HALF_K], A[HALF_R * HALF_K], B[HALF_N * HALF_R];
    fill(W, HALF_N * HALF_K, 0.1f);
    fill(x, HALF_M * HALF_K, 1.0f);
    fill(A, HALF_R * HALF_K, 0.1f);
    fill(B, HALF_N * HALF_R, 0.1f);
    hqq_weight weight = {.out_features = HALF_N,
                         .in_features = HALF_K,
                         .group_size = HALF_G,
                         .nbits = 4,
                         .axis = 1,
                         .packed = r->packed,
                         .scale = r->scale,
                         .zero = r->zero};
    static const uint64_t seed = 7;
    hqq_lora lora = {
        .rank = HALF_R, .A = A, .B = B, .scaling = 2, .dropout = 0.25f, .seed = &seed};
    hqq_quantize_options options = hqq_quantize_defaults();
    hqq_status status =
        hqq_quantize(r->packed, r->scale, r->zero, W, HQQ_F32, &weight, &options, NULL);
    if (status == HQQ_OK)
        status = hqq_lora_linear(r->y, r->xa, x, HALF_K, &weight, NULL, HQQ_F32, &lora, HALF_M,
                                 HQQ_F32, room, sizeof room, NULL);
    return status;
}

hqq_status HALF(without_workspace)(void)
{
    static const uint8_t packed[8 * 8];
    static const float scale[1], zero[1], x[8];
    float y[8];
    hqq_weight weight = {.out_features = 8,
                         .in_features = 8,
                         .group_size = 64,
                         .nbits = 8,
                         .axis = 1,
                         .packed = packed,
                         .scale = scale,
                         .zero = zero};
    return hqq_linear(y, x, 8, &weight, NULL, HQQ_F32, 1, HQQ_F32, NULL, 0, NULL);
}

const char *HALF(message)(void)
{
    return hqq_last_error();
}

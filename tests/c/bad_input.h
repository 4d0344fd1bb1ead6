/* What the programs about hostile arguments share: sound arguments to put one bad one among,
 * outputs that must stay as they are, and what a refused call must give. */
#ifndef HQQ_TESTS_BAD_INPUT_H
#define HQQ_TESTS_BAD_INPUT_H

#include <limits.h>

#include "sample_weight.h"

enum { N = 12, K = 32, G = 8, M = 3, R = 2, GROUPS = N * K / G };

static uint8_t codes_in[N * K];
static int32_t words_in[N * K]; /* aligned, enough for any nbits */
static float scale_in[GROUPS], zero_in[GROUPS];
static float x[M * K], dy[M * N], xa_in[M * R], A[R * K], B[N * R], bias[N], W[N * K];
static _Alignas(64) char scratch[1 << 20];

static struct {
    float y[M * N], xa[M * R], dx[M * K], dA[R * K], dB[N * R], out[N * K];
    uint8_t packed[N * K], codes[N * K];
    float scale[GROUPS], zero[GROUPS];
    int64_t words, word_bytes, groups;
    size_t bytes;
} outputs, pristine;

static const hqq_weight weight = {N,        K,        G,      4, 1, HQQ_F32, HQQ_PACKING_HQQ,
                                  words_in, scale_in, zero_in};
static const hqq_lora lora = {R, HQQ_F32, A, B, 0.5f, 0.0f, NULL, 0};

static int failures;

static inline int untouched(void)
{
    return memcmp(&outputs, &pristine, sizeof outputs) == 0;
}

/* `says`: parts that the message must have, separated by '|' */
static inline void expect(int line, const char *call, hqq_status expected, const char *says,
                          hqq_status got)
{
    char parts[256];
    const char *message = hqq_last_error();
    int ok = got == expected && untouched();
    snprintf(parts, sizeof parts, "%s", says);
    for (char *part = strtok(parts, "|"); part; part = strtok(NULL, "|"))
        ok = ok && strstr(message, part) != NULL;
    if (!ok) {
        failures++;
        printf("line %d: %s\n    expected %s, a message with '%s' and untouched outputs\n"
               "    got %s: '%s'%s\n",
               line, call, hqq_status_name(expected), says, hqq_status_name(got), message,
               untouched() ? "" : "; outputs were written");
    }
    outputs = pristine;
}

#define REFUSES(status, says, call) expect(__LINE__, #call, status, says, call)
#define INVALID(says, call)         REFUSES(HQQ_INVALID, says, call)

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* A call that only looks hostile; what it writes is not looked at. */
#define ACCEPTS(call)                                                                        \
    do {                                                                                     \
        hqq_status got = (call);                                                             \
        if (got != HQQ_OK || hqq_last_error()[0] != '\0') {                                  \
            failures++;                                                                      \
            printf("line %d: %s\n    got %s: '%s'\n", __LINE__, #call, hqq_status_name(got), \
                   hqq_last_error());                                                        \
        }                                                                                    \
        outputs = pristine;                                                                  \
    } while (0)

static inline void fill(float *values, int n, float step)
{
    for (int i = 0; i < n; i++) values[i] = step * (float)(i % 97 - 48);
}

static inline void set_up(void)
{
    for (int i = 0; i < GROUPS; i++) scale_in[i] = 0.01f;
    fill(W, N * K, 0.001f);
    fill(x, M * K, 0.01f);
    fill(dy, M * N, 0.01f);
    fill(xa_in, M * R, 0.01f);
    fill(bias, N, 0.1f);
    memset(codes_in, 1, sizeof codes_in);
    memset(scratch, 0xff, sizeof scratch); /* nothing is asked of a workspace's contents */
    memset(&pristine, 0xa5, sizeof pristine);
    outputs = pristine;
}

/* What main returns. */
static inline int report(void)
{
    if (failures) printf("%d failures\n", failures);
    return failures != 0;
}

#endif

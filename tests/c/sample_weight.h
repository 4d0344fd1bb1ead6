/* Random weights in buffers of exactly their size, so that a sanitizer sees any access behind
 * them, and the small things that the kernel tests share. */
#ifndef HQQ_TESTS_SAMPLE_WEIGHT_H
#define HQQ_TESTS_SAMPLE_WEIGHT_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "format.h"
#include "hqqlora.h"

/* 1 where a test is linked with the CUDA library, whose kernels the tests run on the CPU. */
#ifndef HQQ_TEST_CUDA
#define HQQ_TEST_CUDA 0
#endif

/* The last kernel of hqqlora.h, and the last that is a kernel of its own on this backend. */
#define LAST_NAMED_KERNEL HQQ_KERNEL_TILED
#define LAST_KERNEL       LAST_NAMED_KERNEL

static const int all_bits[] = {8, 4, 3, 2, 1};
enum { BIT_WIDTHS = sizeof all_bits / sizeof *all_bits };
static const hqq_dtype all_dtypes[] = {HQQ_F32, HQQ_F16, HQQ_BF16};

/* xorshift64*: the same numbers on every machine. */
HQQ_WRAPS static inline uint32_t random_bits(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (uint32_t)((*state * UINT64_C(0x2545f4914f6cdd1d)) >> 32);
}

/* Uniform in [low, high). */
static inline float random_float(uint64_t *state, float low, float high)
{
    return low + (high - low) * (float)(random_bits(state) >> 8) * 0x1p-24f;
}

static inline void *exact_alloc(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p) {
        fprintf(stderr, "out of memory: %zu bytes\n", bytes);
        exit(2);
    }
    return p;
}

/* n random elements of dtype in [low, high). */
static inline void *random_array(uint64_t *state, int64_t n, hqq_dtype dtype, float low,
                                 float high)
{
    void *data = exact_alloc((size_t)(n * hqq_dtype_bytes(dtype)));
    for (int64_t i = 0; i < n; i++) hqq_store(data, dtype, i, random_float(state, low, high));
    return data;
}

/* A weight with random words (unused slots and bits included) and scales around `scale`. */
static inline hqq_weight sample_weight(uint64_t *state, int64_t N, int64_t K, int64_t G,
                                       int nbits, int axis, hqq_dtype meta, float scale)
{
    hqq_weight w = {.out_features = N,
                    .in_features = K,
                    .group_size = G,
                    .nbits = nbits,
                    .axis = axis,
                    .meta_dtype = meta};
    int64_t words, word_bytes, groups;
    if (hqq_layout_of(&words, &word_bytes, &groups, &w) != HQQ_OK) {
        fprintf(stderr, "%s\n", hqq_last_error());
        exit(2);
    }
    uint8_t *packed = exact_alloc((size_t)(words * word_bytes));
    for (int64_t i = 0; i < words * word_bytes; i++) packed[i] = (uint8_t)random_bits(state);
    w.packed = packed;
    w.scale = random_array(state, groups, meta, scale * 0.5f, scale * 1.5f);
    w.zero = random_array(state, groups, meta, 0.0f, (float)((1 << nbits) - 1));
    return w;
}

static inline void free_weight(hqq_weight *w)
{
    free((void *)w->packed);
    free((void *)w->scale);
    free((void *)w->zero);
}

static inline void print_weight(const hqq_weight *w)
{
    fprintf(stderr, "weight %lld x %lld, group_size %lld, %d bits, axis %d, meta dtype %d\n",
            (long long)w->out_features, (long long)w->in_features, (long long)w->group_size,
            w->nbits, w->axis, (int)w->meta_dtype);
}

/* Cuts the range into single steps and runs them backwards, to show that order and parts do
 * not matter. */
static inline int32_t backwards_for(int64_t begin, int64_t end, int64_t grain,
                                    void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)grain;
    for (int64_t i = end - 1; i >= begin; i--) fn(i, i + 1, data);
    return 0;
}

/* Calls check(isa) for every instruction set of this machine; the number of failures. */
static inline int for_each_isa(int (*check)(hqq_isa))
{
    int failures = 0;
    for (int isa = HQQ_ISA_PORTABLE; isa <= (int)hqq_isa_in_use(NULL); isa++) {
        int failed = check((hqq_isa)isa);
        printf("%-12s %s\n", hqq_isa_name((hqq_isa)isa), failed ? "FAILED" : "ok");
        failures += failed;
    }
    return failures;
}

#endif

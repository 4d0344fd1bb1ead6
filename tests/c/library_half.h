#ifndef HQQ_TESTS_LIBRARY_HALF_H
#define HQQ_TESTS_LIBRARY_HALF_H

#include "hqqlora.h"

enum { HALF_N = 48, HALF_K = 96, HALF_G = 32, HALF_M = 5, HALF_R = 3 };

typedef struct half_results {
    uint8_t packed[HALF_N * HALF_K / 2];
    float scale[HALF_N * HALF_K / HALF_G], zero[HALF_N * HALF_K / HALF_G];
    float y[HALF_M * HALF_N], xa[HALF_M * HALF_R];
} half_results;

/* Quantizes and multiplies; a call that only a library that allocates can answer; the message
 * of the last failure. */
hqq_status cpu_work(half_results *r), cuda_work(half_results *r);
hqq_status cpu_without_workspace(void), cuda_without_workspace(void);
const char *cpu_message(void), *cuda_message(void);

#ifdef HALF_NAME
#define HALF_JOIN_(a, b) a##_##b
#define HALF_JOIN(a, b)  HALF_JOIN_(a, b)
#define HALF(name)       HALF_JOIN(HALF_NAME, name)
#endif

#endif

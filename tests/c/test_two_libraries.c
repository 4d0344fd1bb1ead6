/* Both libraries in one process, each behind a shared object of its own, as the two halves of
 * the torch shim are: every call reaches the library that its half was linked with, and each
 * keeps its own messages. */
#include "library_half.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static int failures;

static void expect(int holds, const char *what)
{
    if (holds) return;
    failures++;
    printf("not so: %s\n    cpu: '%s'\n    cuda: '%s'\n", what, cpu_message(), cuda_message());
}

static double largest_difference(const float *a, const float *b, int count)
{
    double largest = 0;
    for (int i = 0; i < count; i++) {
        double difference = fabs((double)a[i] - (double)b[i]);
        if (!(difference <= largest)) largest = difference; /* NaN too */
    }
    return largest;
}

int main(void)
{
    static half_results cpu, cuda;
    expect(cpu_work(&cpu) == HQQ_OK, "the CPU library works");
    expect(cuda_work(&cuda) == HQQ_OK, "the CUDA library works");
    expect(memcmp(cpu.packed, cuda.packed, sizeof cpu.packed) == 0 &&
               memcmp(cpu.scale, cuda.scale, sizeof cpu.scale) == 0 &&
               memcmp(cpu.zero, cuda.zero, sizeof cpu.zero) == 0,
           "both quantize to the same bytes");
    expect(cpu.y[HALF_M * HALF_N - 1] != 0.0f, "y is not zero");
    expect(largest_difference(cpu.y, cuda.y, HALF_M * HALF_N) < 1e-5, "y agrees");
    expect(largest_difference(cpu.xa, cuda.xa, HALF_M * HALF_R) < 1e-6,
           "xa agrees, dropout included");

    /* where they differ: only the CPU library makes a workspace itself */
    expect(cpu_without_workspace() == HQQ_OK && cpu_message()[0] == '\0',
           "the CPU library needs no workspace");
    expect(cuda_without_workspace() == HQQ_NO_MEMORY &&
               strstr(cuda_message(), "workspace is NULL") != NULL,
           "the CUDA library asks for its workspace");
    expect(cpu_message()[0] == '\0', "the CUDA library's message is its own");
    return failures != 0;
}

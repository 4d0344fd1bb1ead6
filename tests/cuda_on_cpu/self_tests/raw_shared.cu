/* Must not compile: a raw __shared__ would quietly be one array a thread. */
#include "cuda.cuh"

__global__ void kernel(float *out)
{
    __shared__ float values[32];
    values[threadIdx.x] = 1;
    *out = values[0];
}

#include "small_launch.cuh"

hqq_status hqq_small_launch_bf16(const hqq_small_arguments *a, int nbits, int transpose,
                                 int axis, void *stream)
{
    return launch_bits<__nv_bfloat16>(a, nbits, transpose, axis, stream);
}

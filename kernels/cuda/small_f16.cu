#include "small_launch.cuh"

hqq_status hqq_small_launch_f16(const hqq_small_arguments *a, int nbits, int transpose,
                                int axis, void *stream)
{
    return launch_bits<__half>(a, nbits, transpose, axis, stream);
}

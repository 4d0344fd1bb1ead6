#include "wide_launch.cuh"

hqq_status hqq_wide_launch_f16(const hqq_wide_arguments *a, int nbits, int transpose,
                               void *stream)
{
    return launch_bits<__half>(a, nbits, transpose, stream);
}

#include "wide_launch.cuh"

hqq_status hqq_wide_launch_bf16(const hqq_wide_arguments *a, int nbits, int transpose,
                                void *stream)
{
    return launch_bits<__nv_bfloat16>(a, nbits, transpose, stream);
}

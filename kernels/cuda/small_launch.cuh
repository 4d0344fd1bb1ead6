/* From the run-time choice to the instance of the small-M kernel: every instance there is, for
 * one dtype T (a file each, so that they compile side by side). */
#ifndef HQQ_KERNELS_CUDA_SMALL_LAUNCH_CUH
#define HQQ_KERNELS_CUDA_SMALL_LAUNCH_CUH

#include "small_kernel.cuh"
#include "small_launch.h"

template <class C> static hqq_status launch(const hqq_small_arguments *a, void *stream)
{
    /* the most that any number of ways needs: threads of the host that launch side by side must
     * not take it from one another */
    int most =
        C::shared_bytes(C::WARPS) < a->shared_most ? C::shared_bytes(C::WARPS) : a->shared_most;
    HQQ_TRY(hqq_allow_shared(hqq_small_kernel<C>, most));
    hqq_small_arguments arguments = *a;
    int bytes = C::shared_bytes(a->ways);
    if (a->paired) {
        HQQ_TRY(hqq_knows_clusters(hqq_small_kernel<C>, &arguments.paired));
        if (bytes < C::pair_bytes(a->ways)) bytes = C::pair_bytes(a->ways);
    }
    return hqq_enqueue_clusters(
        dim3(1, arguments.paired ? 2 : 1, 1), hqq_small_kernel<C>,
        dim3((unsigned)a->token_tiles, (unsigned)a->splits, (unsigned)a->unit_blocks),
        dim3(C::THREADS), bytes, stream, arguments);
}

template <class T, int BITS, int TRANSPOSE, int AXIS>
static hqq_status launch_tokens(const hqq_small_arguments *a, void *stream)
{
    if (a->tokens == 8) return launch<hqq_small<T, BITS, TRANSPOSE, AXIS, 1>>(a, stream);
    if (a->tokens == 16) return launch<hqq_small<T, BITS, TRANSPOSE, AXIS, 2>>(a, stream);
    return launch<hqq_small<T, BITS, TRANSPOSE, AXIS, 8>>(a, stream);
}

template <class T, int BITS>
static hqq_status launch_pass(const hqq_small_arguments *a, int transpose, int axis,
                              void *stream)
{
    if (transpose)
        return axis ? launch_tokens<T, BITS, 1, 1>(a, stream)
                    : launch_tokens<T, BITS, 1, 0>(a, stream);
    return axis ? launch_tokens<T, BITS, 0, 1>(a, stream)
                : launch_tokens<T, BITS, 0, 0>(a, stream);
}

template <class T>
static hqq_status launch_bits(const hqq_small_arguments *a, int nbits, int transpose, int axis,
                              void *stream)
{
    switch (nbits) {
    case 8: return launch_pass<T, 8>(a, transpose, axis, stream);
    case 4: return launch_pass<T, 4>(a, transpose, axis, stream);
    case 2: return launch_pass<T, 2>(a, transpose, axis, stream);
    case 1: return launch_pass<T, 1>(a, transpose, axis, stream);
    default: return hqq_fail(HQQ_UNSUPPORTED, "no small-M kernel for %d bits", nbits);
    }
}

#endif

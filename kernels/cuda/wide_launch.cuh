/* From the run-time choice to the instance of the kernel of many tokens, for one dtype T (a
 * file each, so that they compile side by side). */
#ifndef HQQ_KERNELS_CUDA_WIDE_LAUNCH_CUH
#define HQQ_KERNELS_CUDA_WIDE_LAUNCH_CUH

#include "wide_kernel.cuh"

template <class C> static hqq_status launch(const hqq_wide_arguments *a, void *stream)
{
    void (*kernel)(hqq_wide_arguments) =
        a->in_aligned ? hqq_wide_kernel<C, true> : hqq_wide_kernel<C, false>;
    HQQ_TRY(hqq_allow_shared(kernel, C::SHARED_BYTES));
    return hqq_enqueue_clusters(
        dim3(1, a->cluster ? (unsigned)a->splits : 1), kernel,
        dim3((unsigned)(a->token_tiles * a->output_tiles), (unsigned)a->splits),
        dim3(C::THREADS), C::SHARED_BYTES, stream, *a);
}

template <class T, int BITS, int TRANSPOSE>
static hqq_status launch_tokens(const hqq_wide_arguments *a, void *stream)
{
    return a->tokens == HQQ_WIDE_FEW
               ? launch<hqq_wide<T, BITS, TRANSPOSE, HQQ_WIDE_FEW>>(a, stream)
               : launch<hqq_wide<T, BITS, TRANSPOSE, HQQ_WIDE_TOKENS>>(a, stream);
}

template <class T, int BITS>
static hqq_status launch_pass(const hqq_wide_arguments *a, int transpose, void *stream)
{
    return transpose ? launch_tokens<T, BITS, 1>(a, stream)
                     : launch_tokens<T, BITS, 0>(a, stream);
}

template <class T>
static hqq_status launch_bits(const hqq_wide_arguments *a, int nbits, int transpose,
                              void *stream)
{
    switch (nbits) {
    case 8: return launch_pass<T, 8>(a, transpose, stream);
    case 4: return launch_pass<T, 4>(a, transpose, stream);
    case 2: return launch_pass<T, 2>(a, transpose, stream);
    case 1: return launch_pass<T, 1>(a, transpose, stream);
    default: return hqq_fail(HQQ_UNSUPPORTED, "no kernel of many tokens for %d bits", nbits);
    }
}

#endif

/*
 * What every file of this folder includes first: CUDA itself under nvcc; elsewhere the stand-in
 * that runs kernels on the CPU, for the tests. The same source serves both, so
 *   - kernels are launched with hqq_launch, never <<<>>>;
 *   - shared memory is HQQ_SHARED(type, name) or hqq_dynamic_shared<T>(), never __shared__;
 *   - inline PTX lives in ptx.cuh and ptx_warpgroup.cuh alone;
 *   - nothing waits for another block but those of its cluster, and no thread returns before a
 *     barrier.
 */
#ifndef HQQ_KERNELS_CUDA_CUDA_CUH
#define HQQ_KERNELS_CUDA_CUDA_CUH

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

template <class T> using hqq_identity = T;
/* __shared__ T name, where T may be an array type: HQQ_SHARED(float[32], sums). */
#define HQQ_SHARED(T, name) __shared__ hqq_identity<T> name

/* The launch's dynamic shared memory, 128-byte aligned. */
template <class T> __device__ __forceinline__ T *hqq_dynamic_shared()
{
    extern __shared__ __align__(128) unsigned char hqq_dynamic_shared_memory[];
    return reinterpret_cast<T *>(hqq_dynamic_shared_memory);
}
#else
#include "cuda_on_cpu.h"
#endif

extern "C" {
#include "status.h"
}

#define HQQ_DEVICE_INLINE static __device__ __forceinline__

/* The same bits under another type. */
template <class To, class From> HQQ_DEVICE_INLINE To hqq_bit_cast(const From &from)
{
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

/* Returns from the enclosing function, with HQQ_DEVICE and what CUDA says, if `call` failed. */
#define HQQ_CUDA_TRY(call)                                                                   \
    do {                                                                                     \
        cudaError_t error_ = (call);                                                         \
        if (error_ != cudaSuccess)                                                           \
            return hqq_fail(HQQ_DEVICE, "CUDA: %s (%s)", cudaGetErrorString(error_), #call); \
    } while (0)

/* A kernel may then be launched with that much dynamic shared memory; up to 48 KiB, static
 * shared memory included, need no asking. */
template <class... Parameters>
static hqq_status hqq_allow_shared(void (*kernel)(Parameters...), size_t shared_bytes)
{
    if (shared_bytes > 40 * 1024)
        HQQ_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
    return HQQ_OK;
}

/* Whether the device runs code of `kernel` that was compiled for 9.0 or later: on a newer
 * device a library for older ones alone runs what the driver makes of that. */
template <class... Parameters>
static hqq_status hqq_knows_clusters(void (*kernel)(Parameters...), int *knows)
{
    cudaFuncAttributes attributes;
    HQQ_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(kernel)));
    *knows = attributes.ptxVersion >= 90;
    return HQQ_OK;
}

/* Enqueues kernel(args...) on stream, its shared memory allowed, in clusters of so many blocks
 * (more than one from compute capability 9.0 on). The arguments are converted to the kernel's
 * own types. */
template <class... Parameters, class... Arguments>
static hqq_status hqq_enqueue_clusters(dim3 cluster, void (*kernel)(Parameters...), dim3 grid,
                                       dim3 block, size_t shared_bytes, void *stream,
                                       Arguments &&...arguments)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute shape = {};
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim.x = cluster.x;
    shape.val.clusterDim.y = cluster.y;
    shape.val.clusterDim.z = cluster.z;
    config.attrs = &shape;
    config.numAttrs = cluster.x * cluster.y * cluster.z > 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaError_t error =
        cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error == cudaSuccess) return HQQ_OK;
    return hqq_fail(HQQ_DEVICE,
                    "CUDA: %s (a launch of %u x %u x %u blocks of %u threads with %zu bytes of "
                    "shared memory)",
                    cudaGetErrorString(error), grid.x, grid.y, grid.z,
                    block.x * block.y * block.z, shared_bytes);
}

template <class... Parameters, class... Arguments>
static hqq_status hqq_enqueue(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                              size_t shared_bytes, void *stream, Arguments &&...arguments)
{
    return hqq_enqueue_clusters(dim3(1, 1, 1), kernel, grid, block, shared_bytes, stream,
                                arguments...);
}

/* Both, where a kernel's shared memory is always the same. */
template <class... Parameters, class... Arguments>
static hqq_status hqq_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, void *stream, Arguments &&...arguments)
{
    HQQ_TRY(hqq_allow_shared(kernel, shared_bytes));
    return hqq_enqueue(kernel, grid, block, shared_bytes, stream, arguments...);
}

#endif

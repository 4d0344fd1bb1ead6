/* The part of the CUDA runtime that the library's host code uses. Everything is done when the
 * call returns, or captured (see control.h); streams are ignored. Enumerators have CUDA's
 * values. */
#ifndef HQQ_CUDA_ON_CPU_RUNTIME_API_H
#define HQQ_CUDA_ON_CPU_RUNTIME_API_H

#include <functional>
#include <stddef.h>
#include <tuple>

#include "vector_types.h"

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxRegistersPerMultiprocessor = 82,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

struct cudaFuncAttributes {
    int ptxVersion; /* the device's */
};

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};

typedef struct on_cpu_stream *cudaStream_t;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
    struct {
        unsigned x, y, z;
    } clusterDim;
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

/* What went wrong, with the emulator's own words if this thread's last failed call gave them.
 */
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError(); /* of this thread; forgets it */
cudaError_t cudaPeekAtLastError();

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *kernel);
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void *data, int byte, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);

namespace on_cpu
{
/* The clusters that a launch asks for; else of one block. */
dim3 cluster_shape(const cudaLaunchConfig_t &config);

/* Runs body(arguments) once for every thread of the grid. */
cudaError_t launch(const cudaLaunchConfig_t &config, const dim3 &cluster, const void *kernel,
                   void (*body)(void *arguments), void *arguments);

/* Does the work now or, while this host thread captures, keeps it. */
cudaError_t enqueue(std::function<cudaError_t()> work);
} // namespace on_cpu

/* kernel(arguments...); each thread gets its own copy of the arguments, as on the device. */
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments &&...arguments)
{
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } call = {kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
    auto body = [](void *data) {
        Call *c = static_cast<Call *>(data);
        std::apply(c->kernel, c->arguments);
    };
    const dim3 cluster = on_cpu::cluster_shape(*config); /* attributes may end with the call */
    return on_cpu::enqueue([config = *config, cluster, call, body]() mutable {
        return on_cpu::launch(config, cluster, reinterpret_cast<const void *>(call.kernel),
                              body, &call);
    });
}

#endif

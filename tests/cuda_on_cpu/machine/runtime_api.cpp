/* The runtime's calls but for the launch itself. */
#include "runtime_state.h"

#include <map>
#include <mutex>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "device_properties.h"

namespace on_cpu
{
struct LastError {
    cudaError_t pending; /* for cudaGetLastError */
    cudaError_t described;
    char text[512]; /* of `described` */
};
static thread_local LastError last = {cudaSuccess, cudaSuccess, ""};

cudaError_t set_error(cudaError_t error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last.text, sizeof last.text, format, arguments);
    va_end(arguments);
    last.described = last.pending = error;
    return error;
}

static std::mutex guard;
static std::map<const void *, size_t> opted_in; /* kernel to bytes of dynamic shared memory */

size_t allowed_dynamic_shared(const void *kernel)
{
    std::lock_guard<std::mutex> lock(guard);
    auto found = opted_in.find(kernel);
    size_t usual = static_cast<size_t>(known_attribute(cudaDevAttrMaxSharedMemoryPerBlock));
    return found == opted_in.end() || found->second < usual ? usual : found->second;
}
} // namespace on_cpu

using on_cpu::set_error;

static const char *plain_text(cudaError_t error)
{
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    }
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error)
{
    bool described = error != cudaSuccess && error == on_cpu::last.described;
    return described ? on_cpu::last.text : plain_text(error);
}

cudaError_t cudaPeekAtLastError()
{
    return on_cpu::last.pending;
}

cudaError_t cudaGetLastError()
{
    cudaError_t error = on_cpu::last.pending;
    on_cpu::last.pending = cudaSuccess;
    return error;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    if (device == 0) return cudaSuccess;
    return set_error(cudaErrorInvalidDevice, "device %d: the emulator has one", device);
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    if (device != 0) return cudaSetDevice(device);
    if (on_cpu::device_attribute(attribute, value)) return cudaSuccess;
    return set_error(cudaErrorInvalidValue, "the emulator does not know device attribute %d",
                     attribute);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *)
{
    attributes->ptxVersion = on_cpu::ptx_version();
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout)
        return cudaSuccess; /* a hint */
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return set_error(cudaErrorInvalidValue,
                         "the emulator does not know function attribute %d", attribute);
    int limit = on_cpu::known_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (!kernel || value < 0 || value > limit)
        return set_error(cudaErrorInvalidValue, "%d bytes of dynamic shared memory: at most %d",
                         value, limit);
    std::lock_guard<std::mutex> lock(on_cpu::guard);
    on_cpu::opted_in[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *data, int byte, size_t bytes, cudaStream_t)
{
    return on_cpu::enqueue([=] {
        if (bytes) memset(data, byte, bytes);
        return cudaSuccess;
    });
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t)
{
    return on_cpu::enqueue([=] {
        if (bytes) memcpy(to, from, bytes);
        return cudaSuccess;
    });
}

#include "device_properties.h"

#include <mutex>

#include "../control.h"
#include "../device/runtime_api.h"

namespace on_cpu
{
struct Attribute {
    int name, value;
};

/* An H100 SXM's. */
static const Attribute H100[] = {
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrL2CacheSize, 50 << 20},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
    {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
    {cudaDevAttrClusterLaunch, 1},
};
enum { COUNT = sizeof H100 / sizeof *H100 };

static std::mutex guard;
static Attribute attributes[COUNT];
static bool initialised = false;

static Attribute *find(int name) /* guard is held */
{
    if (!initialised)
        for (int i = 0; i < COUNT; i++) attributes[i] = H100[i];
    initialised = true;
    for (Attribute &a : attributes)
        if (a.name == name) return &a;
    return nullptr;
}

static int compiled_for = 0; /* 0: the device */

int ptx_version()
{
    const int device = 10 * known_attribute(cudaDevAttrComputeCapabilityMajor) +
                       known_attribute(cudaDevAttrComputeCapabilityMinor);
    std::lock_guard<std::mutex> lock(guard);
    return compiled_for ? compiled_for : device;
}

bool device_attribute(int name, int *value)
{
    std::lock_guard<std::mutex> lock(guard);
    Attribute *a = find(name);
    if (a) *value = a->value;
    return a != nullptr;
}
} // namespace on_cpu

int hqqlora_emulated_set_device_attribute(int name, int value)
{
    std::lock_guard<std::mutex> lock(on_cpu::guard);
    on_cpu::Attribute *a = on_cpu::find(name);
    if (a) a->value = value;
    return a ? 0 : 1;
}

void hqqlora_emulated_reset_device(void)
{
    std::lock_guard<std::mutex> lock(on_cpu::guard);
    on_cpu::initialised = false;
    on_cpu::compiled_for = 0;
}

void hqqlora_emulated_set_ptx_version(int version)
{
    std::lock_guard<std::mutex> lock(on_cpu::guard);
    on_cpu::compiled_for = version;
}

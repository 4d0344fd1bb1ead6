#include "cuda.cuh"
#include "device.h"

static hqq_status attribute(int *value, cudaDeviceAttr name, int device)
{
    HQQ_CUDA_TRY(cudaDeviceGetAttribute(value, name, device));
    return HQQ_OK;
}

hqq_status hqq_cuda_current_device(hqq_cuda_device *d)
{
    int device, major, minor, l2, shared, clusters;
    HQQ_CUDA_TRY(cudaGetDevice(&device));
    HQQ_TRY(attribute(&d->multiprocessors, cudaDevAttrMultiProcessorCount, device));
    HQQ_TRY(attribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    HQQ_TRY(attribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    HQQ_TRY(attribute(&l2, cudaDevAttrL2CacheSize, device));
    HQQ_TRY(attribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    HQQ_TRY(attribute(&clusters, cudaDevAttrClusterLaunch, device));
    d->compute_capability = 10 * major + minor;
    d->has_clusters = clusters;
    d->l2_bytes = l2;
    d->shared_bytes = shared;
    return HQQ_OK;
}

hqq_status hqq_cuda_fill_zero(void *data, size_t bytes, void *stream)
{
    if (bytes == 0) return HQQ_OK;
    HQQ_CUDA_TRY(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
    return HQQ_OK;
}

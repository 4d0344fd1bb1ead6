/* The device that the runtime's calls describe. */
#ifndef HQQ_CUDA_ON_CPU_DEVICE_PROPERTIES_H
#define HQQ_CUDA_ON_CPU_DEVICE_PROPERTIES_H

namespace on_cpu
{
/* false: not a known attribute. Thread-safe. */
bool device_attribute(int attribute, int *value);

/* Of kernels, as cudaFuncGetAttributes has it. */
int ptx_version();

inline int known_attribute(int attribute)
{
    int value = 0;
    device_attribute(attribute, &value);
    return value;
}
} // namespace on_cpu

#endif

/* Shared memory: heap blocks of exactly the size asked for, all bytes 0xFF (NaN in every float
 * type) when a block of threads starts. */
#ifndef HQQ_CUDA_ON_CPU_SHARED_MEMORY_H
#define HQQ_CUDA_ON_CPU_SHARED_MEMORY_H

#include <stddef.h>

namespace on_cpu
{
/* The block's array known by `key`; the first thread to come allocates it. */
void *static_shared(const void *key, size_t bytes, size_t alignment, const char *name);
void *dynamic_shared();
template <class T> using identity = T;
} // namespace on_cpu

/* __shared__ T name, where T may be an array type: HQQ_SHARED(float[32], sums). */
#define HQQ_SHARED(T, name)                                                 \
    static const char name##_key_ = 0;                                      \
    auto &name = *static_cast<on_cpu::identity<T> *>(on_cpu::static_shared( \
        &name##_key_, sizeof(on_cpu::identity<T>), alignof(on_cpu::identity<T>), #name))

template <class T> T *hqq_dynamic_shared()
{
    return static_cast<T *>(on_cpu::dynamic_shared());
}

#endif

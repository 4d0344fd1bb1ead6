/* CUDA's keywords, as far as a C++ compiler needs none of them. */
#ifndef HQQ_CUDA_ON_CPU_KEYWORDS_H
#define HQQ_CUDA_ON_CPU_KEYWORDS_H

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__  inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
/* No __noinline__: libstdc++ spells attributes with that word. */

/* A raw `__shared__ float s[32]` would quietly become one array a thread. */
#define __shared__                                                                            \
    _Pragma("GCC error \"write HQQ_SHARED(type, name) or hqq_dynamic_shared<T>() instead of " \
            "__shared__\"")

/* An assumption that does not hold ends the launch. */
#define __builtin_assume(condition)                                          \
    ((condition) ? (void)0                                                   \
                 : on_cpu::fail("%s:%d: __builtin_assume(%s) does not hold", \
                                on_cpu::base_name(__FILE__), __LINE__, #condition))

#endif

/* float2, uint4 and the like, with CUDA's alignments: 16-byte loads and stores of misaligned
 * addresses are undefined here too, and the sanitizers say so. */
#ifndef HQQ_CUDA_ON_CPU_VECTOR_TYPES_H
#define HQQ_CUDA_ON_CPU_VECTOR_TYPES_H

/* T is the element, name its CUDA name; two and four are the alignments of name2 and name4. */
#define ON_CPU_VECTOR_TYPES(T, name, two, four)       \
    struct name##1                                    \
    {                                                 \
        T x;                                          \
    };                                                \
    struct alignas(two) name##2                       \
    {                                                 \
        T x, y;                                       \
    };                                                \
    struct name##3                                    \
    {                                                 \
        T x, y, z;                                    \
    };                                                \
    struct alignas(four) name##4                      \
    {                                                 \
        T x, y, z, w;                                 \
    };                                                \
    inline name##1 make_##name##1(T x)                \
    {                                                 \
        return {x};                                   \
    }                                                 \
    inline name##2 make_##name##2(T x, T y)           \
    {                                                 \
        return {x, y};                                \
    }                                                 \
    inline name##3 make_##name##3(T x, T y, T z)      \
    {                                                 \
        return {x, y, z};                             \
    }                                                 \
    inline name##4 make_##name##4(T x, T y, T z, T w) \
    {                                                 \
        return {x, y, z, w};                          \
    }

ON_CPU_VECTOR_TYPES(signed char, char, 2, 4)
ON_CPU_VECTOR_TYPES(unsigned char, uchar, 2, 4)
ON_CPU_VECTOR_TYPES(short, short, 4, 8)
ON_CPU_VECTOR_TYPES(unsigned short, ushort, 4, 8)
ON_CPU_VECTOR_TYPES(int, int, 8, 16)
ON_CPU_VECTOR_TYPES(unsigned int, uint, 8, 16)
ON_CPU_VECTOR_TYPES(long long, longlong, 16, 16)
ON_CPU_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
ON_CPU_VECTOR_TYPES(float, float, 8, 16)
ON_CPU_VECTOR_TYPES(double, double, 16, 16)
#undef ON_CPU_VECTOR_TYPES

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#endif

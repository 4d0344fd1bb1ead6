/*
 * Inline PTX of a warpgroup, four warps whose tensor cores multiply together and by themselves:
 * compute capability 9.0, and it alone (sm_90a). Beside ptx.cuh; for the CPU its twin is
 * tests/cuda_on_cpu/ptx_warpgroup_on_cpu.h.
 */
#ifndef HQQ_KERNELS_CUDA_PTX_WARPGROUP_CUH
#define HQQ_KERNELS_CUDA_PTX_WARPGROUP_CUH

#include "ptx.cuh"

#ifndef __CUDACC__
#include "ptx_warpgroup_on_cpu.h"
#else

/* The descriptor of rows of 128 bytes, one after the other from a multiple of 1024 on, their
 * 16-byte pieces swizzled: what would lie at address i lies at i ^ (i >> 7 & 7) << 4. Eight
 * rows are 1024 bytes apart. */
HQQ_PTX uint64_t ptx_swizzled_rows(const void *rows)
{
    const uint64_t kind = UINT64_C(1) << 62 | UINT64_C(1024 / 16) << 32 | UINT64_C(1) << 16;
    return kind | (ptx_shared_address(rows) & 0x3ffff) >> 4;
}

#define PTX_WARPGROUP_MMA_128(type)                                                           \
    asm volatile(                                                                             \
        "{\n\t"                                                                               \
        ".reg .pred adds;\n\t"                                                                \
        "setp.eq.u32 adds, 0, 0;\n\t"                                                         \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                     \
        "%0, %1, %2, %3, %4, %5, %6, %7, "                                                    \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                              \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                            \
        "%24, %25, %26, %27, %28, %29, %30, %31, "                                            \
        "%32, %33, %34, %35, %36, %37, %38, %39, "                                            \
        "%40, %41, %42, %43, %44, %45, %46, %47, "                                            \
        "%48, %49, %50, %51, %52, %53, %54, %55, "                                            \
        "%56, %57, %58, %59, %60, %61, %62, %63"                                              \
        "}, {%64, %65, %66, %67}, %68, adds, 1, 1, 0;\n\t"                                    \
        "}"                                                                                   \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),          \
          "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),       \
          "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),       \
          "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),       \
          "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),       \
          "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),       \
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),       \
          "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]),       \
          "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(ptx_swizzled_rows(b)))
#define PTX_WARPGROUP_MMA_64(type)                                                           \
    asm volatile("{\n\t"                                                                     \
                 ".reg .pred adds;\n\t"                                                      \
                 "setp.eq.u32 adds, 0, 0;\n\t"                                               \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"            \
                 "%0, %1, %2, %3, %4, %5, %6, %7, "                                          \
                 "%8, %9, %10, %11, %12, %13, %14, %15, "                                    \
                 "%16, %17, %18, %19, %20, %21, %22, %23, "                                  \
                 "%24, %25, %26, %27, %28, %29, %30, %31"                                    \
                 "}, {%32, %33, %34, %35}, %36, adds, 1, 1, 0;\n\t"                          \
                 "}"                                                                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),   \
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),          \
                   "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),          \
                   "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]),          \
                   "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(ptx_swizzled_rows(b)))

/* d += a b, enqueued: a 64 x 16, warp w of the group having rows 16 w .. + 15 as in ptx_mma; b
 * 16 x 128 (or 64) in shared memory, column n as 16 neighbours in row n of so many swizzled
 * rows, the first of them at `b` before swizzling; d 64 x 128 (or 64), lane 4g + t of warp w:
 *   d[4j], d[4j + 1]     row 16 w + g, columns 8j + 2t, 8j + 2t + 1
 *   d[4j + 2], d[4j + 3] row 16 w + g + 8
 * Until ptx_warpgroup_wait says that it is done, nobody may touch d, a or b's rows. */
HQQ_PTX void ptx_warpgroup_mma(float (&d)[64], const uint32_t (&a)[4], const void *b,
                               __nv_bfloat16)
{
    PTX_WARPGROUP_MMA_128("bf16");
}
HQQ_PTX void ptx_warpgroup_mma(float (&d)[64], const uint32_t (&a)[4], const void *b, __half)
{
    PTX_WARPGROUP_MMA_128("f16");
}
HQQ_PTX void ptx_warpgroup_mma(float (&d)[32], const uint32_t (&a)[4], const void *b,
                               __nv_bfloat16)
{
    PTX_WARPGROUP_MMA_64("bf16");
}
HQQ_PTX void ptx_warpgroup_mma(float (&d)[32], const uint32_t (&a)[4], const void *b, __half)
{
    PTX_WARPGROUP_MMA_64("f16");
}
#undef PTX_WARPGROUP_MMA_128
#undef PTX_WARPGROUP_MMA_64

/* Before products whose d or a has been written by other instructions. */
HQQ_PTX void ptx_warpgroup_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* The products enqueued since the last commit become a group. */
HQQ_PTX void ptx_warpgroup_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most N of this warp's groups are still under way. */
template <int N> HQQ_PTX void ptx_warpgroup_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* After a wait: from here on d is what the products have made of it. */
template <int N> HQQ_PTX void ptx_warpgroup_arrived(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/* What this thread has written to shared memory, or copied there and waited for, is seen by
 * products that are enqueued after the next barrier. */
HQQ_PTX void ptx_warpgroup_publish()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif
#endif

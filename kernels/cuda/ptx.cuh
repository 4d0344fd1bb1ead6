/* Inline PTX, one purpose a wrapper, and nowhere else but in ptx_warpgroup.cuh. Shared memory
 * is named by generic pointers. */
#ifndef HQQ_KERNELS_CUDA_PTX_CUH
#define HQQ_KERNELS_CUDA_PTX_CUH

#include "cuda.cuh"

#ifndef __CUDACC__
#include "ptx_on_cpu.h" /* the same wrappers, for the CPU */
#else

#define HQQ_PTX static __device__ __forceinline__

HQQ_PTX uint32_t ptx_shared_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* Four 8 x 8 matrices of 16-bit elements; lanes 8i .. 8i+7 name the rows (16 bytes, 16-byte
 * aligned) of matrix i; lane 4g + t gets elements 2t, 2t+1 of row g of each. */
HQQ_PTX void ptx_ldmatrix_x4(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

/* The same, each matrix transposed: lane 4g + t gets elements g of rows 2t, 2t+1. */
HQQ_PTX void ptx_ldmatrix_x4_trans(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

/* d = a b + d on tensor cores: a 16 x 16 (row), b 16 x 8 (column), d 16 x 8 fp32. Lane 4g + t:
 *   a[0] rows g, k 2t..  a[1] rows g+8, k 2t..  a[2] rows g, k 2t+8..  a[3] rows g+8, k 2t+8..
 *   b[0] k 2t.., column g  b[1] k 2t+8.., column g
 *   d[0], d[1] row g, columns 2t, 2t+1  d[2], d[3] row g+8 */
HQQ_PTX void ptx_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     __nv_bfloat16)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
HQQ_PTX void ptx_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Copies 16 bytes from global to shared memory in the background, or 16 zero bytes if not valid
 * (global is then not read). Both 16-byte aligned. */
HQQ_PTX void ptx_cp_async_16(void *shared, const void *global, bool valid = true)
{
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ptx_shared_address(shared)),
        "l"(global), "r"(valid ? 16 : 0)
        : "memory");
}

/* The copies issued since the last commit become a group. */
HQQ_PTX void ptx_cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most N of this thread's groups are still under way. */
template <int N> HQQ_PTX void ptx_cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#if __CUDA_ARCH__ >= 900
#define PTX_CLUSTERS 1
/* The cluster's barrier. What a thread did before it arrives, all see that have waited. That is
 * a fence of the whole device; not so where only what it wrote to this block's shared memory
 * matters, or a fence went before (relaxed). */
HQQ_PTX void ptx_cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
HQQ_PTX void ptx_cluster_arrive_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
HQQ_PTX void ptx_cluster_arrive_shared()
{
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
    ptx_cluster_arrive_relaxed();
#else
    ptx_cluster_arrive();
#endif
}
HQQ_PTX void ptx_cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* What lies at `own` in this block's shared memory, in that of block `rank` of the cluster. */
struct ptx_cluster_address {
    uint32_t at;
};
HQQ_PTX ptx_cluster_address ptx_cluster_map(const void *own, unsigned rank)
{
    ptx_cluster_address there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(there.at)
                 : "r"(ptx_shared_address(own)), "r"(rank));
    return there;
}
/* The 16 bytes at `there` + bytes. */
HQQ_PTX float4 ptx_cluster_load(ptx_cluster_address there, uint32_t bytes)
{
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(there.at + bytes)
                 : "memory");
    return x;
}
#endif

/* If the 16 bytes at address (global memory, 16-byte aligned) are `expected`, they become
 * `next`; returns what they were. One atomic operation, which orders nothing else. */
#if __CUDA_ARCH__ >= 900
#define PTX_COMPARE_EXCHANGES_16 1
HQQ_PTX uint4 ptx_compare_exchange_16(uint4 *address, uint4 expected, uint4 next)
{
    uint64_t e0 = expected.x | static_cast<uint64_t>(expected.y) << 32, found0;
    uint64_t e1 = expected.z | static_cast<uint64_t>(expected.w) << 32, found1;
    uint64_t n0 = next.x | static_cast<uint64_t>(next.y) << 32;
    uint64_t n1 = next.z | static_cast<uint64_t>(next.w) << 32;
    asm volatile("{\n\t"
                 ".reg .b128 expected, next, found;\n\t"
                 "mov.b128 expected, {%3, %4};\n\t"
                 "mov.b128 next, {%5, %6};\n\t"
                 "atom.relaxed.gpu.cas.b128 found, [%2], expected, next;\n\t"
                 "mov.b128 {%0, %1}, found;\n\t"
                 "}"
                 : "=l"(found0), "=l"(found1)
                 : "l"(address), "l"(e0), "l"(e1), "l"(n0), "l"(n1)
                 : "memory");
    return make_uint4(static_cast<uint32_t>(found0), static_cast<uint32_t>(found0 >> 32),
                      static_cast<uint32_t>(found1), static_cast<uint32_t>(found1 >> 32));
}
#endif

/* Any bitwise function of three words: bit (a b c) of the table. */
template <int table> HQQ_PTX uint32_t ptx_lop3(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(table));
    return d;
}

#endif
#endif

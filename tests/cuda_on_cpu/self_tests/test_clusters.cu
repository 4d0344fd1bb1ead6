/*
 * Clusters: who is in one, their barrier, loads from another block's shared memory. And bugs
 * that kernels have with them, each seen under every schedule; most by the launch that fails,
 * a missing barrier by a wrong result or, built for it, by the race checker.
 */
#include "ptx.cuh"

#include <string.h>
#include <vector>

#include "check.h"
#include "control.h"

enum { THREADS = 64, PER_THREAD = sizeof(float4) };

static __device__ unsigned number_of_block()
{
    return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

/* out[block][rank][t]: the number of the block of that rank, plus t / 128 */
__global__ void read_all(float *out, dim3 shape)
{
    float4 *mine = hqq_dynamic_shared<float4>();
    const unsigned size = shape.x * shape.y * shape.z, t = threadIdx.x;
    const float value = static_cast<float>(number_of_block()) + static_cast<float>(t) / 128;
    mine[t] = make_float4(value, value, value, value);
    ptx_cluster_arrive();
    ptx_cluster_wait();
    for (unsigned rank = 0; rank < size; rank++) {
        float4 x = ptx_cluster_load(ptx_cluster_map(mine, rank), t * PER_THREAD);
        out[(number_of_block() * size + rank) * THREADS + t] = x.w;
    }
    ptx_cluster_arrive();
    ptx_cluster_wait();
}

/* The PTX ISA: a cluster's blocks are numbered as threads are, x fastest. */
static void test_shape(dim3 grid, dim3 shape)
{
    const unsigned size = shape.x * shape.y * shape.z, blocks = grid.x * grid.y * grid.z;
    std::vector<float> out(blocks * size * THREADS, -1);
    hqq_status status = hqq_enqueue_clusters(shape, read_all, grid, dim3(THREADS),
                                             THREADS * PER_THREAD, nullptr, out.data(), shape);
    check(status == HQQ_OK, "clusters of %u: %s", size, hqq_last_error());
    for (unsigned block = 0; block < blocks; block++)
        for (unsigned rank = 0; rank < size; rank++) {
            unsigned x = block % grid.x / shape.x * shape.x + rank % shape.x;
            unsigned y = block / grid.x % grid.y / shape.y * shape.y + rank / shape.x % shape.y;
            unsigned z = block / grid.x / grid.y / shape.z * shape.z + rank / shape.x / shape.y;
            float expected = static_cast<float>(x + grid.x * (y + grid.y * z)) + 63.0f / 128;
            float found = out[(block * size + rank) * THREADS + 63];
            check(found == expected, "block %u reads %g of rank %u, not %g", block,
                  static_cast<double>(found), rank, static_cast<double>(expected));
        }
}

/* ---- what may be launched */

__global__ void nothing() {}

static hqq_status launch_nothing(dim3 shape, dim3 grid)
{
    return hqq_enqueue_clusters(shape, nothing, grid, dim3(32), 0, nullptr);
}

static void test_launches()
{
    check(launch_nothing(dim3(8), dim3(16)) == HQQ_OK, "eight blocks: %s", hqq_last_error());
    check(launch_nothing(dim3(9), dim3(18)) == HQQ_DEVICE, "nine are too many");
    check(launch_nothing(dim3(1, 2), dim3(4, 3)) == HQQ_DEVICE, "a grid of whole clusters");
    int knows = 0;
    check(hqq_knows_clusters(nothing, &knows) == HQQ_OK && knows, "code for an H100");
    hqqlora_emulated_set_ptx_version(80);
    check(hqq_knows_clusters(nothing, &knows) == HQQ_OK && !knows, "code for an A100");
    hqqlora_emulated_set_device_attribute(cudaDevAttrClusterLaunch, 0);
    check(launch_nothing(dim3(2), dim3(2)) == HQQ_DEVICE, "a device without clusters");
    check(launch_nothing(dim3(1), dim3(2)) == HQQ_OK, "has blocks: %s", hqq_last_error());
    hqqlora_emulated_reset_device();
    check(hqq_knows_clusters(nothing, &knows) == HQQ_OK && knows, "the H100 again");
}

/* ---- bugs */

enum ClusterBug {
    NO_BUG,
    READ_AT_ONCE,
    NO_BARRIER_AFTER_WRITE,
    NO_BARRIER_AFTER_READ,
    RETURN_AT_ONCE,
    ONE_RETURNS_AT_ONCE,
    NEVER_WAITED,
    NEVER_ARRIVED,
    ARRIVED_TWICE,
    HALF_A_BLOCK,
    NO_SUCH_RANK,
    OUTSIDE
};

static __device__ void cluster_barrier()
{
    ptx_cluster_arrive();
    ptx_cluster_wait();
}

/* out[rank][t] = the other's t; of a cluster of two */
__global__ void swap(float *out, ClusterBug bug)
{
    float4 *mine = hqq_dynamic_shared<float4>();
    const unsigned rank = blockIdx.x, t = threadIdx.x;
    ptx_cluster_address there = ptx_cluster_map(mine, bug == NO_SUCH_RANK ? 2 : 1 - rank);
    if (bug != READ_AT_ONCE) cluster_barrier();
    mine[t].x = static_cast<float>(100 * rank + t);
    if (bug == READ_AT_ONCE) __syncthreads();
    if (bug == NEVER_ARRIVED) ptx_cluster_wait();
    if (bug == ARRIVED_TWICE) ptx_cluster_arrive();
    if (bug == HALF_A_BLOCK && t < 32) return;
    if (bug != NO_BARRIER_AFTER_WRITE && bug != READ_AT_ONCE) cluster_barrier();
    out[THREADS * rank + t] =
        ptx_cluster_load(there, (bug == OUTSIDE ? t + 1 : t) * PER_THREAD).x;
    if (bug != NO_BARRIER_AFTER_READ) cluster_barrier();
    mine[t].x = -1;
    cluster_barrier();
    out[THREADS * rank + t] += ptx_cluster_load(there, t * PER_THREAD).x + 1;
    if (bug == RETURN_AT_ONCE || (bug == ONE_RETURNS_AT_ONCE && rank == 1)) return;
    ptx_cluster_arrive();
    if (bug != NEVER_WAITED) ptx_cluster_wait();
}

static bool works(ClusterBug bug)
{
    std::vector<float> out(2 * THREADS, -1);
    hqq_status status = hqq_enqueue_clusters(dim3(2), swap, dim3(2), dim3(THREADS),
                                             THREADS * PER_THREAD, nullptr, out.data(), bug);
    bool right = status == HQQ_OK;
    for (int i = 0; i < 2 * THREADS; i++)
        right &= out[i] == static_cast<float>(i < THREADS ? 100 + i : i - THREADS);
    return right;
}

static void test_bugs(const char *order)
{
    const struct {
        ClusterBug bug;
        const char *text; /* of the message; NULL: that of the race checker */
    } bugs[] = {
        {READ_AT_ONCE, "may not have begun"},
        {NO_BARRIER_AFTER_WRITE, nullptr},
        {NO_BARRIER_AFTER_READ, nullptr},
        {RETURN_AT_ONCE, "has returned"},
        {ONE_RETURNS_AT_ONCE, "returned"},
        {NEVER_WAITED, "never waited for the cluster's barrier"},
        {NEVER_ARRIVED, "has not arrived"},
        {ARRIVED_TWICE, "barrier twice"},
        {HALF_A_BLOCK, "returned; threads 32-63 at the cluster's barrier of test_clusters.cu"},
        {NO_SUCH_RANK, "block 2 of a cluster of 2"},
        {OUTSIDE, "is not 16 bytes of shared memory"},
    };
    for (const auto &b : bugs) {
        check(!works(b.bug), "bug %d is not seen, %s", b.bug, order);
        const char *text = b.text ? b.text : "shared memory race in a cluster";
        if (b.text || hqqlora_emulated_checks_races())
            check(strstr(hqq_last_error(), text), "bug %d, %s: \"%s\", not \"%s\"", b.bug,
                  order, hqq_last_error(), text);
        check(works(NO_BUG), "the sound kernel afterwards: %s", hqq_last_error());
    }
}

int main()
{
    for (const char *order : {"FIFO", "LIFO", "RANDOM", "PRIORITY"}) {
        hqqlora_emulated_set_schedule(order, "LATE", 3);
        test_shape(dim3(3, 4, 2), dim3(1, 2, 1));
        test_shape(dim3(4, 2, 2), dim3(2, 2, 2));
        test_shape(dim3(3), dim3(3));
        test_shape(dim3(2), dim3(1));
        test_bugs(order);
    }
    hqqlora_emulated_set_schedule("FIFO", "LATE", 1);
    test_launches();
    return report_checks();
}

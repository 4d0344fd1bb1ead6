/* A launch: checks, the machine, the blocks in the schedule's order. */
#include "machine.h"

#include <atomic>
#include <string.h>

#include "device_properties.h"
#include "runtime_state.h"

ON_CPU_THREAD_LOCAL uint3 blockIdx;
ON_CPU_THREAD_LOCAL dim3 blockDim, gridDim;

namespace on_cpu
{
enum { CLUSTER_MOST = 8 }; /* blocks, on every device that has clusters */

ON_CPU_THREAD_LOCAL const Position *self = nullptr;
ON_CPU_THREAD_LOCAL Machine *machine = nullptr;

static std::atomic<uint64_t> launches{0}, blocks{0}, switches{0}, mma{0}, clusters{0};

static cudaError_t check_configuration(const cudaLaunchConfig_t &c, const void *kernel)
{
    const dim3 &g = c.gridDim, &b = c.blockDim;
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        return set_error(cudaErrorInvalidConfiguration, "a grid of %u x %u x %u blocks", g.x,
                         g.y, g.z);
    uint64_t threads = static_cast<uint64_t>(b.x) * b.y * b.z;
    uint64_t limit = static_cast<uint64_t>(known_attribute(cudaDevAttrMaxThreadsPerBlock));
    if (threads == 0 || b.x > 1024 || b.y > 1024 || b.z > 64 || threads > limit ||
        threads > MAX_THREADS)
        return set_error(cudaErrorInvalidConfiguration, "a block of %u x %u x %u threads", b.x,
                         b.y, b.z);
    size_t allowed = allowed_dynamic_shared(kernel);
    if (c.dynamicSmemBytes > allowed)
        return set_error(cudaErrorInvalidValue,
                         "%zu bytes of dynamic shared memory: this kernel may have %zu",
                         c.dynamicSmemBytes, allowed);
    return cudaSuccess;
}

dim3 cluster_shape(const cudaLaunchConfig_t &config)
{
    for (unsigned i = 0; i < config.numAttrs; i++)
        if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
            const auto &shape = config.attrs[i].val.clusterDim;
            return dim3(shape.x, shape.y, shape.z);
        }
    return dim3(1, 1, 1);
}

static cudaError_t check_cluster(const dim3 &cluster, const dim3 &grid)
{
    if (cluster.x == 1 && cluster.y == 1 && cluster.z == 1) return cudaSuccess;
    if (!known_attribute(cudaDevAttrClusterLaunch))
        return set_error(cudaErrorInvalidConfiguration, "this device has no clusters");
    if (static_cast<uint64_t>(cluster.x) * cluster.y * cluster.z > CLUSTER_MOST ||
        cluster.x == 0 || cluster.y == 0 || cluster.z == 0 || grid.x % cluster.x ||
        grid.y % cluster.y || grid.z % cluster.z)
        return set_error(cudaErrorInvalidConfiguration,
                         "clusters of %u x %u x %u in a grid of %u x %u x %u blocks", cluster.x,
                         cluster.y, cluster.z, grid.x, grid.y, grid.z);
    return cudaSuccess;
}

/* Threads that this machine has had before keep their stacks. */
static bool set_up_threads(Machine &m, const dim3 &block)
{
    m.thread_count = block.x * block.y * block.z;
    m.warp_count = (m.thread_count + 31) / 32;
    for (unsigned i = 0; i < m.thread_count; i++) {
        if (i == m.threads.size()) {
            m.threads.push_back(std::make_unique<Thread>());
            if (!m.threads.back()->fiber.allocate_stack()) {
                m.threads.pop_back();
                return false;
            }
        }
        Thread &t = *m.threads[i];
        t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        t.linear = i;
        t.warp = i / 32;
        t.lane = i % 32;
    }
    for (unsigned w = 0; w < m.warp_count; w++) {
        unsigned lanes = min(32u, m.thread_count - 32 * w);
        m.warps[w].lanes = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        m.warps[w].ready = 0;
        m.warps[w].clocks.fresh = false;
    }
    return true;
}

/* A grid's clusters as one number each, in the order in which they run. */
static std::vector<uint64_t> order_of_clusters(Machine &m, const dim3 &all)
{
    std::vector<uint64_t> order(static_cast<uint64_t>(all.x) * all.y * all.z);
    for (uint64_t i = 0; i < order.size(); i++)
        order[i] = m.schedule.order == Order::lifo ? order.size() - 1 - i : i;
    if (m.schedule.order == Order::random || m.schedule.order == Order::priority)
        m.random.shuffle(order.data(), static_cast<unsigned>(order.size()));
    return order;
}

static void run_clusters(Cluster &cluster, const dim3 &grid, const dim3 &shape)
{
    const dim3 all(grid.x / shape.x, grid.y / shape.y, grid.z / shape.z);
    for (uint64_t i : order_of_clusters(*cluster.blocks[0], all)) {
        uint3 first = {static_cast<unsigned>(i % all.x) * shape.x,
                       static_cast<unsigned>(i / all.x % all.y) * shape.y,
                       static_cast<unsigned>(i / all.x / all.y) * shape.z};
        run_cluster(cluster, first, shape);
        for (unsigned rank = 0; rank < cluster.size; rank++)
            if (cluster.blocks[rank]->failed) return;
    }
}

static void add_counts(const hqqlora_emulated_counts &counts)
{
    blocks += counts.blocks;
    switches += counts.switches;
    mma += counts.mma;
    clusters += counts.clusters;
}

/* One a host thread, freed with it: its stacks are worth keeping from launch to launch. */
static Cluster &cluster_of_this_thread(unsigned size)
{
    static thread_local Cluster kept;
    while (kept.blocks.size() < size) kept.blocks.push_back(std::make_unique<Machine>());
    kept.size = size;
    return kept;
}

cudaError_t launch(const cudaLaunchConfig_t &config, const dim3 &shape, const void *kernel,
                   void (*body)(void *), void *arguments)
{
    cudaError_t error = check_configuration(config, kernel);
    if (error == cudaSuccess) error = check_cluster(shape, config.gridDim);
    if (error != cudaSuccess) return error;
    Cluster &cluster = cluster_of_this_thread(shape.x * shape.y * shape.z);
    const size_t usual =
        static_cast<size_t>(known_attribute(cudaDevAttrMaxSharedMemoryPerBlock));
    const size_t optin =
        static_cast<size_t>(known_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    const size_t most = allowed_dynamic_shared(kernel) > usual ? optin : usual;
    for (unsigned rank = 0; rank < cluster.size; rank++)
        if (!set_up_threads(*cluster.blocks[rank], config.blockDim))
            return set_error(cudaErrorLaunchFailure, "no memory for the stacks of %u threads",
                             cluster.blocks[rank]->thread_count);
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    for (unsigned rank = 0; rank < cluster.size; rank++) {
        Machine &m = *cluster.blocks[rank];
        m.schedule = current_schedule();
        m.random = Random(m.schedule.seed + rank);
        m.cluster = &cluster;
        m.body = body;
        m.arguments = arguments;
        m.failed = false;
        m.error[0] = '\0';
        m.counts = {};
        m.host.adopt_this_thread();
        machine = &m;
        m.shared.start_launch(config.dynamicSmemBytes, usual, most);
    }
    run_clusters(cluster, config.gridDim, shape);
    error = cudaSuccess;
    launches++;
    for (unsigned rank = 0; rank < cluster.size; rank++) {
        Machine &m = *cluster.blocks[rank];
        m.shared.end_launch();
        add_counts(m.counts);
        if (m.failed) error = set_error(cudaErrorLaunchFailure, "%s", m.error);
    }
    machine = nullptr;
    return error;
}
} // namespace on_cpu

void hqqlora_emulated_get_counts(hqqlora_emulated_counts *counts)
{
    *counts = {on_cpu::launches, on_cpu::blocks, on_cpu::switches, on_cpu::mma,
               on_cpu::clusters};
}

int hqqlora_emulated_checks_races(void)
{
    return on_cpu::races_are_checked;
}

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
ON_CPU_THREAD_LOCAL const Position *self = nullptr;
ON_CPU_THREAD_LOCAL Machine *machine = nullptr;

static std::atomic<uint64_t> launches{0}, blocks{0}, switches{0}, mma{0};

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

/* gridDim's blocks as one number each, in the order in which they run. */
static std::vector<uint64_t> order_of_blocks(Machine &m, const dim3 &grid)
{
    std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
    for (uint64_t i = 0; i < order.size(); i++)
        order[i] = m.schedule.order == Order::lifo ? order.size() - 1 - i : i;
    if (m.schedule.order == Order::random || m.schedule.order == Order::priority)
        m.random.shuffle(order.data(), static_cast<unsigned>(order.size()));
    return order;
}

static void run_blocks(Machine &m, const dim3 &grid)
{
    for (uint64_t i : order_of_blocks(m, grid)) {
        blockIdx = {static_cast<unsigned>(i % grid.x),
                    static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        run_block();
        if (m.failed) break;
    }
}

static void add_counts(const hqqlora_emulated_counts &counts)
{
    launches++;
    blocks += counts.blocks;
    switches += counts.switches;
    mma += counts.mma;
}

/* One a host thread, freed with it: its stacks are worth keeping from launch to launch. */
static Machine &machine_of_this_thread()
{
    static thread_local std::unique_ptr<Machine> kept;
    if (!kept) kept = std::make_unique<Machine>();
    return *kept;
}

cudaError_t launch(const cudaLaunchConfig_t &config, const void *kernel, void (*body)(void *),
                   void *arguments)
{
    cudaError_t error = check_configuration(config, kernel);
    if (error != cudaSuccess) return error;
    Machine &m = machine_of_this_thread();
    if (!set_up_threads(m, config.blockDim))
        return set_error(cudaErrorLaunchFailure, "no memory for the stacks of %u threads",
                         m.thread_count);
    m.schedule = current_schedule();
    m.random = Random(m.schedule.seed);
    m.body = body;
    m.arguments = arguments;
    m.failed = false;
    m.error[0] = '\0';
    m.counts = {};
    m.host.adopt_this_thread();
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    size_t usual = static_cast<size_t>(known_attribute(cudaDevAttrMaxSharedMemoryPerBlock));
    size_t optin =
        static_cast<size_t>(known_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    machine = &m;
    m.shared.start_launch(config.dynamicSmemBytes, usual,
                          allowed_dynamic_shared(kernel) > usual ? optin : usual);
    run_blocks(m, config.gridDim);
    m.shared.end_launch();
    machine = nullptr;
    add_counts(m.counts);
    return m.failed ? set_error(cudaErrorLaunchFailure, "%s", m.error) : cudaSuccess;
}
} // namespace on_cpu

void hqqlora_emulated_get_counts(hqqlora_emulated_counts *counts)
{
    *counts = {on_cpu::launches, on_cpu::blocks, on_cpu::switches, on_cpu::mma};
}

int hqqlora_emulated_checks_races(void)
{
    return on_cpu::races_are_checked;
}

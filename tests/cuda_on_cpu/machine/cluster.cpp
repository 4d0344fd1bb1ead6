/* The blocks of a cluster: their turns, their barrier, and what they read of each other. */
#include "machine.h"
#include "../ptx_on_cpu.h"

namespace on_cpu
{
unsigned Machine::rank() const
{
    unsigned rank = 0;
    while (cluster->blocks[rank].get() != this) rank++;
    return rank;
}

/* The ranks in the order in which their blocks run to the cluster's next barrier. */
static std::vector<unsigned> order_of_ranks(Cluster &cluster)
{
    Machine &m = *cluster.blocks[0];
    std::vector<unsigned> order(cluster.size);
    for (unsigned i = 0; i < cluster.size; i++)
        order[i] = m.schedule.order == Order::lifo ? cluster.size - 1 - i : i;
    if (cluster.size > 1 &&
        (m.schedule.order == Order::random || m.schedule.order == Order::priority))
        m.random.shuffle(order.data(), cluster.size);
    return order;
}

static void enter(Cluster &cluster, unsigned rank)
{
    machine = cluster.blocks[rank].get();
    blockIdx = machine->block;
}

/* Every block that has not returned waits at the barrier: they all go on. */
static void release(Cluster &cluster)
{
    cluster.phase++;
    for (unsigned rank = 0; rank < cluster.size; rank++) {
        enter(cluster, rank);
        if (!machine->running) continue;
        machine->races.pass_cluster_barrier();
        deal_ranks();
        for (unsigned i = 0; i < machine->thread_count; i++) {
            machine->threads[i]->arrived = false;
            make_ready(machine->threads[i].get());
        }
    }
}

void run_cluster(Cluster &cluster, const uint3 &first, const dim3 &shape)
{
    cluster.phase = 1;
    cluster.blocks[0]->counts.clusters += cluster.size > 1;
    for (unsigned rank = 0; rank < cluster.size; rank++) {
        Machine &m = *cluster.blocks[rank];
        m.block = {first.x + rank % shape.x, first.y + rank / shape.x % shape.y,
                   first.z + rank / shape.x / shape.y};
        m.read_in = 0;
        enter(cluster, rank);
        start_block();
    }
    for (;;) {
        bool some_wait = false;
        for (unsigned rank : order_of_ranks(cluster)) {
            enter(cluster, rank);
            if (!machine->running) continue;
            run_block();
            if (machine->failed) return;
            some_wait |= machine->running > 0;
        }
        if (!some_wait) return;
        release(cluster);
    }
}

void leave_block()
{
    if (machine->read_in == machine->cluster->phase)
        fail("returned, but no cluster barrier follows another block's reads of its shared "
             "memory");
}

void cluster_arrive(Site site)
{
    Thread *me = this_thread();
    if (me->arrived)
        fail("%s:%d: arrives at the cluster's barrier twice", base_name(site.file), site.line);
    me->arrived = true;
}

void cluster_wait(Site site)
{
    Thread *me = this_thread();
    if (!me->arrived)
        fail("%s:%d: waits for the cluster's barrier, but has not arrived at it",
             base_name(site.file), site.line);
    me->site = site;
    me->state = State::at_cluster_barrier;
    wait_for_turn();
}

const void *cluster_read(const void *own, unsigned rank, size_t bytes, Site site)
{
    const char *file = base_name(site.file);
    Cluster &cluster = *machine->cluster;
    if (reinterpret_cast<uintptr_t>(own) % bytes != 0)
        fail("%s:%d: a load from %p: not a multiple of %zu", file, site.line, own, bytes);
    Region *here = machine->shared.find(own, bytes);
    if (!here) fail("%s:%d: %p is not %zu bytes of shared memory", file, site.line, own, bytes);
    if (rank >= cluster.size)
        fail("%s:%d: block %u of a cluster of %u", file, site.line, rank, cluster.size);
    if (cluster.phase == 1)
        fail("%s:%d: before the first cluster barrier block %u may not have begun", file,
             site.line, rank);
    Machine &other = *cluster.blocks[rank];
    if (!other.running) fail("%s:%d: block %u has returned", file, site.line, rank);
    Region *there = other.shared.find_same(*here);
    if (!there) fail("%s:%d: block %u has no %s yet", file, site.line, rank, here->name);
    this_thread()->site = site;
    other.read_in = cluster.phase;
    size_t offset = static_cast<size_t>(static_cast<const char *>(own) - here->data);
    if (races_are_checked) other.races.read_by_other_block(*there, offset, bytes, rank);
    return there->data + offset;
}
} // namespace on_cpu

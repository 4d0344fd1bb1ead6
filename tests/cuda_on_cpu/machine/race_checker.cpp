#include "machine.h"

#include <string.h>

namespace on_cpu
{
bool races_are_checked = false;

void LaneClocks::reset()
{
    memset(seen, 0, sizeof seen);
    for (unsigned lane = 0; lane < 32; lane++) seen[lane][lane] = 1;
    fresh = true;
}

void RaceChecker::reset_clocks()
{
    for (unsigned w = 0; w < machine->warp_count; w++)
        if (!machine->warps[w].clocks.fresh) machine->warps[w].clocks.reset();
}

void RaceChecker::start_block()
{
    if (!races_are_checked) return;
    epoch++; /* histories outlive the block: older epochs mean nothing */
    cluster_epoch = epoch;
    reset_clocks();
}

void RaceChecker::pass_barrier()
{
    if (!races_are_checked) return;
    epoch++;
    reset_clocks();
}

void RaceChecker::pass_cluster_barrier()
{
    pass_barrier();
    cluster_epoch = epoch;
}

void RaceChecker::sync_lanes(LaneClocks &clocks, unsigned mask)
{
    if (!races_are_checked) return;
    clocks.fresh = false;
    uint32_t joined[32] = {};
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        for (unsigned other = 0; other < 32; other++)
            joined[other] = max(joined[other], clocks.seen[lane][other]);
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        memcpy(clocks.seen[lane], joined, sizeof joined);
        clocks.seen[lane][lane]++;
    }
}

/* Whether an access of this block happened before what `now` does next. */
bool RaceChecker::ordered(const Access &earlier, const Thread *now) const
{
    if (earlier.epoch != epoch || earlier.thread == now->linear) return true;
    if (earlier.thread / 32 != now->warp) return false;
    const LaneClocks &clocks = machine->warps[now->warp].clocks;
    return clocks.seen[now->lane][earlier.thread % 32] >= earlier.clock;
}

const Access *RaceChecker::unordered(const Recent &earlier, const Thread *now) const
{
    for (const auto &warp : earlier.by)
        for (const Access &access : warp)
            if (!ordered(access, now)) return &access;
    return nullptr;
}

Access RaceChecker::access_of(const Thread *thread) const
{
    uint32_t own = machine->warps[thread->warp].clocks.seen[thread->lane][thread->lane];
    return {epoch, thread->linear & 1023, own & 0x1fffff, 0};
}

void Recent::add(const Access &access)
{
    auto same_warp = [&access](const Access &other) {
        return other.epoch == access.epoch && other.thread / 32 == access.thread / 32;
    };
    if (!same_warp(by[0][0])) { /* this warp comes first, the first second */
        Access mine[2] = {};
        if (same_warp(by[1][0])) memcpy(mine, by[1], sizeof mine);
        memcpy(by[1], by[0], sizeof mine);
        memcpy(by[0], mine, sizeof mine);
    }
    if (by[0][0].thread != access.thread) by[0][1] = by[0][0];
    by[0][0] = access;
}

void RaceChecker::check(const ByteHistory &byte, const Thread *thread, Touch kind,
                        const Region &region, size_t offset, const void *pc) const
{
    if (byte.write.in_flight)
        fail_race(thread, kind, byte.write.thread, "has a cp.async to it under way", region,
                  offset, pc);
    if (!ordered(byte.write, thread))
        fail_race(thread, kind, byte.write.thread, "wrote it", region, offset, pc);
    if (const Access *atomic =
            kind == Touch::atomic ? nullptr : unordered(byte.atomics, thread))
        fail_race(thread, kind, atomic->thread, "updated it", region, offset, pc);
    if (const Access *read = kind == Touch::read ? nullptr : unordered(byte.reads, thread))
        fail_race(thread, kind, read->thread, "read it", region, offset, pc);
    if (kind != Touch::read && byte.read_by_other && byte.read_by_other >= cluster_epoch)
        fail_cluster_race("writes, after another block's read,", region, offset,
                          machine->rank());
}

void RaceChecker::touch(const Thread *thread, const void *address, size_t bytes, Touch kind,
                        const void *pc)
{
    Region *region = machine->shared.find(address, bytes);
    if (!region || region->history.empty()) return;
    size_t begin = static_cast<size_t>(static_cast<const char *>(address) - region->data);
    for (size_t i = begin; i < begin + bytes; i++) {
        ByteHistory &byte = region->history[i];
        check(byte, thread, kind, *region, i, pc);
        switch (kind) {
        case Touch::read: byte.reads.add(access_of(thread)); break;
        case Touch::write: byte.write = access_of(thread); break;
        case Touch::atomic: byte.atomics.add(access_of(thread)); break;
        }
    }
}

void RaceChecker::read_as(const Thread *thread, const void *address, size_t bytes)
{
    if (races_are_checked) touch(thread, address, bytes, Touch::read, nullptr);
}

void RaceChecker::start_copy(const void *address, size_t bytes, Site site)
{
    if (!races_are_checked) return;
    this_thread()->site = site;
    touch(this_thread(), address, bytes, Touch::write, nullptr);
    Region *region = machine->shared.find(address, bytes);
    ByteHistory *byte =
        &region
             ->history[static_cast<size_t>(static_cast<const char *>(address) - region->data)];
    for (size_t i = 0; i < bytes; i++) byte[i].write.in_flight = 1;
}

void RaceChecker::read_by_other_block(Region &region, size_t offset, size_t bytes,
                                      unsigned rank)
{
    for (size_t i = offset; i < offset + bytes; i++) {
        ByteHistory &byte = region.history[i];
        if (byte.write.in_flight || byte.write.epoch >= cluster_epoch)
            fail_cluster_race("reads, after that block's own write,", region, i, rank);
        byte.read_by_other = epoch;
    }
}

void RaceChecker::finish_copy(const void *address, size_t bytes)
{
    if (!races_are_checked) return;
    Region *region = machine->shared.find(address, bytes);
    ByteHistory *byte =
        &region
             ->history[static_cast<size_t>(static_cast<const char *>(address) - region->data)];
    for (size_t i = 0; i < bytes; i++) byte[i].write = access_of(this_thread());
}

void atomic_access(const void *address, size_t bytes, Site site)
{
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
        fail("%s:%d: atomic on %p: not a multiple of %zu", base_name(site.file), site.line,
             address, bytes);
    if (!races_are_checked) return;
    this_thread()->site = site;
    machine->races.touch(this_thread(), address, bytes, Touch::atomic, nullptr);
}
} // namespace on_cpu

#include "machine.h"

namespace on_cpu
{
/* The gathering for that mask that this warp has open, or a new one. */
static Gathering &gathering_of(Warp &warp, Collective kind, unsigned mask, Site site)
{
    for (Gathering &g : warp.gatherings) {
        if (g.mask != mask) continue;
        if (g.kind == kind && g.site.line == site.line && g.site.file == site.file) return g;
        fail("warp operations do not match: lane %u is at %s:%d, others of mask %08x at %s:%d",
             self->lane, base_name(site.file), site.line, mask, base_name(g.site.file),
             g.site.line);
    }
    warp.gatherings.emplace_back();
    Gathering &g = warp.gatherings.back();
    g.mask = mask;
    g.arrived = 0;
    g.kind = kind;
    g.site = site;
    return g;
}

static void check_mask(const Warp &warp, Collective kind, unsigned mask, Site site)
{
    if (!(mask >> self->lane & 1))
        fail("%s:%d: the calling lane %u is not in its mask %08x", base_name(site.file),
             site.line, self->lane, mask);
    bool whole_warp = kind == Collective::ldmatrix || kind == Collective::mma ||
                      kind == Collective::warpgroup;
    if (whole_warp && warp.lanes != 0xffffffffu)
        fail("%s:%d: ldmatrix, mma and wgmma need a whole warp; this one has lanes %08x",
             base_name(site.file), site.line, warp.lanes);
}

/* Computes for all lanes of a complete gathering, closes it and lets the other lanes run. */
static void complete(Warp &warp, Gathering &g, Execute execute)
{
    Thread *me = this_thread();
    if (execute) execute(g.slots, g.mask);
    if (g.kind == Collective::syncwarp) machine->races.sync_lanes(warp.clocks, g.mask);
    unsigned others = g.mask & ~(1u << me->lane);
    g = warp.gatherings.back();
    warp.gatherings.pop_back();
    end_turn_of(warp);
    for (; others; others &= others - 1) {
        unsigned lane = static_cast<unsigned>(__builtin_ctz(others));
        make_ready(machine->threads[me->warp * 32 + lane].get());
    }
}

void collective(Collective kind, unsigned mask, void *slot, Execute execute, Site site)
{
    Thread *me = this_thread();
    Warp &warp = this_warp();
    mask &= warp.lanes; /* as the device does with lanes that do not exist */
    check_mask(warp, kind, mask, site);
    Gathering &g = gathering_of(warp, kind, mask, site);
    g.slots[me->lane] = slot;
    g.arrived |= 1u << me->lane;
    me->site = site;
    if (g.arrived != mask) {
        me->mask = mask;
        me->state = State::at_collective;
        wait_for_turn();
        return;
    }
    complete(warp, g, execute);
    if (machine->schedule.order == Order::random) { /* whoever came last need not go on first */
        make_ready(me);
        wait_for_turn();
    }
}

void fail_shuffle_source(unsigned lane, unsigned source, unsigned mask)
{
    fail("%s:%d: lane %u reads lane %u, which is not in mask %08x",
         base_name(this_thread()->site.file), this_thread()->site.line, lane, source, mask);
}
} // namespace on_cpu

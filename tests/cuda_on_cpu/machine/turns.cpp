/* Whose turn it is. Warps and lanes are bits of two words, so that a turn costs a few
 * instructions besides the switch itself. */
#include "machine.h"

#include <stdlib.h>

namespace on_cpu
{
static unsigned lowest(unsigned bits)
{
    return static_cast<unsigned>(__builtin_ctz(bits));
}

static unsigned highest(unsigned bits)
{
    return 31 - static_cast<unsigned>(__builtin_clz(bits));
}

static unsigned any(unsigned bits, Random &random)
{
    unsigned skip = random.below(static_cast<unsigned>(__builtin_popcount(bits)));
    while (skip--) bits &= bits - 1;
    return lowest(bits);
}

/* The first at or after `start`, else the first of all. */
static unsigned next_round(unsigned bits, unsigned start)
{
    unsigned later = bits & ~0u << start;
    return lowest(later ? later : bits);
}

void deal_ranks()
{
    Machine &m = *machine;
    unsigned *warp_of_rank = m.turns.warp_of_rank;
    for (unsigned rank = 0; rank < m.warp_count; rank++)
        warp_of_rank[rank] = m.schedule.order == Order::lifo ? m.warp_count - 1 - rank : rank;
    if (m.schedule.order == Order::priority) m.random.shuffle(warp_of_rank, m.warp_count);
    for (unsigned rank = 0; rank < m.warp_count; rank++)
        m.warps[warp_of_rank[rank]].rank = rank;
    m.turns.ready = 0;
    m.turns.current_rank = 0;
}

void make_ready(Thread *thread)
{
    thread->state = State::ready;
    Warp &warp = machine->warps[thread->warp];
    warp.ready |= 1u << thread->lane;
    machine->turns.ready |= 1u << warp.rank;
}

void end_turn_of(const Warp &warp)
{
    machine->turns.current_rank = (warp.rank + 1) % MAX_WARPS;
}

/* Removes the next thread from the ready ones; NULL: there is none. */
static Thread *pick()
{
    Machine &m = *machine;
    Turns &turns = m.turns;
    if (!turns.ready) return nullptr;
    switch (m.schedule.order) {
    case Order::fifo: turns.current_rank = next_round(turns.ready, turns.current_rank); break;
    case Order::random: turns.current_rank = any(turns.ready, m.random); break;
    default: turns.current_rank = lowest(turns.ready);
    }
    unsigned w = turns.warp_of_rank[turns.current_rank];
    Warp &warp = m.warps[w];
    unsigned lane;
    switch (m.schedule.order) {
    case Order::fifo: lane = lowest(warp.ready); break;
    case Order::lifo: lane = highest(warp.ready); break;
    default: lane = any(warp.ready, m.random);
    }
    warp.ready &= ~(1u << lane);
    if (!warp.ready) turns.ready &= ~(1u << turns.current_rank);
    return m.threads[w * 32 + lane].get();
}

static void switch_to(Fiber &from, Thread *to, Leaving leaving)
{
    self = to;
    machine->counts.switches++;
    switch_fiber(from, to->fiber, leaving);
}

/* From a thread that cannot go on. */
static void give_way(Thread *me, Leaving leaving)
{
    Thread *next = pick();
    if (!next && machine->running && !waits_for_cluster()) {
        release_barrier();
        next = pick();
    }
    if (next) {
        if (next != me) switch_to(me->fiber, next, leaving);
    } else {
        self = nullptr;
        switch_fiber(me->fiber, machine->host, leaving);
    }
}

void wait_for_turn()
{
    give_way(this_thread(), Leaving::for_now);
}

void end_launch()
{
    Machine &m = *machine;
    m.failed = true;
    Thread *me = this_thread();
    self = nullptr;
    switch_fiber(me->fiber, m.host, Leaving::for_good);
    abort();
}

/* The whole life of a CUDA thread. */
static void run_thread()
{
    fiber_entered();
    machine->body(machine->arguments);
    Thread *me = this_thread();
    me->copies.require_none();
    me->products.require_none();
    if (me->arrived) fail("returned, but never waited for the cluster's barrier");
    if (machine->running == 1) leave_block();
    me->state = State::returned;
    machine->running--;
    give_way(me, Leaving::for_good);
    abort();
}

void start_block()
{
    Machine &m = *machine;
    m.counts.blocks++;
    m.running = m.thread_count;
    m.shared.poison();
    m.races.start_block();
    deal_ranks();
    for (unsigned w = 0; w < m.warp_count; w++) m.warps[w].gatherings.clear();
    for (unsigned i = 0; i < m.thread_count; i++) {
        Thread *thread = m.threads[i].get();
        thread->site = {"", 0};
        thread->copies.clear();
        thread->products.clear();
        thread->arrived = false;
        thread->fiber.prepare(run_thread, i);
        make_ready(thread);
    }
}

void run_block()
{
    switch_to(machine->host, pick(), Leaving::for_now);
}
} // namespace on_cpu

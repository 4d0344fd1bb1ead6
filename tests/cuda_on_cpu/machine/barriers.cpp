#include "machine.h"

namespace on_cpu
{
unsigned block_barrier(bool predicate, Site site)
{
    Thread *me = this_thread();
    me->site = site;
    me->predicate = predicate;
    me->state = State::at_barrier;
    wait_for_turn();
    return machine->barrier_result;
}

static bool same_line(const Site &a, const Site &b)
{
    return a.line == b.line && a.file == b.file;
}

/* All threads of the block, none returned, wait at one line. */
static bool whole_block_waits(State state)
{
    const Machine &m = *machine;
    for (unsigned i = 0; i < m.thread_count; i++) {
        const Thread &t = *m.threads[i];
        if (t.state != state || !same_line(t.site, m.threads[0]->site)) return false;
    }
    return true;
}

bool waits_for_cluster()
{
    return whole_block_waits(State::at_cluster_barrier);
}

static bool same_standstill(const Thread &a, const Thread &b)
{
    if (a.state != b.state) return false;
    if (a.state == State::returned) return true;
    return same_line(a.site, b.site) &&
           (a.state != State::at_collective || (a.mask == b.mask && a.warp == b.warp));
}

static void append_standstill(const Thread &t)
{
    switch (t.state) {
    case State::returned: append_error("returned"); break;
    case State::at_barrier:
        append_error("at the barrier of %s:%d", base_name(t.site.file), t.site.line);
        break;
    case State::at_cluster_barrier:
        append_error("at the cluster's barrier of %s:%d", base_name(t.site.file), t.site.line);
        break;
    default:
        append_error("at the warp operation of %s:%d, mask %08x", base_name(t.site.file),
                     t.site.line, t.mask);
    }
}

/* Nobody can go on: says where everybody stands, neighbours in the same place together. */
[[noreturn]] static void fail_standstill()
{
    const Machine &m = *machine;
    bool collective_waits = false;
    for (unsigned i = 0; i < m.thread_count; i++)
        collective_waits |= m.threads[i]->state == State::at_collective;
    append_error(collective_waits ? "deadlock, or masks that do not match:"
                                  : "divergent barrier, or a return before it:");
    int places = 0;
    for (unsigned first = 0, end; first < m.thread_count; first = end) {
        const Thread &t = *m.threads[first];
        for (end = first + 1; end < m.thread_count; end++)
            if (!same_standstill(t, *m.threads[end])) break;
        if (++places > 4) {
            append_error("; and so on");
            break;
        }
        const char *before = first ? ";" : "";
        if (end - first == 1)
            append_error("%s thread %u ", before, first);
        else
            append_error("%s threads %u-%u ", before, first, end - 1);
        append_standstill(t);
    }
    end_launch();
}

void release_barrier()
{
    Machine &m = *machine;
    if (!whole_block_waits(State::at_barrier)) fail_standstill();
    m.barrier_result = 0;
    m.races.pass_barrier();
    deal_ranks();
    for (unsigned i = 0; i < m.thread_count; i++) {
        m.barrier_result += m.threads[i]->predicate;
        make_ready(m.threads[i].get());
    }
}
} // namespace on_cpu

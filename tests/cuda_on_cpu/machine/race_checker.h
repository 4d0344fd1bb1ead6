/*
 * Data races in shared memory, byte by byte. Kernels compiled with -fsanitize=thread call
 * __tsan_read4 and the like before each access; race_checker.cpp defines those (libtsan is not
 * linked), and the emulated PTX and atomics report themselves.
 *
 * Two accesses of which one writes must be ordered:
 *   - a block barrier orders all that comes before it: it starts a new epoch;
 *   - __syncwarp orders the lanes of its mask: each lane knows, of each other lane of its warp,
 *     how many of that lane's syncs it has seen (a vector clock);
 *   - between cp.async and the wait for it nobody may touch the bytes, the thread itself
 * included. Shuffles, votes, ldmatrix and mma order nothing: CUDA promises no memory ordering
 * for them;
 *   - between blocks of a cluster only the cluster's barrier orders.
 */
#ifndef HQQ_CUDA_ON_CPU_RACE_CHECKER_H
#define HQQ_CUDA_ON_CPU_RACE_CHECKER_H

#include <stddef.h>
#include <stdint.h>

#include "../device/thread.h"

namespace on_cpu
{
struct Thread;
struct Region;

/* Whether any linked kernel was compiled for the checker. */
extern bool races_are_checked;

enum class Touch { read, write, atomic };

struct Access {
    uint32_t epoch; /* 0: never */
    uint32_t thread : 10;
    uint32_t clock : 21;    /* of the thread's own syncs, in this epoch */
    uint32_t in_flight : 1; /* a write by a cp.async not waited for */
};

/* The last accesses of two warps, of two lanes each, the most recent first. That is enough: a
 * later thread is of another warp than one of two, and another lane than one of two. */
struct Recent {
    Access by[2][2];
    void add(const Access &access);
};

struct ByteHistory {
    Access write;
    Recent reads, atomics;
    uint32_t read_by_other; /* the epoch of this block in which another of the cluster read */
};

struct LaneClocks {
    uint32_t seen[32][32]; /* [lane][other lane]; its own: the number of its current interval */
    bool fresh;            /* no sync since the last barrier */
    void reset();
};

class RaceChecker
{
  public:
    void start_block();
    void pass_barrier();
    void pass_cluster_barrier();
    void sync_lanes(LaneClocks &clocks, unsigned mask);

    void read_as(const Thread *thread, const void *address, size_t bytes);
    void start_copy(const void *address, size_t bytes, Site site);
    void finish_copy(const void *address, size_t bytes);
    /* The running thread, of another block, reads what this one has; rank: of this one. */
    void read_by_other_block(Region &region, size_t offset, size_t bytes, unsigned rank);
    /* pc: of the access, for addr2line; NULL: `thread` has just noted its site */
    void touch(const Thread *thread, const void *address, size_t bytes, Touch kind,
               const void *pc);

  private:
    void reset_clocks();
    bool ordered(const Access &earlier, const Thread *now) const;
    const Access *unordered(const Recent &earlier, const Thread *now) const; /* or NULL */
    Access access_of(const Thread *thread) const;
    void check(const ByteHistory &byte, const Thread *thread, Touch kind, const Region &region,
               size_t offset, const void *pc) const;

    uint32_t epoch = 0;
    uint32_t cluster_epoch = 0; /* the first since the cluster's last barrier */
};

/* Ends the launch: `thread` is about to touch a byte, and the thread numbered `other` did as
 * `other_did` says. */
[[noreturn]] void fail_race(const Thread *thread, Touch kind, unsigned other,
                            const char *other_did, const Region &region, size_t offset,
                            const void *pc);

/* The same between blocks of a cluster. */
[[noreturn]] void fail_cluster_race(const char *what, const Region &region, size_t offset,
                                    unsigned rank);
} // namespace on_cpu

#endif

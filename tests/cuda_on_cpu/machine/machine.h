/*
 * The machine that a host thread runs its launches on: one block at a time, each CUDA thread a
 * fiber. A fiber runs until it waits at a barrier (barriers.cpp) or for the other lanes of its
 * warp (warp.cpp), or returns; then the schedule picks the next (turns.cpp). Nothing else
 * interrupts it.
 *
 * The blocks of a cluster have a machine each, and take turns too: each runs until all of its
 * threads wait at the cluster's barrier, or have returned (cluster.cpp).
 */
#ifndef HQQ_CUDA_ON_CPU_MACHINE_H
#define HQQ_CUDA_ON_CPU_MACHINE_H

#include <memory>
#include <stdint.h>
#include <vector>

#include "../cuda_on_cpu.h"
#include "../control.h"
#include "copies.h"
#include "fiber.h"
#include "products.h"
#include "race_checker.h"
#include "schedule.h"
#include "shared_memory.h"

namespace on_cpu
{
enum { MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32 };

enum class State { ready, at_barrier, at_cluster_barrier, at_collective, returned };

struct Cluster;

struct Thread : Position {
    State state;
    Site site;                /* of the last barrier or collective; line 0: none yet */
    unsigned mask;            /* at_collective: of whom it waits for */
    bool predicate;           /* at_barrier */
    bool arrived;             /* at the cluster's barrier, for which it has not waited yet */
    PendingCopies copies;     /* cp.async */
    PendingProducts products; /* wgmma */
    Fiber fiber;
};

/* Lanes that gather for one collective. */
struct Gathering {
    unsigned mask, arrived;
    Collective kind;
    Site site;
    void *slots[32];
};

struct Warp {
    unsigned lanes;                    /* those that exist: 32 but for the block's last warp */
    unsigned ready;                    /* lanes that may run */
    unsigned rank;                     /* in Turns; also the bit of Turns::ready */
    std::vector<Gathering> gatherings; /* several when branches use disjoint masks */
    LaneClocks clocks;
};

/* Whose turn it is: the warps with ready lanes, by rank. The schedule deals the ranks. */
struct Turns {
    unsigned ready; /* bit rank */
    unsigned current_rank;
    unsigned warp_of_rank[MAX_WARPS];
};

struct Machine {
    Schedule schedule;
    Random random;

    unsigned thread_count, warp_count;
    unsigned running; /* threads that have not returned */
    unsigned barrier_result;
    std::vector<std::unique_ptr<Thread>> threads; /* kept from launch to launch */
    Warp warps[MAX_WARPS];
    Turns turns;
    Fiber host;

    uint3 block;      /* its blockIdx */
    Cluster *cluster; /* that it belongs to */
    uint32_t read_in; /* the phase in which another block last read its shared memory */

    SharedMemory shared;
    RaceChecker races;

    void (*body)(void *);
    void *arguments;
    bool failed;
    char error[400]; /* what ended the launch */
    hqqlora_emulated_counts counts;

    unsigned rank() const; /* in the cluster */
};

/* The blocks that run together; one, where the launch asks for no clusters. */
struct Cluster {
    std::vector<std::unique_ptr<Machine>> blocks; /* by rank; kept from launch to launch */
    unsigned size;
    uint32_t phase; /* 1, and one more for each of its barriers */
};

/* Of the block that runs on this host thread, else NULL. */
extern ON_CPU_THREAD_LOCAL Machine *machine;

inline Thread *this_thread()
{
    return static_cast<Thread *>(const_cast<Position *>(self));
}

inline Warp &this_warp()
{
    return machine->warps[self->warp];
}

/* turns.cpp */
void deal_ranks(); /* before a block, and at a barrier: nobody is ready then */
void make_ready(Thread *thread);
void end_turn_of(const Warp &warp); /* FIFO: another warp is next */
void wait_for_turn(); /* the caller has set its state; returns when it is picked again */
void start_block();   /* before its first turn */
void run_block();     /* to its end, the first failure or the cluster's barrier */

/* barriers.cpp: called when nobody is ready. Lets the whole block go on, or fails. */
void release_barrier();

/* Whether nobody can go on before the cluster's other blocks have come to its barrier. */
bool waits_for_cluster();

/* cluster.cpp: the blocks from `first` on, to the end or to the first failure. */
void run_cluster(Cluster &cluster, const uint3 &first, const dim3 &shape);
void leave_block(); /* called by the last thread that returns */

/* failure.cpp */
[[noreturn]] void end_launch(); /* after machine->error is written */
void append_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
} // namespace on_cpu

#endif

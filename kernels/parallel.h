/*
 * Small dynamic chunks over whatever parallel_for the caller lends.
 *
 * A parallel_for that cuts its range into one fixed part a thread stalls until the slowest
 * thread is done: 8 ms were seen where one core was busy with something else. So each part
 * that is started ignores its bounds and draws chunk numbers from one atomic counter until
 * none is left. The chunk, never the thread, decides what is computed: results do not depend
 * on the number of threads.
 */
#ifndef HQQ_KERNELS_PARALLEL_H
#define HQQ_KERNELS_PARALLEL_H

#include <stdatomic.h>

#include "hqqlora.h"

/* Works on chunk number `chunk`. `scratch` is this worker's own, of the size asked for, 64-byte
 * aligned, and reused from chunk to chunk. */
typedef hqq_status (*hqq_chunk_fn)(int64_t chunk, void *scratch, void *data);

/* Runs fn for every chunk in [0, chunks), each once, in any order and on any thread of
 * context->parallel_for (context NULL or without one: on this thread). Each worker allocates
 * scratch_bytes (0: none, scratch is NULL). The first failure stops the rest and is returned.
 */
hqq_status hqq_for_each_chunk(int64_t chunks, hqq_chunk_fn fn, void *data, size_t scratch_bytes,
                              const hqq_context *context);

/* The same where memory is what a chunk waits for: a worker draws neighbours, many at first and
 * fewer towards the end, so that what it fetches ahead at the end of a chunk is what it reads
 * next, and not what the other thread does. (4 bits, a two-core Zen 5, times as fast as chunk
 * by chunk, C calls, in two runs: forward at M = 1 and 4 1.07 to 1.21, of which a run with a
 * faster memory left 1.0; dgrad 1.0 to 1.1. At 64 tokens, which are multiplied in the caches,
 * .97.) */
hqq_status hqq_for_each_chunk_in_runs(int64_t chunks, hqq_chunk_fn fn, void *data,
                                      size_t scratch_bytes, const hqq_context *context);

/*
 * Stages: loops one after another in one call of parallel_for, where a barrier between two of
 * them, the end of one call and the start of the next, would leave threads idle. Their chunks
 * are drawn in the order of the stages:
 *
 *     stage      0: decode 0   1: multiply 0   2: decode 1   3: multiply 0   4: multiply 1 ...
 *     waits for                0               nothing       0               0 to 2
 *
 * A worker that has drawn a chunk whose stage waits for another waits until all chunks of that
 * one are done. They were all drawn before, by workers that wait for earlier chunks alone, so
 * there is always one that does not wait; a single worker never waits. What is put between a
 * stage and the one that waits for it (here half of `multiply 0`) is what threads do meanwhile.
 *
 * Measured on a two-core Zen 5, under torch and its autograd: the seven linear layers of a
 * SmolLM2-135M block, 1024 tokens in bf16, R = 16, forward and backward, with 5 to 9 loops a
 * call, and with one: 1 and 0.96 of the time. (Between C calls, where the
 * other thread never sleeps: 1 and 0.98 to 1.)
 */
typedef struct hqq_stage {
    hqq_chunk_fn fn;
    void *data;
    int64_t first, chunks;     /* chunk numbers [first, first + chunks) */
    int after;                 /* begins when stages [0, after) are done */
    atomic_int_least64_t done; /* chunks; of hqq_run_stages */
} hqq_stage;

/* Begins as {0}. Failures to add are kept, and returned by hqq_run_stages. */
typedef struct hqq_stages {
    hqq_stage *list; /* NULL: none yet */
    int count, room;
    size_t scratch_bytes; /* the most that a stage asks for */
    hqq_status status;
} hqq_stages;

/* Adds a stage that begins when the first `after` are done, 0 <= after <= their number now. */
void hqq_add_stage(hqq_stages *stages, hqq_chunk_fn fn, void *data, int64_t first,
                   int64_t chunks, size_t scratch_bytes, int after);

/* Runs all of them as hqq_for_each_chunk does, and forgets them. */
hqq_status hqq_run_stages(hqq_stages *stages, const hqq_context *context);

#endif

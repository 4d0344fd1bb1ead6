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

#endif

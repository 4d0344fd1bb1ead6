#include "parallel.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "integers.h"
#include "status.h"

typedef struct chunk_loop {
    hqq_stage *stages;
    int64_t chunks; /* of all stages */
    size_t scratch_bytes;
    int in_runs; /* draw several at a time */
    atomic_int_least64_t next;
    atomic_int status; /* the first failure */
} chunk_loop;

static int failed(chunk_loop *loop)
{
    return atomic_load(&loop->status) != HQQ_OK;
}

/* A hint that the other thread of a core may go first. */
static void wait_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Waits are short, where there are as many processors as threads; where not, the one that is
 * waited for may need this one. */
#define TRIES_ALONE 4000

/* Until the stages [begin, end) are done. Returns whether they are: not after a failure. */
static int wait_for(chunk_loop *loop, int begin, int end)
{
    for (int s = begin; s < end; s++) {
        hqq_stage *stage = &loop->stages[s];
        int tries = 0;
        while (atomic_load_explicit(&stage->done, memory_order_acquire) < stage->chunks) {
            if (failed(loop)) return 0;
            if (tries < TRIES_ALONE) {
                tries++;
                wait_briefly();
            } else {
                sched_yield();
            }
        }
    }
    return 1;
}

/* A worker's next chunks, [begin, end). */
typedef struct chunk_run {
    int64_t begin, end;
} chunk_run;

/* In runs: half of a worker's share of what is left, as guided loops of OpenMP take it. Where
 * the last are drawn, one by one, the slower thread is one chunk late at most. */
static chunk_run draw(chunk_loop *loop, int64_t workers)
{
    if (!loop->in_runs) {
        int64_t next = atomic_fetch_add(&loop->next, 1);
        return (chunk_run){next, next + 1};
    }
    chunk_run run = {.begin = atomic_load(&loop->next)};
    do {
        int64_t count = (loop->chunks - run.begin) / (2 * workers);
        run.end = run.begin + (count > 1 ? count : 1);
    } while (run.begin < loop->chunks &&
             !atomic_compare_exchange_weak(&loop->next, &run.begin, run.end));
    return run;
}

/* parallel_for has cut the chunks into parts, of which [begin, end) is one: as many as there
 * are workers. */
static void work(int64_t begin, int64_t end, void *data)
{
    chunk_loop *loop = data;
    int64_t workers = end > begin ? hqq_ceil_div(loop->chunks, end - begin) : 1;
    chunk_run run = draw(loop, workers);
    if (run.begin >= loop->chunks) return;
    void *scratch = NULL;
    if (loop->scratch_bytes) {
        scratch = aligned_alloc(64, (loop->scratch_bytes + 63) / 64 * 64);
        if (!scratch) {
            atomic_store(&loop->status, HQQ_NO_MEMORY);
            return;
        }
    }
    hqq_stage *stage = loop->stages; /* that of `chunk`, whose first is number `before` */
    int64_t before = 0;
    int done = 0; /* stages known to be */
    for (int64_t chunk = run.begin; chunk < loop->chunks; chunk = run.begin) {
        for (; chunk - before >= stage->chunks; stage++) before += stage->chunks;
        if (stage->after > done) {
            if (!wait_for(loop, done, stage->after)) break;
            done = stage->after;
        }
        if (failed(loop)) break;
        hqq_status status = stage->fn(stage->first + chunk - before, scratch, stage->data);
        if (status != HQQ_OK) atomic_store(&loop->status, (int)status);
        atomic_fetch_add_explicit(&stage->done, 1, memory_order_release);
        if (++run.begin == run.end) run = draw(loop, workers);
    }
    free(scratch);
}

static hqq_status run_loop(hqq_stage *stages, int count, size_t scratch_bytes, int in_runs,
                           const hqq_context *context)
{
    chunk_loop loop = {.stages = stages, .scratch_bytes = scratch_bytes, .in_runs = in_runs};
    for (int s = 0; s < count; s++) {
        atomic_init(&stages[s].done, 0);
        loop.chunks += stages[s].chunks;
    }
    atomic_init(&loop.next, 0);
    atomic_init(&loop.status, HQQ_OK);
    if (loop.chunks <= 0) return HQQ_OK;
    if (loop.chunks == 1 || !context || !context->parallel_for) {
        work(0, loop.chunks, &loop);
    } else if (context->parallel_for(0, loop.chunks, 1, work, &loop) != 0) {
        return hqq_fail(HQQ_CALLBACK, "parallel_for failed on a range of %lld chunks",
                        (long long)loop.chunks);
    }
    hqq_status status = (hqq_status)atomic_load(&loop.status);
    if (status == HQQ_NO_MEMORY)
        return hqq_fail(status, "could not allocate %zu bytes of scratch", scratch_bytes);
    return status;
}

hqq_status hqq_for_each_chunk(int64_t chunks, hqq_chunk_fn fn, void *data, size_t scratch_bytes,
                              const hqq_context *context)
{
    hqq_stage only = {.fn = fn, .data = data, .chunks = chunks};
    return run_loop(&only, 1, scratch_bytes, 0, context);
}

hqq_status hqq_for_each_chunk_in_runs(int64_t chunks, hqq_chunk_fn fn, void *data,
                                      size_t scratch_bytes, const hqq_context *context)
{
    hqq_stage only = {.fn = fn, .data = data, .chunks = chunks};
    return run_loop(&only, 1, scratch_bytes, 1, context);
}

void hqq_add_stage(hqq_stages *stages, hqq_chunk_fn fn, void *data, int64_t first,
                   int64_t chunks, size_t scratch_bytes, int after)
{
    if (chunks <= 0) return;
    if (stages->count == stages->room) {
        int room = stages->room ? 2 * stages->room : 16;
        hqq_stage *larger = malloc((size_t)room * sizeof *larger);
        if (!larger) {
            stages->status = HQQ_NO_MEMORY;
            return;
        }
        if (stages->count) memcpy(larger, stages->list, (size_t)stages->count * sizeof *larger);
        free(stages->list);
        stages->list = larger;
        stages->room = room;
    }
    hqq_stage *stage = &stages->list[stages->count++];
    stage->fn = fn;
    stage->data = data;
    stage->first = first;
    stage->chunks = chunks;
    stage->after = after;
    if (scratch_bytes > stages->scratch_bytes) stages->scratch_bytes = scratch_bytes;
}

hqq_status hqq_run_stages(hqq_stages *stages, const hqq_context *context)
{
    hqq_status status = stages->status;
    if (status == HQQ_OK)
        status = run_loop(stages->list, stages->count, stages->scratch_bytes, 0, context);
    else
        hqq_fail(status, "could not allocate a list of stages");
    free(stages->list);
    *stages = (hqq_stages){0};
    return status;
}

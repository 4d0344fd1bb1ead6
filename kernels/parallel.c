#include "parallel.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "status.h"

typedef struct chunk_loop {
    hqq_chunk_fn fn;
    void *data;
    int64_t chunks;
    size_t scratch_bytes;
    atomic_int_least64_t next;
    atomic_int status; /* the first failure */
} chunk_loop;

static void work(int64_t begin, int64_t end, void *data)
{
    chunk_loop *loop = data;
    (void)begin;
    (void)end;
    int64_t chunk = atomic_fetch_add(&loop->next, 1);
    if (chunk >= loop->chunks) return;
    void *scratch = NULL;
    if (loop->scratch_bytes) {
        scratch = aligned_alloc(64, (loop->scratch_bytes + 63) / 64 * 64);
        if (!scratch) {
            atomic_store(&loop->status, HQQ_NO_MEMORY);
            return;
        }
    }
    for (; chunk < loop->chunks; chunk = atomic_fetch_add(&loop->next, 1)) {
        if (atomic_load(&loop->status) != HQQ_OK) break;
        hqq_status status = loop->fn(chunk, scratch, loop->data);
        if (status != HQQ_OK) atomic_store(&loop->status, (int)status);
    }
    free(scratch);
}

hqq_status hqq_for_each_chunk(int64_t chunks, hqq_chunk_fn fn, void *data, size_t scratch_bytes,
                              const hqq_context *context)
{
    chunk_loop loop = {
        .fn = fn, .data = data, .chunks = chunks, .scratch_bytes = scratch_bytes};
    atomic_init(&loop.next, 0);
    atomic_init(&loop.status, HQQ_OK);
    if (chunks <= 0) return HQQ_OK;
    if (chunks == 1 || !context || !context->parallel_for) {
        work(0, chunks, &loop);
    } else if (context->parallel_for(0, chunks, 1, work, &loop) != 0) {
        return hqq_fail(HQQ_CALLBACK, "parallel_for failed on a range of %lld chunks",
                        (long long)chunks);
    }
    hqq_status status = (hqq_status)atomic_load(&loop.status);
    if (status == HQQ_NO_MEMORY)
        return hqq_fail(status, "could not allocate %zu bytes of scratch", scratch_bytes);
    return status;
}

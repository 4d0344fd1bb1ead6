/* Loops whose workers draw neighbours (hqq_for_each_chunk_in_runs): each chunk runs once, a
 * failure ends the rest, and what a worker draws are runs. */
#include "parallel.h"
#include "parts.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

enum { THREADS = 2, MOST_CHUNKS = 97, SCRATCH = 256 };

/* A part of the range for each thread, as torch and OpenMP cut it. */
static int32_t on_threads(int64_t begin, int64_t end, int64_t grain,
                          void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)grain;
    pthread_t threads[THREADS];
    part parts[THREADS];
    int64_t length = (end - begin + THREADS - 1) / THREADS;
    for (int t = 0; t < THREADS; t++) {
        int64_t first = begin + t * length, last = first + length;
        parts[t] = (part){first, last < end ? last : end, fn, data};
        if (pthread_create(&threads[t], NULL, run_part, &parts[t]) != 0) abort();
    }
    for (int t = 0; t < THREADS; t++) pthread_join(threads[t], NULL);
    return 0;
}

typedef struct seen {
    int64_t fails; /* the chunk that does; -1: none */
    atomic_int runs[MOST_CHUNKS], begun;
    pthread_t by[MOST_CHUNKS];
    int together; /* the first chunk of each thread waits for the other's */
} seen;

static hqq_status note(int64_t chunk, void *scratch, void *data)
{
    seen *s = data;
    ((char *)scratch)[SCRATCH - 1] = 1;
    atomic_fetch_add(&s->runs[chunk], 1);
    s->by[chunk] = pthread_self();
    atomic_fetch_add(&s->begun, 1);
    while (s->together && atomic_load(&s->begun) < THREADS) sched_yield();
    return chunk == s->fails ? HQQ_INVALID : HQQ_OK;
}

static int each_once(const char *name, const hqq_context *context)
{
    for (int64_t chunks = 0; chunks <= MOST_CHUNKS; chunks++) {
        seen s = {.fails = -1};
        if (hqq_for_each_chunk_in_runs(chunks, note, &s, SCRATCH, context) != HQQ_OK) return 1;
        for (int64_t i = 0; i < MOST_CHUNKS; i++)
            if (atomic_load(&s.runs[i]) != (i < chunks)) {
                printf("%s: chunk %d of %d ran %d times\n", name, (int)i, (int)chunks,
                       atomic_load(&s.runs[i]));
                return 1;
            }
    }
    return 0;
}

/* Of 64 chunks two workers draw first 64 / 4 = 16, then 48 / 4 = 12. */
static int first_runs(const hqq_context *context)
{
    seen s = {.fails = -1, .together = 1};
    if (hqq_for_each_chunk_in_runs(64, note, &s, SCRATCH, context) != HQQ_OK) return 1;
    int wrong = pthread_equal(s.by[0], s.by[16]);
    for (int i = 1; i < 28; i++) wrong |= !pthread_equal(s.by[i], s.by[i < 16 ? 0 : 16]);
    if (wrong) printf("the first chunks are not drawn in runs of 16 and 12\n");
    return wrong;
}

static int failure_ends_it(void)
{
    seen s = {.fails = 40};
    int wrong = hqq_for_each_chunk_in_runs(64, note, &s, SCRATCH, NULL) != HQQ_INVALID;
    for (int i = 0; i < 64; i++) wrong |= atomic_load(&s.runs[i]) != (i <= 40);
    if (wrong) printf("chunks run after one that has failed\n");
    return wrong;
}

int main(void)
{
    const hqq_context threads = {.parallel_for = on_threads};
    const hqq_context one_by_one = {.parallel_for = backwards};
    int failures = each_once("alone", NULL) + each_once("one by one", &one_by_one);
    failures += each_once("threads", &threads) + failure_ends_it();
    for (int round = 0; round < 50; round++) failures += first_runs(&threads);
    return failures != 0;
}

/* Loops one after another in one parallel_for (kernels/parallel.h): each chunk runs once, none
 * before the stages that it waits for are done, and a failure ends all of them. */
#include "parallel.h"
#include "parts.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { THREADS = 3, STAGES = 40, MOST_CHUNKS = 5, SCRATCH = 4096 };

/* ---- parallel_for on threads of our own ---------------------------------------------- */

static int32_t on_threads(int64_t begin, int64_t end, int64_t grain,
                          void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)grain;
    pthread_t threads[THREADS];
    part all = {begin, end, fn, data};
    for (int t = 0; t < THREADS; t++)
        if (pthread_create(&threads[t], NULL, run_part, &all) != 0) abort();
    for (int t = 0; t < THREADS; t++) pthread_join(threads[t], NULL);
    return 0;
}

static int32_t refusing(int64_t begin, int64_t end, int64_t grain,
                        void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)begin, (void)end, (void)grain, (void)fn, (void)data;
    return 1;
}

/* ---- stages that watch each other ---------------------------------------------------- */

typedef struct watched {
    int64_t first, chunks;
    int after, fails;
    atomic_int runs[MOST_CHUNKS], wrong;
    struct watched *all; /* the first of them */
} watched;

static int done(const watched *w)
{
    for (int i = 0; i < w->chunks; i++)
        if (atomic_load(&w->runs[i]) != 1) return 0;
    return 1;
}

static hqq_status watch(int64_t chunk, void *scratch, void *data)
{
    watched *w = data;
    int64_t i = chunk - w->first;
    if (i < 0 || i >= w->chunks || !scratch || (uintptr_t)scratch % 64 != 0) {
        atomic_store(&w->wrong, 1);
        return HQQ_OK;
    }
    ((char *)scratch)[SCRATCH - 1] = 1;
    for (int s = 0; s < w->after; s++)
        if (!done(&w->all[s])) atomic_store(&w->wrong, 1);
    if (i == 0) usleep(300); /* others draw the chunks behind it meanwhile */
    atomic_fetch_add(&w->runs[i], 1);
    return w->fails ? HQQ_INVALID : HQQ_OK;
}

/* Of 1 to 5 chunks; every third waits for all before it, every third for all but the last. */
static void fill(watched *all, hqq_stages *stages, int failing)
{
    *stages = (hqq_stages){0};
    for (int s = 0; s < STAGES; s++) {
        watched *w = &all[s];
        *w = (watched){.first = 7 * s, .chunks = 1 + (3 * s) % MOST_CHUNKS, .all = all};
        w->after = s % 3 == 0 ? s : s % 3 == 1 && s > 0 ? s - 1 : 0;
        w->fails = s == failing;
        hqq_add_stage(stages, watch, w, w->first, w->chunks, s == 20 ? SCRATCH : 1, w->after);
        hqq_add_stage(stages, watch, w, 0, 0, 1, 0); /* of no chunks: not added */
    }
}

static int check(const char *name, const hqq_context *context)
{
    static watched all[STAGES];
    hqq_stages stages;
    fill(all, &stages, -1);
    int failed = stages.count != STAGES || hqq_run_stages(&stages, context) != HQQ_OK;
    for (int s = 0; s < STAGES; s++) failed |= !done(&all[s]) || atomic_load(&all[s].wrong);
    failed |= stages.list != NULL || stages.count != 0;

    fill(all, &stages, 7);
    failed |= hqq_run_stages(&stages, context) != HQQ_INVALID;
    for (int s = 9; s < STAGES; s += 3) /* these wait for number 7 */
        for (int i = 0; i < all[s].chunks; i++) failed |= atomic_load(&all[s].runs[i]) != 0;
    if (failed) printf("%s: stages run in a wrong order, twice or not at all\n", name);
    return failed;
}

int main(void)
{
    static watched all[STAGES];
    const hqq_context threads = {.parallel_for = on_threads};
    const hqq_context one_by_one = {.parallel_for = backwards};
    const hqq_context refused = {.parallel_for = refusing};
    int failures = check("alone", NULL) + check("backwards", &one_by_one);
    for (int round = 0; round < 20; round++) failures += check("threads", &threads);

    hqq_stages stages = {0};
    failures += hqq_run_stages(&stages, &threads) != HQQ_OK; /* of nothing */
    fill(all, &stages, -1);
    failures += hqq_run_stages(&stages, &refused) != HQQ_CALLBACK || stages.list != NULL;
    return failures != 0;
}

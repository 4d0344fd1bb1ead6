/* parallel_for on threads of the test's own: parts of a range, and one chunk at a time. */
#ifndef HQQ_TESTS_PARTS_H
#define HQQ_TESTS_PARTS_H

#include <stdint.h>

/* What a thread is to run. */
typedef struct part {
    int64_t begin, end;
    void (*fn)(int64_t, int64_t, void *);
    void *data;
} part;

/* For pthread_create, of a part. */
static void *run_part(void *data)
{
    part *p = data;
    p->fn(p->begin, p->end, p->data);
    return NULL;
}

/* Chunk by chunk from the last on, on the caller's thread. */
static int32_t backwards(int64_t begin, int64_t end, int64_t grain,
                         void (*fn)(int64_t, int64_t, void *), void *data)
{
    (void)grain;
    for (int64_t i = end - 1; i >= begin; i--) fn(i, i + 1, data);
    return 0;
}

#endif

/* Cutting one block of the caller's memory into 64-byte aligned pieces. The size of a plan is
 * found by running the same cuts over no memory at all, so size and use cannot disagree. */
#ifndef HQQ_KERNELS_WORKSPACE_H
#define HQQ_KERNELS_WORKSPACE_H

#include <stddef.h>

typedef struct hqq_arena {
    char *base;  /* NULL: only measuring */
    size_t used; /* bytes */
} hqq_arena;

static inline void *hqq_arena_take(hqq_arena *arena, size_t bytes)
{
    size_t at = arena->used;
    arena->used += (bytes + 63) / 64 * 64;
    return arena->base ? arena->base + at : NULL;
}

#endif

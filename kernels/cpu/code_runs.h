/*
 * Walking along the codes of one row of W.
 *
 * The elements e = n*K + k of a row lie in words of rising address, all in one slot, until the
 * words wrap and the next slot begins (kernels/format.h). So whatever the bits, the axis and
 * the group size, a row falls into runs:
 *
 *     words, shift     one contiguous stretch of words, one slot of them
 *     axis 1           one group, so one zero and one scale
 *     axis 0           groups of rising index, so contiguous zeros and scales
 *
 * A run ends where the words wrap, where a group (axis 1) or the sequence of groups (axis 0)
 * ends, or where the caller's limit is. Kernels see runs alone and need no other rule.
 */
#ifndef HQQ_KERNELS_CPU_CODE_RUNS_H
#define HQQ_KERNELS_CPU_CODE_RUNS_H

#include "weight_layout.h"

typedef struct hqq_run {
    const void *words; /* the word of the first element */
    int64_t group;     /* of the first element (axis 1: of all) */
    int64_t length;    /* elements */
    int shift;         /* how far left the codes lie in their words */
} hqq_run;

typedef struct hqq_run_cursor {
    const hqq_layout *layout;
    const char *packed;
    int64_t word, group;
    int64_t words_left;  /* in this slot */
    int64_t groups_left; /* axis 1: elements in this group; axis 0: groups until they wrap */
    int64_t left;        /* elements in all */
    int shift;
} hqq_run_cursor;

/* As the kernels see the weight: planes as the nibbles that they make (planes.h). */
static inline hqq_layout hqq_weight_layout(const hqq_weight *w)
{
    hqq_layout l = hqq_stored_layout(w);
    return l.planes ? hqq_layout_of_planes(&l, 2) : l;
}

/* Where an element lies: what a row starts from. */
typedef struct hqq_place {
    int64_t word, slot;
    int64_t turn, rest; /* the element's number div and mod the period of the groups: G for
                           axis 1, E/G for axis 0 */
} hqq_place;

static inline int64_t hqq_group_period(const hqq_layout *l)
{
    return l->axis == 1 ? l->G : l->groups;
}

static inline hqq_place hqq_place_of(const hqq_layout *l, int64_t e)
{
    hqq_place p;
    p.slot = e / l->words;
    p.word = e - p.slot * l->words;
    p.turn = e / hqq_group_period(l);
    p.rest = e - p.turn * hqq_group_period(l);
    return p;
}

/* The place of the sum of two elements' numbers: from row to row without a division. */
static inline hqq_place hqq_place_add(const hqq_layout *l, hqq_place a, const hqq_place *b)
{
    a.word += b->word;
    a.slot += b->slot;
    a.turn += b->turn;
    a.rest += b->rest;
    if (a.word >= l->words) a.word -= l->words, a.slot++;
    if (a.rest >= hqq_group_period(l)) a.rest -= hqq_group_period(l), a.turn++;
    return a;
}

/* A cursor over `elements` elements from a place. */
static inline hqq_run_cursor hqq_runs_from(const hqq_layout *l, const void *packed,
                                           const hqq_place *p, int64_t elements)
{
    return (hqq_run_cursor){.layout = l,
                            .packed = packed,
                            .word = p->word,
                            .group = l->axis == 1 ? p->turn : p->rest,
                            .words_left = l->words - p->word,
                            .groups_left = hqq_group_period(l) - p->rest,
                            .left = elements,
                            .shift = hqq_slot_shift(l->nbits, (int)p->slot)};
}

/* Sets *run to the next run; 0 at the end. */
static inline int hqq_runs_next(hqq_run *run, hqq_run_cursor *c)
{
    if (c->left <= 0) return 0;
    const hqq_layout *l = c->layout;
    int64_t length = c->left < c->words_left ? c->left : c->words_left;
    if (length > c->groups_left) length = c->groups_left;
    run->words = c->packed + c->word * l->word_bytes;
    run->group = c->group;
    run->length = length;
    run->shift = c->shift;
    c->left -= length;
    c->word += length;
    c->words_left -= length;
    c->groups_left -= length;
    if (c->words_left == 0) {
        c->word = 0;
        c->words_left = l->words;
        c->shift -= l->nbits;
    }
    if (l->axis == 0) c->group += length;
    if (c->groups_left == 0) {
        c->group = l->axis == 1 ? c->group + 1 : 0;
        c->groups_left = l->axis == 1 ? l->G : l->groups;
    }
    return 1;
}

#endif

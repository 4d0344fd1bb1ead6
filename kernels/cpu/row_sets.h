/*
 * Which rows of W to take together.
 *
 * A word holds one code of each of `per` slots, so the rows whose codes lie in the same words
 * are read for the price of one. Slot j begins at element j * words, in row j * words / K: set
 * s is the row s behind that, in every slot. Where the slots begin in the middle of rows (3
 * bits, odd shapes) the words of a set overlap the next set's a little, and the last sets may
 * lack a row.
 *
 *     4 bits, even N:  set s = {s, s + N/2}            8 bits:  set s = {s}
 *
 * Sets come in an order in which neighbours also share scales: for axis 0 the rows n = r
 * mod N/G, that is G / per sets, follow one another. Or share bytes: in planes (axis 1) those
 * whose rows are N/8 apart.
 */
#ifndef HQQ_KERNELS_CPU_ROW_SETS_H
#define HQQ_KERNELS_CPU_ROW_SETS_H

#include "format.h"

#define HQQ_MAX_SLOTS 10

typedef struct hqq_row_sets {
    int64_t sets;
    int64_t cycle; /* sets in succession that share scales or bytes; 1: in plain order */
    int64_t step;  /* from a set's rows to the next set's, within a cycle or in plain order */
    int64_t start[HQQ_MAX_SLOTS + 1]; /* of the rows of each slot */
    int slots;
} hqq_row_sets;

static inline hqq_row_sets hqq_row_sets_of(const hqq_layout *l)
{
    hqq_row_sets s = {.cycle = 1, .step = 1, .slots = l->per};
    for (int j = 0; j <= s.slots; j++) {
        int64_t start = (j * l->words + l->K - 1) / l->K;
        s.start[j] = start < l->N ? start : l->N;
        if (j > 0 && s.start[j] - s.start[j - 1] > s.sets) s.sets = s.start[j] - s.start[j - 1];
    }
    if (l->axis == 0 && hqq_rows_align(l) && hqq_groups_align(l) && l->G > l->per) {
        s.cycle = l->G / l->per;
        s.step = s.sets / s.cycle;
    } else if (l->axis == 1 && l->planes) {
        s.cycle = 8 / l->per; /* 1 where a set has all rows of its bytes */
        s.step = s.cycle > 1 ? s.sets / s.cycle : 1;
    }
    return s;
}

/* Rows of W that follow one another. */
typedef struct hqq_row_piece {
    int64_t first, count;
} hqq_row_piece;

/* The rows of the sets [begin, end) in plain order: a piece for each slot, which may be empty.
 */
static inline void hqq_row_pieces(hqq_row_piece pieces[HQQ_MAX_SLOTS], const hqq_row_sets *s,
                                  int64_t begin, int64_t end)
{
    for (int j = 0; j < s->slots; j++) {
        int64_t first = s->start[j] + begin, last = s->start[j] + end;
        if (last > s->start[j + 1]) last = s->start[j + 1];
        pieces[j] = (hqq_row_piece){first, first < last ? last - first : 0};
    }
}

/* The place of a set's row within each slot. */
static inline int64_t hqq_row_in_slot(const hqq_row_sets *s, int64_t set)
{
    if (s->cycle == 1) return set;
    return set / s->cycle + set % s->cycle * s->step;
}

/* How many sets follow `set` at the same step, itself included. */
static inline int64_t hqq_sets_in_step(const hqq_row_sets *s, int64_t set)
{
    return s->cycle == 1 ? s->sets - set : s->cycle - set % s->cycle;
}

/* The rows of a set, in rising order; how many (at most `slots`). */
static inline int hqq_row_set(int64_t rows[HQQ_MAX_SLOTS], const hqq_row_sets *s, int64_t set)
{
    int64_t row = hqq_row_in_slot(s, set);
    int count = 0;
    for (int j = 0; j < s->slots; j++)
        if (s->start[j] + row < s->start[j + 1]) rows[count++] = s->start[j] + row;
    return count;
}

#endif

/* The rows of W in the order in which AMX tiles take them: groups of sets, in each the slots
 * one after the other, so that the 16 rows of a tile follow one another in W. */
#ifndef HQQ_KERNELS_CPU_AMX_ROWS_H
#define HQQ_KERNELS_CPU_AMX_ROWS_H

#include "amx.h"

/* The rows of tile q of the group that begins with `set`: up to 16. */
static inline hqq_row_piece hqq_amx_rows(const hqq_amx_job *job, int64_t set, int64_t q)
{
    int64_t tiles = job->group_sets / 16, slot = q / tiles;
    int64_t first = job->sets.start[slot] + set + q % tiles * 16;
    int64_t count = job->sets.start[slot + 1] - first;
    return (hqq_row_piece){first, count < 0 ? 0 : count < 16 ? count : 16};
}

/* Steps of the reduction over the sets before `set`, the first of a group, or behind the last.
 */
static inline int64_t hqq_amx_steps_of_sets(const hqq_amx_job *job, int64_t set)
{
    int64_t groups = (set + job->group_sets - 1) / job->group_sets;
    return groups * job->group_rows / HQQ_AMX_STEP;
}

#endif

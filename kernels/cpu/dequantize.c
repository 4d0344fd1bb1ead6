/* The whole of W, or a part of it, on all threads. */
#include "code_runs.h"
#include "dequantize_block.h"
#include "dtype.h"
#include "integers.h"
#include "isa.h"
#include "parallel.h"
#include "backend.h"
#include "reference.h"
#include "row_sets.h"

/* Weights in a chunk: some 20 microseconds, far above what drawing a chunk costs. */
#define CHUNK_WEIGHTS (INT64_C(1) << 17)

void hqq_dequantize_block(void *out, int64_t ld, hqq_dtype dtype, const hqq_weight *weight,
                          int64_t row_begin, int64_t row_end, int64_t column_begin,
                          int64_t column_end, hqq_isa isa)
{
    HQQ_ISA_SELECT(isa, hqq_dequantize_rows)
    (out, ld, dtype, weight, row_begin, 1, row_end - row_begin, column_begin, column_end);
}

typedef struct dequantize_job {
    void *out;
    int64_t ld;
    hqq_dtype dtype;
    const hqq_weight *weight;
    int64_t row_begin, row_end, column_begin, column_end;
    hqq_row_sets sets;
    int64_t sets_in_chunk;
    hqq_isa isa;
} dequantize_job;

/* Of the rows first, first + step, ... (`count` of them) those that are wanted. */
static void dequantize_wanted(const dequantize_job *job, int64_t first, int64_t step,
                              int64_t count)
{
    if (first < job->row_begin) {
        int64_t skip = (job->row_begin - first + step - 1) / step;
        first += skip * step;
        count -= skip;
    }
    int64_t fit = (job->row_end - first + step - 1) / step;
    if (count > fit) count = fit;
    if (count <= 0) return;
    int64_t at = (first - job->row_begin) * job->ld;
    HQQ_ISA_SELECT(job->isa, hqq_dequantize_rows)
    (hqq_at_mut(job->out, job->dtype, at), step * job->ld, job->dtype, job->weight, first, step,
     count, job->column_begin, job->column_end);
}

/* Some sets of rows that share words: each word is read from memory once. */
static hqq_status dequantize_chunk(int64_t chunk, void *scratch, void *data)
{
    const dequantize_job *job = data;
    const hqq_row_sets *sets = &job->sets;
    int64_t set = chunk * job->sets_in_chunk, end = set + job->sets_in_chunk;
    if (end > sets->sets) end = sets->sets;
    (void)scratch;
    while (set < end) {
        int64_t run = hqq_sets_in_step(sets, set);
        if (run > end - set) run = end - set;
        for (int j = 0; j < sets->slots; j++) {
            int64_t row = hqq_row_in_slot(sets, set),
                    rows = sets->start[j + 1] - sets->start[j];
            int64_t fit = (rows - row + sets->step - 1) / sets->step;
            dequantize_wanted(job, sets->start[j] + row, sets->step, run < fit ? run : fit);
        }
        set += run;
    }
    return HQQ_OK;
}

hqq_status hqq_backend_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                                  const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                                  int64_t column_begin, int64_t column_end,
                                  const hqq_context *context)
{
    if (context && context->kernel == HQQ_KERNEL_REFERENCE) {
        hqq_reference_dequantize(out, ld_out, out_dtype, weight, row_begin, row_end,
                                 column_begin, column_end);
        return HQQ_OK;
    }
    hqq_layout layout = hqq_weight_layout(weight);
    dequantize_job job = {.out = out,
                          .ld = ld_out,
                          .dtype = out_dtype,
                          .weight = weight,
                          .row_begin = row_begin,
                          .row_end = row_end,
                          .column_begin = column_begin,
                          .column_end = column_end,
                          .sets = hqq_row_sets_of(&layout),
                          .isa = hqq_isa_in_use(context)};
    int64_t weights = (row_end - row_begin) * (column_end - column_begin);
    job.sets_in_chunk = job.sets.sets * CHUNK_WEIGHTS / weights;
    if (job.sets_in_chunk < 1) job.sets_in_chunk = 1;
    int64_t chunks = hqq_ceil_div(job.sets.sets, job.sets_in_chunk);
    return hqq_for_each_chunk(chunks, dequantize_chunk, &job, 0, context);
}

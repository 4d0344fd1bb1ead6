/* The whole of W, or a part of it, on all threads. */
#include "code_runs.h"
#include "dequantize_block.h"
#include "dtype.h"
#include "isa.h"
#include "parallel.h"
#include "products.h"
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

/* Some sets of rows that share words: each word is read from memory once. */
static hqq_status dequantize_chunk(int64_t chunk, void *scratch, void *data)
{
    const dequantize_job *job = data;
    int64_t begin = chunk * job->sets_in_chunk, end = begin + job->sets_in_chunk;
    if (end > job->sets.sets) end = job->sets.sets;
    (void)scratch;
    for (int64_t set = begin; set < end; set++) {
        int64_t rows[HQQ_MAX_SLOTS];
        int count = hqq_row_set(rows, &job->sets, set);
        for (int i = 0; i < count; i++) {
            if (rows[i] < job->row_begin || rows[i] >= job->row_end) continue;
            int64_t at = (rows[i] - job->row_begin) * job->ld;
            hqq_dequantize_block(hqq_at_mut(job->out, job->dtype, at), job->ld, job->dtype,
                                 job->weight, rows[i], rows[i] + 1, job->column_begin,
                                 job->column_end, job->isa);
        }
    }
    return HQQ_OK;
}

hqq_status hqq_cpu_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
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
    dequantize_job job = {.out = out, .ld = ld_out, .dtype = out_dtype, .weight = weight,
                          .row_begin = row_begin, .row_end = row_end,
                          .column_begin = column_begin, .column_end = column_end,
                          .sets = hqq_row_sets_of(&layout), .isa = hqq_isa_in_use(context)};
    int64_t weights = (row_end - row_begin) * (column_end - column_begin);
    job.sets_in_chunk = job.sets.sets * CHUNK_WEIGHTS / weights;
    if (job.sets_in_chunk < 1) job.sets_in_chunk = 1;
    int64_t chunks = (job.sets.sets + job.sets_in_chunk - 1) / job.sets_in_chunk;
    return hqq_for_each_chunk(chunks, dequantize_chunk, &job, 0, context);
}

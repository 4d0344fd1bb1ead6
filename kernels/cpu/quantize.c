/* The quantizer's driver: checks W, cuts it into chunks of bands, and for hqq's solver finds
 * the step at which hqq would stop. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "dtype.h"
#include "parallel.h"
#include "backend.h"
#include "quantize_groups.h"
#include "non_finite.h"
#include "status.h"

/* ---- non-finite weights ----------------------------------------------------------------- */

enum { CHECK_ELEMENTS = 1 << 18 };

typedef struct finite_check {
    const void *W;
    hqq_dtype dtype;
    hqq_isa isa;
    int64_t elements;
    atomic_int_least64_t first_bad; /* `elements`: none */
} finite_check;

static hqq_status check_chunk(int64_t chunk, void *scratch, void *data)
{
    (void)scratch;
    finite_check *check = data;
    int64_t begin = chunk * CHECK_ELEMENTS, end = begin + CHECK_ELEMENTS;
    if (end > check->elements) end = check->elements;
    if (!HQQ_ISA_SELECT(check->isa, hqq_any_non_finite)(check->W, check->dtype, begin, end))
        return HQQ_OK;
    int64_t e = begin;
    while (isfinite(hqq_load(check->W, check->dtype, e))) e++;
    int_least64_t first = atomic_load(&check->first_bad);
    while (e < first && !atomic_compare_exchange_weak(&check->first_bad, &first, e)) continue;
    return HQQ_OK;
}

static hqq_status check_finite(const void *W, hqq_dtype dtype, const hqq_layout *l,
                               const hqq_context *context)
{
    finite_check check = {
        .W = W, .dtype = dtype, .isa = hqq_isa_in_use(context), .elements = l->elements};
    atomic_init(&check.first_bad, l->elements);
    HQQ_TRY(hqq_for_each_chunk((l->elements + CHECK_ELEMENTS - 1) / CHECK_ELEMENTS, check_chunk,
                               &check, 0, context));
    int64_t e = atomic_load(&check.first_bad);
    if (e == l->elements) return HQQ_OK;
    return hqq_fail(HQQ_NON_FINITE, "W[%lld, %lld] is %g; only finite weights can be quantized",
                    (long long)(e / l->K), (long long)(e % l->K),
                    (double)hqq_load(W, dtype, e));
}

static hqq_status check_importance(const float *importance, const hqq_layout *l)
{
    for (int64_t k = 0; importance && k < l->K; k++)
        if (!(importance[k] >= 0.0f && isfinite(importance[k])))
            return hqq_fail(HQQ_INVALID,
                            "options.importance[%lld] is %g; expected a finite value of at "
                            "least 0",
                            (long long)k, (double)importance[k]);
    return HQQ_OK;
}

/* ---- chunks ----------------------------------------------------------------------------- */

enum {
    CHUNK_ELEMENTS = 1 << 16,
    BAND_MULTIPLE = 64,        /* bands in a chunk: whole tiles, whole cache lines at axis 0 */
    ERROR_SUMS_MOST = 1 << 18, /* doubles: 2 MB */
    SETTLED_MOST = 1 << 21     /* bytes */
};

typedef struct quantize_run {
    hqq_quantize_job job;
    hqq_isa isa;
    int64_t chunk_bands;
    int iters;
    double *errors; /* [chunks][iters] or NULL */
} quantize_run;

size_t hqq_quantize_scratch(const hqq_quantize_job *job)
{
    const hqq_layout *l = &job->layout;
    int64_t steps = l->G < HQQ_TILE_STEPS ? l->G : HQQ_TILE_STEPS;
    int64_t arrays = hqq_tiles_at_once(l) * (job->importance ? 2 : 1);
    return (size_t)(arrays * steps) * 16 * sizeof(float); /* of the widest lanes */
}

static hqq_status quantize_chunk(int64_t chunk, void *scratch, void *data)
{
    const quantize_run *run = data;
    const hqq_quantize_job *job = &run->job;
    int64_t begin = chunk * run->chunk_bands, end = begin + run->chunk_bands;
    if (end > job->bands) end = job->bands;
    if (job->options->solver == HQQ_SOLVER_DEFAULT)
        HQQ_ISA_SELECT(run->isa, hqq_quantize_default)(job, begin, end, scratch);
    else
        HQQ_ISA_SELECT(run->isa, hqq_quantize_hqq)
    (job, begin, end, run->iters, run->errors ? run->errors + chunk * run->iters : NULL,
     scratch);
    return HQQ_OK;
}

static int64_t chunks_of(const quantize_run *run)
{
    return (run->job.bands + run->chunk_bands - 1) / run->chunk_bands;
}

static hqq_status run_chunks(quantize_run *run, const hqq_context *context)
{
    return hqq_for_each_chunk(chunks_of(run), quantize_chunk, run,
                              hqq_quantize_scratch(&run->job), context);
}

/* The step after which hqq stops: the first whose mean error, over the whole matrix and in
 * fp32, is not below the least so far. */
static int last_step(const quantize_run *run)
{
    float least = INFINITY;
    for (int step = 0; step < run->iters; step++) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks_of(run); chunk++)
            sum += run->errors[chunk * run->iters + step];
        float error = (float)(sum / (double)run->job.layout.elements);
        if (!(error < least)) return step + 1;
        least = error;
    }
    return run->iters;
}

/* All steps, and then those that hqq would have done. */
static hqq_status run_twice(quantize_run *run, const hqq_context *context)
{
    HQQ_TRY(run_chunks(run, context));
    int steps = last_step(run);
    if (steps == run->iters) return HQQ_OK;
    run->iters = steps;
    run->errors = NULL;
    return run_chunks(run, context);
}

/* Groups do not know of each other, and where to stop shows only when all have run. So all
 * steps are run first; where hqq would have stopped before the last, they are run again up to
 * there, but for the tiles that had settled by then. Matrices with too many tiles to remember
 * which do without (run->job.settled is NULL). */
static hqq_status run_early_stop(quantize_run *run, const hqq_context *context)
{
    if (chunks_of(run) * run->iters > ERROR_SUMS_MOST) {
        int64_t most = ERROR_SUMS_MOST / run->iters;
        int64_t bands = (run->job.bands + most - 1) / most;
        run->chunk_bands = (bands + BAND_MULTIPLE - 1) / BAND_MULTIPLE * BAND_MULTIPLE;
    }
    size_t error_bytes = (size_t)(chunks_of(run) * run->iters) * sizeof(double);
    int64_t tiles = hqq_quantize_tiles_most(&run->job);
    size_t bytes = error_bytes + (tiles <= SETTLED_MOST ? (size_t)tiles : 0);
    double *errors = calloc(1, bytes);
    if (!errors) return hqq_fail(HQQ_NO_MEMORY, "could not allocate %zu bytes", bytes);
    run->errors = errors;
    if (tiles <= SETTLED_MOST) run->job.settled = (uint8_t *)errors + error_bytes;
    hqq_status status = run_twice(run, context);
    free(errors);
    return status;
}

hqq_status hqq_backend_quantize(void *packed, void *scale, void *zero, const void *W,
                                hqq_dtype W_dtype, const hqq_weight *w,
                                const hqq_quantize_options *options, const hqq_context *context)
{
    hqq_layout l =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    HQQ_TRY(check_importance(options->importance, &l));
    HQQ_TRY(check_finite(W, W_dtype, &l, context));
    quantize_run run = {.isa = hqq_isa_in_use(context)};
    run.job =
        (hqq_quantize_job){.layout = l,
                           .bands = hqq_quantize_bands(&l),
                           .W = W,
                           .W_dtype = W_dtype,
                           .packed = packed,
                           .scale = scale,
                           .zero = zero,
                           .meta_dtype = w->meta_dtype,
                           .options = options,
                           .importance = hqq_columns_differ(&l) ? options->importance : NULL};
    int64_t band_elements = l.axis == 1 ? l.G * l.per : l.G;
    int64_t multiples = CHUNK_ELEMENTS / (band_elements * BAND_MULTIPLE);
    run.chunk_bands = BAND_MULTIPLE * (multiples > 1 ? multiples : 1);
    run.iters = options->solver == HQQ_SOLVER_REFERENCE ? options->iters : 0;
    if (run.iters > 0 && options->early_stop) return run_early_stop(&run, context);
    return run_chunks(&run, context);
}

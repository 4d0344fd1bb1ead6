/* The quantizer's host side: how a matrix is cut into tiles, and which solver gets them. */
#include "quantize.h"

#include "cuda.cuh"
#include "quantize_job.h"

static hqq_quantize_job job_of(const hqq_weight *w)
{
    hqq_quantize_job job = {};
    hqq_layout l =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    job.layout = l;
    job.bands = l.axis == 1 ? l.words / l.G : l.groups;
    job.tile_slots = l.axis == 1 ? l.per : 1;
    job.tile_bands = HQQ_TILE_LANES / job.tile_slots;
    job.tiles = (job.bands + job.tile_bands - 1) / job.tile_bands;
    job.levels = static_cast<float>(hqq_max_code(l.nbits));
    job.meta_dtype = w->meta_dtype;
    return job;
}

extern "C" hqq_status hqq_cuda_quantize(void *packed, void *scale, void *zero, const void *W,
                                        hqq_dtype W_dtype, const hqq_weight *weight,
                                        const hqq_quantize_options *options, void *stream)
{
    hqq_quantize_job job = job_of(weight);
    if (job.tiles == 0) return HQQ_OK;
    job.packed = packed;
    job.scale = scale;
    job.zero = zero;
    job.W = W;
    job.W_dtype = W_dtype;
    job.importance = hqq_columns_differ(&job.layout) ? options->importance : NULL;
    if (options->solver == HQQ_SOLVER_DEFAULT) return hqq_cuda_quantize_default(&job, stream);
    return hqq_cuda_quantize_hqq(&job, options, stream);
}

/*
 * The width w of the blocks of a large product, out [M,O] = in [M,L] block [L,w], by block.
 *
 * A GEMM of one block is a number of output tiles over P multiprocessors, and the last wave of
 * tiles is as long as a full one: with M = 2048 and w = 512 there are 32 tiles of 128 x 256,
 * and 100 of an H100's 132 multiprocessors have nothing to do. Wide blocks fill the waves;
 * narrow ones stay in the L2 cache between the kernel that writes them and the GEMM that reads
 * them. Both are put into one unit, operations of one multiprocessor:
 *
 *     cost(w) = max(tiles, traffic) + min(tiles, traffic) / 4 + spill + overhead
 *
 *     tiles     waves * (operations of a tile) * factor, the cheapest way to cut M x w: tiles
 * of 128 x 256, of 128 x 128 (each element is loaded more often: factor 1.15), and either with
 * the sum split (1.25) where the tiles are fewer than half of P traffic   the block is read,
 * from L2 at half the price of memory; `in` is read again if it does not stay in L2 beside the
 * block. A GEMM hides most of it, or of the arithmetic: a quarter of the shorter is counted
 *     spill     block + its outputs exceed half of L2: the block is written to memory
 *     overhead  of starting two kernels and of their first and last moments
 *
 * and the narrowest block within 4 percent of the least total is taken: it costs the least
 * workspace. A prediction, not a measurement: the balance between arithmetic and memory is that
 * of the A100, H100 and B200 within a factor of 1.7.
 */
#include "block_width.h"

#include <stddef.h>

#include "dtype.h"
#include "integers.h"

enum { STEP = 64 }; /* outputs; what dequantize's fast path and the tiles like */

/* Dense weights up to the first are one block if that is the cheapest; others are never whole:
 * at most half of the weight, and at most the second. */
#ifndef HQQ_CUDA_WHOLE_BYTES_MOST
#define HQQ_CUDA_WHOLE_BYTES_MOST ((int64_t)16 << 20)
#endif
#define BLOCK_BYTES_MOST ((int64_t)64 << 20)

#define OVERHEAD_OPERATIONS (2.0 * HQQ_CUDA_LAUNCH_OPERATIONS) /* of two kernels */
#define TOLERANCE           1.04

typedef struct product_shape {
    int64_t outputs, length, M;
    int element_bytes;
    double operations_per_byte; /* of all multiprocessors, in the time of a byte of memory */
    int64_t l2_bytes;
    int64_t multiprocessors;
} product_shape;

/* Operations a multiprocessor does until all tiles of this size are done. */
static double tile_cost(const product_shape *s, int64_t width, int64_t tile_width,
                        double factor)
{
    enum { TILE_ROWS = 128, SPLITS_MOST = 16 };
    int64_t tiles = hqq_ceil_div(s->M, TILE_ROWS) * hqq_ceil_div(width, tile_width);
    double tile = 2.0 * TILE_ROWS * (double)tile_width * (double)s->length * factor;
    int64_t splits = s->multiprocessors / tiles;
    if (splits >= 2) return 1.25 * tile / (double)(splits < SPLITS_MOST ? splits : SPLITS_MOST);
    return tile * (double)hqq_ceil_div(tiles, s->multiprocessors);
}

static double block_cost(const product_shape *s, int64_t width)
{
    if (width == 0) return 0.0;
    double per_byte = s->operations_per_byte / (double)s->multiprocessors;
    double bytes = (double)s->element_bytes;
    double block = (double)width * (double)s->length * bytes;
    double out = (double)s->M * (double)width * bytes;
    double in = (double)s->M * (double)s->length * bytes;

    double wide = tile_cost(s, width, 256, 1.0), narrow = tile_cost(s, width, 128, 1.15);
    double tiles = wide < narrow ? wide : narrow;
    int stays = block + out <= 0.5 * (double)s->l2_bytes;
    double traffic = (stays ? 0.5 : 1.0) * block;
    if (in + block + out > (double)s->l2_bytes) traffic += in;
    traffic *= per_byte;
    double spill = stays ? 0.0 : block * per_byte;
    double longer = tiles > traffic ? tiles : traffic,
           shorter = tiles > traffic ? traffic : tiles;
    return longer + 0.25 * shorter + spill + OVERHEAD_OPERATIONS;
}

static double total_cost(const product_shape *s, int64_t width)
{
    return (double)(s->outputs / width) * block_cost(s, width) +
           block_cost(s, s->outputs % width);
}

/* The widest block that its memory allows: a multiple of STEP, or all outputs. */
static int64_t widest(const product_shape *s)
{
    int64_t row = s->length * s->element_bytes;
    if (s->outputs <= STEP || s->outputs <= HQQ_CUDA_WHOLE_BYTES_MOST / row) return s->outputs;
    int64_t half = hqq_ceil_div(s->outputs, 2), memory = BLOCK_BYTES_MOST / row;
    int64_t width = (half < memory ? half : memory) / STEP * STEP;
    return width < STEP ? STEP : width;
}

static product_shape shape_of(int64_t outputs, int64_t length, int64_t M, hqq_dtype dtype,
                              const hqq_cuda_device *device)
{
    return (product_shape){
        .outputs = outputs,
        .length = length,
        .M = M,
        .element_bytes = hqq_dtype_bytes(dtype),
        .operations_per_byte = dtype == HQQ_F32 ? 20.0 : 256.0, /* no tensor cores for fp32 */
        .l2_bytes = device->l2_bytes,
        .multiprocessors = device->multiprocessors > 0 ? device->multiprocessors : 1,
    };
}

int64_t hqq_cuda_block_width(int64_t outputs, int64_t length, int64_t M, hqq_dtype dtype,
                             const hqq_cuda_device *device)
{
    product_shape s = shape_of(outputs, length, M, dtype, device);
    int64_t most = widest(&s);
    double least = total_cost(&s, most);
    for (int64_t width = STEP; width < most; width += STEP) {
        double cost = total_cost(&s, width);
        if (cost < least) least = cost;
    }
    for (int64_t width = STEP; width < most; width += STEP)
        if (total_cost(&s, width) <= TOLERANCE * least) return width;
    return most;
}

double hqq_cuda_blocks_cost(int64_t outputs, int64_t length, int64_t M, hqq_dtype dtype,
                            const hqq_cuda_device *device)
{
    product_shape s = shape_of(outputs, length, M, dtype, device);
    return total_cost(&s, hqq_cuda_block_width(outputs, length, M, dtype, device));
}

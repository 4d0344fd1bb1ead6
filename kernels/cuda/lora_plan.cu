/* How a skinny product is spread over the device, and how its parts are added. */
#include "cuda.cuh"
#include "lora.h"
#include "lora_product.h"
#include "workspace.h"

/* A part is of whole steps: a chunk of fp32, half of one of bf16. A multiprocessor holds
 * RESIDENT blocks; adding up its warps costs a block as much as END_STEPS of its sum. */
enum { PART_STEP = 32, RESIDENT = 2, END_STEPS = 2, MOST_ROUNDS = 4 };

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Of all numbers of parts the one whose blocks, in rounds of as many as the device holds, take
 * the fewest steps; the fewest parts, of several. */
int64_t hqq_lora_parts(int64_t *part_length, int64_t I, int64_t J, int64_t R,
                       const hqq_cuda_device *device)
{
    int64_t tiles = divide_up(J, HQQ_LORA_TILE) * divide_up(R, hqq_lora_tile_ranks(R));
    int64_t slots = static_cast<int64_t>(device->multiprocessors) * RESIDENT;
    int64_t steps = I > 0 ? divide_up(I, PART_STEP) : 1;
    int64_t most = MOST_ROUNDS * slots / (tiles > 0 ? tiles : 1);
    int64_t best_parts = 1, best_cost = INT64_MAX;
    for (int64_t parts = 1; parts == 1 || (parts <= most && parts <= steps); parts++) {
        int64_t cost = divide_up(tiles * parts, slots) * (divide_up(steps, parts) + END_STEPS);
        if (cost < best_cost) best_parts = parts, best_cost = cost;
    }
    int64_t part_steps = divide_up(steps, best_parts);
    *part_length = part_steps * PART_STEP;
    return divide_up(steps, part_steps);
}

static size_t part_bytes(int64_t I, int64_t J, int64_t R, const hqq_cuda_device *device)
{
    int64_t length, parts = hqq_lora_parts(&length, I, J, R, device);
    return parts > 1 ? static_cast<size_t>(parts * J * R) * sizeof(float) : 0;
}

size_t hqq_cuda_lora_workspace(const hqq_lora *lora, int64_t M, int64_t N, int64_t K,
                               const hqq_cuda_device *device)
{
    const int64_t sums[][2] = {{K, M}, {N, M}, {M, K}, {M, N}}; /* xa, dyb, dA, dB: I and J */
    size_t most = 0;
    for (int i = 0; i < 4; i++) {
        size_t bytes = part_bytes(sums[i][0], sums[i][1], lora->rank, device);
        most = bytes > most ? bytes : most;
    }
    hqq_arena arena = {};
    hqq_arena_take(&arena, most);
    return arena.used;
}

/* A block does 32 outputs; its row y adds the parts y, y + 8, ..., and then the rows are added.
 */
enum { OUTPUTS_X = 32, PARTS_Y = 8 };

static __global__ void __launch_bounds__(OUTPUTS_X *PARTS_Y)
    lora_add_parts(const hqq_lora_product p, int64_t parts, int64_t count)
{
    HQQ_SHARED(float[PARTS_Y][OUTPUTS_X], sums);
    int64_t at = static_cast<int64_t>(blockIdx.x) * OUTPUTS_X + threadIdx.x;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += PARTS_Y)
        if (at < count) sum += p.parts[part * count + at];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || at >= count) return;
#pragma unroll
    for (int y = 1; y < PARTS_Y; y++) sum += sums[y][threadIdx.x];
    hqq_store(p.out, p.out_dtype, at, sum * p.scaling);
}

hqq_status hqq_lora_add_parts(const hqq_lora_product *p, int64_t parts, void *stream)
{
    int64_t count = p->J * p->R;
    dim3 grid(static_cast<unsigned>((count + OUTPUTS_X - 1) / OUTPUTS_X));
    return hqq_launch(lora_add_parts, grid, dim3(OUTPUTS_X, PARTS_Y), 0, stream, *p, parts,
                      count);
}

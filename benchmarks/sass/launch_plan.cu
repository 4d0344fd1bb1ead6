/*
 * Prints what the library's own host code decides, so that the predictions repeat none of it.
 * Needs no GPU. instances.inc, which sass/launches.py writes, lists SMALL(hqq_small<...>) and
 * WIDE(hqq_wide<...>) for each product that was compiled.
 *
 *     launch_plan instances
 *         name | threads | dynamic shared memory of a block | and of each way more
 *     launch_plan plan MULTIPROCESSORS CAPABILITY L2_BYTES SHARED_BYTES
 *         for each line "N K M transpose axis nbits G" of its input:
 *         whether the small product serves; its tokens a block, token tiles, units, units a
 *         block, chunks, chunks a split, chunks of the busiest quarter of a multiprocessor,
 *         ways, splits, whether they are paired; the large product's block width; whether the
 *         wide product serves, its tokens a block, token and output tiles, splits, chunks a
 *         split, and whether splits are a cluster
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "small_product.cu" /* its grid is its own */

#include "block_width.h"
#include "lora.h"
#include "plan.h"
#include "small_layout.cuh"
#include "wide_layout.cuh"
#include "wide_product.h"

/* Never called: here nothing is launched. */
hqq_status hqq_small_launch_bf16(const hqq_small_arguments *, int, int, int, void *)
{
    return HQQ_UNSUPPORTED;
}
hqq_status hqq_small_launch_f16(const hqq_small_arguments *, int, int, int, void *)
{
    return HQQ_UNSUPPORTED;
}

hqq_status hqq_wide_launch_bf16(const hqq_wide_arguments *, int, int, void *)
{
    return HQQ_UNSUPPORTED;
}
hqq_status hqq_wide_launch_f16(const hqq_wide_arguments *, int, int, void *)
{
    return HQQ_UNSUPPORTED;
}
hqq_status hqq_wide_launch_sum(const hqq_wide_arguments *, hqq_dtype, int64_t, void *)
{
    return HQQ_UNSUPPORTED;
}
hqq_status hqq_cuda_write_addend(void *, hqq_dtype, const hqq_addend *, int64_t, int64_t,
                                 void *)
{
    return HQQ_UNSUPPORTED;
}

#define WIDE(...)                                                         \
    printf("%s | %d | %d | 0\n", #__VA_ARGS__, (int)__VA_ARGS__::THREADS, \
           (int)__VA_ARGS__::SHARED_BYTES);
#define SMALL(...)                                                         \
    printf("%s | %d | %d | %d\n", #__VA_ARGS__, (int)__VA_ARGS__::THREADS, \
           __VA_ARGS__::shared_bytes(0), (int)__VA_ARGS__::WAY_BYTES);

static void print_instances(void)
{
#include "instances.inc"
}

static void print_plans(const hqq_cuda_device *device)
{
    static char storage[16];
    long long N, K, M, G;
    int transpose, axis, nbits;
    while (scanf("%lld %lld %lld %d %d %d %lld", &N, &K, &M, &transpose, &axis, &nbits, &G) ==
           7) {
        hqq_weight w = {};
        w.packed = w.scale = w.zero = storage;
        w.out_features = N, w.in_features = K, w.group_size = G;
        w.nbits = nbits, w.axis = axis, w.meta_dtype = HQQ_BF16;
        hqq_kernel kernel =
            hqq_cuda_kernel_for(&w, M, HQQ_BF16, transpose, HQQ_KERNEL_AUTO, device);
        hqq_wide_grid wide = hqq_cuda_wide_grid(&w, M, transpose, device);
        small_grid g = small_grid_of(&w, M, transpose, device);
        int64_t outputs = transpose ? K : N, length = transpose ? N : K;
        printf("%d %d %d %lld %d %lld %d %d %d %d %d %lld %d %lld %lld %lld %lld %lld %d\n",
               kernel == HQQ_KERNEL_DIRECT, g.tokens, g.token_tiles, (long long)g.units,
               g.units_of_block, (long long)g.chunks, g.chunks_per_split, busiest_chunks(&g),
               g.ways, g.splits, g.paired,
               (long long)hqq_cuda_block_width(outputs, length, M, HQQ_BF16, device),
               kernel == HQQ_KERNEL_TILED, (long long)wide.tokens, (long long)wide.token_tiles,
               (long long)wide.output_tiles, (long long)wide.splits,
               (long long)wide.chunks_per_split, wide.cluster);
    }
}

int main(int count, char **arguments)
{
    if (count == 2 && !strcmp(arguments[1], "instances")) {
        print_instances();
        return 0;
    }
    if (count != 6 || strcmp(arguments[1], "plan")) return 2;
    hqq_cuda_device device = {};
    device.multiprocessors = atoi(arguments[2]);
    device.compute_capability = atoi(arguments[3]);
    device.l2_bytes = atoll(arguments[4]);
    device.shared_bytes = atoll(arguments[5]);
    device.has_clusters = device.compute_capability >= 90;
    print_plans(&device);
    return 0;
}

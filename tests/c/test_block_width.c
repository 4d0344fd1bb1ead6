/* The width of the blocks of a large product: what the planner must and must not choose, for
 * real shapes and devices; and that any question has an answer. */
#include "block_width.h"

#include <stdio.h>

#include "dtype.h"

static const struct {
    const char *name;
    hqq_cuda_device device;
} devices[] = {
    {"H100", {.multiprocessors = 132, .compute_capability = 90, .l2_bytes = 50 << 20}},
    {"A100", {.multiprocessors = 108, .compute_capability = 80, .l2_bytes = 40 << 20}},
    {"A10", {.multiprocessors = 72, .compute_capability = 86, .l2_bytes = 6 << 20}},
    {"RTX 4090", {.multiprocessors = 128, .compute_capability = 89, .l2_bytes = 72 << 20}},
    {"B200", {.multiprocessors = 148, .compute_capability = 100, .l2_bytes = 126 << 20}},
};
enum { DEVICES = sizeof devices / sizeof *devices };

static int failures;

static void expect(int holds, const char *what, int d, int64_t outputs, int64_t length,
                   int64_t M, int64_t width)
{
    if (holds) return;
    failures++;
    printf("%s: %lld outputs of %lld, M = %lld, width %lld: not so: %s\n", devices[d].name,
           (long long)outputs, (long long)length, (long long)M, (long long)width, what);
}

/* The part of the multiprocessors' time in which they work on whole tiles of 128 x `side`; a
 * sum that is split, for want of tiles, costs a fifth. */
static double busy(int64_t M, int64_t width, int64_t side, int multiprocessors)
{
    int64_t tiles = (M + 127) / 128 * ((width + side - 1) / side);
    int64_t waves = (tiles + multiprocessors - 1) / multiprocessors;
    double whole = (double)M / 128 * (double)width / (double)side;
    int64_t splits = multiprocessors / tiles < 16 ? multiprocessors / tiles : 16;
    double part = whole / (double)(waves * multiprocessors);
    return splits < 2 ? part : 0.8 * part * (double)splits;
}

/* Multiples of 64, no more than asked for, and bounded memory, for anything. */
static void check_limits(void)
{
    static const int64_t sides[] = {1,    63,   64,    65,    100,   576,   1000,
                                    1024, 4096, 11008, 14336, 28672, 128256};
    static const int64_t rows[] = {1, 65, 100, 512, 2048, 4096, 8192, 100000, INT64_C(1) << 40};
    enum { SIDES = sizeof sides / sizeof *sides, ROWS = sizeof rows / sizeof *rows };
    for (int d = 0; d < DEVICES; d++)
        for (int i = 0; i < SIDES * SIDES * ROWS * 2; i++) {
            int64_t outputs = sides[i % SIDES], length = sides[i / SIDES % SIDES];
            int64_t M = rows[i / SIDES / SIDES % ROWS];
            hqq_dtype dtype = i / SIDES / SIDES / ROWS ? HQQ_F32 : HQQ_BF16;
            int64_t width = hqq_cuda_block_width(outputs, length, M, dtype, &devices[d].device);
            int64_t bytes = width * length * hqq_dtype_bytes(dtype);
            int64_t dense = outputs * length * hqq_dtype_bytes(dtype);
            expect(0 < width && width <= outputs, "0 < width <= outputs", d, outputs, length, M,
                   width);
            expect(width == outputs || width % 64 == 0, "a multiple of 64", d, outputs, length,
                   M, width);
            expect(bytes <= 64 << 20 || width <= 64, "at most 64 MB", d, outputs, length, M,
                   width);
            expect(dense <= 16 << 20 || 2 * bytes <= dense || width <= 64,
                   "no large dense weight as a whole", d, outputs, length, M, width);
        }
}

/* Layers of Llama-3-8B and 70B, forward and dgrad, at common numbers of tokens. */
static void check_real_shapes(void)
{
    static const int64_t shapes[][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336},
                                        {8192, 8192}, {28672, 8192}, {8192, 28672},
                                        {1024, 8192}};
    static const int64_t rows[] = {1024, 2048, 4096, 8192, 16384};
    for (int d = 0; d < DEVICES; d++)
        for (int s = 0; s < 7; s++)
            for (int m = 0; m < 5; m++) {
                int64_t O = shapes[s][0], L = shapes[s][1], M = rows[m];
                const hqq_cuda_device *device = &devices[d].device;
                int64_t width = hqq_cuda_block_width(O, L, M, HQQ_BF16, device);
                double wide = busy(M, width, 256, device->multiprocessors);
                double narrow = busy(M, width, 128, device->multiprocessors);
                double part = wide > narrow ? wide : narrow;
                expect(part >= 0.70, "waves at least 70 percent full", d, O, L, M, width);
            }
}

/* Blocks for an H100, by hand. */
static void check_known(void)
{
    const hqq_cuda_device *h100 = &devices[0].device;
    /* 512 columns are 32 tiles of 128 x 256 for 132 multiprocessors; 2048 are 128 */
    int64_t width = hqq_cuda_block_width(8192, 8192, 2048, HQQ_BF16, h100);
    expect(width == 2048, "2048, which fill one wave", 0, 8192, 8192, 2048, width);
    /* few rows: no width fills a wave, and the block should stay in L2 */
    width = hqq_cuda_block_width(8192, 8192, 128, HQQ_BF16, h100);
    expect(width * (8192 + 128) * 2 <= 25 << 20, "within half of L2", 0, 8192, 8192, 128,
           width);
    /* a key or value projection, 8 MB dense, is one block */
    width = hqq_cuda_block_width(1024, 4096, 2048, HQQ_BF16, h100);
    expect(width == 1024, "whole", 0, 1024, 4096, 2048, width);
}

int main(void)
{
    check_limits();
    check_real_shapes();
    check_known();
    return failures != 0;
}

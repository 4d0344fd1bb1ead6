/* The runtime's calls, launch limits, schedules, and several host threads at once. */
#include "cuda.cuh"

#include <algorithm>
#include <stdlib.h>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "control.h"

static bool contains(const char *text, const char *part)
{
    return std::string(text).find(part) != std::string::npos;
}

/* ---- indices */

/* Lanes are numbered with x fastest: lane 3 must hold the fourth thread of each warp. */
__global__ void write_indices(unsigned *out)
{
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned fourth = __shfl_sync(0xffffffffu, thread, 3);
    unsigned *mine = out + block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    *mine += fourth == thread / 32 * 32 + 3 ? block * 1000 + thread : 1000000;
}

static void test_indices()
{
    std::vector<unsigned> out(24 * 40, 0);
    hqq_status status =
        hqq_launch(write_indices, dim3(2, 3, 4), dim3(4, 2, 5), 0, nullptr, out.data());
    check(status == HQQ_OK, "indices: %s", hqq_last_error());
    for (unsigned i = 0; i < out.size(); i++)
        check(out[i] == i / 40 * 1000 + i % 40, "index %u: %u", i, out[i]);
}

/* ---- limits */

__global__ void touch_last_byte(size_t bytes)
{
    if (threadIdx.x == 0) hqq_dynamic_shared<char>()[bytes - 1] = 1;
}

__global__ void nothing() {}

template <int floats> __global__ void static_array(float *out)
{
    HQQ_SHARED(float[floats], values);
    HQQ_SHARED(float[4], more);
    values[0] = more[0] = 1;
    *out = values[0] + more[0];
}

static cudaError_t launch_plainly(size_t shared_bytes)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(32);
    config.dynamicSmemBytes = shared_bytes;
    return cudaLaunchKernelEx(&config, touch_last_byte, shared_bytes);
}

static void test_dynamic_shared_memory()
{
    const void *kernel = reinterpret_cast<const void *>(touch_last_byte);
    const cudaFuncAttribute size = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(launch_plainly(48 << 10) == cudaSuccess, "48 KiB need no attribute");
    check(launch_plainly((48 << 10) + 1) == cudaErrorInvalidValue, "more do");
    check(contains(cudaGetErrorString(cudaErrorInvalidValue), "49153 bytes"),
          "with the number: %s", cudaGetErrorString(cudaErrorInvalidValue));
    check(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess,
          "the last error is told once");
    check(cudaFuncSetAttribute(kernel, size, 100 << 10) == cudaSuccess, "100 KiB");
    check(launch_plainly(100 << 10) == cudaSuccess, "100 KiB, opted in");
    check(launch_plainly((100 << 10) + 1) == cudaErrorInvalidValue, "not more than opted in");
    check(cudaFuncSetAttribute(kernel, size, (227 << 10) + 1) == cudaErrorInvalidValue,
          "227 KiB");
    hqqlora_emulated_set_device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 99 << 10);
    check(cudaFuncSetAttribute(kernel, size, 100 << 10) == cudaErrorInvalidValue,
          "a smaller device has less");
    hqqlora_emulated_reset_device();
}

static void test_static_shared_memory()
{
    float out = 0;
    check(hqq_launch(static_array<12284>, dim3(1), dim3(1), 0, nullptr, &out) == HQQ_OK &&
              out == 2,
          "48 KiB of static arrays: %s", hqq_last_error());
    check(hqq_launch(static_array<12285>, dim3(1), dim3(1), 0, nullptr, &out) == HQQ_DEVICE,
          "and 4 bytes more");
    check(contains(hqq_last_error(), "49156 bytes of static shared memory with 'more'"), "%s",
          hqq_last_error());
    check(hqq_launch(static_array<8000>, dim3(1), dim3(1), 20000, nullptr, &out) == HQQ_DEVICE,
          "static and dynamic count together");
    check(hqq_launch(static_array<8000>, dim3(1), dim3(1), 200000, nullptr, &out) == HQQ_OK,
          "up to 227 KiB for who opted in: %s", hqq_last_error());
    check(hqq_launch(touch_last_byte, dim3(1), dim3(1), 0, nullptr, 1) == HQQ_DEVICE,
          "no dynamic shared memory to use");
}

/* Each block finds all bits set, whatever the one before it left. */
__global__ void look_at_unwritten(unsigned *out)
{
    HQQ_SHARED(unsigned[4], words);
    unsigned *dynamic = hqq_dynamic_shared<unsigned>();
    out[2 * blockIdx.x] = words[3];
    out[2 * blockIdx.x + 1] = dynamic[3];
    words[3] = dynamic[3] = 0;
}

static void test_shared_memory_is_undefined_at_first()
{
    unsigned out[6] = {};
    check(hqq_launch(look_at_unwritten, dim3(3), dim3(1), 16, nullptr, &out[0]) == HQQ_OK, "%s",
          hqq_last_error());
    for (unsigned word : out) check(word == 0xffffffffu, "unwritten shared memory: %#x", word);
}

static void test_launch_limits()
{
    const struct {
        dim3 grid, block;
        bool good;
    } cases[] = {
        {dim3(1), dim3(1024), true},      {dim3(1), dim3(1025), false},
        {dim3(1), dim3(32, 33), false},   {dim3(1), dim3(0), false},
        {dim3(1), dim3(1, 1, 64), true},  {dim3(1), dim3(1, 1, 65), false},
        {dim3(0), dim3(32), false},       {dim3(1, 65535), dim3(1), true},
        {dim3(1, 65536), dim3(1), false}, {dim3(1u << 31), dim3(1), false},
    };
    for (const auto &c : cases) {
        hqq_status status = hqq_launch(nothing, c.grid, c.block, 0, nullptr);
        check((status == HQQ_OK) == c.good, "grid %u x %u, block %u x %u x %u: %s", c.grid.x,
              c.grid.y, c.block.x, c.block.y, c.block.z, hqq_last_error());
        check(c.good || status == HQQ_DEVICE, "a bad launch is a device error");
    }
}

/* ---- the device */

static int attribute(cudaDeviceAttr name)
{
    int value = -1;
    check(cudaDeviceGetAttribute(&value, name, 0) == cudaSuccess, "attribute %d", name);
    return value;
}

static void test_device()
{
    int device = -1, count = 0, value = 0;
    check(cudaGetDevice(&device) == cudaSuccess && device == 0, "device 0");
    check(cudaGetDeviceCount(&count) == cudaSuccess && count == 1, "of one");
    check(cudaSetDevice(0) == cudaSuccess && cudaSetDevice(1) == cudaErrorInvalidDevice, "set");
    check(cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(999), 0) ==
              cudaErrorInvalidValue,
          "an unknown attribute");
    check(attribute(cudaDevAttrMultiProcessorCount) == 132 &&
              attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
              attribute(cudaDevAttrL2CacheSize) == 50 << 20,
          "an H100 at first");
    check(hqqlora_emulated_set_device_attribute(cudaDevAttrMultiProcessorCount, 8) == 0 &&
              attribute(cudaDevAttrMultiProcessorCount) == 8,
          "tests may set another");
    check(hqqlora_emulated_set_device_attribute(999, 8) == 1, "but not an unknown one");
    hqqlora_emulated_reset_device();
    check(attribute(cudaDevAttrMultiProcessorCount) == 132, "and go back");
    char bytes[4] = {1, 2, 3, 4}, copy[4] = {};
    check(cudaMemsetAsync(bytes, 7, 3, nullptr) == cudaSuccess && bytes[2] == 7 &&
              bytes[3] == 4,
          "memset");
    check(cudaMemcpyAsync(copy, bytes, 4, cudaMemcpyDeviceToDevice, nullptr) == cudaSuccess &&
              copy[3] == 4,
          "memcpy");
    check(std::string(cudaGetErrorString(cudaSuccess)) == "no error", "no error");
}

/* ---- schedules */

/* The order in which (block, warp, lane) come: before, between and after two warp operations.
 */
__global__ void note_order(int *notes, int *count)
{
    int me = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    notes[(*count)++] = me;
    __syncwarp();
    notes[(*count)++] = me;
    __syncthreads();
    notes[(*count)++] = me;
}

static std::vector<int> order_of_turns()
{
    std::vector<int> notes(2 * 96 * 3, -1);
    int count = 0;
    hqq_status status =
        hqq_launch(note_order, dim3(2), dim3(96), 0, nullptr, notes.data(), &count);
    check(status == HQQ_OK && count == static_cast<int>(notes.size()), "%s", hqq_last_error());
    return notes;
}

static std::vector<int> order_of_turns(const char *order, uint64_t seed)
{
    check(hqqlora_emulated_set_schedule(order, "LATE", seed) == 0, "schedule %s", order);
    return order_of_turns();
}

/* The environment's schedule holds until somebody sets another: called first. */
static void test_environment()
{
    const char *order = getenv("HQQLORA_EMULATED_ORDER"),
               *seed = getenv("HQQLORA_EMULATED_SEED");
    std::vector<int> from_environment = order_of_turns();
    check(from_environment ==
              order_of_turns(order ? order : "FIFO", seed ? strtoull(seed, 0, 10) : 1),
          "the environment's schedule");
}

static void test_schedules()
{
    std::vector<int> fifo = order_of_turns("FIFO", 1), lifo = order_of_turns("LIFO", 1);
    /* whoever comes last to a warp operation goes on at once; then others have their turn */
    for (int i = 0; i < 96; i++)
        check(fifo[i + i / 32] == i, "FIFO: lanes and warps upwards, %d", fifo[i + i / 32]);
    for (int i = 0; i < 32; i++)
        check(lifo[i] == 191 - i, "LIFO: lanes and warps downwards, %d", lifo[i]);
    for (int i = 32; i < 64; i++)
        check(lifo[i] / 32 == 5, "LIFO: the last warp runs ahead, not warp %d", lifo[i] / 32);
    for (const char *order : {"RANDOM", "PRIORITY"}) {
        std::vector<int> once = order_of_turns(order, 1);
        check(once == order_of_turns(order, 1), "%s repeats for a seed", order);
        check(once != order_of_turns(order, 2), "%s differs for another", order);
        std::sort(once.begin(), once.end());
        for (int i = 0; i < 576; i++) check(once[i] == i / 3, "%s lets everybody run", order);
    }
    check(hqqlora_emulated_set_schedule("fifo", "LATE", 1) == 1 &&
              hqqlora_emulated_set_schedule("FIFO", "SOON", 1) == 1,
          "unknown names");
    hqqlora_emulated_set_schedule("FIFO", "LATE", 1);
}

/* ---- host threads */

__global__ void sum_in_block(int *out, int start)
{
    HQQ_SHARED(int[64], parts);
    parts[threadIdx.x] = start + static_cast<int>(threadIdx.x);
    __syncthreads();
    int sum = 0;
    for (int part : parts) sum += part;
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
    if (start < 0) __trap();
}

static void test_host_threads()
{
    std::vector<std::thread> threads;
    std::vector<int> wrong(4, 0);
    for (int h = 0; h < 4; h++)
        threads.emplace_back([h, &wrong] {
            for (int round = 0; round < 25; round++) {
                int out[3] = {}, start = h * 1000 + round;
                bool fails = round % 5 == 4; /* one thread's failure is not another's */
                hqq_status status = hqq_launch(sum_in_block, dim3(3), dim3(64), 0, nullptr,
                                               &out[0], fails ? -1 : start);
                if ((status != HQQ_OK) != fails) wrong[h]++;
                if (fails && !contains(hqq_last_error(), "__trap")) wrong[h]++;
                for (int sum : out)
                    if (!fails && sum != 64 * start + 63 * 32) wrong[h]++;
            }
        });
    for (std::thread &thread : threads) thread.join();
    for (int h = 0; h < 4; h++) check(wrong[h] == 0, "host thread %d: %d wrong", h, wrong[h]);
}

__global__ void assume_even(int n)
{
    __builtin_assume(n % 2 == 0);
}

static void test_assumptions()
{
    check(hqq_launch(assume_even, dim3(1), dim3(1), 0, nullptr, 4) == HQQ_OK, "an assumption");
    check(hqq_launch(assume_even, dim3(1), dim3(1), 0, nullptr, 3) == HQQ_DEVICE &&
              contains(hqq_last_error(), "__builtin_assume(n % 2 == 0) does not hold"),
          "that does not hold: %s", hqq_last_error());
}

int main()
{
    test_environment();
    test_indices();
    test_dynamic_shared_memory();
    test_static_shared_memory();
    test_shared_memory_is_undefined_at_first();
    test_launch_limits();
    test_device();
    test_schedules();
    test_host_threads();
    test_assumptions();
    return report_checks();
}

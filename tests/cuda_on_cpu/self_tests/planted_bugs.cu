/* One bug a kernel, of the kinds that CUDA kernels have. `bug` plants it. The test looks up the
 * lines marked @, and finds them named in the messages. */
#include "ptx_warpgroup.cuh"

#include "planted_bugs.h"

/* ---- tiles through shared memory: thread t copies, thread n - 1 - t uses */

enum { TILE_THREADS = 64, TILES = 4 };

enum TileBug { NO_TILE_BUG, NO_BARRIER_AFTER_WAIT, NO_BARRIER_AT_LOOP_END, NO_WAIT };

/* out[t] = sum over tiles of in[tile][n - 1 - t], 4 floats a thread, one buffer */
__global__ void sum_tiles(float *out, const float4 *in, TileBug bug)
{
    float4 *tile = hqq_dynamic_shared<float4>();
    int t = threadIdx.x, n = blockDim.x;
    float sum = 0;
    for (int i = 0; i < TILES; i++) {
        ptx_cp_async_16(tile + t, in + i * n + t);
        ptx_cp_async_commit();
        if (bug == NO_WAIT)
            ptx_cp_async_wait<1>();
        else
            ptx_cp_async_wait<0>();
        if (bug != NO_BARRIER_AFTER_WAIT) __syncthreads();
        float4 v = tile[n - 1 - t];
        sum += v.x + v.y + v.z + v.w;
        if (bug == NO_WAIT) ptx_cp_async_wait<0>();
        if (bug != NO_BARRIER_AT_LOOP_END) __syncthreads();
    }
    out[t] = sum;
}

static hqq_status run_sum_tiles(TileBug bug, Floats &out, Floats &expected)
{
    int floats = TILES * TILE_THREADS * 4;
    std::vector<float4> in(TILES * TILE_THREADS);
    out.assign(TILE_THREADS, 0);
    expected.assign(TILE_THREADS, 0);
    for (int i = 0; i < floats; i++) {
        float value = static_cast<float>(i * i % 97);
        memcpy(reinterpret_cast<char *>(in.data()) + 4 * i, &value, 4);
        expected[TILE_THREADS - 1 - i / 4 % TILE_THREADS] += value;
    }
    return hqq_launch(sum_tiles, dim3(1), dim3(TILE_THREADS), TILE_THREADS * 16, nullptr,
                      out.data(), in.data(), bug);
}

/* ---- cp.async at the end of a thread, and of shared memory */

__global__ void copy_one(float *out, const float4 *in, int bug)
{
    float4 *shared = hqq_dynamic_shared<float4>();
    ptx_cp_async_16(shared + threadIdx.x, in + threadIdx.x); /* 3: half of it outside */
    ptx_cp_async_commit();
    ptx_cp_async_wait<0>();
    out[threadIdx.x] = shared[threadIdx.x].x;
    if (bug == 1 || bug == 2) ptx_cp_async_16(shared + threadIdx.x, in); /* @copy */
    if (bug == 1) ptx_cp_async_commit(); /* never waited for; 2: never committed */
}

static hqq_status run_copy_one(int bug, Floats &out, Floats &expected)
{
    std::vector<float4> in(32);
    out.assign(32, 0);
    expected.assign(32, 0);
    for (int i = 0; i < 32; i++) expected[i] = in[i].x = static_cast<float>(i + 1);
    size_t shared_bytes = bug == 3 ? 504 : 512;
    return hqq_launch(copy_one, dim3(1), dim3(32), shared_bytes, nullptr, out.data(), in.data(),
                      bug);
}

/* ---- barriers */

enum BarrierBug { NO_BARRIER_BUG, DIVERGENT, EARLY_RETURN, FEWER_ROUNDS };

/* out[t] = t of the thread across the block */
__global__ void exchange(float *out, BarrierBug bug)
{
    HQQ_SHARED(float[96], values);
    int t = threadIdx.x;
    values[t] = static_cast<float>(t);
    if (bug == EARLY_RETURN && t >= 90) return;
    if (bug == DIVERGENT && t < 40) {
        __syncthreads(); /* @other barrier */
    } else {
        __syncthreads(); /* @barrier */
    }
    int rounds = bug == FEWER_ROUNDS && t < 32 ? 2 : 3; /* a warp leaves the loop early */
    for (int i = 0; i < rounds; i++) __syncthreads();   /* @loop */
    out[t] = values[95 - t];
}

static hqq_status run_exchange(BarrierBug bug, Floats &out, Floats &expected)
{
    out.assign(96, -1);
    expected.assign(96, 0);
    for (int t = 0; t < 96; t++) expected[t] = static_cast<float>(95 - t);
    return hqq_launch(exchange, dim3(2), dim3(96), 0, nullptr, out.data(), bug);
}

/* ---- warps */

enum WarpBug { NO_WARP_BUG, SOME_LANES, OTHER_MASK, NOT_IN_MASK, SOURCE_OUTSIDE, TWO_LINES };

/* out[lane] = its neighbour lane ^ 1 */
__global__ void neighbours(float *out, WarpBug bug)
{
    int lane = threadIdx.x % 32, neighbour = -1;
    unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    if (bug == OTHER_MASK && lane < 4) mask = 0xffffffffu;
    if (bug == NOT_IN_MASK && lane == 3) mask = 0xffff0000u;
    if (bug == TWO_LINES && lane == 9) {
        neighbour = __shfl_xor_sync(mask, lane, 1); /* @other shuffle */
    } else if (bug != SOME_LANES || lane != 20) {
        neighbour = __shfl_xor_sync(mask, lane, bug == SOURCE_OUTSIDE ? 16 : 1); /* @shuffle */
    }
    out[threadIdx.x] = static_cast<float>(neighbour);
}

static hqq_status run_neighbours(WarpBug bug, Floats &out, Floats &expected)
{
    out.assign(64, -1);
    expected.assign(64, 0);
    for (int t = 0; t < 64; t++) expected[t] = static_cast<float>(t % 32 ^ 1);
    return hqq_launch(neighbours, dim3(1), dim3(64), 0, nullptr, out.data(), bug);
}

/* Lanes hand values over through shared memory: out[t] = value of lane ^ 5. */
__global__ void through_shared_memory(float *out, bool bug)
{
    HQQ_SHARED(float[64], values);
    int t = threadIdx.x;
    for (int round = 0; round < 3; round++) {
        values[t] = static_cast<float>(t + round);
        if (!bug || round < 2) __syncwarp();
        out[t] = values[t ^ 5];
        __syncwarp();
    }
}

static hqq_status run_through_shared_memory(bool bug, Floats &out, Floats &expected)
{
    out.assign(64, -1);
    expected.assign(64, 0);
    for (int t = 0; t < 64; t++) expected[t] = static_cast<float>((t ^ 5) + 2);
    return hqq_launch(through_shared_memory, dim3(1), dim3(64), 0, nullptr, out.data(), bug);
}

/* The same across warps, where __syncwarp is not enough. */
__global__ void across_warps(float *out, bool bug)
{
    HQQ_SHARED(float[64], values);
    int t = threadIdx.x;
    values[t] = static_cast<float>(t);
    if (bug)
        __syncwarp();
    else
        __syncthreads();
    out[t] = values[63 - t];
}

static hqq_status run_across_warps(bool bug, Floats &out, Floats &expected)
{
    out.assign(64, -1);
    expected.assign(64, 0);
    for (int t = 0; t < 64; t++) expected[t] = static_cast<float>(63 - t);
    return hqq_launch(across_warps, dim3(1), dim3(64), 0, nullptr, out.data(), bug);
}

/* A shuffle makes lanes wait for one another but orders no memory. */
__global__ void shuffle_for_barrier(float *out, bool bug)
{
    HQQ_SHARED(float[32], values);
    int t = threadIdx.x;
    values[t] = static_cast<float>(t);
    if (bug)
        __shfl_sync(0xffffffffu, t, 0);
    else
        __syncwarp();
    out[t] = values[31 - t];
}

static hqq_status run_shuffle_for_barrier(bool bug, Floats &out, Floats &expected)
{
    out.assign(32, -1);
    expected.assign(32, 0);
    for (int t = 0; t < 32; t++) expected[t] = static_cast<float>(31 - t);
    return hqq_launch(shuffle_for_barrier, dim3(1), dim3(32), 0, nullptr, out.data(), bug);
}

/* Half the lanes synchronise among themselves; the other half reads what they wrote. */
__global__ void half_a_sync(float *out, bool bug)
{
    HQQ_SHARED(float[16], values);
    int t = threadIdx.x;
    if (t < 16) {
        values[t] = static_cast<float>(t);
        __syncwarp(0x0000ffffu);
    }
    if (!bug) __syncwarp();
    out[t] = values[t % 16];
}

static hqq_status run_half_a_sync(bool bug, Floats &out, Floats &expected)
{
    out.assign(32, -1);
    expected.assign(32, 0);
    for (int t = 0; t < 32; t++) expected[t] = static_cast<float>(t % 16);
    return hqq_launch(half_a_sync, dim3(1), dim3(32), 0, nullptr, out.data(), bug);
}

/* mma with a warp of 16 lanes. */
__global__ void multiply_zeros(float *out)
{
    float d[4] = {1, 1, 1, 1};
    uint32_t a[4] = {}, b[2] = {};
    ptx_mma(d, a, b, __half());
    out[threadIdx.x] = d[0];
}

static hqq_status run_multiply_zeros(bool bug, Floats &out, Floats &expected)
{
    out.assign(bug ? 48 : 64, 0);
    expected.assign(out.size(), 1);
    return hqq_launch(multiply_zeros, dim3(1), dim3(static_cast<unsigned>(out.size())), 0,
                      nullptr, out.data());
}

/* ---- ldmatrix */

enum RowBug { NO_ROW_BUG, MISALIGNED_ROW, ROW_OUTSIDE, OTHER_ROW };

/* out[lane] = first element of row lane / 4 of matrix 3; rows of 8 elements, all equal */
__global__ void load_rows(float *out, RowBug bug)
{
    uint16_t *shared = hqq_dynamic_shared<uint16_t>();
    int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) shared[8 * lane + i] = static_cast<uint16_t>(lane);
    __syncwarp();
    int row = bug == OTHER_ROW ? lane ^ 1 : bug == ROW_OUTSIDE ? lane + 1 : lane;
    uint32_t r[4];
    ptx_ldmatrix_x4(r, shared + 8 * row + (bug == MISALIGNED_ROW ? 2 : 0));
    out[lane] = static_cast<float>(r[3] & 0xffff);
}

static hqq_status run_load_rows(RowBug bug, Floats &out, Floats &expected)
{
    out.assign(32, -1);
    expected.assign(32, 0);
    for (int t = 0; t < 32; t++) expected[t] = static_cast<float>(24 + t / 4);
    return hqq_launch(load_rows, dim3(1), dim3(32), 512, nullptr, out.data(), bug);
}

/* ---- products of a warpgroup */

enum ProductBug {
    NO_PRODUCT_BUG,
    ROWS_TOO_EARLY,    /* written before the product that reads them is waited for */
    NO_BARRIER_BEFORE, /* between those who write the rows and the product */
    REGISTERS_TOO_EARLY,
    PRODUCT_NEVER_WAITED_FOR,
    PRODUCT_NEVER_COMMITTED,
    PART_OF_A_WARPGROUP,
    ROWS_MISPLACED,
    ROWS_OUTSIDE
};

/* In two rounds thread t writes t % 7 + round into 16 elements of row t; A is all ones: out[t]
 * is the sum of the thread's 64 sums. */
__global__ void multiply_rows(float *out, ProductBug bug)
{
    unsigned char *rows = hqq_dynamic_shared<unsigned char>();
    rows += (1024 - (reinterpret_cast<uintptr_t>(rows) & 1023)) & 1023;
    const __nv_bfloat16 type = __nv_bfloat16();
    int t = threadIdx.x;
    float d[64];
    for (float &sum : d) sum = 0;
    uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    const void *from = rows + (bug == ROWS_MISPLACED ? 16 : bug == ROWS_OUTSIDE ? 1024 : 0);
    ptx_warpgroup_begin();
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 8 && t >= 64; i++) __syncwarp(); /* some warps are slower */
        for (int i = 0; i < 16; i++)
            reinterpret_cast<__nv_bfloat16 *>(rows + 128 * t + 16 * (i / 8 ^ (t & 7)))[i % 8] =
                __float2bfloat16_rn(static_cast<float>(t % 7 + round));
        ptx_warpgroup_publish();
        if (bug != NO_BARRIER_BEFORE) __syncthreads();
        ptx_warpgroup_mma(d, ones, from, type); /* @product */
        if (bug != PRODUCT_NEVER_COMMITTED || round == 0) ptx_warpgroup_commit();
        if (bug == REGISTERS_TOO_EARLY && round == 1) ones[0] = 0;
        bool waits = bug != ROWS_TOO_EARLY || round == 1;
        if (waits && !(bug == PRODUCT_NEVER_WAITED_FOR && round == 1)) ptx_warpgroup_wait<0>();
        if (waits) __syncthreads();
    }
    ptx_warpgroup_arrived(d);
    float sum = 0;
    for (float part : d) sum += part;
    out[t] = sum;
}

static hqq_status run_multiply_rows(ProductBug bug, Floats &out, Floats &expected)
{
    unsigned threads = bug == PART_OF_A_WARPGROUP ? 96 : 128;
    out.assign(128, 0);
    expected.assign(128, 0);
    for (int t = 0; t < 128; t++)
        for (int j = 0; j < 16; j++)
            for (int i = 0; i < 2; i++) /* two rows, 16 elements, two rounds */
                expected[t] += static_cast<float>(32 * (2 * ((8 * j + t % 4 * 2 + i) % 7) + 1));
    return hqq_launch(multiply_rows, dim3(1), dim3(threads), 1024 + 128 * 128, nullptr,
                      out.data(), bug);
}

/* ---- memory */

enum MemoryBug {
    NO_MEMORY_BUG,
    SHARED_OVERFLOW,
    STATIC_OVERFLOW,
    LOAD_PAST_END,
    COPY_PAST_END,
    MISALIGNED_LOAD,
    UNDER_ALIGNED_ARRAY,
    UNWRITTEN
};

/* out[t] = first of 4 floats; 32 threads */
__global__ void move_vectors(float *out, const float4 *in, MemoryBug bug)
{
    HQQ_SHARED(float[36], words);
    float4 *shared = hqq_dynamic_shared<float4>();
    int t = threadIdx.x;
    const float4 *from = in + t + (bug == LOAD_PAST_END ? 1 : 0);
    if (bug == MISALIGNED_LOAD) from = reinterpret_cast<const float4 *>(&in[t].y) - (t > 0);
    shared[t + (bug == SHARED_OVERFLOW ? 1 : 0)] = *from;
    __syncthreads();
    if (bug == COPY_PAST_END) ptx_cp_async_16(shared + t, in + t + 1);
    ptx_cp_async_commit();
    ptx_cp_async_wait<0>();
    if (bug != UNWRITTEN || t != 7) words[t] = shared[t].x;
    if (bug == STATIC_OVERFLOW) words[t + 5] = shared[t].x;
    if (bug == UNDER_ALIGNED_ARRAY) *reinterpret_cast<float4 *>(words + 32) = shared[t];
    __syncthreads();
    out[t] = words[t];
}

static hqq_status run_move_vectors(MemoryBug bug, Floats &out, Floats &expected)
{
    std::vector<float4> in(32);
    out.assign(32, -1);
    expected.assign(32, 0);
    for (int t = 0; t < 32; t++) expected[t] = in[t].x = static_cast<float>(t + 1);
    return hqq_launch(move_vectors, dim3(1), dim3(32), 512, nullptr, out.data(), in.data(),
                      bug);
}

/* ---- atomics, blocks */

enum CounterBug { NO_COUNTER_BUG, READ_TOO_EARLY, SET_TOO_LATE };

/* A counter in shared memory: set, added to, read, a barrier between any two. */
__global__ void count_threads(float *out, CounterBug bug)
{
    HQQ_SHARED(int, count);
    if (threadIdx.x == 0) count = 0;
    if (bug != SET_TOO_LATE) __syncthreads();
    atomicAdd(&count, 1);
    if (bug != READ_TOO_EARLY) __syncthreads();
    out[threadIdx.x] = static_cast<float>(count);
}

static hqq_status run_count_threads(CounterBug bug, Floats &out, Floats &expected)
{
    out.assign(64, -1);
    expected.assign(64, 64);
    return hqq_launch(count_threads, dim3(1), dim3(64), 0, nullptr, out.data(), bug);
}

/* Blocks add up; the bug relies on block i - 1 having run before block i. */
__global__ void running_sum(float *out, bool bug)
{
    float sum = 0;
    if (bug)
        sum = (blockIdx.x ? out[blockIdx.x - 1] : 0) + 1;
    else
        for (unsigned i = 0; i <= blockIdx.x; i++) sum += 1;
    out[blockIdx.x] = sum;
}

static hqq_status run_running_sum(bool bug, Floats &out, Floats &expected)
{
    out.assign(16, 0);
    expected.assign(16, 0);
    for (int i = 0; i < 16; i++) expected[i] = static_cast<float>(i + 1);
    return hqq_launch(running_sum, dim3(16), dim3(1), 0, nullptr, out.data(), bug);
}

#define BUG(name, run, bug)                                                        \
    {name, [](bool planted, Floats &out, Floats &expected) {                       \
         return run(static_cast<decltype(bug)>(planted ? bug : 0), out, expected); \
     }}

const PlantedBug PLANTED_BUGS[] = {
    BUG("no barrier after the wait", run_sum_tiles, NO_BARRIER_AFTER_WAIT),
    BUG("no barrier at the loop's end", run_sum_tiles, NO_BARRIER_AT_LOOP_END),
    BUG("no wait_group", run_sum_tiles, NO_WAIT),
    BUG("cp.async never waited for", run_copy_one, 1),
    BUG("cp.async never committed", run_copy_one, 2),
    BUG("cp.async half outside", run_copy_one, 3),
    BUG("divergent barrier", run_exchange, DIVERGENT),
    BUG("return before a barrier", run_exchange, EARLY_RETURN),
    BUG("fewer barriers in one warp", run_exchange, FEWER_ROUNDS),
    BUG("a lane is missing", run_neighbours, SOME_LANES),
    BUG("masks do not match", run_neighbours, OTHER_MASK),
    BUG("caller not in its mask", run_neighbours, NOT_IN_MASK),
    BUG("shuffle from outside the mask", run_neighbours, SOURCE_OUTSIDE),
    BUG("shuffles of two lines", run_neighbours, TWO_LINES),
    BUG("no __syncwarp", run_through_shared_memory, true),
    BUG("__syncwarp across warps", run_across_warps, true),
    BUG("a shuffle for a barrier", run_shuffle_for_barrier, true),
    BUG("__syncwarp of half a warp", run_half_a_sync, true),
    BUG("mma in half a warp", run_multiply_zeros, true),
    BUG("ldmatrix: misaligned row", run_load_rows, MISALIGNED_ROW),
    BUG("ldmatrix: row outside", run_load_rows, ROW_OUTSIDE),
    BUG("ldmatrix: another row", run_load_rows, OTHER_ROW),
    BUG("rows written before the wait", run_multiply_rows, ROWS_TOO_EARLY),
    BUG("no barrier before the product", run_multiply_rows, NO_BARRIER_BEFORE),
    BUG("registers written before the wait", run_multiply_rows, REGISTERS_TOO_EARLY),
    BUG("wgmma never waited for", run_multiply_rows, PRODUCT_NEVER_WAITED_FOR),
    BUG("wgmma never committed", run_multiply_rows, PRODUCT_NEVER_COMMITTED),
    BUG("wgmma in three warps", run_multiply_rows, PART_OF_A_WARPGROUP),
    BUG("wgmma: misplaced rows", run_multiply_rows, ROWS_MISPLACED),
    BUG("wgmma: rows outside", run_multiply_rows, ROWS_OUTSIDE),
    BUG("overflow of dynamic shared memory", run_move_vectors, SHARED_OVERFLOW),
    BUG("overflow of static shared memory", run_move_vectors, STATIC_OVERFLOW),
    BUG("load past the end", run_move_vectors, LOAD_PAST_END),
    BUG("cp.async past the end", run_move_vectors, COPY_PAST_END),
    BUG("misaligned load", run_move_vectors, MISALIGNED_LOAD),
    BUG("float4 in an array of float", run_move_vectors, UNDER_ALIGNED_ARRAY),
    BUG("unwritten shared memory", run_move_vectors, UNWRITTEN),
    BUG("counter read too early", run_count_threads, READ_TOO_EARLY),
    BUG("counter set too late", run_count_threads, SET_TOO_LATE),
    BUG("blocks in order", run_running_sum, true),
};
const int PLANTED_BUG_COUNT = sizeof PLANTED_BUGS / sizeof *PLANTED_BUGS;

/* Warp and block operations for every lane, and scalar intrinsics at the values where they
 * could go wrong. */
#include "cuda.cuh"

#include <vector>

#include "check.h"
#include "control.h"

typedef std::vector<int> Ints;

template <class Kernel> static Ints run(Kernel kernel, unsigned threads, int per_thread)
{
    Ints out(threads * static_cast<unsigned>(per_thread), -1);
    hqq_status status = hqq_launch(kernel, dim3(1), dim3(threads), 0, nullptr, out.data());
    check(status == HQQ_OK, "%s", hqq_last_error());
    return out;
}

/* ---- shuffles: lane l holds 100 + l */

__global__ void shuffles(int *out)
{
    int lane = threadIdx.x, value = 100 + lane;
    out += lane * 8;
    out[0] = __shfl_sync(0xffffffffu, value, 5);
    out[1] = __shfl_sync(0xffffffffu, value, lane + 3, 8);
    out[2] = __shfl_xor_sync(0xffffffffu, value, 17);
    out[3] = __shfl_xor_sync(0xffffffffu, value, 12, 8); /* into the next segment: stays */
    out[4] = __shfl_down_sync(0xffffffffu, value, 3);
    out[5] = __shfl_down_sync(0xffffffffu, value, 3, 8);
    out[6] = __shfl_up_sync(0xffffffffu, value, 3);
    out[7] = __shfl_up_sync(0xffffffffu, value, 3, 8);
}

static void test_shuffles()
{
    Ints out = run(shuffles, 32, 8);
    for (int l = 0; l < 32; l++) {
        int segment = l / 8 * 8;
        int crossed = l ^ 12; /* xor may read an earlier segment, not a later one */
        int sources[8] = {5,
                          segment + (l + 3) % 8,
                          l ^ 17,
                          crossed < segment + 8 ? crossed : l,
                          l + 3 < 32 ? l + 3 : l,
                          l + 3 < segment + 8 ? l + 3 : l,
                          l >= 3 ? l - 3 : l,
                          l - 3 >= segment ? l - 3 : l};
        for (int i = 0; i < 8; i++)
            check(out[l * 8 + i] == 100 + sources[i], "shuffle %d, lane %d: %d, not %d", i, l,
                  out[l * 8 + i], 100 + sources[i]);
    }
}

__global__ void shuffle_other_types(int *out)
{
    int lane = threadIdx.x;
    float2 pair = {static_cast<float>(lane), 0.5f};
    double wide = 0.1 * lane;
    unsigned long long word = 1ull << (lane + 20);
    __nv_bfloat16 narrow = static_cast<float>(lane);
    float2 p = __shfl_xor_sync(0xffffffffu, pair, 1);
    double w = __shfl_xor_sync(0xffffffffu, wide, 1);
    unsigned long long u = __shfl_xor_sync(0xffffffffu, word, 1);
    float n = __shfl_xor_sync(0xffffffffu, narrow, 1);
    int other = lane ^ 1;
    out[lane] = p.x == static_cast<float>(other) && p.y == 0.5f && w == 0.1 * other &&
                u == 1ull << (other + 20) && n == static_cast<float>(other);
}

/* ---- votes and reductions, whole warps and odd lanes alone */

__global__ void votes(int *out)
{
    int lane = threadIdx.x;
    out += lane * 8;
    out[0] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
    out[1] = __any_sync(0xffffffffu, lane == 31) + 2 * __any_sync(0xffffffffu, 0);
    out[2] = __all_sync(0xffffffffu, lane < 32) + 2 * __all_sync(0xffffffffu, lane);
    out[3] =
        __reduce_max_sync(0xffffffffu, lane - 40) + __reduce_min_sync(0xffffffffu, lane - 40);
    out[4] = __reduce_add_sync(0xffffffffu, -lane);
    out[5] = static_cast<int>(__reduce_xor_sync(0xffffffffu, 1u << lane / 3));
    if (lane % 2) {
        out[6] = static_cast<int>(__ballot_sync(0xaaaaaaaau, lane > 9));
        out[7] = __all_sync(0xaaaaaaaau, lane % 2);
    }
}

static void test_votes()
{
    Ints out = run(votes, 32, 8);
    for (int l = 0; l < 32; l++) {
        int expected[8] = {0x49249249, 1, 1, -9 + -40, -31 * 32 / 2, 0x3ff, -1, -1};
        /* lanes 3 n, 3 n + 1, 3 n + 2 flip bit n three times; the last bit, 10, twice */
        if (l % 2) expected[6] = static_cast<int>(0xaaaaa800u), expected[7] = 1;
        for (int i = 0; i < 8; i++)
            check(out[l * 8 + i] == expected[i], "vote %d, lane %d: %#x, not %#x", i, l,
                  static_cast<unsigned>(out[l * 8 + i]), static_cast<unsigned>(expected[i]));
    }
}

/* ---- barriers that count, in a block whose last warp is not whole */

__global__ void counting_barriers(int *out)
{
    int t = threadIdx.x;
    out += t * 5;
    out[0] = __syncthreads_count(t % 5 == 0);
    out[1] = __syncthreads_and(t < 70) + 2 * __syncthreads_and(t < 69);
    out[2] = __syncthreads_or(t == 69) + 2 * __syncthreads_or(t > 69);
    out[3] = static_cast<int>(__ballot_sync(0xffffffffu, 1)); /* of the lanes that exist */
    __syncwarp();
    out[4] = warpSize + static_cast<int>(threadIdx.y + threadIdx.z);
}

static void test_counting_barriers()
{
    Ints out = run(counting_barriers, 70, 5);
    for (int t = 0; t < 70; t++) {
        int expected[5] = {14, 1, 1, t < 64 ? -1 : 0x3f, 32};
        for (int i = 0; i < 5; i++)
            check(out[t * 5 + i] == expected[i], "barrier %d, thread %d: %d, not %d", i, t,
                  out[t * 5 + i], expected[i]);
    }
}

/* ---- atomics */

__global__ void atomics(int *out)
{
    HQQ_SHARED(int[8], s);
    HQQ_SHARED(float, total);
    HQQ_SHARED(unsigned, wrapping);
    int t = threadIdx.x;
    const int start[8] = {0, -100, 100, 0, 0, -1, 0, 5};
    if (t < 8) s[t] = start[t];
    if (t == 0) total = 0, wrapping = 0;
    __syncthreads();
    atomicAdd(&s[0], t);
    atomicMax(&s[1], t - 3);
    atomicMin(&s[2], t - 3);
    if (t == 7) s[3] = 0;
    atomicOr(&s[4], 1 << (t % 20));
    atomicAnd(&s[5], ~(1 << (t % 20)));
    atomicXor(&s[6], t);
    atomicCAS(&s[7], 5, 50 + t);
    atomicAdd(&total, 0.5f);
    atomicInc(&wrapping, 9); /* 0 .. 9 and again */
    __syncthreads();
    out[t] = t < 8 ? s[t] : t == 8 ? static_cast<int>(2 * total) : static_cast<int>(wrapping);
    if (t == 7 && (s[7] < 50 || s[7] >= 114))
        out[7] = -7;
    else if (t == 7)
        out[7] = 7; /* one of them won */
}

static void test_atomics()
{
    Ints out = run(atomics, 64, 1);
    int expected[10] = {63 * 64 / 2, 60, -3, 0, 0xfffff, ~0xfffff, 0, 7, 64, 64 % 10};
    for (int i = 0; i < 10; i++)
        check(out[i] == expected[i], "atomic %d: %d, not %d", i, out[i], expected[i]);
}

/* ---- scalars */

static void test_scalars()
{
    check(__byte_perm(0x33221100, 0x77665544, 0x7531) == 0x77553311, "__byte_perm");
    check(__byte_perm(0x33221180, 0x77665544, 0x0189) == 0x8011ff00,
          "__byte_perm with signs: %#x", __byte_perm(0x33221180, 0x77665544, 0x0189));
    check(__funnelshift_l(0x80000001u, 0x12345678u, 4) == 0x23456788u, "__funnelshift_l");
    check(__funnelshift_r(0x80000001u, 0x12345678u, 4) == 0x88000000u, "__funnelshift_r");
    check(__funnelshift_l(1u, 2u, 32) == 2u && __funnelshift_lc(1u, 2u, 40) == 1u &&
              __funnelshift_r(1u, 2u, 32) == 1u && __funnelshift_rc(1u, 2u, 40) == 2u,
          "funnel shifts by 32 and more");
    check(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __clz(1) == 31 && __clz(0) == 32 &&
              __ffs(0) == 0 && __ffs(8) == 4 && __clzll(1) == 63 && __brev(1u) == 0x80000000u,
          "bit counts");
    check(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu && __mulhi(-1, 5) == -1 &&
              __umul64hi(~0ull, ~0ull) == ~0ull - 1,
          "high halves of products");
    check(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 &&
              __float2int_rn(-2.5f) == -2 && __float2int_rz(-2.7f) == -2 &&
              __float2int_rd(-2.1f) == -3 && __float2int_ru(2.1f) == 3,
          "float to int: rounding");
    check(__float2int_rn(3e9f) == 2147483647 && __float2int_rn(-3e9f) == -2147483647 - 1 &&
              __float2int_rn(NAN) == 0 && __float2uint_rn(-1.0f) == 0 &&
              __float2uint_rn(5e9f) == 0xffffffffu && __float2uint_rn(4e9f) == 4000000000u,
          "float to integer: saturation");
    check(__fmaf_rn(1 + 0x1p-12f, 1 + 0x1p-12f, -1 - 0x1p-11f) == 0x1p-24f, "fma rounds once");
    check(__fadd_rn(__fmul_rn(1 + 0x1p-12f, 1 + 0x1p-12f), -1 - 0x1p-11f) == 0,
          "mul, then add");
    check(rsqrtf(0.25f) == 2 && __frcp_rn(8) == 0.125f && __fdiv_rn(1, 3) == 1.0f / 3,
          "quotients");
    check(min(-1, 2) == -1 && max(2u, 7u) == 7u && min(1.5f, NAN) == 1.5f &&
              max(3, 2.5) == 3.0 && min(3LL, 2) == 2,
          "min and max");
    check(sizeof(float3) == 12 && alignof(float4) == 16 && alignof(uint2) == 8 &&
              alignof(uchar4) == 4 && alignof(ushort4) == 8 && alignof(ulonglong2) == 16 &&
              sizeof(__half2) == 4 && alignof(__nv_bfloat162) == 4,
          "sizes and alignments");
}

int main()
{
    test_scalars();
    for (const char *order : {"FIFO", "LIFO", "RANDOM", "PRIORITY"}) {
        hqqlora_emulated_set_schedule(order, "LATE", 5);
        test_shuffles();
        for (int same : run(shuffle_other_types, 32, 1))
            check(same == 1, "shuffles of other types");
        test_votes();
        test_counting_barriers();
        test_atomics();
    }
    return report_checks();
}

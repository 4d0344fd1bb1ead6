/*
 * The wrappers of ptx_warpgroup.cuh against the PTX ISA, chapter "Asynchronous Warpgroup Level
 * Matrix Multiply-Accumulate": each formula below is written down from there, none is shared
 * with the emulator.
 */
#include "ptx_warpgroup.cuh"

#include <random>
#include <vector>

#include "check.h"
#include "control.h"

extern "C" {
#include "dtype.h"
}

/* ---- wgmma.m64n128k16 and m64n64k16, A in registers. Of warpgroup's thread T, element i is
 *
 *   A  row 16 (T / 32) + T % 32 / 4 (i = 0, 1, 4, 5) or + 8,
 *      column 2 (T % 4) + (i & 1) (i < 4) or + 8
 *   D  row 16 (T / 32) + T % 32 / 4 (i / 2 even) or + 8, column 8 (i / 4) + 2 (T % 4) + (i & 1)
 *
 * B is K-major in shared memory, in atoms of eight rows of 128 bytes with the 128-byte swizzle:
 * bits 4 .. 6 of an address are exclusive-or-ed with its bits 7 .. 9. */

enum { THREADS = 128, COLUMNS_MOST = 128, STEPS = 4, DEPTH = 16 * STEPS };

template <int COLUMNS> struct Registers {
    uint32_t a[STEPS][4];
    float d[COLUMNS / 2];
};

/* d += a b over all steps, a group each; B [columns][depth] as 16-bit elements. */
template <class T, int COLUMNS>
__global__ void multiply(Registers<COLUMNS> *registers, const uint16_t *B, int steps, int apart)
{
    unsigned char *shared = hqq_dynamic_shared<unsigned char>();
    uintptr_t base = (reinterpret_cast<uintptr_t>(shared) + 1023) / 1024 * 1024;
    unsigned char *rows = shared + (base - reinterpret_cast<uintptr_t>(shared)) + apart;
    for (int i = threadIdx.x; i < COLUMNS * DEPTH; i += THREADS) {
        uint32_t at = static_cast<uint32_t>(i / DEPTH * 128 + i % DEPTH * 2);
        at ^= (at >> 7 & 7) << 4;
        memcpy(rows + at, &B[i], 2);
    }
    ptx_warpgroup_publish();
    __syncthreads();
    Registers<COLUMNS> &mine = registers[threadIdx.x];
    ptx_warpgroup_begin();
    for (int step = 0; step < steps; step++) {
        ptx_warpgroup_mma(mine.d, mine.a[step], rows + 32 * step, T());
        ptx_warpgroup_commit();
        if (step == 1) ptx_warpgroup_wait<1>();
    }
    ptx_warpgroup_wait<0>();
    ptx_warpgroup_arrived(mine.d);
}

struct Matrices {
    int A[64][DEPTH], B[COLUMNS_MOST][DEPTH],
        D[64][COLUMNS_MOST]; /* small: every sum is exact */
};

static uint32_t bits_of(int value, hqq_dtype dtype)
{
    float v = static_cast<float>(value);
    return static_cast<uint32_t>(dtype == HQQ_BF16 ? hqq_float_to_bf16(v)
                                                   : hqq_float_to_f16(v));
}

static int row_in_A(int thread, int i)
{
    bool upper = i == 0 || i == 1 || i == 4 || i == 5;
    return 16 * (thread / 32) + thread % 32 / 4 + (upper ? 0 : 8);
}

static int column_in_A(int thread, int i)
{
    return 2 * (thread % 4) + (i & 1) + (i < 4 ? 0 : 8);
}

static int row_in_D(int thread, int i)
{
    return 16 * (thread / 32) + thread % 32 / 4 + (i / 2 % 2 == 0 ? 0 : 8);
}

static int column_in_D(int thread, int i)
{
    return 8 * (i / 4) + 2 * (thread % 4) + (i & 1);
}

template <class T, int COLUMNS>
static void check_product(const Matrices &m, hqq_dtype dtype, int steps, int apart)
{
    std::vector<Registers<COLUMNS>> registers(THREADS);
    for (int thread = 0; thread < THREADS; thread++) {
        for (int step = 0; step < STEPS; step++)
            for (int i = 0; i < 8; i++)
                registers[thread].a[step][i / 2] |=
                    bits_of(m.A[row_in_A(thread, i)][16 * step + column_in_A(thread, i)], dtype)
                    << (16 * (i & 1));
        for (int i = 0; i < COLUMNS / 2; i++)
            registers[thread].d[i] =
                static_cast<float>(m.D[row_in_D(thread, i)][column_in_D(thread, i)]);
    }
    std::vector<uint16_t> B;
    for (const auto &row : m.B)
        for (int value : row) B.push_back(static_cast<uint16_t>(bits_of(value, dtype)));
    hqq_status status =
        hqq_launch(multiply<T, COLUMNS>, dim3(1), dim3(THREADS), 1024 + 128 * COLUMNS + 1024,
                   nullptr, registers.data(), B.data(), steps, apart);
    check(status == HQQ_OK, "wgmma: %s", hqq_last_error());
    for (int thread = 0; thread < THREADS; thread++)
        for (int i = 0; i < COLUMNS / 2; i++) {
            int row = row_in_D(thread, i), column = column_in_D(thread, i);
            int expected = m.D[row][column];
            for (int k = 0; k < 16 * steps; k++) expected += m.A[row][k] * m.B[column][k];
            float got = registers[thread].d[i];
            check(got == static_cast<float>(expected),
                  "wgmma of dtype %d: thread %d, d%d (row %d, column %d): %g, not %d",
                  static_cast<int>(dtype), thread, i, row, column, static_cast<double>(got),
                  expected);
        }
}

static Matrices random_matrices(std::mt19937 &random)
{
    std::uniform_int_distribution<int> small(-9, 9);
    Matrices m;
    for (auto &row : m.A)
        for (int &x : row) x = small(random);
    for (auto &row : m.B)
        for (int &x : row) x = small(random);
    for (auto &row : m.D)
        for (int &x : row) x = small(random);
    return m;
}

int main()
{
    std::mt19937 random(7);
    for (const char *order : {"FIFO", "LIFO", "RANDOM", "PRIORITY"})
        for (const char *when : {"LATE", "EARLY", "MIXED"}) {
            hqqlora_emulated_set_schedule(order, when, 1);
            Matrices m = random_matrices(random);
            check_product<__nv_bfloat16, 128>(m, HQQ_BF16, STEPS, 0);
            check_product<__nv_bfloat16, 64>(m, HQQ_BF16, 3, 1024);
            check_product<__half, 128>(m, HQQ_F16, 3, 1024);
            check_product<__half, 64>(m, HQQ_F16, STEPS, 0);
        }
    return report_checks();
}

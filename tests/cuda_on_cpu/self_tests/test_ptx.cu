/*
 * The PTX wrappers against the tables of the PTX ISA, chapter "Warp-level matrix instructions":
 * each formula below is written down from there, none is shared with the emulator.
 */
#include "ptx.cuh"

#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "control.h"

extern "C" {
#include "dtype.h"
}

/* ---- ldmatrix: "each thread of 8i .. 8i+7 holds the address of one row of matrix i; thread T
 * receives of row T / 4 the elements 2 (T % 4) and 2 (T % 4) + 1". */

enum { ROWS = 32 };

/* elements [32][8] go to shared memory row by row at place[row]; row i is named by lane i. */
__global__ void load_matrices(uint32_t *registers, const uint16_t *elements, const int *place,
                              bool transposed)
{
    uint16_t *shared = hqq_dynamic_shared<uint16_t>();
    int lane = threadIdx.x;
    for (int c = 0; c < 8; c++) shared[place[lane] * 8 + c] = elements[lane * 8 + c];
    __syncthreads();
    uint32_t r[4];
    if (transposed)
        ptx_ldmatrix_x4_trans(r, shared + place[lane] * 8);
    else
        ptx_ldmatrix_x4(r, shared + place[lane] * 8);
    for (int i = 0; i < 4; i++) registers[lane * 4 + i] = r[i];
}

static void test_ldmatrix(bool transposed)
{
    std::vector<uint16_t> elements(ROWS * 8);
    for (int i = 0; i < ROWS * 8; i++)
        elements[i] = static_cast<uint16_t>(0x1001 * (i % 16) + i);
    std::vector<int> place(ROWS); /* scattered: rows need not be neighbours */
    for (int row = 0; row < ROWS; row++) place[row] = row * 11 % 37;
    std::vector<uint32_t> registers(128);
    hqq_status status = hqq_launch(load_matrices, dim3(1), dim3(32), 37 * 16, nullptr,
                                   registers.data(), elements.data(), place.data(), transposed);
    check(status == HQQ_OK, "ldmatrix: %s", hqq_last_error());
    for (int thread = 0; thread < 32; thread++)
        for (int matrix = 0; matrix < 4; matrix++)
            for (int e = 0; e < 2; e++) {
                int row = thread / 4, column = 2 * (thread % 4) + e;
                if (transposed) std::swap(row, column);
                uint32_t expected = elements[(matrix * 8 + row) * 8 + column];
                uint32_t got = registers[thread * 4 + matrix] >> (16 * e) & 0xffff;
                check(got == expected,
                      "ldmatrix%s: thread %d, matrix %d, element %d: %#x, not %#x",
                      transposed ? ".trans" : "", thread, matrix, e, got, expected);
            }
}

/* ---- mma.m16n8k16: element i of thread T's fragment stands at
 *   A  row T / 4 (i = 0, 1, 4, 5) or T / 4 + 8, column 2 (T % 4) + (i & 1) (i < 4) or + 8
 *   B  row 2 (T % 4) + (i & 1) (i < 2) or + 8, column T / 4
 *   D  row T / 4 (i < 2) or T / 4 + 8, column 2 (T % 4) + (i & 1) */

struct Place {
    int row, column;
};

static Place place_in_A(int thread, int i)
{
    bool upper = i == 0 || i == 1 || i == 4 || i == 5;
    return {thread / 4 + (upper ? 0 : 8), 2 * (thread % 4) + (i & 1) + (i < 4 ? 0 : 8)};
}

static Place place_in_B(int thread, int i)
{
    return {2 * (thread % 4) + (i & 1) + (i < 2 ? 0 : 8), thread / 4};
}

static Place place_in_D(int thread, int i)
{
    return {thread / 4 + (i < 2 ? 0 : 8), 2 * (thread % 4) + (i & 1)};
}

struct Fragments {
    uint32_t a[32][4], b[32][2];
    float d[32][4];
};

template <class T> __global__ void multiply(Fragments *cases, int count)
{
    int lane = threadIdx.x;
    for (int i = 0; i < count; i++)
        ptx_mma(cases[i].d[lane], cases[i].a[lane], cases[i].b[lane], T());
}

struct Matrices {
    int A[16][16], B[16][8], D[16][8]; /* small integers: every sum is exact */
};

static Fragments fragments_of(const Matrices &m, hqq_dtype dtype)
{
    Fragments f = {};
    auto bits = [dtype](int value) {
        float v = static_cast<float>(value);
        return static_cast<uint32_t>(dtype == HQQ_BF16 ? hqq_float_to_bf16(v)
                                                       : hqq_float_to_f16(v));
    };
    for (int thread = 0; thread < 32; thread++) {
        for (int i = 0; i < 8; i++) {
            Place p = place_in_A(thread, i);
            f.a[thread][i / 2] |= bits(m.A[p.row][p.column]) << (16 * (i & 1));
        }
        for (int i = 0; i < 4; i++) {
            Place p = place_in_B(thread, i);
            f.b[thread][i / 2] |= bits(m.B[p.row][p.column]) << (16 * (i & 1));
        }
        for (int i = 0; i < 4; i++) {
            Place p = place_in_D(thread, i);
            f.d[thread][i] = static_cast<float>(m.D[p.row][p.column]);
        }
    }
    return f;
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

/* One-hot A at every place with a random B, one-hot B with a random A, and random ones. */
static std::vector<Matrices> mma_cases()
{
    std::mt19937 random(7);
    std::vector<Matrices> cases;
    for (int at = 0; at < 256 + 128 + 8; at++) {
        Matrices m = random_matrices(random);
        if (at < 256)
            for (int i = 0; i < 256; i++) m.A[i / 16][i % 16] = i == at ? 3 : 0;
        else if (at < 256 + 128)
            for (int i = 0; i < 128; i++) m.B[i / 8][i % 8] = i == at - 256 ? 3 : 0;
        cases.push_back(m);
    }
    return cases;
}

template <class T> static void test_mma(hqq_dtype dtype, const char *name)
{
    std::vector<Matrices> cases = mma_cases();
    std::vector<Fragments> fragments;
    for (const Matrices &m : cases) fragments.push_back(fragments_of(m, dtype));
    hqq_status status = hqq_launch(multiply<T>, dim3(1), dim3(32), 0, nullptr, fragments.data(),
                                   static_cast<int>(cases.size()));
    check(status == HQQ_OK, "mma: %s", hqq_last_error());
    for (size_t at = 0; at < cases.size(); at++)
        for (int thread = 0; thread < 32; thread++)
            for (int i = 0; i < 4; i++) {
                Place p = place_in_D(thread, i);
                int expected = cases[at].D[p.row][p.column];
                for (int k = 0; k < 16; k++)
                    expected += cases[at].A[p.row][k] * cases[at].B[k][p.column];
                float got = fragments[at].d[thread][i];
                check(got == static_cast<float>(expected),
                      "mma %s, case %zu: thread %d, d%d (row %d, column %d): %g, not %d", name,
                      at, thread, i, p.row, p.column, static_cast<double>(got), expected);
            }
}

/* ---- cp.async: groups complete in order; an invalid copy writes zeros and reads nothing. */

__global__ void copy_in_groups(uint4 *after_two, uint4 *after_all, const uint4 *in)
{
    uint4 *shared = hqq_dynamic_shared<uint4>();
    for (int group = 0; group < 3; group++) {
        ptx_cp_async_16(shared + group, group == 1 ? nullptr : in + group, group != 1);
        ptx_cp_async_commit();
    }
    ptx_cp_async_wait<1>();
    for (int i = 0; i < 2; i++) after_two[i] = shared[i];
    ptx_cp_async_wait<0>();
    for (int i = 0; i < 3; i++) after_all[i] = shared[i];
}

static bool same(const uint4 &a, const uint4 &b)
{
    return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}

static void test_cp_async(const char *when)
{
    hqqlora_emulated_set_schedule("FIFO", when, 1);
    uint4 in[3] = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}}, two[2], all[3];
    hqq_status status =
        hqq_launch(copy_in_groups, dim3(1), dim3(1), 48, nullptr, &two[0], &all[0], &in[0]);
    check(status == HQQ_OK, "cp.async: %s", hqq_last_error());
    uint4 expected[3] = {in[0], {0, 0, 0, 0}, in[2]};
    for (int i = 0; i < 3; i++) {
        check(i == 2 || same(two[i], expected[i]), "cp.async %s: copy %d of 2", when, i);
        check(same(all[i], expected[i]), "cp.async %s: copy %d of 3", when, i);
    }
    hqqlora_emulated_set_schedule("FIFO", "LATE", 1);
}

/* What a kernel sees that does not wait for the last of two copies: undefined bits, or the
 * data. */
__global__ void look_too_early(unsigned *out, const uint4 *in)
{
    uint4 *shared = hqq_dynamic_shared<uint4>();
    shared[0] = shared[1] = uint4{0, 0, 0, 0};
    for (int i = 0; i < 2; i++) {
        ptx_cp_async_16(shared + i, in + i);
        ptx_cp_async_commit();
    }
    ptx_cp_async_wait<1>();
    out[0] = shared[0].x;
    out[1] = shared[1].x;
    ptx_cp_async_wait<0>();
    out[2] = shared[1].x;
}

static void test_looking_too_early(const char *when, unsigned expected)
{
    hqqlora_emulated_set_schedule("FIFO", when, 1);
    uint4 in[2] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
    unsigned out[3] = {};
    hqq_status status =
        hqq_launch(look_too_early, dim3(1), dim3(1), 32, nullptr, &out[0], &in[0]);
    if (hqqlora_emulated_checks_races())
        check(status == HQQ_DEVICE, "the race checker does not let it");
    else
        check(status == HQQ_OK && out[0] == 1 && out[1] == expected && out[2] == 5,
              "cp.async %s: %#x, %#x before, %#x after the wait", when, out[0], out[1], out[2]);
    hqqlora_emulated_set_schedule("FIFO", "LATE", 1);
}

/* ---- compare and exchange: all 16 bytes count, and what was there comes back. */

__global__ void exchange(uint4 *found, uint4 *at, const uint4 *expected, const uint4 *next)
{
    *found = ptx_compare_exchange_16(at, *expected, *next);
}

static void test_compare_exchange()
{
    const uint4 there = {1, 2, 3, 4}, next = {5, 6, 7, 8};
    for (unsigned wrong = 0; wrong < 16; wrong++) { /* which words differ */
        uint4 at = there, found = {}, expected = there;
        expected.x += wrong & 1, expected.y += wrong >> 1 & 1;
        expected.z += wrong >> 2 & 1, expected.w += wrong >> 3 & 1;
        hqq_status status =
            hqq_launch(exchange, dim3(1), dim3(1), 0, nullptr, &found, &at, &expected, &next);
        check(status == HQQ_OK, "exchange: %s", hqq_last_error());
        check(same(found, there), "exchange: %#x wrong: not what was there", wrong);
        check(same(at, wrong ? there : next), "exchange: %#x wrong: leaves %u", wrong, at.x);
    }
}

/* ---- lop3: bit i of the result is bit (4 a_i + 2 b_i + c_i) of the table. */

template <int... tables>
__global__ void all_lop3(uint32_t *out, const uint32_t *abc,
                         std::integer_sequence<int, tables...>)
{
    uint32_t results[] = {ptx_lop3<tables>(abc[0], abc[1], abc[2])...};
    for (int t = 0; t < 256; t++) out[t] = results[t];
}

static void test_lop3()
{
    std::mt19937 random(11);
    for (int trial = 0; trial < 16; trial++) {
        std::vector<uint32_t> out(256),
            abc = {static_cast<uint32_t>(random()), static_cast<uint32_t>(random()),
                   static_cast<uint32_t>(random())};
        typedef std::make_integer_sequence<int, 256> Tables;
        void (*kernel)(uint32_t *, const uint32_t *, Tables) = all_lop3;
        hqq_status status =
            hqq_launch(kernel, dim3(1), dim3(1), 0, nullptr, out.data(), abc.data(), Tables());
        check(status == HQQ_OK, "lop3: %s", hqq_last_error());
        for (unsigned table = 0; table < 256; table++) {
            uint32_t expected = 0;
            for (int i = 0; i < 32; i++) {
                uint32_t index =
                    (abc[0] >> i & 1) * 4 + (abc[1] >> i & 1) * 2 + (abc[2] >> i & 1);
                expected |= (table >> index & 1) << i;
            }
            check(out[table] == expected, "lop3 %#x: %#x, not %#x", table, out[table],
                  expected);
        }
    }
}

int main()
{
    for (const char *order : {"FIFO", "LIFO", "RANDOM", "PRIORITY"}) {
        hqqlora_emulated_set_schedule(order, "LATE", 1);
        test_ldmatrix(false);
        test_ldmatrix(true);
    }
    hqqlora_emulated_set_schedule("FIFO", "LATE", 1);
    test_mma<__nv_bfloat16>(HQQ_BF16, "bf16");
    test_mma<__half>(HQQ_F16, "fp16");
    for (const char *when : {"LATE", "EARLY", "MIXED"}) test_cp_async(when);
    test_looking_too_early("LATE", 0xffffffffu);
    test_looking_too_early("EARLY", 5);
    test_compare_exchange();
    test_lop3();
    return report_checks();
}

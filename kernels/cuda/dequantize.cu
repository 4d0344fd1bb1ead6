/*
 * out[n - row_begin, k - column_begin] = (q[n,k] - zero) * scale, rounded once to out's dtype.
 *
 * Three kernels, from the fast to the plain; what each needs is a host function beside it.
 *
 * rows      packed row p holds the whole rows p + j P, P = N/per (8, 4, 2 and 1 bits):
 *
 *               k ->      a thread's run of k
 *           p   ........[==========]........      one load from packed
 *               |
 *               |  slot 0  row p      ..[==========]..   16 bytes stored in out
 *               |  slot 1  row p + P  ..[==========]..   16 bytes stored in out
 *               ...
 *
 *           A run is what 16 bytes of out hold: 8 weights (4 of fp32). Neighbouring lanes take
 *           neighbouring runs, so each load and store of a warp touches whole sectors, and a
 *           store 512 bytes on end. Of a block of rows, only packed rows with a wanted row are
 *           read. Axis 1: a run lies in one group. Axis 0: a thread keeps the scales and zeros
 *           of its run and walks down the packed rows that share them, N/G apart.
 *
 * runs      a run lies in one slot, wherever that is (3 bits; codes that ignore rows). For each
 *           run of weights a run of words is read, so 3 bits read 4 bytes a weight, mostly from
 *           L2, where the readers of the other nine slots find them too.
 *
 * elements  one thread an element.
 *
 * bf16 or fp16 out, 4 bits, G = 64, fp32 scale and zero: 2.6 bytes a weight through memory. At
 * 3.0 TB/s on 132 multiprocessors of 1.7 GHz that is 0.195 cycles a weight, in which a
 * multiprocessor issues for 25 lanes. The loop of the rows kernel has 8 instructions a weight
 * on axis 0 and 11 on axis 1 (nvcc 13.0, sm_90).
 */
#include "cuda.cuh"
#include "dequantize.h"
#include "elements.cuh"
#include "reference_elements.h"

enum { RUNS_X = 32, ROWS_Y = 8, THREADS = RUNS_X * ROWS_Y };

typedef struct dequantize_job {
    void *out;
    int64_t ld_out;
    hqq_weight weight;
    hqq_layout layout;
    int64_t row_begin, rows, column_begin, columns; /* the block */
    /* rows kernel */
    int64_t P, first_packed, packed_rows; /* packed rows first_packed .. of P, going round */
    int64_t groups_in_row;                /* axis 1: K/G */
    uint32_t step, rows_a_thread;         /* a thread's packed rows lie `step` apart */
    uint32_t column_tiles;
} dequantize_job;

static dequantize_job make_job(void *out, int64_t ld_out, const hqq_weight *w,
                               int64_t row_begin, int64_t row_end, int64_t column_begin,
                               int64_t column_end)
{
    dequantize_job job = {};
    job.out = out;
    job.ld_out = ld_out;
    job.weight = *w;
    job.layout =
        hqq_layout_make(w->out_features, w->in_features, w->group_size, w->nbits, w->axis);
    job.row_begin = row_begin;
    job.rows = row_end - row_begin;
    job.column_begin = column_begin;
    job.columns = column_end - column_begin;
    return job;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* float(q), q below 2^23: the bits of 2^23 + q, less 2^23. Exact, and no conversion
 * instruction, of which a multiprocessor has fewer. */
HQQ_DEVICE_INLINE float code_from_bits(uint32_t bits)
{
    return __fadd_rn(hqq_bit_cast<float>(bits), -8388608.0f);
}
enum { CODE_BITS = 0x4b000000 };

/* (q - zero) * scale, each step rounded. */
HQQ_DEVICE_INLINE float weight_of(float code, float zero, float scale)
{
    return __fmul_rn(__fadd_rn(code, -zero), scale);
}

/* ---- rows ------------------------------------------------------------------------- */

/* Half of what an H100 keeps resident, with 8 bytes each on their way: enough to hide the
 * memory's latency. Threads beyond that do more rows instead, which saves address arithmetic.
 */
enum { ENOUGH_THREADS = 1 << 17 };

/* Scales and zeros of a run: one each where it lies in a group, else one an element. */
template <int n> struct run_meta {
    float scale[n], zero[n];
};

template <int n>
HQQ_DEVICE_INLINE void load_meta(run_meta<n> &meta, const hqq_weight &w, int64_t group)
{
    if constexpr (n == 1) {
        meta.scale[0] = hqq_load_one(w.scale, w.meta_dtype, group);
        meta.zero[0] = hqq_load_one(w.zero, w.meta_dtype, group);
    } else {
        hqq_load_run(meta.scale, w.scale, w.meta_dtype, group);
        hqq_load_run(meta.zero, w.zero, w.meta_dtype, group);
    }
}

/* Slot j of the packed words, as weights. */
template <int bits, int run, int n>
HQQ_DEVICE_INLINE void decode_slot(float (&weights)[run], const uint32_t (&words)[run / 4],
                                   const run_meta<n> &meta, int j)
{
    constexpr uint32_t mask = ((1u << bits) - 1) * 0x01010101u;
#pragma unroll
    for (int i = 0; i < run; i++) {
        uint32_t codes = words[i / 4] >> hqq_slot_shift(bits, j) & mask;
        float code = code_from_bits(__byte_perm(codes, CODE_BITS, 0x7440 + i % 4));
        weights[i] = weight_of(code, meta.zero[n == 1 ? 0 : i], meta.scale[n == 1 ? 0 : i]);
    }
}

template <class Out, int bits, int axis>
static __global__ void __launch_bounds__(THREADS) dequantize_rows(const dequantize_job job)
{
    constexpr int run = 16 / sizeof(Out), per = 8 / bits;
    uint32_t column_tile = blockIdx.x % job.column_tiles,
             row_tile = blockIdx.x / job.column_tiles;
    int64_t column = static_cast<int64_t>(column_tile * RUNS_X + threadIdx.x) * run;
    if (column >= job.columns) return;
    uint32_t k = static_cast<uint32_t>(job.column_begin + column);

    /* i counts the block's packed rows */
    uint32_t i = row_tile * ROWS_Y + threadIdx.y;
    i = i / job.step * job.step * job.rows_a_thread + i % job.step;
    uint32_t end = static_cast<uint32_t>(job.packed_rows);
    if (i >= end) return;
    if (end > i + job.step * job.rows_a_thread) end = i + job.step * job.rows_a_thread;

    run_meta<axis == 1 ? 1 : run> meta;
    uint32_t group_in_row = axis == 1 ? k / static_cast<uint32_t>(job.layout.G) : 0;
    if (axis == 0) {
        uint32_t meta_row = (static_cast<uint32_t>(job.row_begin) + i) % job.step;
        load_meta(meta, job.weight, meta_row * job.layout.K + k);
    }

    const uint8_t *packed = static_cast<const uint8_t *>(job.weight.packed) + k;
    Out *out = static_cast<Out *>(job.out) + column;
    for (; i < end; i += job.step) {
        int64_t p = job.first_packed + i;
        if (p >= job.P) p -= job.P;
        uint32_t words[run / 4];
        hqq_load_words(words, packed + p * job.layout.K);
#pragma unroll
        for (int j = 0; j < per; j++) {
            int64_t n = p + j * job.P, row = n - job.row_begin;
            if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(job.rows)) continue;
            if (axis == 1) load_meta(meta, job.weight, n * job.groups_in_row + group_in_row);
            float weights[run];
            decode_slot<bits>(weights, words, meta, j);
            hqq_store_run(out + row * job.ld_out, weights);
        }
    }
}

static int rows_kernel_serves(const dequantize_job *job, hqq_dtype dtype)
{
    const hqq_layout *l = &job->layout;
    int bytes = hqq_dtype_bytes(dtype), run = 16 / bytes;
    if (!hqq_rows_align(l) || !hqq_groups_align(l) || l->N > INT32_MAX / 2 ||
        l->K > INT32_MAX / 2)
        return 0;
    if (l->K % run || job->column_begin % run || job->columns % run) return 0;
    if (!hqq_rows_aligned(job->out, job->ld_out, bytes)) return 0;
    if (!hqq_rows_aligned(job->weight.packed, 16, 1)) return 0;
    if (l->axis == 1) return l->G % run == 0;
    /* all slots of a packed row share a row of scales */
    return l->N / l->per % (l->N / l->G) == 0 && hqq_rows_aligned(job->weight.scale, 16, 1) &&
           hqq_rows_aligned(job->weight.zero, 16, 1);
}

template <class Out, int bits>
static hqq_status launch_rows_of(dequantize_job *job, void *stream)
{
    const hqq_layout *l = &job->layout;
    int run = 16 / sizeof(Out);
    job->P = l->N / l->per;
    job->first_packed = job->row_begin % job->P;
    job->packed_rows = job->rows < job->P ? job->rows : job->P;
    job->groups_in_row = l->K / l->G;
    job->column_tiles = static_cast<uint32_t>(divide_up(job->columns / run, RUNS_X));

    int64_t rows_a_thread = job->packed_rows * (job->columns / run) / ENOUGH_THREADS;
    rows_a_thread = rows_a_thread < 1 ? 1 : rows_a_thread > 8 ? 8 : rows_a_thread;
    int64_t step = ROWS_Y;
    if (l->axis == 0) step = l->N / l->G;
    int64_t row_threads = divide_up(job->packed_rows, step * rows_a_thread) * step;
    job->step = static_cast<uint32_t>(step);
    job->rows_a_thread = static_cast<uint32_t>(rows_a_thread);
    int64_t blocks = divide_up(row_threads, ROWS_Y) * job->column_tiles;
    return hqq_launch(
        l->axis == 1 ? dequantize_rows<Out, bits, 1> : dequantize_rows<Out, bits, 0>,
        dim3(static_cast<unsigned>(blocks)), dim3(RUNS_X, ROWS_Y), 0, stream, *job);
}

template <class Out> static hqq_status launch_rows(dequantize_job *job, void *stream)
{
    switch (job->layout.nbits) {
    case 8: return launch_rows_of<Out, 8>(job, stream);
    case 4: return launch_rows_of<Out, 4>(job, stream);
    case 2: return launch_rows_of<Out, 2>(job, stream);
    default: return launch_rows_of<Out, 1>(job, stream);
    }
}

/* ---- runs ------------------------------------------------------------------------- */

template <class Out>
static __global__ void __launch_bounds__(THREADS) dequantize_runs(const dequantize_job job)
{
    constexpr int run = 16 / sizeof(Out);
    uint32_t column_tile = blockIdx.x % job.column_tiles,
             row_tile = blockIdx.x / job.column_tiles;
    int64_t column = static_cast<int64_t>(column_tile * RUNS_X + threadIdx.x) * run;
    int64_t row = static_cast<int64_t>(row_tile) * ROWS_Y + threadIdx.y;
    if (column >= job.columns || row >= job.rows) return;

    const hqq_layout &layout = job.layout;
    int64_t e = (job.row_begin + row) * layout.K + job.column_begin + column;
    int64_t slot = e / layout.words, word = e - slot * layout.words;
    int shift = hqq_slot_shift(layout.nbits, static_cast<int>(slot));
    uint32_t mask = hqq_max_code(layout.nbits), codes[run];
    if (layout.word_bytes == 4) {
        hqq_load_words(codes, static_cast<const uint32_t *>(job.weight.packed) + word);
    } else {
        uint32_t bytes[run / 4];
        hqq_load_words(bytes, static_cast<const uint8_t *>(job.weight.packed) + word);
#pragma unroll
        for (int i = 0; i < run; i++) codes[i] = bytes[i / 4] >> (i % 4 * 8);
    }

    run_meta<run> meta;
    if (layout.axis == 0) {
        load_meta(meta, job.weight, e % layout.groups);
    } else {
        run_meta<1> one;
        load_meta(one, job.weight, e / layout.G);
#pragma unroll
        for (int i = 0; i < run; i++) meta.scale[i] = one.scale[0], meta.zero[i] = one.zero[0];
    }
    float weights[run];
#pragma unroll
    for (int i = 0; i < run; i++)
        weights[i] = weight_of(code_from_bits((codes[i] >> shift & mask) | CODE_BITS),
                               meta.zero[i], meta.scale[i]);
    hqq_store_run(static_cast<Out *>(job.out) + row * job.ld_out + column, weights);
}

static int runs_kernel_serves(const dequantize_job *job, hqq_dtype dtype)
{
    const hqq_layout *l = &job->layout;
    int bytes = hqq_dtype_bytes(dtype), run = 16 / bytes;
    if (job->weight.packing != HQQ_PACKING_HQQ) return 0;
    if (l->K % run || job->column_begin % run || job->columns % run || l->words % run) return 0;
    if (l->axis == 1 ? l->G % run : l->groups % run) return 0;
    return hqq_rows_aligned(job->out, job->ld_out, bytes) &&
           hqq_rows_aligned(job->weight.packed, 16, 1) &&
           hqq_rows_aligned(job->weight.scale, 16, 1) &&
           hqq_rows_aligned(job->weight.zero, 16, 1);
}

template <class Out> static hqq_status launch_runs(dequantize_job *job, void *stream)
{
    int run = 16 / sizeof(Out);
    job->column_tiles = static_cast<uint32_t>(divide_up(job->columns / run, RUNS_X));
    int64_t blocks = divide_up(job->rows, ROWS_Y) * job->column_tiles;
    return hqq_launch(dequantize_runs<Out>, dim3(static_cast<unsigned>(blocks)),
                      dim3(RUNS_X, ROWS_Y), 0, stream, *job);
}

/* ---- elements --------------------------------------------------------------------- */

template <class Out>
static __global__ void __launch_bounds__(THREADS) dequantize_elements(const dequantize_job job)
{
    uint32_t column_tile = blockIdx.x % job.column_tiles,
             row_tile = blockIdx.x / job.column_tiles;
    int64_t column = static_cast<int64_t>(column_tile) * RUNS_X + threadIdx.x;
    int64_t row = static_cast<int64_t>(row_tile) * ROWS_Y + threadIdx.y;
    if (column >= job.columns || row >= job.rows) return;
    float weight =
        hqq_reference_element(&job.weight, job.row_begin + row, job.column_begin + column);
    hqq_from_float(static_cast<Out *>(job.out)[row * job.ld_out + column], weight);
}

template <class Out> static hqq_status launch_elements(dequantize_job *job, void *stream)
{
    job->column_tiles = static_cast<uint32_t>(divide_up(job->columns, RUNS_X));
    int64_t blocks = divide_up(job->rows, ROWS_Y) * job->column_tiles;
    return hqq_launch(dequantize_elements<Out>, dim3(static_cast<unsigned>(blocks)),
                      dim3(RUNS_X, ROWS_Y), 0, stream, *job);
}

/* ----------------------------------------------------------------------------------- */

hqq_status hqq_cuda_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                               const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                               int64_t column_begin, int64_t column_end, void *stream)
{
    dequantize_job job =
        make_job(out, ld_out, weight, row_begin, row_end, column_begin, column_end);
    if (job.rows == 0 || job.columns == 0) return HQQ_OK;
    if (rows_kernel_serves(&job, out_dtype))
        return HQQ_BY_DTYPE(out_dtype, launch_rows, &job, stream);
    if (runs_kernel_serves(&job, out_dtype))
        return HQQ_BY_DTYPE(out_dtype, launch_runs, &job, stream);
    return HQQ_BY_DTYPE(out_dtype, launch_elements, &job, stream);
}

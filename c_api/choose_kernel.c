/*
 * Which kernel serves which shape: the one place. benchmarks/tune.py measures the table's row
 * for the machine it runs on.
 *
 *   direct    reads each code once a few tokens: its time grows with M from the start
 *   tiled     decodes a block once for all tokens, and multiplies at the rate of its tiles
 *   blocked   leaves the product of a decoded block to the caller's GEMM
 *
 * The table says up to how many tokens direct is used, and above that up to how many tiled.
 * Measured on 4096 x 4096, 4 bits, G = 64, cold, against torch's GEMM:
 *
 * AVX-512 BF16: a Zen 5, two threads, and 14336 x 4096, 4096 x 14336 and 1536 x 576 beside
 * that; where they disagree, what loses least. In bf16 forward, tiled takes 0.79 to 0.93 of the
 * time of blocked up to 2048 tokens; in dgrad 0.93 to 1.1 at 1024, but where it decodes into
 * panels (cpu/panels.h) 0.87 to 0.94 at 512 to 2048: there it has no upper end. In fp32 it
 * takes half of the time of blocked at any M; in fp16, which torch multiplies without vectors,
 * a seventh.
 *
 * AMX: a Xeon, two threads. In bf16 tiled passes direct at 6 tokens forward and 7 in dgrad, is
 * half of direct's time at 16, and takes 0.4 to 0.7 of the time of blocked, with torch's GEMM
 * on the same tiles, up to 1024. In fp32 and fp16 few tokens are not for AMX (tiled.c), and
 * direct ends as measured for AVX-512.
 *
 * AVX-512: no instructions for bf16, so as fp32. AVX2: direct's are of the Xeon, restricted to
 * AVX2; fp16's is a guess. Portable: not measured.
 *
 * In fp32 dgrad decodes strip by strip (cpu/decode_floats.h) where the weight lets it, at axis
 * 1: it then passes direct between 4 and 5 tokens on the Zen 5, also without its bf16 and with
 * AVX2 alone; there 6 are left to direct, as on the Xeon it was passed later. With AMX not
 * measured. At axis 0 it decodes residue by residue, and of the time of direct takes, at 5, 8,
 * 12 and 16 tokens, 4 bits .98, 1.03, .93, .90 and 8 bits .88, 1.08, .90, .85; of 14336 x 4096
 * 1.26, 1.5, 1.08, .98; with AVX2 .94, .88, .85 at 5, 8, 12. What does not decode so passes
 * direct at 20 tokens. Forward tiled passes direct at 7, at axis 0 between 6 and 12, at 8 bits
 * before 6, at 2 at 12.
 *
 * Forward, rows of 2048 or more, AVX-512: direct's own time is less there (cpu/dot_rows.h, for
 * 4 bits), and decoding a block for the tiles takes what it takes, so a table by bits and axis
 * says where direct ends. Of tiled's time at 8, 12 and 16 tokens direct takes on the Zen 5:
 *
 *                     4 bits             8 bits             3 bits             1 bit
 *     bf16, axis 1   .87  .99 1.07      .89 1.22 1.16      .72  .99  .98     1.23 1.50 1.59
 *           axis 0   .87  .95  .94      .89 1.11 1.03      .68  .87  .85      .93 1.05 1.08
 *     fp32, axis 1   .75  .86  .88      .84 1.13 1.03      .90 1.06 1.10      .83  .98 1.04
 *           axis 0   .80  .89  .93      .81 1.00  .95      .89 1.08 1.11      .84  .97  .99
 *
 * (2 bits: longer; 8 bits in bf16 at 6 tokens 1.13 and 1.02.) Rows of 1024 and less are passed
 * at 8 to 16 tokens.
 */
#include "hqqlora.h"
#include "cpu/decode_floats.h"
#include "cpu/direct_linear.h"
#include "cpu/isa.h"
#include "cpu/panels.h"

#define ANY INT64_MAX

/* Up to how many tokens. */
typedef struct thresholds {
    int64_t direct, tiled;
} thresholds;

/* By dtype: fp32, fp16, bf16. */
typedef thresholds thresholds_by_dtype[3];

/* Passes: forward, dgrad of weights that it decodes strip by strip, of those that it decodes
 * residue by residue, and of any other. */
static const thresholds_by_dtype table[][4] = {
    [HQQ_ISA_PORTABLE] = {{{8, 0}, {8, 0}, {8, 0}},
                          {{8, 0}, {8, 0}, {8, 0}},
                          {{8, 0}, {8, 0}, {8, 0}},
                          {{8, 0}, {8, 0}, {8, 0}}},
    [HQQ_ISA_AVX2] = {{{24, ANY}, {16, ANY}, {16, ANY}},
                      {{6, ANY}, {6, ANY}, {6, ANY}},
                      {{6, ANY}, {6, ANY}, {6, ANY}},
                      {{16, ANY}, {12, ANY}, {12, ANY}}},
    [HQQ_ISA_AVX512] = {{{6, ANY}, {6, ANY}, {6, ANY}},
                        {{4, ANY}, {4, ANY}, {4, ANY}},
                        {{12, ANY}, {12, ANY}, {12, ANY}},
                        {{16, ANY}, {16, ANY}, {16, ANY}}},
    [HQQ_ISA_AVX512_BF16] = {{{6, ANY}, {6, ANY}, {8, ANY}},
                             {{4, ANY}, {4, ANY}, {6, 1024}},
                             {{12, ANY}, {12, ANY}, {6, 1024}},
                             {{20, ANY}, {16, ANY}, {6, 1024}}},
    [HQQ_ISA_AMX] = {{{12, ANY}, {16, ANY}, {5, ANY}},
                     {{16, ANY}, {16, ANY}, {6, ANY}},
                     {{16, ANY}, {16, ANY}, {6, ANY}},
                     {{16, ANY}, {16, ANY}, {6, ANY}}},
};

/* By [multiplied in fp32, bf16][axis][bits]. */
static const int8_t long_rows[2][2][9] = {
    {{[1] = 16, [2] = 24, [3] = 8, [4] = 24, [8] = 8},
     {[1] = 12, [2] = 24, [3] = 8, [4] = 24, [8] = 8}},
    {{[1] = 8, [2] = 24, [3] = 24, [4] = 24, [8] = 8},
     {[1] = 4, [2] = 12, [3] = 12, [4] = 12, [8] = 8}},
};

/* Up to how many tokens direct serves such a forward product; 0: see the table above. */
static int64_t direct_of_long_rows(const hqq_weight *w, hqq_dtype dtype, int isa)
{
    if (isa != HQQ_ISA_AVX512 && isa != HQQ_ISA_AVX512_BF16) return 0;
    if (!w || w->nbits < 1 || w->nbits > 8 || !hqq_rows_are_long(w)) return 0;
    return long_rows[isa == HQQ_ISA_AVX512_BF16 && dtype == HQQ_BF16][w->axis == 1][w->nbits];
}

/* dgrad of 8 bits in bf16, which direct does not multiply in pairs: tiled takes .91, .87, .97
 * of its time at 5, 6, 7 tokens, and 1.2 at 4; at axis 0 .99 and .80 at 5 and 6; of 1536 x
 * 576 1.25 and 1.1. */
static int64_t direct_of_bytes(const hqq_weight *w, hqq_dtype dtype, int isa, int pass)
{
    int in_pairs = isa == HQQ_ISA_AVX512_BF16 && dtype == HQQ_BF16;
    return in_pairs && (pass == 1 || pass == 2) && w && w->nbits == 8 ? 4 : 0;
}

hqq_kernel hqq_choose_kernel(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                             int32_t transpose, hqq_isa isa)
{
    int row = isa >= HQQ_ISA_PORTABLE && isa <= HQQ_ISA_AMX ? (int)isa : HQQ_ISA_PORTABLE;
    int column = dtype == HQQ_F16 || dtype == HQQ_BF16 ? (int)dtype : HQQ_F32;
    int pass = !transpose                             ? 0
               : !weight || hqq_strips_decode(weight) ? 1
               : hqq_residues_decode(weight)          ? 2
                                                      : 3;
    thresholds up_to = table[row][pass][column];
    int64_t direct = pass == 0 ? direct_of_long_rows(weight, dtype, row)
                               : direct_of_bytes(weight, dtype, row, pass);
    if (M <= (direct ? direct : up_to.direct)) return HQQ_KERNEL_DIRECT;
    if (M <= up_to.tiled || hqq_panels_serve(weight, M, dtype, transpose, isa))
        return HQQ_KERNEL_TILED;
    return HQQ_KERNEL_BLOCKED;
}

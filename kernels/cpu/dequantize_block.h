/* A block of W in floats: what every product starts from that does not multiply the codes as
 * they are unpacked. One thread; callable inside a chunk. */
#ifndef HQQ_KERNELS_CPU_DEQUANTIZE_BLOCK_H
#define HQQ_KERNELS_CPU_DEQUANTIZE_BLOCK_H

#include "hqqlora.h"
#include "isa.h"

/* out [rows, column_end - column_begin] = W[row + i * row_step, column_begin:column_end],
 * row i at out + i * ld elements: fp32 (q - zero) * scale, rounded once to dtype. Steps other
 * than 1 gather rows that share packed words (N/per) or scales (axis 0: N/G). Writes nothing
 * between the rows. */
HQQ_ISA_DECLARE(void, hqq_dequantize_rows,
                (void *out, int64_t ld, hqq_dtype dtype, const hqq_weight *weight, int64_t row,
                 int64_t row_step, int64_t rows, int64_t column_begin, int64_t column_end));

/* The same of a weight in planes, and of each row also the one N/2 behind it, `second` elements
 * behind it in out (> 0): both are of the same bytes, which are put together once. */
HQQ_ISA_DECLARE(void, hqq_dequantize_halves,
                (void *out, int64_t ld, int64_t second, hqq_dtype dtype,
                 const hqq_weight *weight, int64_t row, int64_t row_step, int64_t rows,
                 int64_t column_begin, int64_t column_end));

/* hqq_dequantize_rows of the rows row_begin to row_end. */
void hqq_dequantize_block(void *out, int64_t ld, hqq_dtype dtype, const hqq_weight *weight,
                          int64_t row_begin, int64_t row_end, int64_t column_begin,
                          int64_t column_end, hqq_isa isa);

#endif

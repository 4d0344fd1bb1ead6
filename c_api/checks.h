/* Argument checks shared by the entry points: each failure names the values. */
#ifndef HQQ_C_API_CHECKS_H
#define HQQ_C_API_CHECKS_H

#include "hqqlora.h"

/* Whether rows * columns, neither negative, is more than 2^56: far beyond any memory, and far
 * enough from overflow for byte counts. */
int hqq_too_many(int64_t rows, int64_t columns);

/* `packing` is one that there is, and that fits the weight, whose shape must have been checked.
 */
hqq_status hqq_check_packing(const char *name, hqq_packing packing, const hqq_weight *weight);

/* weight->packed is aligned to its words. */
hqq_status hqq_check_packed(const hqq_weight *weight);

/* N, K, G, nbits, axis, packing and meta_dtype fit together and N*K does not overflow. */
hqq_status hqq_check_shape(const hqq_weight *weight);

/* And the arrays are there. */
hqq_status hqq_check_weight(const hqq_weight *weight);

hqq_status hqq_check_dtype(const char *name, hqq_dtype dtype);

/* rank, scaling, dropout, dtype and pointers, against x's dtype. What is behind the pointers,
 * the seed too, is not read. */
hqq_status hqq_check_lora(const hqq_lora *lora, const hqq_weight *weight, hqq_dtype dtype);

/* The same where one of A and B is not read, and may be NULL. */
hqq_status hqq_check_factors(const hqq_lora *lora, const hqq_weight *weight, hqq_dtype dtype,
                             int reads_A, int reads_B);

/* data lies at a multiple of the `bytes` of its elements. */
hqq_status hqq_check_aligned(const char *name, const void *data, int64_t bytes);

/* A [rows, columns] matrix of dtype with row stride ld behind a pointer that may be NULL only
 * when it is empty. */
hqq_status hqq_check_matrix(const char *name, const void *data, int64_t rows, int64_t columns,
                            int64_t ld, hqq_dtype dtype);

hqq_status hqq_check_context(const hqq_context *context);

#endif

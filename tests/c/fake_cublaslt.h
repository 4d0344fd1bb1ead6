/* What fake_cublaslt.c tells of itself. */
#ifndef HQQ_TESTS_FAKE_CUBLASLT_H
#define HQQ_TESTS_FAKE_CUBLASLT_H

#include <stdint.h>

typedef struct fake_cublaslt_record {
    int handles, heuristics, products; /* calls */
    int living;                        /* descriptors made and not destroyed */
    int wrong_algorithm;               /* products with an algorithm chosen for another one */
    int refuse;                        /* set by the test: the heuristic finds nothing */
    uint64_t workspace_bytes;          /* of the last product, and its preferences */
    uint32_t reductions, align_first, align_second, align_result;
} fake_cublaslt_record;

/* fake_cublaslt_record *fake_cublaslt(void) */
typedef fake_cublaslt_record *fake_cublaslt_fn(void);

#endif

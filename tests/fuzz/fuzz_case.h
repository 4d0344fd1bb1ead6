/* One call: its fields, the descriptors and sizes that they stand for, and its buffers. */
#ifndef HQQ_FUZZ_CASE_H
#define HQQ_FUZZ_CASE_H

#include "buffers.h"
#include "decode.h"
#include "hqqlora.h"

typedef struct fuzz_case {
    fuzz_fields fields;
    fuzz_buffers buffers;
    int64_t N, K, M, R;
    int64_t experts;                   /* 1 but in the grouped entries */
    int64_t words, word_bytes, groups; /* of hqq_layout_of; -1 where it refuses the shape */
    hqq_dtype dtype, bias_dtype, W_dtype;
    int64_t stride_x, stride_dy, stride_out;
    hqq_weight weight;
    hqq_lora lora;
    hqq_routing routing;
    hqq_context context;
    hqq_quantize_options options;
    size_t workspace_bytes; /* of the call, set by case_workspace */
} fuzz_case;

/* All that has no array: then the functions below give what a call takes. */
void make_case(fuzz_case *c, const fuzz_fields *fields, int grouped);

/* How many instruction sets and kernels the library takes, HQQ_..._AUTO included: it is asked,
 * so that a new one is tried without a word here. decode_enum gives what is beyond, too. */
int known_isas(void);
int known_kernels(void);

const hqq_weight *case_shape(fuzz_case *c);  /* pointers all NULL */
const hqq_weight *case_weight(fuzz_case *c); /* with its arrays */
const hqq_lora *case_lora(fuzz_case *c);
const hqq_routing *case_routing(fuzz_case *c); /* and sets M: to be called before the next */
const hqq_context *case_context(fuzz_case *c);

/* A matrix of `rows` rows of `columns`, `stride` apart; an input or an output. */
const void *case_rows(fuzz_case *c, enum which which, int64_t rows, int64_t columns,
                      int64_t stride, hqq_dtype dtype);
void *case_output(fuzz_case *c, enum which which, fuzz_count elements, int bytes);

/* The elements of all experts' arrays, of one expert's; -1 where that is negative or absurd. */
fuzz_count of_experts(const fuzz_case *c, fuzz_count elements);

/* The workspace that hqq_workspace_size asks for, or a wrong one; after all other arrays. */
void *case_workspace(fuzz_case *c, const hqq_lora *lora, int grouped);

/* A workspace of the bytes that are needed, or a wrong one; empty or none where the question
 * how many are was refused with `status`. */
void *workspace_of(fuzz_case *c, hqq_status status, size_t needed);

int bytes_of(hqq_dtype dtype);

#endif

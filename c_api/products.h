/* What the entry points of single and of grouped products have in common: their checks, and
 * where their workspace comes from. */
#ifndef HQQ_C_API_PRODUCTS_H
#define HQQ_C_API_PRODUCTS_H

#include "backend.h"

/* Each checks its arguments, and takes adapters of rank 0, which add nothing, away: below this
 * room they do not exist. */
hqq_status hqq_prepare_workspace_size(const size_t *bytes, const hqq_weight *weight,
                                      const hqq_lora **lora, int64_t M, hqq_dtype dtype,
                                      const hqq_context *context);
hqq_status hqq_prepare_forward(hqq_forward *f, const hqq_context *context);
hqq_status hqq_prepare_backward(hqq_backward *b, const hqq_context *context);

/* A stride that no row is reached by may be anything: below this room it is a sound one. */
void hqq_settle_stride(int64_t *ld, int64_t rows, int64_t columns);

/* The whole of a product, from its checks on. */
hqq_status hqq_run_forward(hqq_forward *f, void *workspace, size_t workspace_bytes,
                           const hqq_context *context);
hqq_status hqq_run_backward(hqq_backward *b, void *workspace, size_t workspace_bytes,
                            const hqq_context *context);

/* Whether there is nothing to write. */
int hqq_is_empty_forward(const hqq_forward *f);

/* Bytes of workspace for one product; an empty one needs none. */
hqq_status hqq_bytes_needed(size_t *bytes, const hqq_weight *weight, const hqq_lora *lora,
                            int64_t M, hqq_dtype dtype, const hqq_context *context);

/* The caller's workspace, or our own for the time of one call. */
typedef struct hqq_borrowed_workspace {
    void *memory;
    int owned;
} hqq_borrowed_workspace;

hqq_status hqq_borrow_workspace(hqq_borrowed_workspace *w, size_t needed, void *given,
                                size_t given_bytes);
void hqq_return_workspace(hqq_borrowed_workspace *w);

#endif

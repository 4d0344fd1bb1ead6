/* What a context may lend: nothing, something that works, something that fails. */
#ifndef HQQ_FUZZ_CALLBACKS_H
#define HQQ_FUZZ_CALLBACKS_H

#include "hqqlora.h"

/* Bits 0 and 1 of the field choose parallel_for, bits 2 and 3 gemm. */
void lend_callbacks(hqq_context *context, uint32_t field);

#endif

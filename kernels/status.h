/* Statuses with a message: every error text of the library passes through hqq_fail. */
#ifndef HQQ_KERNELS_STATUS_H
#define HQQ_KERNELS_STATUS_H

#include "hqqlora.h"

/* Stores a printf-formatted message for this thread and returns status. */
__attribute__((format(printf, 2, 3))) hqq_status hqq_fail(hqq_status status, const char *format,
                                                          ...);

/* Empties this thread's message: the first act of every entry point. */
void hqq_clear_error(void);

/* Returns from the enclosing function if `call` did not give HQQ_OK. */
#define HQQ_TRY(call)                          \
    do {                                       \
        hqq_status status_ = (call);           \
        if (status_ != HQQ_OK) return status_; \
    } while (0)

#endif

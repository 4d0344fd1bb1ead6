/* The table of entry points, each as a call of a case. */
#ifndef HQQ_FUZZ_ENTRIES_H
#define HQQ_FUZZ_ENTRIES_H

#include "fuzz_case.h"

typedef struct fuzz_entry {
    const char *name;
    hqq_status (*call)(fuzz_case *c);
    int grouped;
} fuzz_entry;

extern const fuzz_entry fuzz_entries[];
extern const int fuzz_entry_count;

#endif

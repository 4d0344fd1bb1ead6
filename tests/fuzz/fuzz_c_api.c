/* Every entry point of hqqlora.h under whatever arguments: it returns a status, never crashes,
 * says what is wrong, and a refused call has written nothing. The table: how often each entry
 * was called, and how often it returned which status. */
#include <stdio.h>
#include <stdlib.h>

#include "entries.h"
#ifdef FUZZ_CUDA
#include "control.h"
#endif

static long counts[32][HQQ_DEVICE + 1];

static void print_counts(void)
{
    if (!getenv("HQQLORA_FUZZ_COUNTS")) return;
    fprintf(stderr, "%-30s %10s %10s %10s %10s %10s\n", "entry", "ok", "invalid", "no memory",
            "non-finite", "callback");
    for (int e = 0; e < fuzz_entry_count; e++)
        fprintf(stderr, "%-30s %10ld %10ld %10ld %10ld %10ld\n", fuzz_entries[e].name,
                counts[e][HQQ_OK], counts[e][HQQ_INVALID], counts[e][HQQ_NO_MEMORY],
                counts[e][HQQ_NON_FINITE], counts[e][HQQ_CALLBACK]);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    atexit(print_counts);
    return 0;
}

static void fail(const fuzz_entry *entry, const char *what, hqq_status status)
{
    fprintf(stderr, "%s: %s; status %d, '%s'\n", entry->name, what, (int)status,
            hqq_last_error());
    abort();
}

static void check(const fuzz_entry *entry, const fuzz_case *c, hqq_status status)
{
    if ((int)status < HQQ_OK || status > HQQ_DEVICE) fail(entry, "no status", status);
    if ((status == HQQ_OK) != (hqq_last_error()[0] == '\0'))
        fail(entry, "a message where nothing failed, or none where something did", status);
    if (status == HQQ_DEVICE) fail(entry, "a launch has failed", status);
    if (status != HQQ_OK && status != HQQ_CALLBACK && !outputs_untouched(&c->buffers))
        fail(entry, "a refused call has written outputs", status);
    uint32_t lent = c->fields.callbacks;
    if (status == HQQ_CALLBACK && (lent & 3) != 2 && (lent >> 2 & 3) != 2)
        fail(entry, "a callback that does not fail has failed", status);
}

/* A GPU has no instruction set to choose: there the field says in which order threads run. */
static void choose_schedule(const fuzz_fields *fields)
{
#ifdef FUZZ_CUDA
    static const char *const orders[] = {"FIFO", "LIFO", "RANDOM", "PRIORITY"};
    static const char *const arrivals[] = {"LATE", "EARLY", "MIXED"};
    hqqlora_emulated_set_schedule(orders[fields->isa % 4], arrivals[fields->isa / 4 % 3],
                                  fields->seed);
#else
    (void)fields;
#endif
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_fields fields = decode_fields(data, size);
    int e = (int)(fields.entry % (uint32_t)fuzz_entry_count);
    fuzz_case c;
    choose_schedule(&fields);
    make_case(&c, &fields, fuzz_entries[e].grouped);
    hqq_status status = fuzz_entries[e].call(&c);
    check(&fuzz_entries[e], &c, status);
    counts[e][status]++;
    free_buffers(&c.buffers);
    return 0;
}

/* Codes to words and back. Slot j of the words w .. w + n holds the elements j * words + w ..:
 * each slot of a chunk of words is one contiguous run of codes, and chunks share nothing. The
 * loops below are plain enough for the compiler to vectorize; they run at the speed of memory.
 */
#include <string.h>

#include "format.h"
#include "integers.h"
#include "parallel.h"
#include "backend.h"
#include "status.h"

enum { CHUNK_WORDS = 1 << 14 };

typedef struct pack_run {
    hqq_layout layout;
    uint8_t *codes;
    char *words;
} pack_run;

/* The codes of one slot in words [begin, begin + count), fewer or none in the last slots. */
typedef struct slot_run {
    uint8_t *codes;
    int64_t count;
    int shift;
} slot_run;

static slot_run slot_run_of(const pack_run *run, int slot, int64_t begin, int64_t count)
{
    const hqq_layout *l = &run->layout;
    int64_t first = slot * l->words + begin, left = l->elements - first;
    if (left <= 0) return (slot_run){0};
    return (slot_run){.codes = run->codes + first,
                      .count = left < count ? left : count,
                      .shift = hqq_slot_shift(l->nbits, slot)};
}

static void add_to_bytes(uint8_t *restrict words, const uint8_t *restrict codes, int64_t n,
                         int shift)
{
    for (int64_t i = 0; i < n; i++) words[i] |= (uint8_t)(codes[i] << shift);
}

static void add_to_words(uint32_t *restrict words, const uint8_t *restrict codes, int64_t n,
                         int shift)
{
    for (int64_t i = 0; i < n; i++) words[i] |= (uint32_t)codes[i] << shift;
}

static void take_from_bytes(uint8_t *restrict codes, const uint8_t *restrict words, int64_t n,
                            int shift, int mask)
{
    for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(words[i] >> shift & mask);
}

static void take_from_words(uint8_t *restrict codes, const uint32_t *restrict words, int64_t n,
                            int shift, int mask)
{
    for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(words[i] >> shift & (uint32_t)mask);
}

static int64_t chunk_words(const hqq_layout *l, int64_t chunk, int64_t *begin)
{
    *begin = chunk * CHUNK_WORDS;
    return l->words - *begin < CHUNK_WORDS ? l->words - *begin : CHUNK_WORDS;
}

static hqq_status pack_chunk(int64_t chunk, void *scratch, void *data)
{
    (void)scratch;
    const pack_run *run = data;
    const hqq_layout *l = &run->layout;
    int64_t begin, count = chunk_words(l, chunk, &begin);
    char *words = run->words + begin * l->word_bytes;
    memset(words, 0, (size_t)(count * l->word_bytes));
    for (int slot = 0; slot < l->per; slot++) {
        slot_run s = slot_run_of(run, slot, begin, count);
        if (l->word_bytes == 4)
            add_to_words((uint32_t *)words, s.codes, s.count, s.shift);
        else
            add_to_bytes((uint8_t *)words, s.codes, s.count, s.shift);
    }
    return HQQ_OK;
}

static hqq_status unpack_chunk(int64_t chunk, void *scratch, void *data)
{
    (void)scratch;
    const pack_run *run = data;
    const hqq_layout *l = &run->layout;
    int64_t begin, count = chunk_words(l, chunk, &begin);
    const char *words = run->words + begin * l->word_bytes;
    int mask = hqq_max_code(l->nbits);
    for (int slot = 0; slot < l->per; slot++) {
        slot_run s = slot_run_of(run, slot, begin, count);
        if (l->word_bytes == 4)
            take_from_words(s.codes, (const uint32_t *)words, s.count, s.shift, mask);
        else
            take_from_bytes(s.codes, (const uint8_t *)words, s.count, s.shift, mask);
    }
    return HQQ_OK;
}

static hqq_status for_each_chunk_of_words(hqq_chunk_fn fn, void *words, uint8_t *codes,
                                          const hqq_weight *w, const hqq_context *context)
{
    pack_run run = {.layout = hqq_layout_make(w->out_features, w->in_features, w->group_size,
                                              w->nbits, w->axis),
                    .codes = codes,
                    .words = words};
    int64_t chunks = hqq_ceil_div(run.layout.words, CHUNK_WORDS);
    return hqq_for_each_chunk(chunks, fn, &run, 0, context);
}

hqq_status hqq_backend_pack(void *packed, const uint8_t *codes, const hqq_weight *w,
                            const hqq_context *context)
{
    int64_t elements = w->out_features * w->in_features;
    for (int64_t e = 0; e < elements; e++)
        if (codes[e] > hqq_max_code(w->nbits))
            return hqq_fail(HQQ_INVALID, "codes[%lld] is %d; %d bits hold 0 to %d",
                            (long long)e, codes[e], w->nbits, hqq_max_code(w->nbits));
    return for_each_chunk_of_words(pack_chunk, packed, (uint8_t *)codes, w, context);
}

hqq_status hqq_backend_unpack(uint8_t *codes, const hqq_weight *w, const hqq_context *context)
{
    return for_each_chunk_of_words(unpack_chunk, (void *)w->packed, codes, w, context);
}

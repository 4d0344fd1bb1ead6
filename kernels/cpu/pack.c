/* Codes to words, or to planes, and back. Slot j of the words w .. w + n holds the elements j *
 * words + w ..: each slot of a chunk of words is one contiguous run of codes, and chunks share
 * nothing. The loops below are plain enough for the compiler to vectorize; they run at the
 * speed of memory.
 */
#include <string.h>

#include "integers.h"
#include "parallel.h"
#include "backend.h"
#include "status.h"
#include "weight_layout.h"

enum { CHUNK_WORDS = 1 << 14 };

/* layout: of the words. A weight to repack takes the place of the codes. */
typedef struct pack_run {
    hqq_layout layout;
    uint8_t *codes;
    char *words;
    const void *packed;
    hqq_layout packed_layout;
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
    return (slot_run){.codes = run->codes ? run->codes + first : NULL,
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

/* In planes: bits of codes to a plane of 2 bits and one of 1. */
static void add_to_planes(uint8_t *restrict twos, uint8_t *restrict ones,
                          const uint8_t *restrict codes, int64_t n, int two, int one)
{
    for (int64_t i = 0; i < n; i++) twos[i] |= (uint8_t)(codes[i] >> 1 << two);
    for (int64_t i = 0; i < n; i++) ones[i] |= (uint8_t)((codes[i] & 1) << one);
}

static void take_from_planes(uint8_t *restrict codes, const uint8_t *restrict twos,
                             const uint8_t *restrict ones, int64_t n, int two, int one)
{
    for (int64_t i = 0; i < n; i++)
        codes[i] = (uint8_t)((twos[i] >> two & 3) << 1 | (ones[i] >> one & 1));
}

/* codes [n] = those of the elements from e on, in any layout. */
static void read_codes(uint8_t *codes, const void *packed, const hqq_layout *l, int64_t e,
                       int64_t n)
{
    int64_t eighth = l->elements / 8, slot_words = l->planes ? eighth : l->words;
    while (n > 0) {
        int slot = (int)(e / slot_words);
        int64_t word = e - slot * slot_words, count = hqq_least(n, slot_words - word);
        if (l->planes) {
            const uint8_t *twos = (const uint8_t *)packed + slot % 2 * eighth + word,
                          *ones = (const uint8_t *)packed + 2 * eighth + word;
            take_from_planes(codes, twos, ones, count, hqq_slot_shift(2, slot / 2),
                             hqq_slot_shift(1, slot));
        } else if (l->word_bytes == 4) {
            take_from_words(codes, (const uint32_t *)packed + word, count,
                            hqq_slot_shift(l->nbits, slot), hqq_max_code(l->nbits));
        } else {
            take_from_bytes(codes, (const uint8_t *)packed + word, count,
                            hqq_slot_shift(l->nbits, slot), hqq_max_code(l->nbits));
        }
        codes += count, e += count, n -= count;
    }
}

/* Codes of a run to pack: as they were given, or of the weight to repack, in scratch. */
static const uint8_t *codes_of_run(const pack_run *run, int64_t e, int64_t n, void *scratch)
{
    if (!run->packed) return run->codes + e;
    read_codes(scratch, run->packed, &run->packed_layout, e, n);
    return scratch;
}

static int64_t chunk_words(const hqq_layout *l, int64_t chunk, int64_t *begin)
{
    *begin = chunk * CHUNK_WORDS;
    return l->words - *begin < CHUNK_WORDS ? l->words - *begin : CHUNK_WORDS;
}

static hqq_status pack_chunk(int64_t chunk, void *scratch, void *data)
{
    const pack_run *run = data;
    const hqq_layout *l = &run->layout;
    int64_t begin, count = chunk_words(l, chunk, &begin);
    char *words = run->words + begin * l->word_bytes;
    memset(words, 0, (size_t)(count * l->word_bytes));
    for (int slot = 0; slot < l->per; slot++) {
        slot_run s = slot_run_of(run, slot, begin, count);
        const uint8_t *codes = codes_of_run(run, slot * l->words + begin, s.count, scratch);
        if (l->word_bytes == 4)
            add_to_words((uint32_t *)words, codes, s.count, s.shift);
        else
            add_to_bytes((uint8_t *)words, codes, s.count, s.shift);
    }
    return HQQ_OK;
}

/* Of planes a chunk is a stretch of the eighths: its bytes of all slots. */
static hqq_status pack_planes_chunk(int64_t chunk, void *scratch, void *data)
{
    const pack_run *run = data;
    int64_t eighth = run->layout.elements / 8, begin = chunk * CHUNK_WORDS,
            count = hqq_least(eighth - begin, CHUNK_WORDS);
    uint8_t *twos = (uint8_t *)run->words + begin, *ones = twos + 2 * eighth;
    memset(twos, 0, (size_t)count);
    memset(twos + eighth, 0, (size_t)count);
    memset(ones, 0, (size_t)count);
    for (int slot = 0; slot < 8; slot++)
        add_to_planes(twos + slot % 2 * eighth, ones,
                      codes_of_run(run, slot * eighth + begin, count, scratch), count,
                      hqq_slot_shift(2, slot / 2), hqq_slot_shift(1, slot));
    return HQQ_OK;
}

static hqq_status unpack_planes_chunk(int64_t chunk, void *scratch, void *data)
{
    (void)scratch;
    const pack_run *run = data;
    int64_t begin = chunk * CHUNK_WORDS;
    read_codes(run->codes + begin, run->words, &run->layout, begin,
               hqq_least(run->layout.elements - begin, CHUNK_WORDS));
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

static hqq_status for_each_chunk_of_words(hqq_chunk_fn fn, const pack_run *run,
                                          const hqq_context *context)
{
    return hqq_for_each_chunk(hqq_ceil_div(run->layout.words, CHUNK_WORDS), fn, (void *)run,
                              run->packed ? CHUNK_WORDS : 0, context);
}

static hqq_status pack_run_of(const pack_run *run, const hqq_context *context)
{
    if (!run->layout.planes) return for_each_chunk_of_words(pack_chunk, run, context);
    return hqq_for_each_chunk(hqq_ceil_div(run->layout.elements / 8, CHUNK_WORDS),
                              pack_planes_chunk, (void *)run, run->packed ? CHUNK_WORDS : 0,
                              context);
}

hqq_status hqq_backend_pack(void *packed, const uint8_t *codes, const hqq_weight *w,
                            const hqq_context *context)
{
    int64_t elements = w->out_features * w->in_features;
    for (int64_t e = 0; e < elements; e++)
        if (codes[e] > hqq_max_code(w->nbits))
            return hqq_fail(HQQ_INVALID, "codes[%lld] is %d; %d bits hold 0 to %d",
                            (long long)e, codes[e], w->nbits, hqq_max_code(w->nbits));
    const pack_run run = {
        .layout = hqq_stored_layout(w), .codes = (uint8_t *)codes, .words = packed};
    return pack_run_of(&run, context);
}

hqq_status hqq_backend_unpack(uint8_t *codes, const hqq_weight *w, const hqq_context *context)
{
    const pack_run run = {
        .layout = hqq_stored_layout(w), .codes = codes, .words = (void *)w->packed};
    if (!run.layout.planes) return for_each_chunk_of_words(unpack_chunk, &run, context);
    return hqq_for_each_chunk(hqq_ceil_div(run.layout.elements, CHUNK_WORDS),
                              unpack_planes_chunk, (void *)&run, 0, context);
}

hqq_status hqq_backend_repack(void *packed, hqq_packing packing, const hqq_weight *w,
                              const hqq_context *context)
{
    const pack_run run = {.layout = hqq_layout_packed_as(w, packing),
                          .words = packed,
                          .packed = w->packed,
                          .packed_layout = hqq_stored_layout(w)};
    return pack_run_of(&run, context);
}

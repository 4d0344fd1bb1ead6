#include "buffers.h"

#include <stdlib.h>
#include <string.h>

#define PATTERN          0xa5
#define MOST_BYTES       (1 << 21)
#define REFUSED_ELEMENTS ((fuzz_count)1 << 56)

uint64_t fuzz_random(fuzz_buffers *b)
{
    b->state ^= b->state >> 12;
    b->state ^= b->state << 25;
    b->state ^= b->state >> 27;
    return b->state;
}

/* A word of one or two values: numbers around 1, or what `values` says. */
static uint64_t value_word(fuzz_buffers *b, int bytes)
{
    static const uint64_t same[] = {0,
                                    ~0ull,
                                    0x7f7f7f7f7f7f7f7f,
                                    0x7f8000007f800000,
                                    0x7c007c007c007c00,
                                    0x0001000100000001};
    uint64_t bits = fuzz_random(b);
    if (b->values % 16 == 1) return bits;
    if (b->values % 16 >= 8 && b->values % 16 < 14) return same[b->values % 16 - 8];
    if (bytes == 4) return (bits & 0x807fffff807fffff) | 0x3f0000003f000000;
    if (bytes == 2) return (bits & 0x83ff83ff83ff83ff) | 0x3c003c003c003c00;
    return bits;
}

static void fill(fuzz_buffers *b, char *memory, size_t bytes, int element_bytes)
{
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = value_word(b, element_bytes);
        memcpy(memory + i, &word, bytes - i < 8 ? bytes - i : 8);
    }
}

static char *give(fuzz_buffers *b, enum which which, fuzz_count elements, int element_bytes,
                  int output)
{
    if (b->null >> which & 1) return NULL;
    if (elements < 0 || elements > REFUSED_ELEMENTS) elements = 1;
    if (elements * element_bytes > MOST_BYTES) return NULL;
    size_t offset = b->misaligned >> which & 1;
    size_t bytes = (size_t)elements * (size_t)element_bytes + offset;
    char *memory = malloc(bytes);
    if (!memory) abort();
    if (output)
        memset(memory, PATTERN, bytes);
    else
        fill(b, memory + offset, bytes - offset, element_bytes);
    b->held[b->count].memory = memory;
    b->held[b->count].bytes = bytes;
    b->held[b->count++].output = output;
    return memory + offset;
}

const void *give_input(fuzz_buffers *b, enum which which, fuzz_count elements, int bytes)
{
    return give(b, which, elements, bytes, 0);
}

void *give_output(fuzz_buffers *b, enum which which, fuzz_count elements, int bytes)
{
    return give(b, which, elements, bytes, 1);
}

const uint8_t *give_codes(fuzz_buffers *b, fuzz_count elements, int nbits)
{
    char *codes = give(b, CODES, elements, 1, 0);
    if (codes && b->values % 16 != 1 && elements >= 0 && elements <= MOST_BYTES)
        for (int64_t i = 0; i < (int64_t)elements; i++)
            codes[i] &= (char)((1 << (nbits & 15)) - 1);
    return (const uint8_t *)codes;
}

void *give_workspace(fuzz_buffers *b, size_t bytes)
{
    void *memory = NULL;
    if (bytes > 4 * MOST_BYTES) return NULL;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1) != 0) abort();
    b->held[b->count].memory = memory;
    b->held[b->count].bytes = bytes;
    b->held[b->count++].output = 0;
    return memory;
}

int outputs_untouched(const fuzz_buffers *b)
{
    for (int i = 0; i < b->count; i++)
        for (size_t j = 0; b->held[i].output && j < b->held[i].bytes; j++)
            if ((uint8_t)b->held[i].memory[j] != PATTERN) return 0;
    return 1;
}

void free_buffers(fuzz_buffers *b)
{
    for (int i = 0; i < b->count; i++) free(b->held[i].memory);
}

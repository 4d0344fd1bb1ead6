/* Arrays of exactly the size that a call may touch, so that a sanitizer sees any access beyond.
 *
 * An array that nobody could give, because it is too large, is NULL instead. An array whose
 * size is negative or beyond 2^56 elements, which the library must refuse, is one element. */
#ifndef HQQ_FUZZ_BUFFERS_H
#define HQQ_FUZZ_BUFFERS_H

#include <stddef.h>
#include <stdint.h>

typedef __int128 fuzz_count; /* of elements: no product of a few sizes overflows it */

/* Every pointer that an entry point takes, as a bit of the fields `null` and `misaligned`. */
enum which {
    PACKED,
    SCALE,
    ZERO,
    CODES,
    X,
    DY,
    Y,
    DX,
    XA,
    BIAS,
    LORA_A,
    LORA_B,
    DA,
    DB,
    OUT,
    WEIGHTS,
    WEIGHT,
    LORA,
    ROUTING,
    OFFSETS,
    OPTIONS,
    BYTES,
    SEED,
    IMPORTANCE,
    WHICH_COUNT
};

typedef struct fuzz_buffers {
    struct {
        char *memory; /* as malloc gave it */
        size_t bytes;
        int output;
    } held[WHICH_COUNT + 1];
    int count;
    uint32_t null, misaligned; /* bits of enum which */
    int values;
    uint64_t state; /* of the random numbers */
} fuzz_buffers;

const void *give_input(fuzz_buffers *b, enum which which, fuzz_count elements, int bytes);
void *give_output(fuzz_buffers *b, enum which which, fuzz_count elements, int bytes);

/* Codes below 2^nbits. */
const uint8_t *give_codes(fuzz_buffers *b, fuzz_count elements, int nbits);

/* A 64-byte aligned workspace. */
void *give_workspace(fuzz_buffers *b, size_t bytes);

uint64_t fuzz_random(fuzz_buffers *b);

/* Whether all outputs still hold what they held when they were given. */
int outputs_untouched(const fuzz_buffers *b);

void free_buffers(fuzz_buffers *b);

#endif

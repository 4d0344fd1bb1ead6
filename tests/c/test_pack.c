/* Packing is a bijection: every code comes back from its own word and slot, slots without an
 * element are zero, and no order of the work matters. */
#include "sample_weight.h"

#include "format.h"

typedef struct shape {
    int64_t N, K, G;
} shape;

/* tails of every slot count, words within one chunk and over several */
static const shape shapes[] = {{1, 1, 1},     {3, 5, 5},    {7, 9, 3},    {5, 64, 16},
                               {16, 64, 64},  {9, 33, 11},  {33, 31, 31}, {2, 13, 26},
                               {40, 48, 8},   {64, 96, 32}, {257, 3, 3},  {300, 130, 26},
                               {150, 1000, 8}};

/* One format, quantities behind every array are the sanitizer's. */
static int check_pack(const shape *s, int nbits, int axis)
{
    uint64_t state = 88172645463325252u;
    hqq_weight w = sample_weight(&state, s->N, s->K, s->G, nbits, axis, HQQ_F32, 1.0f);
    hqq_layout l = hqq_layout_make(s->N, s->K, s->G, nbits, axis);
    uint8_t *codes = exact_alloc((size_t)l.elements), *back = exact_alloc((size_t)l.elements);
    for (int64_t e = 0; e < l.elements; e++)
        codes[e] = (uint8_t)(random_bits(&state) & (uint32_t)hqq_max_code(nbits));
    hqq_context context = {.parallel_for = backwards_for};
    int wrong = hqq_pack((void *)w.packed, codes, &w, &context) != HQQ_OK;
    for (int64_t word = 0; word < l.words; word++) {
        uint32_t expected = 0;
        for (int slot = 0; slot < l.per; slot++) {
            int64_t e = slot * l.words + word;
            if (e < l.elements) expected |= (uint32_t)codes[e] << hqq_slot_shift(nbits, slot);
        }
        wrong += hqq_word_at(w.packed, nbits, word) != expected;
    }
    memset(back, 0xa5, (size_t)l.elements);
    wrong += hqq_unpack(back, &w, &context) != HQQ_OK;
    wrong += memcmp(back, codes, (size_t)l.elements) != 0;
    memset(back, 0xa5, (size_t)l.elements);
    wrong += hqq_unpack(back, &w, NULL) != HQQ_OK;
    wrong += memcmp(back, codes, (size_t)l.elements) != 0;
    if (wrong) {
        print_weight(&w);
        fprintf(stderr, "%d wrong\n", wrong);
    }
    free(codes);
    free(back);
    free_weight(&w);
    return wrong != 0;
}

int main(void)
{
    int failures = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int b = 0; b < BIT_WIDTHS; b++)
            for (int axis = 0; axis < 2; axis++)
                failures += check_pack(&shapes[s], all_bits[b], axis);
    return failures != 0;
}

/* The random words against published ones, the mask against the words, and the share it keeps.
 */
#include <stdio.h>
#include <string.h>

#include "dropout.h"

/* From Random123's kat_vectors: philox4x32, 10 rounds. */
static int check_known_answers(void)
{
    static const struct {
        uint32_t counter[4], key[2], words[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    int failures = 0;
    for (int i = 0; i < 3; i++) {
        uint32_t words[4];
        memcpy(words, known[i].counter, sizeof words);
        hqq_philox(words, (uint64_t)known[i].key[1] << 32 | known[i].key[0]);
        if (memcmp(words, known[i].words, sizeof words) == 0) continue;
        failures++;
        fprintf(stderr, "philox %d: %08x %08x %08x %08x\n", i, words[0], words[1], words[2],
                words[3]);
    }
    return failures;
}

/* Element i is word i mod 4 of counter i div 4, kept where it is below (1 - p) 2^32; also where
 * the counter's low word runs over. */
static int check_elements(void)
{
    static const uint64_t starts[] = {0, UINT64_C(4) << 32, (UINT64_C(4) << 32) - 8};
    hqq_dropout d = hqq_dropout_make(0.25f, UINT64_C(0x0123456789abcdef));
    int failures = 0;
    for (int s = 0; s < 3; s++)
        for (uint64_t i = starts[s]; i < starts[s] + 16; i++) {
            uint32_t words[4] = {(uint32_t)(i / 4), (uint32_t)(i / 4 >> 32), 0, 0};
            float quad[4];
            hqq_philox(words, d.seed);
            hqq_dropout_quad(quad, &d, i / 4 * 4);
            float want = words[i % 4] < 0xc0000000u ? 1 / 0.75f : 0.0f;
            if (hqq_dropout_factor(&d, i) == want && quad[i % 4] == want) continue;
            failures++;
            fprintf(stderr, "element %llu: %g, in its quad %g, not %g\n", (unsigned long long)i,
                    (double)hqq_dropout_factor(&d, i), (double)quad[i % 4], (double)want);
        }
    return failures;
}

/* The share kept of 2^18 elements is 1 - p within five standard deviations. */
static int check_share(float p)
{
    const int count = 1 << 18;
    hqq_dropout d = hqq_dropout_make(p, 5);
    int kept = 0;
    for (int i = 0; i < count; i++) kept += hqq_dropout_factor(&d, (uint64_t)i) != 0;
    double off = kept - (1 - (double)p) * count;
    if (off * off <= 25 * (double)count * (double)p * (1 - (double)p)) return 0;
    fprintf(stderr, "p = %g keeps %d of %d\n", (double)p, kept, count);
    return 1;
}

int main(void)
{
    int failures = check_known_answers() + check_elements();
    failures += check_share(0.0f) + check_share(0.05f) + check_share(0.5f) + check_share(0.99f);
    failures += hqq_dropout_make(0x1.fffffep-1f, 0).last != 255; /* the largest p: 2^-24 stay */
    return failures != 0;
}

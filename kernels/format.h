/*
 * The HQQ format, in its one place: CPU kernels, CUDA kernels and the checks all use this.
 *
 * W [N,K] holds E = N*K elements, e = n*K + k. hqq reshapes them to `rows` x `cols`
 *     axis 1:  rows = E/G, cols = G        axis 0:  rows = G, cols = E/G
 * and packs along the rows: `per` codes ("slots") of nbits bits share a word, the first one
 * in the highest bits, and slot j of the words holds the j-th stretch of the elements:
 *
 *     words = ceil(rows / per) * cols
 *     element e  ->  word e mod words, slot e div words
 *
 *     4 bits, byte w:    7 6 5 4 | 3 2 1 0
 *                        e = w   | e = w + words          (= n and n + N/2 at the same k)
 *     3 bits, int32 w:   31 30 (unused) | 29..27: e = w | 26..24: e = w + words | ... | 2..0
 *
 * Slots past the last element are zero. Element e belongs to group
 *     axis 1:  e div G                     axis 0:  e mod (E/G)
 */
#ifndef HQQ_KERNELS_FORMAT_H
#define HQQ_KERNELS_FORMAT_H

#include <stdint.h>

#if defined(__CUDACC__)
#define HQQ_INLINE static __host__ __device__ __forceinline__
#else
#define HQQ_INLINE static inline
#endif

/* Of a function whose unsigned sums or products are meant to wrap, as a random generator's are:
 * elsewhere they are sizes, and `make integer` stops where one wraps. */
#if defined(__clang__) && !defined(__CUDACC__)
#define HQQ_WRAPS __attribute__((no_sanitize("unsigned-integer-overflow")))
#else
#define HQQ_WRAPS
#endif

/* Codes in a word: 8/nbits in a byte, ten 3-bit codes in an int32; 0 for other nbits. */
HQQ_INLINE int hqq_slots_per_word(int nbits)
{
    switch (nbits) {
    case 8: return 1;
    case 4: return 2;
    case 3: return 10;
    case 2: return 4;
    case 1: return 8;
    default: return 0;
    }
}

HQQ_INLINE int hqq_word_bytes(int nbits)
{
    return nbits == 3 ? 4 : 1;
}

HQQ_INLINE int hqq_max_code(int nbits)
{
    return (1 << nbits) - 1;
}

/* How far left the code of a slot is shifted in its word. */
HQQ_INLINE int hqq_slot_shift(int nbits, int slot)
{
    return (nbits == 3 ? 27 : 8 - nbits) - nbits * slot;
}

/* Everything that follows from N, K, G, nbits and axis. */
typedef struct hqq_layout {
    int64_t N, K, G;
    int64_t elements; /* E = N*K */
    int64_t groups;   /* E/G */
    int64_t words;
    int nbits, axis;
    int per;        /* slots in a word */
    int word_bytes; /* 1 or 4 */
} hqq_layout;

/* Shapes must have been checked: nbits and axis valid, G > 0 and dividing N*K. */
HQQ_INLINE hqq_layout hqq_layout_make(int64_t N, int64_t K, int64_t G, int nbits, int axis)
{
    hqq_layout l;
    l.N = N;
    l.K = K;
    l.G = G;
    l.nbits = nbits;
    l.axis = axis;
    l.elements = N * K;
    l.groups = l.elements / G;
    l.per = hqq_slots_per_word(nbits);
    l.word_bytes = hqq_word_bytes(nbits);
    int64_t rows = axis == 1 ? l.groups : G;
    int64_t cols = axis == 1 ? G : l.groups;
    l.words = (rows + l.per - 1) / l.per * cols;
    return l;
}

HQQ_INLINE int64_t hqq_group_of(const hqq_layout *l, int64_t e)
{
    return l->axis == 1 ? e / l->G : e % l->groups;
}

/* Whether packed row p holds the whole output rows p, p + P, ... with P = N/per: the fast
 * kernels' condition, met by every even split of bytes (always for 8 bits, never for 3). */
HQQ_INLINE int hqq_rows_align(const hqq_layout *l)
{
    return l->word_bytes == 1 && l->N % l->per == 0 && l->words * l->per == l->elements;
}

/* Whether groups also respect rows: axis 1, a group lies in one row (G divides K); axis 0,
 * the rows n = r mod N/G share scale row r (G divides N). */
HQQ_INLINE int hqq_groups_align(const hqq_layout *l)
{
    return l->axis == 1 ? l->K % l->G == 0 : l->N % l->G == 0;
}

HQQ_INLINE uint32_t hqq_word_at(const void *packed, int nbits, int64_t word)
{
    return hqq_word_bytes(nbits) == 4 ? ((const uint32_t *)packed)[word]
                                      : ((const uint8_t *)packed)[word];
}

/* The code of element e. One at a time: for references and tails. */
HQQ_INLINE int hqq_code_at(const void *packed, const hqq_layout *l, int64_t e)
{
    int slot = (int)(e / l->words);
    uint32_t word = hqq_word_at(packed, l->nbits, e % l->words);
    return (int)(word >> hqq_slot_shift(l->nbits, slot)) & hqq_max_code(l->nbits);
}

#endif

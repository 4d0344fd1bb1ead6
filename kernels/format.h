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
 * Slots past the last element are zero. In memory, not in checkpoints, 3 bits may also be in
 * "planes" (hqq_packing of hqqlora.h), exactly 3 bits a weight, both planes packed as above:
 *
 *     E/4 bytes: q >> 1, as 2 bits     then E/8 bytes: q & 1, as 1 bit
 *
 * That is for weights whose rows align in both: then one byte of each plane and a shift each
 * make the byte that 4 bits would have for the same codes ("nibbles", hqq_plane_row), so that
 * whatever serves 4 bits serves planes. Element e belongs to group
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
    int planes;     /* 3 bits in planes: `words` are their bytes, and per is 0 */
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
    l.planes = 0;
    return l;
}

/* Whether a 3-bit weight may be in planes: no slot of a byte is partly empty, and a packed row
 * holds whole rows of W. */
HQQ_INLINE int hqq_planes_fit(const hqq_layout *l)
{
    int64_t rows = l->axis == 1 ? l->groups : l->G;
    return l->nbits == 3 && l->N % 8 == 0 && rows % 8 == 0;
}

/* The layout of the same weight in planes; they must fit. */
HQQ_INLINE hqq_layout hqq_layout_in_planes(hqq_layout l)
{
    l.words = l.elements / 8 * 3;
    l.word_bytes = 1;
    l.per = 0;
    l.planes = 1;
    return l;
}

/* Planes as kernels see them: as bytes that hold a code of each of `per` rows, N/per apart. Of
 * 2 they are the 4-bit bytes that hqq_plane_row's rows make; of 4 those of rows p and p + N/4,
 * which share a byte of the 2-bit plane, of 8 those of rows p, p + N/8, ..., which share one of
 * the 1-bit plane. */
HQQ_INLINE hqq_layout hqq_layout_of_planes(const hqq_layout *planes, int per)
{
    hqq_layout l = hqq_layout_make(planes->N, planes->K, planes->G, 8 / per, planes->axis);
    l.planes = 1;
    return l;
}

/* What makes row p of the nibbles, which holds row p of W in its upper halves and row p + N/2
 * in its lower ones. The 2-bit slots of row p mod N/4 are rows 0, 1, 2, 3 times N/4 behind it;
 * the 1-bit slots of row p mod N/8 likewise eighths:
 *
 *     p < N/4    2 bits   [p] . . .  [p + N/2] . . .   >> 1       1 bit, s = p div N/8:
 *                         7 6 5 4     3 2 1 0                      7-s and 3-s >> 3 - s
 *     else       2 bits   . . [p] .  . . [p + N/2] .   << 1
 *
 *     nibbles = (twos >> 1 or twos << 1) & 0x66  |  ones >> (3 - s) & 0x11 */
typedef struct hqq_plane_row {
    const uint8_t *twos, *ones;
    int twos_left; /* 0: they are shifted right */
    int ones_right;
} hqq_plane_row;

enum { HQQ_TWOS_MASK = 0x66, HQQ_ONES_MASK = 0x11 };

/* l: either layout of planes. */
HQQ_INLINE hqq_plane_row hqq_plane_row_of(const void *packed, const hqq_layout *l, int64_t p)
{
    const uint8_t *planes = (const uint8_t *)packed;
    int64_t quarter = l->N / 4, eighth = l->N / 8;
    hqq_plane_row row;
    row.twos_left = p >= quarter;
    p -= row.twos_left ? quarter : 0;
    row.twos = planes + p * l->K;
    row.ones_right = 3 - row.twos_left * 2 - (p >= eighth);
    row.ones = planes + l->elements / 4 + (p >= eighth ? p - eighth : p) * l->K;
    return row;
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

/* Whether some group has elements of several columns of W. */
HQQ_INLINE int hqq_columns_differ(const hqq_layout *l)
{
    return l->axis == 1 || l->N % l->G != 0;
}

HQQ_INLINE uint32_t hqq_word_at(const void *packed, int nbits, int64_t word)
{
    return hqq_word_bytes(nbits) == 4 ? ((const uint32_t *)packed)[word]
                                      : ((const uint8_t *)packed)[word];
}

/* The code of element e, of words or in planes. One at a time: for references and tails. */
HQQ_INLINE int hqq_code_at(const void *packed, const hqq_layout *l, int64_t e)
{
    if (l->planes) {
        /* the 1-bit slot says the rest: a 2-bit slot is two of them */
        const uint8_t *planes = (const uint8_t *)packed;
        int64_t eighth = l->elements / 8, rest = e % eighth;
        int slot = (int)(e / eighth);
        int high = planes[slot % 2 * eighth + rest] >> hqq_slot_shift(2, slot / 2) & 3;
        int low = planes[2 * eighth + rest] >> hqq_slot_shift(1, slot) & 1;
        return high << 1 | low;
    }
    int slot = (int)(e / l->words);
    uint32_t word = hqq_word_at(packed, l->nbits, e % l->words);
    return (int)(word >> hqq_slot_shift(l->nbits, slot)) & hqq_max_code(l->nbits);
}

#endif

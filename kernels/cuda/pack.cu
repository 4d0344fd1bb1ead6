/*
 * Codes to words and back.
 *
 *     word w = OR over slots j of codes[j * words + w] << shift(j)
 *
 * Slot j of neighbouring words are neighbouring codes: a thread takes four words w .. w+3, and
 * with them a run of four codes of each slot, so a warp reads and writes 128 bytes of each.
 * Four bytes are handled as one 32-bit number: a code and its shift stay within a byte. Where
 * `words` is no multiple of four, or an array is not aligned, the same goes word by word.
 *
 *     bytes a weight   1 + bits / 8 (3 bits: 1 + 0.4)
 *     instructions     4 a weight (by fours, sm_90), so that memory is the limit: 1.5 bytes a
 *                      weight at 4 bits, 2.2e12 weights/s at 3.3 TB/s (predicted)
 */
#include "pack.h"

#include "cuda.cuh"
#include "weight_layout.h"

enum { PACK_THREADS = 256 };

/* Word by word at 1, four at a time at 4. */
template <int run> struct pack_unit;
template <> struct pack_unit<1> {
    typedef uint8_t codes;
};
template <> struct pack_unit<4> {
    typedef uint32_t codes;
};

HQQ_DEVICE_INLINE int64_t first_word(int run)
{
    return (static_cast<int64_t>(blockIdx.x) * PACK_THREADS + threadIdx.x) * run;
}

HQQ_DEVICE_INLINE int64_t word_stride(int run)
{
    return static_cast<int64_t>(gridDim.x) * PACK_THREADS * run;
}

/* `run` codes of one slot from word w on; 0 behind the last element. */
template <int run>
HQQ_DEVICE_INLINE uint32_t codes_at(const uint8_t *codes, const hqq_layout *l, int slot,
                                    int64_t w)
{
    int64_t e = slot * l->words + w, left = l->elements - e;
    if (left >= run)
        return *reinterpret_cast<const typename pack_unit<run>::codes *>(codes + e);
    uint32_t some = 0;
    for (int i = 0; i < left; i++) some |= static_cast<uint32_t>(codes[e + i]) << 8 * i;
    return some;
}

template <int run>
HQQ_DEVICE_INLINE void put_codes(uint8_t *codes, const hqq_layout *l, int slot, int64_t w,
                                 uint32_t four)
{
    int64_t e = slot * l->words + w, left = l->elements - e;
    if (left >= run)
        *reinterpret_cast<typename pack_unit<run>::codes *>(codes + e) =
            static_cast<typename pack_unit<run>::codes>(four);
    else
        for (int i = 0; i < left; i++) codes[e + i] = static_cast<uint8_t>(four >> 8 * i);
}

template <int run>
__global__ void __launch_bounds__(PACK_THREADS)
    hqq_pack_kernel(void *packed, const uint8_t *codes, hqq_layout l)
{
    uint32_t mask = 0x01010101u * static_cast<uint32_t>(hqq_max_code(l.nbits));
    for (int64_t w = first_word(run); w < l.words; w += word_stride(run)) {
        uint32_t words[run] = {}; /* of 3 bits; words[0] is four words of bytes otherwise */
        for (int slot = 0; slot < l.per; slot++) {
            uint32_t four = codes_at<run>(codes, &l, slot, w) & mask;
            int shift = hqq_slot_shift(l.nbits, slot);
            if (l.word_bytes == 1)
                words[0] |= four << shift;
            else
#pragma unroll
                for (int i = 0; i < run; i++) words[i] |= (four >> 8 * i & 7) << shift;
        }
        if (l.word_bytes == 1)
            reinterpret_cast<typename pack_unit<run>::codes *>(packed)[w / run] =
                static_cast<typename pack_unit<run>::codes>(words[0]);
        else
#pragma unroll
            for (int i = 0; i < run; i++) static_cast<uint32_t *>(packed)[w + i] = words[i];
    }
}

template <int run>
__global__ void __launch_bounds__(PACK_THREADS)
    hqq_unpack_kernel(uint8_t *codes, const void *packed, hqq_layout l)
{
    uint32_t mask = 0x01010101u * static_cast<uint32_t>(hqq_max_code(l.nbits));
    for (int64_t w = first_word(run); w < l.words; w += word_stride(run)) {
        uint32_t words[run];
        if (l.word_bytes == 1)
            words[0] = static_cast<const typename pack_unit<run>::codes *>(packed)[w / run];
        else
#pragma unroll
            for (int i = 0; i < run; i++)
                words[i] = static_cast<const uint32_t *>(packed)[w + i];
        for (int slot = 0; slot < l.per; slot++) {
            int shift = hqq_slot_shift(l.nbits, slot);
            uint32_t four = 0;
            if (l.word_bytes == 1)
                four = words[0] >> shift & mask;
            else
#pragma unroll
                for (int i = 0; i < run; i++) four |= (words[i] >> shift & 7) << 8 * i;
            put_codes<run>(codes, &l, slot, w, four);
        }
    }
}

/* ---- from and to planes: a word of the result, or a code, at a time -------------------- */

/* Codes, or where there are none a weight's. */
typedef struct code_source {
    const uint8_t *codes;
    const void *packed;
    hqq_layout layout;
} code_source;

HQQ_DEVICE_INLINE uint32_t code_of(const code_source *from, int64_t e)
{
    if (from->codes) return static_cast<uint32_t>(from->codes[e] & hqq_max_code(3));
    return static_cast<uint32_t>(hqq_code_at(from->packed, &from->layout, e));
}

/* Byte w of the planes. */
HQQ_DEVICE_INLINE uint8_t plane_byte(const code_source *from, const hqq_layout *l, int64_t w)
{
    int64_t quarter = l->elements / 4;
    int bits = w < quarter ? 2 : 1;
    int64_t bytes = bits == 2 ? quarter : quarter / 2, first = bits == 2 ? w : w - quarter;
    uint32_t byte = 0;
    for (int slot = 0; slot < 8 / bits; slot++) {
        uint32_t code = code_of(from, slot * bytes + first);
        byte |= (bits == 2 ? code >> 1 : code & 1) << hqq_slot_shift(bits, slot);
    }
    return static_cast<uint8_t>(byte);
}

__global__ void __launch_bounds__(PACK_THREADS)
    hqq_repack_kernel(void *packed, hqq_layout l, code_source from)
{
    for (int64_t w = first_word(1); w < l.words; w += word_stride(1)) {
        if (l.planes) {
            static_cast<uint8_t *>(packed)[w] = plane_byte(&from, &l, w);
            continue;
        }
        uint32_t word = 0;
        for (int slot = 0; slot < l.per && slot * l.words + w < l.elements; slot++)
            word |= code_of(&from, slot * l.words + w) << hqq_slot_shift(l.nbits, slot);
        if (l.word_bytes == 1)
            static_cast<uint8_t *>(packed)[w] = static_cast<uint8_t>(word);
        else
            static_cast<uint32_t *>(packed)[w] = word;
    }
}

__global__ void __launch_bounds__(PACK_THREADS)
    hqq_unpack_planes_kernel(uint8_t *codes, code_source from)
{
    for (int64_t e = first_word(1); e < from.layout.elements; e += word_stride(1))
        codes[e] = static_cast<uint8_t>(code_of(&from, e));
}

/* ----------------------------------------------------------------------------------------- */

static int by_fours(const hqq_layout *l, const void *codes, const void *packed)
{
    uintptr_t at = reinterpret_cast<uintptr_t>(codes) | reinterpret_cast<uintptr_t>(packed);
    return l->words % 4 == 0 && at % 4 == 0;
}

static dim3 blocks_for(int64_t words, int run)
{
    const int64_t most = 1 << 16;
    int64_t blocks = (words / run + PACK_THREADS - 1) / PACK_THREADS;
    return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

extern "C" hqq_status hqq_cuda_pack(void *packed, const uint8_t *codes,
                                    const hqq_weight *weight, void *stream)
{
    hqq_layout l = hqq_stored_layout(weight);
    if (l.words == 0) return HQQ_OK;
    dim3 threads(PACK_THREADS);
    if (l.planes)
        return hqq_launch(hqq_repack_kernel, blocks_for(l.words, 1), threads, 0, stream, packed,
                          l, code_source{codes, NULL, l});
    return by_fours(&l, codes, packed) ? hqq_launch(hqq_pack_kernel<4>, blocks_for(l.words, 4),
                                                    threads, 0, stream, packed, codes, l)
                                       : hqq_launch(hqq_pack_kernel<1>, blocks_for(l.words, 1),
                                                    threads, 0, stream, packed, codes, l);
}

extern "C" hqq_status hqq_cuda_unpack(uint8_t *codes, const hqq_weight *weight, void *stream)
{
    hqq_layout l = hqq_stored_layout(weight);
    if (l.words == 0) return HQQ_OK;
    dim3 threads(PACK_THREADS);
    if (l.planes)
        return hqq_launch(hqq_unpack_planes_kernel, blocks_for(l.elements, 1), threads, 0,
                          stream, codes, code_source{NULL, weight->packed, l});
    return by_fours(&l, codes, weight->packed)
               ? hqq_launch(hqq_unpack_kernel<4>, blocks_for(l.words, 4), threads, 0, stream,
                            codes, weight->packed, l)
               : hqq_launch(hqq_unpack_kernel<1>, blocks_for(l.words, 1), threads, 0, stream,
                            codes, weight->packed, l);
}

extern "C" hqq_status hqq_cuda_repack(void *packed, hqq_packing packing,
                                      const hqq_weight *weight, void *stream)
{
    hqq_layout l = hqq_layout_packed_as(weight, packing), from = hqq_stored_layout(weight);
    if (l.words == 0) return HQQ_OK;
    return hqq_launch(hqq_repack_kernel, blocks_for(l.words, 1), dim3(PACK_THREADS), 0, stream,
                      packed, l, code_source{NULL, weight->packed, from});
}

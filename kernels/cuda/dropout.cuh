/* The dropout factors of a run of elements in one thread's registers. */
#ifndef HQQ_KERNELS_CUDA_DROPOUT_CUH
#define HQQ_KERNELS_CUDA_DROPOUT_CUH

#include "cuda.cuh"
#include "dropout.h"

/* Once the seed is read; it is not where nothing is dropped. */
HQQ_DEVICE_INLINE hqq_dropout hqq_dropout_if(int drops, const hqq_dropout_source &source)
{
    hqq_dropout dropout = {source.last, source.keep_scale, 0};
    if (drops) dropout = hqq_dropout_read(&source);
    return dropout;
}

/* values [n] times the factors of the elements i, i + 1, ... The generator gives four at once,
 * of a multiple of 4 and on: where i is none (never, if K is a multiple of 4), one more call is
 * made and the words move up by i mod 4. */
template <int n>
HQQ_DEVICE_INLINE void hqq_drop_run(float (&values)[n], const hqq_dropout &dropout, uint64_t i)
{
    static_assert(n % 4 == 0, "runs are of quads");
    uint32_t words[n + 4];
#pragma unroll
    for (int j = 0; j < n; j += 4) hqq_dropout_words(words + j, dropout.seed, i / 4 + j / 4);
    if (i % 4 != 0) {
        hqq_dropout_words(words + n, dropout.seed, i / 4 + n / 4);
#pragma unroll
        for (int j = 0; j < n; j++) {
            uint32_t even = i & 2 ? words[j + 2] : words[j];
            uint32_t odd = i & 2 ? words[j + 3] : words[j + 1];
            words[j] = i & 1 ? odd : even; /* words above j are still where they were */
        }
    }
#pragma unroll
    for (int j = 0; j < n; j++) values[j] *= hqq_dropout_of_word(&dropout, words[j]);
}

#endif

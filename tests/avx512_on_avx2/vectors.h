/* What the imitated instructions are written with: vectors of 64 bytes whose lanes can be
 * computed on (__m512i has lanes of 64 bits alone). */
#ifndef HQQ_TESTS_VECTORS_H
#define HQQ_TESTS_VECTORS_H

#include <stdint.h>

#define EMU static inline __attribute__((always_inline, unused))

typedef int32_t emu_ivec __attribute__((vector_size(64)));
typedef uint32_t emu_uvec __attribute__((vector_size(64)));
typedef uint16_t emu_u16vec __attribute__((vector_size(64)));

#endif

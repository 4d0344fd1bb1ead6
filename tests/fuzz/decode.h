/* From the bytes of an input to the values of arguments: mostly small and sound ones, and from
 * the upper end of a field's range those that break things. */
#ifndef HQQ_FUZZ_DECODE_H
#define HQQ_FUZZ_DECODE_H

#include <stddef.h>
#include <stdint.h>

/* The fields of fields.def, each as an unsigned number. */
typedef struct fuzz_fields {
#define FIELD(name, bytes) uint32_t name;
#include "fields.def"
#undef FIELD
} fuzz_fields;

fuzz_fields decode_fields(const uint8_t *data, size_t size);

/* A size, of two bytes: below 0xe000 it is 0 to 1020, else near a limit. */
int64_t decode_size(uint32_t field);

/* G, of two bytes: below 0xa000 one that fits N and K more often than not, else a size. */
int64_t decode_group_size(uint32_t field, int64_t N, int64_t K);

/* An enumerator 0 .. count - 1, of one byte: from 0xf0 on none of these. */
int decode_enum(uint32_t field, int count);

int32_t decode_nbits(uint32_t field);
int32_t decode_axis(uint32_t field);
int32_t decode_iters(uint32_t field);

/* `sound` below 0xe0, a hostile value from there on. */
float decode_float(uint32_t field, float sound);

/* A row stride for rows of `columns`: below 0x40 exactly that. */
int64_t decode_stride(uint32_t field, int64_t columns);

/* A bound in 0 .. size, or for values from 0xe000 on a size; `otherwise` for 0. */
int64_t decode_bound(uint32_t field, int64_t size, int64_t otherwise);

#endif

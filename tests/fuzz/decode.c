#include "decode.h"

#include <float.h>
#include <limits.h>
#include <math.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

static uint32_t take(const uint8_t **data, size_t *size, int bytes)
{
    uint32_t value = 0;
    for (int i = 0; i < bytes && *size > 0; i++, (*size)--)
        value |= (uint32_t)*(*data)++ << 8 * i;
    return value;
}

fuzz_fields decode_fields(const uint8_t *data, size_t size)
{
    fuzz_fields f;
#define FIELD(name, bytes) f.name = take(&data, &size, bytes);
#include "fields.def"
#undef FIELD
    return f;
}

int64_t decode_size(uint32_t field)
{
    static const int64_t limits[] = {0,
                                     INT64_MAX - 2,
                                     INT64_MIN + 2,
                                     INT32_MAX,
                                     UINT32_MAX,
                                     INT64_C(1) << 40,
                                     INT64_C(1) << 48,
                                     INT64_C(1) << 55,
                                     INT64_C(1) << 56,
                                     INT64_C(1) << 57,
                                     INT64_C(1) << 61,
                                     INT64_C(1) << 62,
                                     -(INT64_C(1) << 40),
                                     INT64_C(1) << 28,
                                     -(INT64_C(1) << 62),
                                     INT64_C(1) << 53};
    uint32_t high = field >> 8, low = field & 0xff;
    if (high < 0x60) return low;
    if (high < 0x70) return low % 5 * 64; /* what vectors and tensor cores serve */
    if (high < 0x80) return low * 4;
    if (high < 0xe0) return low % 24;
    return limits[high % COUNT(limits)] + ((int64_t)(low % 5) - 2);
}

int64_t decode_group_size(uint32_t field, int64_t N, int64_t K)
{
    if (field >= 0xa000) return decode_size(field);
    const int64_t choices[] = {8, K, N, 64, 16, 32, 1, 4, 2, 12, 10, 128, K / 2, N / 2, 256, 3};
    uint32_t choice = field % (COUNT(choices) + 1);
    if (choice < COUNT(choices)) return choices[choice];
    return (int64_t)((uint64_t)N * (uint64_t)K);
}

int decode_enum(uint32_t field, int count)
{
    const int none[] = {-1, count, INT_MAX, INT_MIN, 99, count + 1};
    return field < 0xf0 ? (int)(field % (uint32_t)count) : none[field % COUNT(none)];
}

int32_t decode_nbits(uint32_t field)
{
    static const int32_t sound[] = {8, 4, 3, 2, 1};
    static const int32_t none[] = {0, 5, 16, -4, INT32_MAX, INT32_MIN, 7, 32};
    return field < 0xf0 ? sound[field % COUNT(sound)] : none[field % COUNT(none)];
}

int32_t decode_axis(uint32_t field)
{
    static const int32_t none[] = {2, -1, INT32_MAX, INT32_MIN};
    return field < 0xf0 ? (int32_t)(field % 2) : none[field % COUNT(none)];
}

int32_t decode_iters(uint32_t field)
{
    static const int32_t hostile[] = {0, -1, INT32_MAX, INT32_MIN, 10000, 10001};
    return field < 0xf0 ? (int32_t)(field % 24) + 1 : hostile[field % COUNT(hostile)];
}

float decode_float(uint32_t field, float sound)
{
    static const float hostile[] = {NAN,    INFINITY, -INFINITY, -1, -0.0f, 0,
                                    1e-45f, FLT_MAX,  -FLT_MAX,  1,  1.5f,  0.99999994f};
    return field < 0xe0 ? sound : hostile[field % COUNT(hostile)];
}

int64_t decode_stride(uint32_t field, int64_t columns)
{
    const uint64_t c = (uint64_t)columns;
    const uint64_t strides[] = {c,     c + 1, c + 16,    c,          c - 1, 0,
                                0 - c, 1,     INT64_MAX, 1ull << 63, c * 2, 1ull << 55};
    return (int64_t)strides[field < 0x40 ? 0 : field % COUNT(strides)];
}

int64_t decode_bound(uint32_t field, int64_t size, int64_t otherwise)
{
    if (field == 0) return otherwise;
    if (field >= 0xe000 || size < 0 || size > 1020) return decode_size(field);
    return (int64_t)field % (size + 1);
}

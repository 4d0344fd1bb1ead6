/*
 * Copies between the caller's matrices and fp32 tiles, for gemm_tile.c: conversion from any
 * dtype, dropout, and transposition in registers where the source runs the other way. Included
 * by ISA sources only.
 */
#ifndef HQQ_KERNELS_CPU_GEMM_PACK_H
#define HQQ_KERNELS_CPU_GEMM_PACK_H

#include "dropout_vector.h"
#include "gemm.h"
#include "simd.h"
#include "transpose.h"

/* Where a block of fp32 goes: row-major, or cut into panels of `width` columns (a multiple of
 * HQQ_LANES) that lie `panel_stride` apart, each with rows `ld` apart. */
typedef struct block_target {
    float *data;
    int64_t ld, width, panel_stride;
    int fetched; /* the source is in a near cache: else rows that are contiguous are fetched */
} block_target;

/* HQQ_LANES elements of a view (or the `count` that are left, and zeros), the dtype and whether
 * there is dropout being known to the compiler. */
HQQ_ALWAYS_INLINE hqq_vec load_view(const void *data, hqq_dtype dtype, int masked,
                                    const hqq_dropout *dropout, int64_t at, int64_t mask_at,
                                    int64_t count)
{
    hqq_vec value = count >= HQQ_LANES ? hqq_vec_load_dtype(data, dtype, at)
                                       : hqq_vec_load_dtype_part(data, dtype, at, (int)count);
    return masked ? value * hqq_dropout_factors(dropout, (uint64_t)mask_at) : value;
}

/* Rows fetched ahead: each is on a page of its own, where no hardware prefetcher follows (dA at
 * K = 4096 took a quarter longer without). */
#define HQQ_ROWS_AHEAD 4

/* Rows of the view are contiguous: convert along them, a whole row at a time. */
HQQ_ALWAYS_INLINE void copy_rows(const block_target *target, const hqq_view *v, int64_t row,
                                 int64_t column, int64_t rows, int64_t columns, hqq_dtype dtype,
                                 int masked)
{
    block_target to = *target;
    hqq_dropout dropout = masked ? *v->dropout : (hqq_dropout){0};
    const void *data = v->data;
    int64_t stride = v->row_stride, mask_stride = v->mask_row_stride;
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = (row + i) * stride + column, mask_at = (row + i) * mask_stride + column;
        float *out = to.data + i * to.ld;
        if (!to.fetched && i + HQQ_ROWS_AHEAD < rows)
            for (int64_t j = 0; j < columns; j += 64 / hqq_dtype_bytes(dtype))
                __builtin_prefetch(hqq_at(data, dtype, at + HQQ_ROWS_AHEAD * stride + j));
        for (int64_t panel = 0; panel < columns; panel += to.width, out += to.panel_stride) {
            int64_t width = columns - panel < to.width ? columns - panel : to.width, j = 0;
            for (; j + HQQ_LANES <= width; j += HQQ_LANES)
                hqq_vec_store(out + j, load_view(data, dtype, masked, &dropout, at + panel + j,
                                                 mask_at + panel + j, HQQ_LANES));
            if (j < width)
                hqq_vec_store(out + j, load_view(data, dtype, masked, &dropout, at + panel + j,
                                                 mask_at + panel + j, width - j));
        }
    }
}

/* Columns of the view are contiguous: load along them, transpose, store along rows. */
HQQ_ALWAYS_INLINE void copy_columns(const block_target *target, const hqq_view *v, int64_t row,
                                    int64_t column, int64_t rows, int64_t columns,
                                    hqq_dtype dtype, int masked)
{
    block_target to = *target;
    hqq_dropout dropout = masked ? *v->dropout : (hqq_dropout){0};
    const void *data = v->data;
    int64_t stride = v->column_stride, mask_stride = v->mask_column_stride;
    for (int64_t j = 0; j < columns; j += HQQ_LANES) {
        float *out = to.data + j / to.width * to.panel_stride + j % to.width;
        for (int64_t i = 0; i < rows; i += HQQ_LANES) {
            hqq_vec tile[HQQ_LANES];
            int64_t at = (column + j) * stride + row + i;
            int64_t mask_at = (column + j) * mask_stride + row + i;
            if (columns - j >= HQQ_LANES && rows - i >= HQQ_LANES) {
#pragma GCC unroll 16
                for (int l = 0; l < HQQ_LANES; l++)
                    tile[l] = load_view(data, dtype, masked, &dropout, at + l * stride,
                                        mask_at + l * mask_stride, HQQ_LANES);
                hqq_vec_transpose(tile);
#pragma GCC unroll 16
                for (int l = 0; l < HQQ_LANES; l++)
                    hqq_vec_store(out + (i + l) * to.ld, tile[l]);
                continue;
            }
            for (int l = 0; l < HQQ_LANES; l++)
                tile[l] = l < columns - j
                              ? load_view(data, dtype, masked, &dropout, at + l * stride,
                                          mask_at + l * mask_stride, rows - i)
                              : hqq_vec_zero();
            hqq_vec_transpose(tile);
            for (int l = 0; l < HQQ_LANES && l < rows - i; l++)
                hqq_vec_store(out + (i + l) * to.ld, tile[l]);
        }
    }
}

/* Neither: one at a time. */
static void copy_elements(const block_target *to, const hqq_view *v, int64_t row,
                          int64_t column, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < (columns + HQQ_LANES - 1) / HQQ_LANES * HQQ_LANES; j++) {
            float value = 0;
            if (j < columns) {
                value = hqq_load(v->data, v->dtype,
                                 (row + i) * v->row_stride + (column + j) * v->column_stride);
                if (v->dropout)
                    value *= hqq_dropout_factor(
                        v->dropout, (uint64_t)((row + i) * v->mask_row_stride +
                                               (column + j) * v->mask_column_stride));
            }
            to->data[j / to->width * to->panel_stride + i * to->ld + j % to->width] = value;
        }
}

#define HQQ_COPY(copy, masked)                                                       \
    switch (v->dtype) {                                                              \
    case HQQ_F32: copy(to, v, row, column, rows, columns, HQQ_F32, masked); break;   \
    case HQQ_F16: copy(to, v, row, column, rows, columns, HQQ_F16, masked); break;   \
    case HQQ_BF16: copy(to, v, row, column, rows, columns, HQQ_BF16, masked); break; \
    }

/* to = view[row : row + rows, column : column + columns] in fp32. Columns are filled up with
 * zeros to a multiple of HQQ_LANES, for which rows must have room. */
static void copy_block(const block_target *to, const hqq_view *v, int64_t row, int64_t column,
                       int64_t rows, int64_t columns)
{
    int rows_run = v->column_stride == 1 && (!v->dropout || v->mask_column_stride == 1);
    int columns_run = v->row_stride == 1 && (!v->dropout || v->mask_row_stride == 1);
    if (rows_run && v->dropout)
        HQQ_COPY(copy_rows, 1)
    else if (rows_run)
        HQQ_COPY(copy_rows, 0)
    else if (columns_run && v->dropout)
        HQQ_COPY(copy_columns, 1)
    else if (columns_run)
        HQQ_COPY(copy_columns, 0)
    else
        copy_elements(to, v, row, column, rows, columns);
}

#endif

/*
 * Which kernel serves which shape on a GPU: the one place.
 *
 * The small products read each packed code once for every 64 rows, and are bound by memory up
 * to about 16 rows and by their tensor-core instructions (mma.sync, with the unpacking beside
 * it) at 64. A GEMM on dequantized blocks has neither limit, but first moves 4 bytes a weight
 * through L2: at 14336 x 4096 on an H100 an estimated 60 us for 192 rows by the one, 90 us by
 * the other. Not measured: a threshold with room on its side. fp32 has no tensor-core path: its
 * dot products cost M times the codes, and 8 rows are what hides behind the memory.
 *
 * On compute capability 9.0 and at axis 1 the wide products multiply with the codes at a GEMM's
 * pace, and read them once for 128 rows, or 64. Above 16 rows they are taken where they are to
 * cost less than the small ones or, above 192, than blocks, which can still win where outputs
 * and rows make few tiles: small_product.cu, wide_product.c and block_width.c reckon the costs.
 */
#include "plan.h"

#include "format.h"
#include "small_product.h"
#include "wide_product.h"

enum { SMALL_ROWS_MOST = 192, SMALL_ROWS_MOST_F32 = 8, WIDE_ROWS_LEAST = 16 };

static int is_dtype(hqq_dtype dtype)
{
    return (int)dtype >= HQQ_F32 && (int)dtype <= HQQ_BF16;
}

/* A question about a weight that does not exist must still have an answer. */
static int is_sound(const hqq_weight *w)
{
    int64_t elements;
    return w && hqq_slots_per_word(w->nbits) > 0 && (w->axis == 0 || w->axis == 1) &&
           is_dtype(w->meta_dtype) && w->out_features > 0 && w->in_features > 0 &&
           w->group_size > 0 &&
           !__builtin_mul_overflow(w->out_features, w->in_features, &elements) &&
           elements <= INT64_C(1) << 60 && elements % w->group_size == 0;
}

/* Of the kernel of many tokens and of blocks. */
static hqq_kernel of_many_rows(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                               int transpose, hqq_kernel forced, const hqq_cuda_device *device)
{
    if (!hqq_cuda_wide_serves(weight, M, dtype, device)) return HQQ_KERNEL_BLOCKED;
    return forced == HQQ_KERNEL_TILED ||
                   hqq_cuda_wide_is_faster(weight, M, dtype, transpose, device)
               ? HQQ_KERNEL_TILED
               : HQQ_KERNEL_BLOCKED;
}

static int wide_beats_small(const hqq_weight *weight, int64_t M, hqq_dtype dtype, int transpose,
                            const hqq_cuda_device *device)
{
    return hqq_cuda_wide_serves(weight, M, dtype, device) &&
           hqq_cuda_wide_grid(weight, M, transpose, device).cost <
               hqq_cuda_small_cost(weight, M, transpose, device);
}

hqq_kernel hqq_cuda_kernel_for(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                               int transpose, hqq_kernel forced, const hqq_cuda_device *device)
{
    if (forced == HQQ_KERNEL_REFERENCE || forced == HQQ_KERNEL_BLOCKED) return forced;
    if (!is_sound(weight) || !is_dtype(dtype)) return HQQ_KERNEL_BLOCKED;
    int64_t most = dtype == HQQ_F32 ? SMALL_ROWS_MOST_F32 : SMALL_ROWS_MOST;
    if (forced == HQQ_KERNEL_TILED || (forced != HQQ_KERNEL_DIRECT && M > most))
        return of_many_rows(weight, M, dtype, transpose, forced, device);
    if (!hqq_cuda_small_serves(weight, M, dtype, transpose)) return HQQ_KERNEL_BLOCKED;
    return forced != HQQ_KERNEL_DIRECT && M > WIDE_ROWS_LEAST &&
                   wide_beats_small(weight, M, dtype, transpose, device)
               ? HQQ_KERNEL_TILED
               : HQQ_KERNEL_DIRECT;
}

hqq_kernel hqq_choose_kernel(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                             int32_t transpose, hqq_isa isa)
{
    (void)isa;
    hqq_cuda_device device;
    int known = hqq_cuda_current_device(&device) == HQQ_OK;
    return hqq_cuda_kernel_for(weight, M, dtype, transpose, HQQ_KERNEL_AUTO,
                               known ? &device : NULL);
}

/* Instruction sets are the CPU's; here there is one set of kernels. */
hqq_isa hqq_isa_in_use(const hqq_context *context)
{
    (void)context;
    return HQQ_ISA_PORTABLE;
}

#include "entries.h"

/* In the order of these calls arrays are given: the workspace last, as its size depends on
 * where the packed words are. */

static hqq_status choose_kernel(fuzz_case *c)
{
    hqq_kernel chosen =
        hqq_choose_kernel(case_shape(c), c->M, c->dtype, (int32_t)c->R, c->context.isa);
    hqq_isa isa = hqq_isa_in_use(case_context(c));
    if ((int)chosen < HQQ_KERNEL_AUTO || (int)chosen >= known_kernels()) __builtin_trap();
    if (!hqq_isa_name(isa) || !hqq_isa_name(c->context.isa) || !hqq_version() ||
        !hqq_status_name((hqq_status)c->R))
        __builtin_trap();
    return hqq_layout_of(NULL, NULL, NULL, case_shape(c));
}

static hqq_status layout_of(fuzz_case *c)
{
    return hqq_layout_of(case_output(c, CODES, 1, 8), case_output(c, SCALE, 1, 8),
                         case_output(c, ZERO, 1, 8), case_shape(c));
}

static hqq_status quantize(fuzz_case *c)
{
    int meta = bytes_of(c->weight.meta_dtype);
    fuzz_count elements = c->words < 0 ? -1 : (fuzz_count)c->N * c->K;
    void *packed = case_output(c, PACKED, c->words, (int)c->word_bytes);
    void *scale = case_output(c, SCALE, c->groups, meta);
    void *zero = case_output(c, ZERO, c->groups, meta);
    const void *W = give_input(&c->buffers, WEIGHTS, elements, bytes_of(c->W_dtype));
    if (c->fields.switches & 4) {
        fuzz_count columns = c->words < 0 ? -1 : c->K;
        const char *importance = give_input(&c->buffers, IMPORTANCE, columns, 4);
        for (int64_t i = 0; importance && c->fields.switches & 8 && i < (int64_t)columns; i++)
            ((char *)importance)[i * 4 + 3] &= 0x7f; /* the sign */
        c->options.importance = (const float *)importance;
    }
    return hqq_quantize(packed, scale, zero, W, c->W_dtype, case_shape(c),
                        c->buffers.null >> OPTIONS & 1 ? NULL : &c->options, case_context(c));
}

static fuzz_count code_count(const fuzz_case *c)
{
    return c->words < 0 ? -1 : (fuzz_count)c->N * c->K;
}

static hqq_status pack(fuzz_case *c)
{
    void *packed = case_output(c, PACKED, c->words, (int)c->word_bytes);
    const uint8_t *codes = give_codes(&c->buffers, code_count(c), c->weight.nbits);
    return hqq_pack(packed, codes, case_shape(c), case_context(c));
}

static hqq_status unpack(fuzz_case *c)
{
    uint8_t *codes = case_output(c, CODES, code_count(c), 1);
    return hqq_unpack(codes, case_weight(c), case_context(c));
}

static hqq_status repack(fuzz_case *c)
{
    hqq_weight other = c->weight;
    int64_t words, word_bytes;
    other.packing = (hqq_packing)decode_enum(c->fields.repacking, 2);
    if (c->words < 0 || hqq_layout_of(&words, &word_bytes, NULL, &other) != HQQ_OK)
        words = -1, word_bytes = 1;
    void *packed = case_output(c, OUT, words, (int)word_bytes);
    return hqq_repack(packed, other.packing, case_weight(c), case_context(c));
}

static hqq_status dequantize(fuzz_case *c)
{
    const fuzz_fields *f = &c->fields;
    int64_t row_begin = decode_bound(f->row_begin, c->N, 0);
    int64_t row_end = decode_bound(f->row_end, c->N, c->N);
    int64_t column_begin = decode_bound(f->column_begin, c->K, 0);
    int64_t column_end = decode_bound(f->column_end, c->K, c->K);
    int bad = row_begin < 0 || row_end < row_begin || row_end > c->N || column_begin < 0 ||
              column_end < column_begin || column_end > c->K;
    int64_t rows = bad ? 1 : row_end - row_begin, columns = bad ? 1 : column_end - column_begin;
    int64_t stride = decode_stride(f->stride, columns);
    fuzz_count elements =
        rows > 0 && columns > 0 ? (fuzz_count)(rows - 1) * stride + columns : 0;
    if (rows > 1 && stride < columns) elements = 1;
    void *out = case_output(c, OUT, elements, bytes_of(c->dtype));
    return hqq_dequantize(out, stride, c->dtype, case_weight(c), row_begin, row_end,
                          column_begin, column_end, case_context(c));
}

static hqq_status workspace_size(fuzz_case *c)
{
    size_t *bytes = case_output(c, BYTES, 1, sizeof *bytes);
    const hqq_lora *lora = case_lora(c);
    return hqq_workspace_size(bytes, case_weight(c), lora, c->M, c->dtype, case_context(c));
}

static hqq_status grouped_workspace_size(fuzz_case *c)
{
    size_t *bytes = case_output(c, BYTES, 1, sizeof *bytes);
    const hqq_routing *routing = case_routing(c);
    const hqq_lora *lora = case_lora(c);
    return hqq_grouped_workspace_size(bytes, case_weight(c), lora, routing, c->dtype,
                                      case_context(c));
}

/* ---- products -------------------------------------------------------------------------- */

/* M rows of `columns`, without gaps; nobody can say how large if there is a negative one. */
static void *product(fuzz_case *c, enum which which, int64_t rows, int64_t columns, int bytes)
{
    fuzz_count elements = rows < 0 || columns < 0 ? -1 : (fuzz_count)rows * columns;
    return case_output(c, which, elements, bytes);
}

static const void *bias(fuzz_case *c)
{
    if (c->fields.bias_dtype & 1) return NULL;
    return give_input(&c->buffers, BIAS, c->N, bytes_of(c->bias_dtype));
}

/* Forward and backward, of one weight or grouped, with an adapter or without: all arguments. */
typedef struct product_arguments {
    void *y, *dx, *dA, *dB, *workspace;
    float *xa;
    const void *x, *dy, *bias;
    const float *saved_xa;
    const hqq_weight *weight;
    const hqq_lora *lora;
    const hqq_routing *routing;
} product_arguments;

static product_arguments arguments_of(fuzz_case *c, int backward, int with_lora, int grouped)
{
    product_arguments a = {0};
    int bytes = bytes_of(c->dtype);
    if (grouped) a.routing = case_routing(c);
    a.weight = case_weight(c);
    if (with_lora) a.lora = case_lora(c);
    if (!backward || with_lora) a.x = case_rows(c, X, c->M, c->K, c->stride_x, c->dtype);
    if (backward) {
        a.dy = case_rows(c, DY, c->M, c->N, c->stride_dy, c->dtype);
        a.dx = product(c, DX, c->M, c->K, bytes);
    } else {
        a.y = product(c, Y, c->M, c->N, bytes);
        if (!grouped) a.bias = bias(c);
    }
    if (with_lora && backward) {
        int of_lora = bytes_of(c->lora.dtype);
        fuzz_count A = (fuzz_count)c->R * c->K, B = (fuzz_count)c->R * c->N;
        a.dA = case_output(c, DA, of_experts(c, A), of_lora);
        a.dB = case_output(c, DB, of_experts(c, B), of_lora);
        a.saved_xa = case_rows(c, XA, c->M, c->R, c->R, HQQ_F32);
    } else if (with_lora) {
        a.xa = product(c, XA, c->M, c->R, 4);
    }
    a.workspace = case_workspace(c, a.lora, grouped);
    return a;
}

static hqq_status linear(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 0, 0, 0);
    return hqq_linear(a.y, a.x, c->stride_x, a.weight, a.bias, c->bias_dtype, c->M, c->dtype,
                      a.workspace, c->workspace_bytes, case_context(c));
}

static hqq_status linear_dgrad(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 1, 0, 0);
    return hqq_linear_dgrad(a.dx, a.dy, c->stride_dy, a.weight, c->M, c->dtype, a.workspace,
                            c->workspace_bytes, case_context(c));
}

static hqq_status lora_linear(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 0, 1, 0);
    return hqq_lora_linear(a.y, a.xa, a.x, c->stride_x, a.weight, a.bias, c->bias_dtype, a.lora,
                           c->M, c->dtype, a.workspace, c->workspace_bytes, case_context(c));
}

static hqq_status lora_linear_backward(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 1, 1, 0);
    return hqq_lora_linear_backward(a.dx, a.dA, a.dB, a.dy, c->stride_dy, a.x, c->stride_x,
                                    a.saved_xa, a.weight, a.lora, c->M, c->dtype, a.workspace,
                                    c->workspace_bytes, case_context(c));
}

static hqq_status grouped_linear(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 0, 0, 1);
    return hqq_grouped_linear(a.y, a.x, c->stride_x, a.weight, a.routing, c->dtype, a.workspace,
                              c->workspace_bytes, case_context(c));
}

static hqq_status grouped_linear_dgrad(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 1, 0, 1);
    return hqq_grouped_linear_dgrad(a.dx, a.dy, c->stride_dy, a.weight, a.routing, c->dtype,
                                    a.workspace, c->workspace_bytes, case_context(c));
}

static hqq_status grouped_lora_linear(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 0, 1, 1);
    return hqq_grouped_lora_linear(a.y, a.xa, a.x, c->stride_x, a.weight, a.lora, a.routing,
                                   c->dtype, a.workspace, c->workspace_bytes, case_context(c));
}

static hqq_status grouped_lora_linear_backward(fuzz_case *c)
{
    product_arguments a = arguments_of(c, 1, 1, 1);
    return hqq_grouped_lora_linear_backward(
        a.dx, a.dA, a.dB, a.dy, c->stride_dy, a.x, c->stride_x, a.saved_xa, a.weight, a.lora,
        a.routing, c->dtype, a.workspace, c->workspace_bytes, case_context(c));
}

/* ---- layers that share their input ------------------------------------------------------ */

static hqq_status shared_input_workspace_size(fuzz_case *c)
{
    size_t *bytes = case_output(c, BYTES, 1, sizeof *bytes);
    const hqq_lora *lora = case_lora(c);
    return hqq_shared_input_workspace_size(bytes, case_weight(c), lora, c->M, c->dtype,
                                           case_context(c));
}

static void *shared_workspace(fuzz_case *c, const hqq_lora *lora, const hqq_weight *weight)
{
    size_t needed = 0;
    hqq_status status =
        hqq_shared_input_workspace_size(&needed, weight, lora, c->M, c->dtype, case_context(c));
    return workspace_of(c, status, needed);
}

/* Of the calls that take no weight: of one that is sound whatever N and K are, as a caller has
 * to make one up. */
static void *factor_workspace(fuzz_case *c, const hqq_lora *lora, int64_t N, int64_t K)
{
    const hqq_weight weight = {
        .out_features = N, .in_features = K, .group_size = 1, .nbits = 8, .axis = 1};
    return shared_workspace(c, lora, &weight);
}

static hqq_status lora_project(fuzz_case *c)
{
    const hqq_lora *lora = case_lora(c);
    const void *x = case_rows(c, X, c->M, c->K, c->stride_x, c->dtype);
    float *xa = product(c, XA, c->M, c->R, 4);
    void *workspace = factor_workspace(c, lora, 0, c->K);
    return hqq_lora_project(xa, x, c->stride_x, lora, c->M, c->K, c->dtype, workspace,
                            c->workspace_bytes, case_context(c));
}

static hqq_status lora_linear_from_xa(fuzz_case *c)
{
    const hqq_weight *weight = case_weight(c);
    const hqq_lora *lora = case_lora(c);
    const void *x = case_rows(c, X, c->M, c->K, c->stride_x, c->dtype);
    const float *xa = case_rows(c, XA, c->M, c->R, c->R, HQQ_F32);
    const void *with_bias = bias(c);
    void *y = product(c, Y, c->M, c->N, bytes_of(c->dtype));
    void *workspace = shared_workspace(c, lora, weight);
    return hqq_lora_linear_from_xa(y, xa, x, c->stride_x, weight, with_bias, c->bias_dtype,
                                   lora, c->M, c->dtype, workspace, c->workspace_bytes,
                                   case_context(c));
}

static hqq_status lora_factor_gradients(fuzz_case *c)
{
    const hqq_lora *lora = case_lora(c);
    const void *dy = case_rows(c, DY, c->M, c->N, c->stride_dy, c->dtype);
    const float *xa = case_rows(c, XA, c->M, c->R, c->R, HQQ_F32);
    float *dyb = product(c, OUT, c->M, c->R, 4);
    void *dB = product(c, DB, c->N, c->R, bytes_of(c->lora.dtype));
    void *workspace = factor_workspace(c, lora, c->N, 0);
    return hqq_lora_factor_gradients(dyb, dB, dy, c->stride_dy, xa, lora, c->M, c->N, c->dtype,
                                     workspace, c->workspace_bytes, case_context(c));
}

static hqq_status lora_input_gradients(fuzz_case *c)
{
    const hqq_weight *weight = case_weight(c);
    const hqq_lora *lora = case_lora(c);
    const void *dy = case_rows(c, DY, c->M, c->N, c->stride_dy, c->dtype);
    const void *x = case_rows(c, X, c->M, c->K, c->stride_x, c->dtype);
    const float *dyb = case_rows(c, XA, c->M, c->R, c->R, HQQ_F32);
    void *dx = product(c, DX, c->M, c->K, bytes_of(c->dtype));
    void *dA = product(c, DA, c->R, c->K, bytes_of(c->lora.dtype));
    void *workspace = shared_workspace(c, lora, weight);
    return hqq_lora_input_gradients(dx, dA, dy, c->stride_dy, dyb, x, c->stride_x, weight, lora,
                                    c->M, c->dtype, workspace, c->workspace_bytes,
                                    case_context(c));
}

const fuzz_entry fuzz_entries[] = {
    {"choose_kernel", choose_kernel, 0},
    {"layout_of", layout_of, 0},
    {"quantize", quantize, 0},
    {"pack", pack, 0},
    {"unpack", unpack, 0},
    {"dequantize", dequantize, 0},
    {"workspace_size", workspace_size, 0},
    {"linear", linear, 0},
    {"linear_dgrad", linear_dgrad, 0},
    {"lora_linear", lora_linear, 0},
    {"lora_linear_backward", lora_linear_backward, 0},
    {"grouped_workspace_size", grouped_workspace_size, 1},
    {"grouped_linear", grouped_linear, 1},
    {"grouped_linear_dgrad", grouped_linear_dgrad, 1},
    {"grouped_lora_linear", grouped_lora_linear, 1},
    {"grouped_lora_linear_backward", grouped_lora_linear_backward, 1},
    {"shared_input_workspace_size", shared_input_workspace_size, 0},
    {"lora_project", lora_project, 0},
    {"lora_linear_from_xa", lora_linear_from_xa, 0},
    {"lora_factor_gradients", lora_factor_gradients, 0},
    {"lora_input_gradients", lora_input_gradients, 0},
    {"repack", repack, 0},
};
const int fuzz_entry_count = (int)(sizeof fuzz_entries / sizeof *fuzz_entries);

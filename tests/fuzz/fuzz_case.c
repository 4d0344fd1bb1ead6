#include "fuzz_case.h"

#include "callbacks.h"

int bytes_of(hqq_dtype dtype)
{
    return dtype == HQQ_F16 || dtype == HQQ_BF16 ? 2 : 4;
}

/* So much work that an input takes milliseconds: multiplications, in double for the reference.
 * Where a thread of a GPU is a fiber of the CPU, 2^17 of them take a tenth of a second. */
#ifdef FUZZ_CUDA
#define MOST_WORK ((fuzz_count)1 << 17)
#else
#define MOST_WORK ((fuzz_count)1 << 20)
#endif

static fuzz_count at_least_1(int64_t a)
{
    return a > 1 ? a : 1;
}

/* A weight of no more elements than that; one of absurd sizes stays so, and has no arrays. */
static void bound_weight(fuzz_case *c)
{
    while (c->N > 0 && c->K > 0 && c->N < 1024 && c->K < 1024 &&
           (fuzz_count)c->N * c->K > MOST_WORK)
        *(c->N > c->K ? &c->N : &c->K) /= 2;
}

static void bound_work(fuzz_case *c)
{
    bound_weight(c);
    int reference = c->context.kernel == HQQ_KERNEL_REFERENCE;
    fuzz_count elements = at_least_1(c->N) * at_least_1(c->K);
    if (elements > MOST_WORK) return; /* no arrays that large are given */
    while (c->M > 1 && c->M < 1024 &&
           c->M * elements * (reference ? at_least_1(c->R) : 1) > MOST_WORK)
        c->M /= 2;
    while (c->R > 1 && c->R < 1024 && c->M * elements * c->R > 4 * MOST_WORK) c->R /= 2;
    while (c->options.iters > 1 && c->options.iters <= 10000 &&
           c->options.iters * elements > MOST_WORK)
        c->options.iters /= 2;
}

/* Whether the library takes a context with these. */
static int is_taken(int isa, int kernel)
{
    const hqq_weight sound = {.out_features = 8, .in_features = 8, .group_size = 8, .nbits = 4};
    const hqq_context context = {.isa = (hqq_isa)isa, .kernel = (hqq_kernel)kernel};
    size_t bytes;
    return hqq_workspace_size(&bytes, &sound, NULL, 1, HQQ_F32, &context) == HQQ_OK;
}

/* More than there will ever be: a library that takes so many checks none. */
enum { ENUMERATORS_MOST = 0xf0 };

int known_isas(void)
{
    static int known;
    if (known) return known;
    while (is_taken(known, HQQ_KERNEL_AUTO))
        if (++known == ENUMERATORS_MOST) __builtin_trap();
    return known;
}

int known_kernels(void)
{
    static int known;
    if (known) return known;
    while (is_taken(HQQ_ISA_AUTO, known))
        if (++known == ENUMERATORS_MOST) __builtin_trap();
    return known;
}

static hqq_quantize_options make_options(const fuzz_fields *f)
{
    return (hqq_quantize_options){.solver = (hqq_solver)decode_enum(f->solver, 3),
                                  .iters = decode_iters(f->iters),
                                  .early_stop = f->switches & 1,
                                  .round_zero = f->switches >> 1 & 1,
                                  .lp_norm = decode_float(f->lp_norm, 0.7f),
                                  .beta = decode_float(f->beta, 10.0f),
                                  .kappa = decode_float(f->kappa, 1.0f)};
}

void make_case(fuzz_case *c, const fuzz_fields *f, int grouped)
{
    *c = (fuzz_case){.fields = *f, .experts = 1};
    c->buffers.null = f->null;
    c->buffers.misaligned = f->misaligned;
    c->buffers.values = (int)f->values;
    c->buffers.state = f->seed + UINT64_C(0x9e3779b97f4a7c15);
    c->N = decode_size(f->N);
    c->K = decode_size(f->K);
    c->M = decode_size(f->M);
    c->R = decode_size(f->rank);
    c->dtype = (hqq_dtype)decode_enum(f->dtype, 3);
    c->W_dtype = c->dtype;
    c->bias_dtype = (hqq_dtype)decode_enum(f->bias_dtype >> 1, 3);
    c->options = make_options(f);
    c->context.isa = (hqq_isa)decode_enum(f->isa, known_isas());
    c->context.kernel = (hqq_kernel)decode_enum(f->kernel, known_kernels());
    lend_callbacks(&c->context, f->callbacks);
    if (grouped) {
        c->experts = decode_size(f->experts);
        if (c->experts > 40 && c->experts < 4096) c->experts %= 40;
        if (c->M > 64 && c->M < 4096) c->M %= 64;
    }
    bound_work(c);
    c->weight = (hqq_weight){.out_features = c->N,
                             .in_features = c->K,
                             .group_size = decode_group_size(f->G, c->N, c->K),
                             .nbits = decode_nbits(f->nbits),
                             .axis = decode_axis(f->axis),
                             .meta_dtype = (hqq_dtype)decode_enum(f->meta_dtype, 3),
                             .packing = (hqq_packing)decode_enum(f->packing, 2)};
    if (hqq_layout_of(&c->words, &c->word_bytes, &c->groups, &c->weight) != HQQ_OK) {
        c->words = c->groups = -1;
        c->word_bytes = 1;
    }
    c->stride_x = decode_stride(f->stride, c->K);
    c->stride_dy = decode_stride(f->stride, c->N);
}

const hqq_context *case_context(fuzz_case *c)
{
    return c->fields.callbacks >= 0xf0 ? NULL : &c->context;
}

const hqq_weight *case_shape(fuzz_case *c)
{
    return c->buffers.null >> WEIGHT & 1 ? NULL : &c->weight;
}

fuzz_count of_experts(const fuzz_case *c, fuzz_count elements)
{
    if (elements < 0 || elements > INT64_MAX) return -1;
    return elements * (c->experts > 0 ? c->experts : 1);
}

const hqq_weight *case_weight(fuzz_case *c)
{
    fuzz_buffers *b = &c->buffers;
    int meta = bytes_of(c->weight.meta_dtype);
    c->weight.packed = give_input(b, PACKED, of_experts(c, c->words), (int)c->word_bytes);
    c->weight.scale = give_input(b, SCALE, of_experts(c, c->groups), meta);
    c->weight.zero = give_input(b, ZERO, of_experts(c, c->groups), meta);
    return case_shape(c);
}

const hqq_lora *case_lora(fuzz_case *c)
{
    const fuzz_fields *f = &c->fields;
    int choice = decode_enum(f->lora_dtype, 4); /* x's dtype more often than another */
    c->lora.dtype = choice == 3 ? c->dtype : (hqq_dtype)choice;
    c->lora.rank = c->R;
    c->lora.scaling = decode_float(f->scaling, 0.5f);
    c->lora.dropout = decode_float(f->dropout, f->dropout & 1 ? 0.25f : 0.0f);
    int bytes = bytes_of(c->lora.dtype);
    c->lora.A = give_input(&c->buffers, LORA_A, of_experts(c, (fuzz_count)c->R * c->K), bytes);
    c->lora.B = give_input(&c->buffers, LORA_B, of_experts(c, (fuzz_count)c->N * c->R), bytes);
    c->lora.seed = (const uint64_t *)give_input(&c->buffers, SEED, 1, sizeof *c->lora.seed);
    c->lora.seed_offset = f->seed;
    return c->buffers.null >> LORA & 1 ? NULL : &c->lora;
}

/* Offsets that cut M rows at random places, or with one fault. An absurd number of experts gets
 * two offsets, whose second must stop whoever reads them. */
const hqq_routing *case_routing(fuzz_case *c)
{
    fuzz_buffers *b = &c->buffers;
    int absurd = c->experts < 1 || c->experts > 40;
    int64_t count = absurd ? 2 : c->experts + 1;
    int64_t *offsets = (int64_t *)give_input(b, OFFSETS, count, sizeof *offsets);
    b->misaligned &= ~(1u << OFFSETS);
    c->routing = (hqq_routing){.experts = c->experts, .offsets = offsets};
    if (offsets && (uintptr_t)offsets % sizeof *offsets == 0) {
        int64_t rows = c->M, at = 0;
        for (int64_t e = 0; e < count; e++) {
            offsets[e] = at;
            if (rows > at && rows < 4096)
                at += (int64_t)(fuzz_random(b) % (uint64_t)(2 * (rows - at) / (count - e) + 1));
            if (at > rows) at = rows;
        }
        if (!absurd) offsets[count - 1] = rows;
        uint64_t place = fuzz_random(b) % (uint64_t)count;
        switch (c->fields.routing) {
        case 1: offsets[0] = 1; break;
        case 2: offsets[place] = -1; break;
        case 3: offsets[place] = INT64_MAX; break;
        case 4: offsets[place] = INT64_MIN; break;
        case 5: offsets[0] = offsets[count - 1]; break;
        default: break;
        }
        if (absurd) offsets[0] = 0, offsets[1] = -1;
        c->M = offsets[count - 1];
    }
    return b->null >> ROUTING & 1 ? NULL : &c->routing;
}

const void *case_rows(fuzz_case *c, enum which which, int64_t rows, int64_t columns,
                      int64_t stride, hqq_dtype dtype)
{
    fuzz_count elements = columns;
    if (rows > 1) elements = (fuzz_count)(rows - 1) * stride + columns;
    if (rows <= 0 || columns <= 0) elements = 0;
    if (rows < 0 || columns < 0 || (rows > 1 && stride < columns)) elements = -1;
    return give_input(&c->buffers, which, elements, bytes_of(dtype));
}

void *case_output(fuzz_case *c, enum which which, fuzz_count elements, int bytes)
{
    return give_output(&c->buffers, which, elements, bytes);
}

void *case_workspace(fuzz_case *c, const hqq_lora *lora, int grouped)
{
    size_t needed = 0;
    const hqq_weight *weight = case_shape(c);
    const hqq_context *context = case_context(c);
    const hqq_routing *routing = c->buffers.null >> ROUTING & 1 ? NULL : &c->routing;
    hqq_status status =
        grouped ? hqq_grouped_workspace_size(&needed, weight, lora, routing, c->dtype, context)
                : hqq_workspace_size(&needed, weight, lora, c->M, c->dtype, context);
    return workspace_of(c, status, needed);
}

void *workspace_of(fuzz_case *c, hqq_status status, size_t needed)
{
    if (status != HQQ_OK) { /* whoever was refused the size has none to claim */
        c->workspace_bytes = 0;
        return c->fields.workspace % 2 ? give_workspace(&c->buffers, 0) : NULL;
    }
    char *given = give_workspace(&c->buffers, needed);
    c->workspace_bytes = needed;
    switch (c->fields.workspace % 8) {
    case 1: given = NULL; break;                         /* and its size */
    case 2: given = NULL, c->workspace_bytes = 0; break; /* "make it yourself" */
    case 3: c->workspace_bytes = needed ? needed - 1 : 0; break;
    case 4: c->workspace_bytes = SIZE_MAX; break; /* more than there is */
    case 5: c->workspace_bytes = 0; break;
    case 6: given = given && needed ? given + 4 : given; break;
    default: break;
    }
    return given;
}

/*
 * Products of mixtures of experts. An expert has its own rows and its own weight, so each is a
 * product of its own; what is decided here is who works on it.
 *
 *   few rows    experts side by side, each on one thread: a product of few rows is short, and
 *               threads would wait for each other at the end of each
 *   many rows   one after the other, each on all threads
 */
#include "experts.h"

#include "isa.h"
#include "parallel.h"
#include "status.h"

/* Experts side by side, if at least so many of them have few rows: enough for a few threads. Of
 * many rows one expert alone keeps the threads busy, and its workspace is megabytes. Neither is
 * measured yet. */
enum { HQQ_SIDE_BY_SIDE_LEAST = 4, HQQ_FEW_ROWS = 256 };

/* One of `forward` and `backward` is not NULL. */
typedef struct grouped_product {
    const hqq_forward *forward;
    const hqq_backward *backward;
    const hqq_routing *routing;
    const hqq_weight *weight;
    const hqq_lora *lora;
    hqq_dtype dtype;
    const hqq_context *context;
    hqq_context one_thread;
} grouped_product;

/* Also those without rows, whose gradients are to be filled with zeros. The GEMM that is lent
 * is not called on threads of ours. */
static int has_few_rows(const grouped_product *g, int64_t e)
{
    int64_t M = hqq_rows_of_expert(g->routing, e);
    hqq_kernel kernel = g->context ? g->context->kernel : HQQ_KERNEL_AUTO;
    if (kernel == HQQ_KERNEL_AUTO)
        kernel = hqq_choose_kernel(g->weight, M, g->dtype, g->backward != NULL,
                                   hqq_isa_in_use(g->context));
    return kernel != HQQ_KERNEL_BLOCKED && M <= HQQ_FEW_ROWS;
}

static hqq_status run_expert(const grouped_product *g, int64_t e, void *workspace,
                             const hqq_context *context)
{
    hqq_expert expert;
    if (g->backward) {
        hqq_expert_backward(&expert, g->backward, g->routing, e);
        return hqq_backend_backward(&expert.backward, workspace, context);
    }
    if (hqq_rows_of_expert(g->routing, e) == 0) return HQQ_OK;
    hqq_expert_forward(&expert, g->forward, g->routing, e);
    return hqq_backend_forward(&expert.forward, workspace, context);
}

static hqq_status run_if_few_rows(int64_t chunk, void *scratch, void *data)
{
    const grouped_product *g = data;
    if (!has_few_rows(g, chunk)) return HQQ_OK;
    return run_expert(g, chunk, scratch, &g->one_thread);
}

/* Runs the experts with few rows, if they are to be run side by side, and says so. */
static hqq_status run_side_by_side(const grouped_product *g, int *done)
{
    int64_t experts = 0;
    size_t bytes = 0;
    for (int64_t e = 0; e < g->routing->experts; e++) {
        int64_t M = hqq_rows_of_expert(g->routing, e);
        if (M == 0 || !has_few_rows(g, e)) continue;
        size_t needed;
        HQQ_TRY(
            hqq_backend_workspace_size(&needed, g->weight, g->lora, M, g->dtype, g->context));
        if (needed > bytes) bytes = needed;
        experts++;
    }
    *done = experts >= HQQ_SIDE_BY_SIDE_LEAST;
    if (!*done) return HQQ_OK;
    return hqq_for_each_chunk(g->routing->experts, run_if_few_rows, (void *)g, bytes,
                              g->context);
}

static hqq_status run(grouped_product *g, void *workspace, const hqq_context *context)
{
    g->context = context;
    if (context) g->one_thread = *context;
    g->one_thread.parallel_for = NULL;
    int small_are_done = 0;
    if (context && context->parallel_for) HQQ_TRY(run_side_by_side(g, &small_are_done));
    for (int64_t e = 0; e < g->routing->experts; e++)
        if (!small_are_done || !has_few_rows(g, e))
            HQQ_TRY(run_expert(g, e, workspace, context));
    return HQQ_OK;
}

hqq_status hqq_backend_grouped_forward(const hqq_forward *f, const hqq_routing *routing,
                                       void *workspace, const hqq_context *context)
{
    grouped_product g = {.forward = f,
                         .routing = routing,
                         .weight = f->weight,
                         .lora = f->lora,
                         .dtype = f->dtype};
    return run(&g, workspace, context);
}

hqq_status hqq_backend_grouped_backward(const hqq_backward *b, const hqq_routing *routing,
                                        void *workspace, const hqq_context *context)
{
    grouped_product g = {.backward = b,
                         .routing = routing,
                         .weight = b->weight,
                         .lora = b->lora,
                         .dtype = b->dtype};
    return run(&g, workspace, context);
}

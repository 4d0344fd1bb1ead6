/* Products of mixtures of experts: each expert's kernels are enqueued behind the last one's,
 * which may use the same workspace. An expert without rows costs nothing in forward. */
#include "experts.h"

#include "status.h"

hqq_status hqq_backend_grouped_forward(const hqq_forward *f, const hqq_routing *routing,
                                       void *workspace, const hqq_context *context)
{
    hqq_expert expert;
    for (int64_t e = 0; e < routing->experts; e++) {
        if (hqq_rows_of_expert(routing, e) == 0) continue;
        hqq_expert_forward(&expert, f, routing, e);
        HQQ_TRY(hqq_backend_forward(&expert.forward, workspace, context));
    }
    return HQQ_OK;
}

hqq_status hqq_backend_grouped_backward(const hqq_backward *b, const hqq_routing *routing,
                                        void *workspace, const hqq_context *context)
{
    hqq_expert expert;
    for (int64_t e = 0; e < routing->experts; e++) {
        hqq_expert_backward(&expert, b, routing, e);
        HQQ_TRY(hqq_backend_backward(&expert.backward, workspace, context));
    }
    return HQQ_OK;
}

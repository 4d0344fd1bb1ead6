#include "finite.h"

#include <torch/csrc/stable/ops.h>

#include "torch_context.h"

namespace hqqlora
{
namespace
{

/* One of torch's functions of one tensor. */
Tensor call(const char *name, const Tensor &t)
{
    StableIValue stack[1] = {torch::stable::detail::from(t)};
    torch_check(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION), name);
    return torch::stable::detail::to<Tensor>(stack[0]);
}

bool any(const Tensor &t)
{
    bool result = false;
    torch_check(aoti_torch_item_bool(call("aten::any", t).get(), &result), "reading a bool");
    return result;
}

/* t[i, j] */
Tensor element(const Tensor &t, int64_t i, int64_t j)
{
    return torch::stable::select(torch::stable::select(t, 0, i), 0, j);
}

int64_t integer(const Tensor &t)
{
    int64_t value = 0;
    torch_check(aoti_torch_item_int64(t.get(), &value), "reading an integer");
    return value;
}

double number(const Tensor &t)
{
    double value = 0;
    torch_check(aoti_torch_item_float64(t.get(), &value), "reading a number");
    return value;
}

/* Where t is not finite: [count, dimensions], in the order of the elements. */
Tensor non_finite(const Tensor &t)
{
    return call("aten::nonzero", call("aten::logical_not", call("aten::isfinite", t)));
}

} // namespace

void check_finite(const Tensor &W, const Tensor &scale, const OptionalTensor &importance)
{
    if (!any(call("aten::isnan", scale))) return;
    if (importance) { /* the square root of a negative number is NaN */
        Tensor bad = non_finite(call("aten::sqrt", *importance));
        if (bad.size(0) != 0) {
            int64_t k = integer(element(bad, 0, 0));
            HQQ_CHECK(false, "options.importance[", k, "] is ",
                      number(torch::stable::select(*importance, 0, k)),
                      "; expected a finite value of at least 0");
        }
    }
    Tensor bad = non_finite(W);
    if (bad.size(0) == 0) return;
    int64_t row = integer(element(bad, 0, 0)), column = integer(element(bad, 0, 1));
    HQQ_CHECK(false, "W[", row, ", ", column, "] is ", number(element(W, row, column)),
              "; only finite weights can be quantized");
}

} // namespace hqqlora

/* Whether a weight that has been quantized was finite, where the library cannot tell. */
#ifndef HQQLORA_OPS_FINITE_H
#define HQQLORA_OPS_FINITE_H

#include "arguments.h"

namespace hqqlora
{

/* Throws, in the CPU library's words, if W [N,K] holds a NaN or an infinity, or the importance
 * [K] of its columns such or a negative number; scale is what it was quantized to, with NaN for
 * the groups of such elements. Waits for the device: one byte is read back, and W itself is
 * searched only if some scale is NaN. */
void check_finite(const Tensor &W, const Tensor &scale, const OptionalTensor &importance);

} // namespace hqqlora

#endif

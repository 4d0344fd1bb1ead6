/* The ops as torch sees them. Their meaning is in hqqlora.h, the checks of their arguments
 * in arguments.h and adapter.h; each device's implementations register themselves.
 *
 * All ops are functional, and none carries an autograd formula: gradients come from
 * hqqlora.autograd, which calls these. The implementations take int64_t for `int` and double
 * for `float`; TORCH_BOX would take anything else too, and pass garbage. */
#include <torch/csrc/stable/library.h>

#define WEIGHT  "Tensor W_q, Tensor scale, Tensor zero"
#define FORMAT  "int out_features, int in_features, int nbits, int group_size, int axis"
#define ADAPTER "Tensor A, Tensor B, Tensor? seed, float scaling, float dropout"

STABLE_TORCH_LIBRARY(hqqlora, m)
{
    m.def("quantize(Tensor weight, int nbits, int group_size, int axis, ScalarType meta_dtype, "
          "int solver=0, int iters=20, bool early_stop=True, bool round_zero=False, "
          "float lp_norm=0.7, float beta=10.0, float kappa=1.0, Tensor? importance=None) "
          "-> (Tensor W_q, Tensor scale, Tensor zero)");
    m.def("dequantize(" WEIGHT ", " FORMAT ", ScalarType dtype) -> Tensor");
    m.def("repack(Tensor W_q, " FORMAT ", bool planes) -> Tensor");
    m.def("linear(Tensor x, " WEIGHT ", Tensor? bias, " FORMAT ") -> Tensor");
    m.def("linear_dgrad(Tensor dy, " WEIGHT ", " FORMAT ") -> Tensor");
    m.def("lora_linear(Tensor x, " WEIGHT ", Tensor? bias, " ADAPTER ", " FORMAT ") "
          "-> (Tensor y, Tensor xa)");
    m.def("lora_linear_backward(Tensor dy, Tensor? x, Tensor? xa, " WEIGHT ", " ADAPTER
          ", " FORMAT ", bool needs_dx, bool needs_dA, bool needs_dB) "
          "-> (Tensor dx, Tensor dA, Tensor dB)");

    /* of layers that share x: A of all of them, or B and xa of one */
    m.def("lora_project(Tensor x, Tensor A) -> Tensor");
    m.def("lora_linear_from_xa(Tensor x, " WEIGHT ", Tensor? bias, Tensor xa, Tensor B, "
          "float scaling, " FORMAT ") -> Tensor");
    m.def("lora_factor_gradients(Tensor dy, Tensor? xa, Tensor B, float scaling, "
          "bool needs_dyb, bool needs_dB) -> (Tensor dyb, Tensor dB)");
    m.def("lora_input_gradients(Tensor dy, Tensor dyb, Tensor? x, " WEIGHT ", Tensor A, "
          "float scaling, " FORMAT ", bool needs_dx, bool needs_dA) "
          "-> (Tensor dx, Tensor dA)");

    /* of E experts: a first dimension E in W_q, scale, zero, A and B; offsets [E + 1] */
    m.def("grouped_linear(Tensor x, " WEIGHT ", Tensor offsets, " FORMAT ") -> Tensor");
    m.def("grouped_linear_dgrad(Tensor dy, " WEIGHT ", Tensor offsets, " FORMAT ") -> Tensor");
    m.def("grouped_lora_linear(Tensor x, " WEIGHT ", Tensor offsets, " ADAPTER ", " FORMAT ") "
          "-> (Tensor y, Tensor xa)");
    m.def("grouped_lora_linear_backward(Tensor dy, Tensor? x, Tensor? xa, " WEIGHT
          ", Tensor offsets, " ADAPTER ", " FORMAT ", bool needs_dx, bool needs_dA, "
          "bool needs_dB) -> (Tensor dx, Tensor dA, Tensor dB)");
}

/* The header alone is all a program needs: it compiles first and by itself, as pedantic C11
 * and, through test_header_cxx.cpp, as C++17; and each declared function is there to be linked.
 */
#include "hqqlora.h"

#include <stdio.h>
#include <string.h>

/* Descriptors are part of the binary interface: fields may be added at the end alone. */
#define SAME_PLACE(type, field, place) \
    (offsetof(type, field) == (place) ? 0 : failed(#type "." #field " has moved"))

static int failed(const char *what)
{
    printf("test_header: %s\n", what);
    return 1;
}

/* The linker checks that each is there. */
typedef void (*function)(void);
static const function entries[] = {
    (function)hqq_choose_kernel,
    (function)hqq_layout_of,
    (function)hqq_quantize,
    (function)hqq_pack,
    (function)hqq_unpack,
    (function)hqq_repack,
    (function)hqq_dequantize,
    (function)hqq_workspace_size,
    (function)hqq_linear,
    (function)hqq_linear_dgrad,
    (function)hqq_lora_linear,
    (function)hqq_lora_linear_backward,
    (function)hqq_shared_input_workspace_size,
    (function)hqq_lora_project,
    (function)hqq_lora_linear_from_xa,
    (function)hqq_lora_factor_gradients,
    (function)hqq_lora_input_gradients,
};

int main(void)
{
    int failures = 0;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (!entries[i]) failures += failed("a declared function is missing");

    char expected[32];
    snprintf(expected, sizeof expected, "%d.%d.%d", HQQ_VERSION_MAJOR, HQQ_VERSION_MINOR,
             HQQ_VERSION_PATCH);
    if (strcmp(hqq_version(), expected) != 0)
        failures += failed("hqq_version is not the header's");
    if (strcmp(hqq_last_error(), "") != 0) failures += failed("a message before any failure");

    for (int i = -1; i <= 6; i++)
        if (!hqq_status_name((hqq_status)i) || !hqq_isa_name((hqq_isa)i))
            failures += failed("a name is NULL");
    if (strcmp(hqq_status_name(HQQ_OK), "ok") != 0) failures += failed("HQQ_OK is not \"ok\"");
    for (int a = 0; a <= 5; a++)
        for (int b = 0; b < a; b++)
            if (strcmp(hqq_status_name((hqq_status)a), hqq_status_name((hqq_status)b)) == 0)
                failures += failed("two statuses have one name");

    hqq_isa best = hqq_isa_in_use(NULL);
    if (best < HQQ_ISA_PORTABLE || best > HQQ_ISA_AMX)
        failures += failed("isa_in_use is not an instruction set");
    hqq_context portable;
    memset(&portable, 0, sizeof portable);
    portable.isa = HQQ_ISA_PORTABLE;
    if (hqq_isa_in_use(&portable) != HQQ_ISA_PORTABLE) failures += failed("a cap is not kept");

    hqq_quantize_options o = hqq_quantize_defaults();
    if (o.solver != HQQ_SOLVER_DEFAULT || o.iters != 20 || o.early_stop != 1 ||
        o.round_zero != 0 || o.lp_norm != 0.7f || o.beta != 10.0f || o.kappa != 1.0f ||
        o.importance)
        failures += failed("the default options are not those the header states");

    if (sizeof(void *) == 8)
        failures += SAME_PLACE(hqq_weight, packed, 40) + SAME_PLACE(hqq_weight, zero, 56) +
                    SAME_PLACE(hqq_lora, scaling, 32) + SAME_PLACE(hqq_lora, seed, 40) +
                    SAME_PLACE(hqq_lora, seed_offset, 48) + SAME_PLACE(hqq_context, isa, 32) +
                    SAME_PLACE(hqq_context, kernel, 36) +
                    SAME_PLACE(hqq_quantize_options, kappa, 24) +
                    SAME_PLACE(hqq_quantize_options, importance, 32);
    return failures != 0;
}

#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

hqq_status hqq_fail(hqq_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

void hqq_clear_error(void)
{
    message[0] = '\0';
}

const char *hqq_last_error(void)
{
    return message;
}

const char *hqq_status_name(hqq_status status)
{
    switch (status) {
    case HQQ_OK: return "ok";
    case HQQ_INVALID: return "invalid argument";
    case HQQ_UNSUPPORTED: return "unsupported";
    case HQQ_NO_MEMORY: return "out of memory";
    case HQQ_NON_FINITE: return "non-finite weight";
    case HQQ_CALLBACK: return "callback failed";
    case HQQ_DEVICE: return "device error";
    }
    return "unknown status";
}

const char *hqq_isa_name(hqq_isa isa)
{
    switch (isa) {
    case HQQ_ISA_AUTO: return "auto";
    case HQQ_ISA_PORTABLE: return "portable";
    case HQQ_ISA_AVX2: return "avx2";
    case HQQ_ISA_AVX512: return "avx512";
    case HQQ_ISA_AVX512_BF16: return "avx512_bf16";
    case HQQ_ISA_AMX: return "amx";
    }
    return "unknown";
}

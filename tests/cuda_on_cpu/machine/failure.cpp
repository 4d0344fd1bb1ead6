#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace on_cpu
{
const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* No std::string: the stacks of the fibers are left as they are, and nothing is unwound. */
static void append(const char *format, va_list arguments)
{
    size_t used = strlen(machine->error);
    vsnprintf(machine->error + used, sizeof machine->error - used, format, arguments);
}

void append_error(const char *format, ...)
{
    if (!machine->error[0])
        snprintf(machine->error, sizeof machine->error, "block (%u, %u, %u), ", blockIdx.x,
                 blockIdx.y, blockIdx.z);
    va_list arguments;
    va_start(arguments, format);
    append(format, arguments);
    va_end(arguments);
}

void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (!machine || !self) { /* a kernel's function called by the host */
        vfprintf(stderr, format, arguments);
        fputc('\n', stderr);
        abort();
    }
    append_error("thread %u: ", self->linear);
    append(format, arguments);
    va_end(arguments);
    end_launch();
}
} // namespace on_cpu

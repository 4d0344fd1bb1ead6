/* Checks that go on after a failure, so that one run shows all of them. */
#ifndef HQQ_CUDA_ON_CPU_CHECK_H
#define HQQ_CUDA_ON_CPU_CHECK_H

#include <stdarg.h>
#include <stdio.h>

static int failed_checks = 0;

__attribute__((format(printf, 2, 3), unused)) static void check(bool holds, const char *format,
                                                                ...)
{
    if (holds) return;
    if (++failed_checks > 20) return;
    va_list arguments;
    va_start(arguments, format);
    fputs("FAILED: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

/* What main returns. */
__attribute__((unused)) static int report_checks()
{
    if (failed_checks) fprintf(stderr, "%d checks failed\n", failed_checks);
    return failed_checks ? 1 : 0;
}

#endif

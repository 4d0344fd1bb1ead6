#include "schedule.h"

#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../control.h"

namespace on_cpu
{
static const char *const ORDERS[] = {"FIFO", "LIFO", "RANDOM", "PRIORITY"};
static const char *const CP_ASYNC[] = {"LATE", "EARLY", "MIXED"};

/* The index of name, or -1. */
template <int count> static int find(const char *const (&names)[count], const char *name)
{
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0) return i;
    return -1;
}

template <int count>
static int from_environment(const char *variable, const char *const (&names)[count])
{
    const char *name = getenv(variable);
    if (!name || !*name) return 0;
    int i = find(names, name);
    if (i >= 0) return i;
    /* a typing error must not silently test something else */
    fprintf(stderr, "%s is \"%s\": not a schedule of the CUDA emulator\n", variable, name);
    _Exit(2);
}

static Schedule initial_schedule()
{
    const char *seed = getenv("HQQLORA_EMULATED_SEED");
    return {static_cast<Order>(from_environment("HQQLORA_EMULATED_ORDER", ORDERS)),
            static_cast<CpAsync>(from_environment("HQQLORA_EMULATED_CP_ASYNC", CP_ASYNC)),
            seed ? strtoull(seed, nullptr, 10) : 1};
}

static std::mutex guard;

static Schedule &schedule()
{
    static Schedule s = initial_schedule();
    return s;
}

Schedule current_schedule()
{
    std::lock_guard<std::mutex> lock(guard);
    return schedule();
}
} // namespace on_cpu

int hqqlora_emulated_set_schedule(const char *order, const char *cp_async, uint64_t seed)
{
    using namespace on_cpu;
    int o = find(ORDERS, order), c = find(CP_ASYNC, cp_async);
    if (o < 0 || c < 0) return 1;
    std::lock_guard<std::mutex> lock(guard);
    schedule() = {static_cast<Order>(o), static_cast<CpAsync>(c), seed};
    return 0;
}

#include "machine.h"

#include <algorithm>
#include <stdlib.h>
#include <string.h>

#if ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace on_cpu
{
enum { DYNAMIC_ALIGNMENT = 128, COARSEST_ALIGNMENT = 256 };

void SharedMemory::start_launch(size_t dynamic, size_t static_limit_, size_t total_limit_)
{
    dynamic_bytes = dynamic;
    static_limit = static_limit_;
    total_limit = total_limit_;
    static_bytes = 0;
    if (dynamic) add(nullptr, "dynamic shared memory", dynamic, DYNAMIC_ALIGNMENT);
}

void SharedMemory::end_launch()
{
    for (Region &r : regions) {
#if ON_CPU_ASAN
        ASAN_UNPOISON_MEMORY_REGION(r.allocation, r.data - static_cast<char *>(r.allocation));
#endif
        free(r.allocation);
    }
    regions.clear();
    low = high = nullptr;
}

void SharedMemory::poison()
{
    for (Region &r : regions) memset(r.data, 0xff, r.bytes);
}

/* Under the sanitizers the address has the alignment of its type and no more: kernels that rely
 * on more than they declared are reported. Else vector instructions would just crash. */
Region &SharedMemory::add(const void *key, const char *name, size_t bytes, size_t alignment)
{
    size_t offset = ON_CPU_ASAN ? alignment : 0;
    void *allocation = nullptr;
    if (posix_memalign(&allocation, COARSEST_ALIGNMENT, offset + bytes) != 0)
        fail("no memory for %zu bytes of shared memory", bytes);
    char *data = static_cast<char *>(allocation) + offset;
#if ON_CPU_ASAN
    ASAN_POISON_MEMORY_REGION(allocation, offset);
#endif
    memset(data, 0xff, bytes);
    low = regions.empty() ? data : std::min(low, data);
    high = regions.empty() ? data + bytes : std::max(high, data + bytes);
    regions.push_back({key, name, data, bytes, allocation, {}});
    if (races_are_checked) regions.back().history.resize(bytes);
    return regions.back();
}

void *SharedMemory::static_array(const void *key, size_t bytes, size_t alignment,
                                 const char *name)
{
    for (Region &r : regions)
        if (r.key == key) return r.data;
    static_bytes += bytes;
    if (static_bytes > static_limit)
        fail("%zu bytes of static shared memory with '%s': the limit is %zu", static_bytes,
             name, static_limit);
    if (static_bytes + dynamic_bytes > total_limit)
        fail("%zu bytes of static shared memory with '%s' and %zu of dynamic: the limit is %zu",
             static_bytes, name, dynamic_bytes, total_limit);
    return add(key, name, bytes, alignment).data;
}

void *SharedMemory::dynamic()
{
    if (!dynamic_bytes) fail("the launch asked for no dynamic shared memory");
    return regions[0].data;
}

Region *SharedMemory::find(const void *address, size_t bytes)
{
    const char *a = static_cast<const char *>(address);
    for (Region &r : regions)
        if (a >= r.data && a < r.data + r.bytes)
            return a + bytes <= r.data + r.bytes ? &r : nullptr;
    return nullptr;
}

Region *SharedMemory::find_same(const Region &region)
{
    for (Region &r : regions)
        if (r.key == region.key) return &r;
    return nullptr;
}

void *static_shared(const void *key, size_t bytes, size_t alignment, const char *name)
{
    return machine->shared.static_array(key, bytes, alignment, name);
}

void *dynamic_shared()
{
    return machine->shared.dynamic();
}
} // namespace on_cpu

/* cp.async.cg.shared.global, 16 bytes a copy. */
#include "machine.h"
#include "../ptx_on_cpu.h"

#include <string.h>

#if ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace on_cpu
{
enum { COPY_BYTES = 16 };

static bool misaligned(const void *address)
{
    return reinterpret_cast<uintptr_t>(address) % COPY_BYTES != 0;
}

static void check_copy(const void *shared, const void *global, bool valid, Site site)
{
    const char *file = base_name(site.file);
    if (misaligned(shared) || (valid && misaligned(global)))
        fail("%s:%d: cp.async from %p to %p: not both multiples of 16", file, site.line, global,
             shared);
    if (!machine->shared.find(shared, COPY_BYTES))
        fail("%s:%d: cp.async to %p: not 16 bytes of shared memory", file, site.line, shared);
#if ON_CPU_ASAN
    if (valid && __asan_region_is_poisoned(const_cast<void *>(global), COPY_BYTES))
        fail("%s:%d: cp.async from %p: past the end of the allocation", file, site.line,
             global);
#endif
}

void PendingCopies::clear()
{
    copies.clear();
    open_group = 0;
}

void PendingCopies::land(const Copy &copy)
{
    if (copy.valid)
        memcpy(copy.shared, copy.global, COPY_BYTES);
    else
        memset(copy.shared, 0, COPY_BYTES);
}

void PendingCopies::issue(void *shared, const void *global, bool valid, Site site)
{
    check_copy(shared, global, valid, site);
    machine->races.start_copy(shared, COPY_BYTES, site);
    CpAsync when = machine->schedule.cp_async;
    if (when == CpAsync::mixed)
        when = machine->random.below(2) ? CpAsync::early : CpAsync::late;
    Copy copy = {shared, global, valid, when == CpAsync::early, open_group, site};
    if (copy.landed)
        land(copy);
    else
        memset(shared, 0xff, COPY_BYTES);
    copies.push_back(copy);
}

void PendingCopies::wait(unsigned groups_left)
{
    size_t done = 0;
    for (; done < copies.size(); done++) {
        const Copy &copy = copies[done];
        if (copy.group >= open_group || open_group - copy.group <= groups_left) break;
        if (!copy.landed) land(copy);
        machine->races.finish_copy(copy.shared, COPY_BYTES);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

void PendingCopies::require_none() const
{
    if (copies.empty()) return;
    const Copy &copy = copies.front();
    fail("returned, but the cp.async of %s:%d was never %s", base_name(copy.site.file),
         copy.site.line, copy.group == open_group ? "committed" : "waited for");
}

void cp_async_16(void *shared, const void *global, bool valid, Site site)
{
    this_thread()->copies.issue(shared, global, valid, site);
}

void cp_async_commit()
{
    this_thread()->copies.commit();
}

void cp_async_wait(unsigned groups_left)
{
    this_thread()->copies.wait(groups_left);
}
} // namespace on_cpu

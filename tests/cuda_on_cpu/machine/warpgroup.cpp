/*
 * wgmma.mma_async.m64n128k16 and m64n64k16, A from registers: each warp of the group multiplies
 * its own 16 rows with the same 128 or 64 rows of shared memory, so here a warp is emulated at
 * a time.
 *
 * As with cp.async, the schedule says when: LATE, at the wait, from what registers and shared
 * memory then hold, so that whoever overwrites either before spoils the result; EARLY, at once;
 * MIXED, every other product. The race checker sees the rows read both when a product is issued
 * and when it is waited for.
 */
#include "machine.h"
#include "../ptx_warpgroup_on_cpu.h"

#include <string.h>

namespace on_cpu
{
enum { ROWS_MOST = 128, STEP = 16 };

void PendingProducts::clear()
{
    products.clear();
    open_group = 0;
}

void PendingProducts::add(const Product &product)
{
    products.push_back(product);
    products.back().group = open_group;
}

size_t PendingProducts::due(unsigned groups_left) const
{
    size_t count = 0;
    for (; count < products.size(); count++) {
        unsigned group = products[count].group;
        if (group >= open_group || open_group - group <= groups_left) break;
    }
    return count;
}

void PendingProducts::forget(size_t count)
{
    products.erase(products.begin(), products.begin() + static_cast<ptrdiff_t>(count));
}

void PendingProducts::require_none() const
{
    if (products.empty()) return;
    const Product &product = products.front();
    fail("returned, but the wgmma of %s:%d was never %s", base_name(product.site.file),
         product.site.line, product.group == open_group ? "committed" : "waited for");
}

/* ---- one product ------------------------------------------------------------------------ */

/* The 16 bytes that hold elements 8 part .. + 7 of row `row`: 16-byte pieces are swizzled by
 * the address of their row. */
static const char *piece_at(const char *b, unsigned row, unsigned part)
{
    uintptr_t plain = reinterpret_cast<uintptr_t>(b) + 128 * row + 16 * part;
    uintptr_t at = plain ^ (plain >> 7 & 7) << 4;
    return b + (at - reinterpret_cast<uintptr_t>(b));
}

static void check_rows(const Product &product)
{
    const char *file = base_name(product.site.file);
    int line = product.site.line;
    uintptr_t at = reinterpret_cast<uintptr_t>(product.b);
    if (at % 1024 >= 128 || at % 32 != 0)
        fail("%s:%d: wgmma: rows at %p, not at a step in the first of eight swizzled ones",
             file, line, static_cast<const void *>(product.b));
    const void *first = reinterpret_cast<const void *>(at / 128 * 128);
    const int bytes = 128 * static_cast<int>(product.rows);
    if (!machine->shared.find(first, static_cast<size_t>(bytes)))
        fail("%s:%d: wgmma: the rows at %p are not %d bytes of shared memory", file, line,
             first, bytes);
}

static void note_reads(const Product &product)
{
    for (unsigned row = 0; row < product.rows; row++) {
        const Thread *reader = machine->threads[self->warp * 32 + row % 32].get();
        for (unsigned part = 0; part < 2; part++)
            machine->races.read_as(reader, piece_at(product.b, row, part), 16);
    }
}

template <class Format>
static void unpack_rows(float (&b)[STEP][ROWS_MOST], const Product &product)
{
    for (unsigned row = 0; row < product.rows; row++)
        for (unsigned part = 0; part < 2; part++) {
            uint16_t elements[8];
            memcpy(elements, piece_at(product.b, row, part), 16);
            for (unsigned i = 0; i < 8; i++)
                b[8 * part + i][row] = Format::to_float(elements[i]);
        }
}

template <class Format> static void unpack_pair(float *to, uint32_t pair)
{
    to[0] = Format::to_float(static_cast<uint16_t>(pair));
    to[1] = Format::to_float(static_cast<uint16_t>(pair >> 16));
}

/* lanes[l]: lane l's product. */
template <class Format> static void multiply(Product *const (&lanes)[32])
{
    float b[STEP][ROWS_MOST];
    const unsigned rows = lanes[0]->rows;
    unpack_rows<Format>(b, *lanes[0]);
    for (unsigned g = 0; g < 8; g++)
        for (unsigned upper = 0; upper < 2; upper++) {
            float a[STEP], sums[ROWS_MOST];
            for (unsigned t = 0; t < 4; t++) {
                const Product &lane = *lanes[4 * g + t];
                unpack_pair<Format>(a + 2 * t, lane.a[upper]);
                unpack_pair<Format>(a + 2 * t + 8, lane.a[upper + 2]);
                for (unsigned j = 0; j < rows / 8; j++)
                    memcpy(sums + 8 * j + 2 * t, lane.d + 4 * j + 2 * upper, 8);
            }
            for (unsigned k = 0; k < STEP; k++)
                for (unsigned n = 0; n < rows; n++) sums[n] += a[k] * b[k][n];
            for (unsigned t = 0; t < 4; t++)
                for (unsigned j = 0; j < rows / 8; j++)
                    memcpy(lanes[4 * g + t]->d + 4 * j + 2 * upper, sums + 8 * j + 2 * t, 8);
        }
    machine->counts.mma++;
}

static void compute(Product *const (&lanes)[32])
{
    if (lanes[0]->half)
        multiply<Half>(lanes);
    else
        multiply<Bfloat16>(lanes);
    for (Product *lane : lanes) lane->computed = true;
}

/* ---- issue and wait -----------------------------------------------------------------------
 */

/* Product `index` of each lane's pending ones; fails if they are not the same. */
static void gather(Product *(&lanes)[32], void **slots, size_t index)
{
    for (unsigned lane = 0; lane < 32; lane++) {
        auto *pending = static_cast<PendingProducts *>(slots[lane]);
        Product &product = pending->products[index];
        lanes[lane] = &product;
        if (product.b != lanes[0]->b)
            fail("%s:%d: wgmma: lane %u names rows at %p, lane 0 at %p",
                 base_name(product.site.file), product.site.line, lane,
                 static_cast<const void *>(product.b), static_cast<const void *>(lanes[0]->b));
    }
}

static bool computes_at_once(size_t number)
{
    CpAsync when = machine->schedule.cp_async;
    return when == CpAsync::early || (when == CpAsync::mixed && number % 2 == 1);
}

static void execute_issue(void **slots, unsigned)
{
    Product *lanes[32];
    size_t last = static_cast<PendingProducts *>(slots[0])->products.size() - 1;
    gather(lanes, slots, last);
    note_reads(*lanes[0]);
    if (computes_at_once(last)) compute(lanes);
}

static void issue(const Product &product)
{
    if (machine->thread_count % 128 != 0)
        fail("%s:%d: wgmma in a block of %u threads, not whole warpgroups",
             base_name(product.site.file), product.site.line, machine->thread_count);
    check_rows(product);
    PendingProducts &pending = this_thread()->products;
    pending.add(product);
    collective(Collective::warpgroup, 0xffffffffu, &pending, execute_issue, product.site);
}

void warpgroup_mma(float *d, unsigned rows, const uint32_t (&a)[4], const void *b, Half,
                   Site site)
{
    issue({d, rows, a, static_cast<const char *>(b), true, false, 0, site});
}

void warpgroup_mma(float *d, unsigned rows, const uint32_t (&a)[4], const void *b, Bfloat16,
                   Site site)
{
    issue({d, rows, a, static_cast<const char *>(b), false, false, 0, site});
}

void warpgroup_commit()
{
    this_thread()->products.commit();
}

struct WaitSlot {
    PendingProducts *pending;
    size_t due;
};

static void execute_wait(void **slots, unsigned)
{
    void *pending[32];
    size_t due = static_cast<WaitSlot *>(slots[0])->due;
    for (unsigned lane = 0; lane < 32; lane++) {
        auto *slot = static_cast<WaitSlot *>(slots[lane]);
        if (slot->due != due)
            fail("%s:%d: lane %u waits for %zu products, lane 0 for %zu",
                 base_name(this_thread()->site.file), this_thread()->site.line, lane, slot->due,
                 due);
        pending[lane] = slot->pending;
    }
    for (size_t i = 0; i < due; i++) {
        Product *lanes[32];
        gather(lanes, pending, i);
        note_reads(*lanes[0]);
        if (!lanes[0]->computed) compute(lanes);
    }
}

void warpgroup_wait(unsigned groups_left, Site site)
{
    PendingProducts &pending = this_thread()->products;
    WaitSlot slot = {&pending, pending.due(groups_left)};
    collective(Collective::warpgroup, 0xffffffffu, &slot, execute_wait, site);
    pending.forget(slot.due);
}
} // namespace on_cpu

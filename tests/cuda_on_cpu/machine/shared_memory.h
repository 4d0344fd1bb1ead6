/* The shared memory of the block that runs. */
#ifndef HQQ_CUDA_ON_CPU_MACHINE_SHARED_MEMORY_H
#define HQQ_CUDA_ON_CPU_MACHINE_SHARED_MEMORY_H

#include <stddef.h>
#include <vector>

#include "race_checker.h"

namespace on_cpu
{
/* One array: exactly as long as asked for, so that AddressSanitizer sees the first byte beyond.
 */
struct Region {
    const void *key;  /* of HQQ_SHARED; NULL: the dynamic shared memory */
    const char *name; /* for messages */
    char *data;
    size_t bytes;
    void *allocation;                 /* data lies within */
    std::vector<ByteHistory> history; /* a byte each, for the race checker; else empty */
};

class SharedMemory
{
  public:
    /* Limits in bytes: of static arrays and of all together. */
    void start_launch(size_t dynamic_bytes, size_t static_limit, size_t total_limit);
    void end_launch();
    void poison(); /* before each block */

    void *static_array(const void *key, size_t bytes, size_t alignment, const char *name);
    void *dynamic();

    /* The array that is `region` in another block, or NULL: not there yet. */
    Region *find_same(const Region &region);
    /* The array that holds all of those bytes, or NULL. */
    Region *find(const void *address, size_t bytes);
    /* Whether the address lies between the first and the last array: quick, may err. */
    bool may_hold(const void *address) const { return address >= low && address < high; }

  private:
    Region &add(const void *key, const char *name, size_t bytes, size_t alignment);

    std::vector<Region> regions;
    char *low = nullptr, *high = nullptr;
    size_t static_bytes = 0, dynamic_bytes = 0, static_limit = 0, total_limit = 0;
};
} // namespace on_cpu

#endif

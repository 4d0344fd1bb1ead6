/* The warpgroup products of one thread that have not been waited for. */
#ifndef HQQ_CUDA_ON_CPU_PRODUCTS_H
#define HQQ_CUDA_ON_CPU_PRODUCTS_H

#include <vector>

#include "../device/thread.h"

namespace on_cpu
{
struct Product {
    float *d;            /* rows / 2 */
    unsigned rows;       /* of b: 128 or 64 */
    const uint32_t *a;   /* 4 */
    const char *b;       /* swizzled */
    bool half, computed; /* of fp16; already */
    unsigned group;
    Site site;
};

class PendingProducts
{
  public:
    void clear();
    void add(const Product &product);
    void commit() { open_group++; }
    size_t due(unsigned groups_left) const; /* how many a wait is for, the first ones */
    void forget(size_t count);
    void require_none() const; /* fails if any is left */

    std::vector<Product> products; /* in the order of issue */

  private:
    unsigned open_group = 0; /* number of groups committed */
};
} // namespace on_cpu

#endif

/* The cp.async copies of one thread that have not been waited for. */
#ifndef HQQ_CUDA_ON_CPU_COPIES_H
#define HQQ_CUDA_ON_CPU_COPIES_H

#include <vector>

#include "../device/thread.h"

namespace on_cpu
{
class PendingCopies
{
  public:
    void clear();
    void issue(void *shared, const void *global, bool valid, Site site);
    void commit() { open_group++; }
    void wait(unsigned groups_left);
    void require_none() const; /* fails if any is left */

  private:
    struct Copy {
        void *shared;
        const void *global;
        bool valid;
        bool landed; /* the bytes are there already, though nobody may know */
        unsigned group;
        Site site;
    };
    static void land(const Copy &copy);

    std::vector<Copy> copies; /* in the order of issue */
    unsigned open_group = 0;  /* number of groups committed */
};
} // namespace on_cpu

#endif

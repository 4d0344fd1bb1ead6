/* Kernels, each right as it stands and wrong with its one bug planted. */
#ifndef HQQ_CUDA_ON_CPU_PLANTED_BUGS_H
#define HQQ_CUDA_ON_CPU_PLANTED_BUGS_H

#include <vector>

extern "C" {
#include "status.h"
}

typedef std::vector<float> Floats;

struct PlantedBug {
    const char *name;
    /* Launches once; out is what the kernel wrote, expected what it should have. */
    hqq_status (*run)(bool planted, Floats &out, Floats &expected);
};

extern const PlantedBug PLANTED_BUGS[];
extern const int PLANTED_BUG_COUNT;

#endif

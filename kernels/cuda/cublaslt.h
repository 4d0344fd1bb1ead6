/* cuBLASLt, found at run time: the library is not linked to it, so that it loads, and does all
 * but large products, where there is none. */
#ifndef HQQ_KERNELS_CUDA_CUBLASLT_H
#define HQQ_KERNELS_CUDA_CUBLASLT_H

#include <cublasLt.h>

#include "hqqlora.h"

/* The functions that are used, by their own names without the prefix. */
typedef struct hqq_cublaslt {
#define HQQ_CUBLASLT_FUNCTIONS(X)   \
    X(Create)                       \
    X(GetStatusString)              \
    X(Matmul)                       \
    X(MatmulAlgoGetHeuristic)       \
    X(MatmulDescCreate)             \
    X(MatmulDescDestroy)            \
    X(MatmulDescSetAttribute)       \
    X(MatmulPreferenceCreate)       \
    X(MatmulPreferenceDestroy)      \
    X(MatmulPreferenceSetAttribute) \
    X(MatrixLayoutCreate)           \
    X(MatrixLayoutDestroy)
#define HQQ_CUBLASLT_MEMBER(name) __typeof__(cublasLt##name) *name;
    HQQ_CUBLASLT_FUNCTIONS(HQQ_CUBLASLT_MEMBER)
#undef HQQ_CUBLASLT_MEMBER
} hqq_cublaslt;

/* The functions, and the handle of a device, which must be the current one; both are made once
 * and kept. Any thread may ask. HQQ_DEVICE, with what to install, where there is no cuBLASLt.
 */
hqq_status hqq_cublaslt_of_device(hqq_cublaslt *functions, cublasLtHandle_t *handle,
                                  int device);

/* HQQ_OK, or HQQ_DEVICE with the call's name and cuBLASLt's word for the status. */
hqq_status hqq_cublaslt_check(const hqq_cublaslt *functions, cublasStatus_t status,
                              const char *call);

#endif

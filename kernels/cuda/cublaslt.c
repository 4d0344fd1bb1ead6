#include "cublaslt.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

#include "status.h"

enum { DEVICES_MOST = 64 };

/* Guards both of the following. A failure to load is not kept: the library may be there by the
 * next call. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int loaded;
    hqq_cublaslt functions;
} library;
static cublasLtHandle_t handles[DEVICES_MOST];

/* A library that the process has already, whichever of the two (torch brings one); else the one
 * that this file was compiled for; else the other. */
static void *open_library(void)
{
    static const char *const names[] = {
#if CUBLAS_VER_MAJOR >= 13
        "libcublasLt.so.13", "libcublasLt.so.12"
#else
        "libcublasLt.so.12", "libcublasLt.so.13"
#endif
    };
    static const int flags[] = {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY};
    for (int f = 0; f < 2; f++)
        for (int n = 0; n < 2; n++) {
            void *opened = dlopen(names[n], flags[f] | RTLD_LOCAL);
            if (opened) return opened;
        }
    return NULL;
}

static hqq_status load(void)
{
    if (library.loaded) return HQQ_OK;
    void *opened = open_library();
    if (!opened) {
        const char *why = dlerror();
        return hqq_fail(
            HQQ_DEVICE,
            "cuBLASLt was not found (%s): install libcublas of CUDA 12 or 13 where "
            "the loader finds it (pip: nvidia-cublas, and LD_LIBRARY_PATH), or lend "
            "a gemm in the context",
            why ? why : "no reason given");
    }
    hqq_cublaslt found;
#define FIND(name)                                                                            \
    do {                                                                                      \
        void *symbol = dlsym(opened, "cublasLt" #name);                                       \
        if (!symbol)                                                                          \
            return hqq_fail(HQQ_DEVICE, "the cuBLASLt that was found has no cublasLt" #name); \
        memcpy(&found.name, &symbol, sizeof symbol);                                          \
    } while (0);
    HQQ_CUBLASLT_FUNCTIONS(FIND)
#undef FIND
    library.functions = found;
    library.loaded = 1;
    return HQQ_OK;
}

static hqq_status find(hqq_cublaslt *functions, cublasLtHandle_t *handle, int device)
{
    HQQ_TRY(load());
    *functions = library.functions;
    if (!handles[device])
        HQQ_TRY(hqq_cublaslt_check(functions, functions->Create(&handles[device]),
                                   "cublasLtCreate"));
    *handle = handles[device];
    return HQQ_OK;
}

hqq_status hqq_cublaslt_of_device(hqq_cublaslt *functions, cublasLtHandle_t *handle, int device)
{
    if (device < 0 || device >= DEVICES_MOST)
        return hqq_fail(HQQ_UNSUPPORTED, "device %d; the first %d are supported", device,
                        DEVICES_MOST);
    pthread_mutex_lock(&lock);
    hqq_status status = find(functions, handle, device);
    pthread_mutex_unlock(&lock);
    return status;
}

hqq_status hqq_cublaslt_check(const hqq_cublaslt *functions, cublasStatus_t status,
                              const char *call)
{
    if (status == CUBLAS_STATUS_SUCCESS) return HQQ_OK;
    return hqq_fail(HQQ_DEVICE, "%s: %s (%d)", call, functions->GetStatusString(status),
                    (int)status);
}

/* The CUDA library's calls as a CUDA graph captures them: while a call is made the host touches
 * nothing of the device's memory, and each replay works on what it finds there, the seed of the
 * dropout mask among it. */
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "control.h"
#include "sample_weight.h"

enum { N = 128, K = 192, G = 64, R = 4, E = 3, DEVICE_BYTES = 16 << 20 };

/* ---- memory that the host may be kept from ---------------------------------------------- */

static char *device;
static size_t used;

static void *device_alloc(size_t bytes)
{
    char *memory = device + used;
    used += (bytes + 255) / 256 * 256;
    if (used <= DEVICE_BYTES) return memory;
    fprintf(stderr, "DEVICE_BYTES is too small\n");
    exit(2);
}

static void *random_on_device(uint64_t *state, int64_t n, hqq_dtype dtype, float low,
                              float high)
{
    void *memory = device_alloc((size_t)(n * hqq_dtype_bytes(dtype)));
    for (int64_t i = 0; i < n; i++) hqq_store(memory, dtype, i, random_float(state, low, high));
    return memory;
}

static void let_host_touch(int allowed)
{
    if (mprotect(device, DEVICE_BYTES, allowed ? PROT_READ | PROT_WRITE : PROT_NONE) == 0)
        return;
    perror("mprotect");
    exit(2);
}

static void on_fault(int signal)
{
    static const char text[] = "the host touched the device's memory while a call was made\n";
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0) _exit(2);
    _exit(signal == SIGSEGV || signal == SIGBUS ? 1 : 2);
}

/* ---- every entry point ------------------------------------------------------------------ */

typedef struct problem {
    int64_t M;
    hqq_dtype dtype;
    hqq_context context;
    hqq_weight weight; /* of E experts, the first of which is a weight of its own here */
    hqq_lora lora;
    uint64_t *seed;
    int64_t offsets[E + 1];
    void *x, *dy, *bias, *codes, *workspace;
    size_t workspace_bytes;
    char *outputs; /* all of the following */
    size_t output_bytes;
    void *y, *dx, *lora_y, *lora_dx, *dA, *dB, *grouped_y, *grouped_dx, *grouped_dA,
        *grouped_dB;
    void *packed, *scale, *zero, *words, *unpacked, *W;
    float *xa, *grouped_xa;
} problem;

static hqq_weight weight_on_device(uint64_t *state, hqq_dtype meta)
{
    hqq_weight w = {.out_features = N,
                    .in_features = K,
                    .group_size = G,
                    .nbits = 4,
                    .axis = 1,
                    .meta_dtype = meta};
    uint8_t *packed = device_alloc(E * N * K / 2);
    for (int i = 0; i < E * N * K / 2; i++) packed[i] = (uint8_t)random_bits(state);
    w.packed = packed;
    w.scale = random_on_device(state, E * N * K / G, meta, 0.01f, 0.03f);
    w.zero = random_on_device(state, E * N * K / G, meta, 0, 15);
    return w;
}

static void place_outputs(problem *p)
{
    size_t bytes = (size_t)hqq_dtype_bytes(p->dtype), M = (size_t)p->M;
    size_t meta_bytes = N * K / G * (size_t)hqq_dtype_bytes(p->weight.meta_dtype);
    p->outputs = device_alloc(0);
    p->y = device_alloc(M * N * bytes), p->dx = device_alloc(M * K * bytes);
    p->lora_y = device_alloc(M * N * bytes), p->lora_dx = device_alloc(M * K * bytes);
    p->dA = device_alloc(R * K * bytes), p->dB = device_alloc(N * R * bytes);
    p->xa = device_alloc(M * R * sizeof(float));
    p->grouped_y = device_alloc(M * N * bytes), p->grouped_dx = device_alloc(M * K * bytes);
    p->grouped_dA = device_alloc(E * R * K * bytes);
    p->grouped_dB = device_alloc(E * N * R * bytes);
    p->grouped_xa = device_alloc(M * R * sizeof(float));
    p->packed = device_alloc(N * K / 2), p->words = device_alloc(N * K / 2);
    p->scale = device_alloc(meta_bytes), p->zero = device_alloc(meta_bytes);
    p->unpacked = device_alloc(N * K), p->W = device_alloc(N * K * sizeof(float));
    p->output_bytes = (size_t)(device + used - p->outputs);
}

static problem make_problem(uint64_t *state, int64_t M, hqq_dtype dtype, hqq_kernel kernel)
{
    used = 0;
    problem p = {.M = M, .dtype = dtype, .context.kernel = kernel, .offsets = {0, 2, 2, M}};
    p.weight = weight_on_device(state, HQQ_F16);
    p.x = random_on_device(state, M * K, dtype, -1, 1);
    p.dy = random_on_device(state, M * N, dtype, -1, 1);
    p.bias = random_on_device(state, N, HQQ_F32, -1, 1);
    p.codes = device_alloc(N * K);
    for (int i = 0; i < N * K; i++) ((uint8_t *)p.codes)[i] = random_bits(state) % 16;
    p.seed = device_alloc(sizeof *p.seed);
    p.lora = (hqq_lora){.rank = R,
                        .dtype = dtype,
                        .A = random_on_device(state, E * R * K, dtype, -1, 1),
                        .B = random_on_device(state, E * N * R, dtype, -1, 1),
                        .scaling = 2,
                        .dropout = 0.5f,
                        .seed = p.seed,
                        .seed_offset = 3};
    p.workspace_bytes = 4 << 20;
    p.workspace = device_alloc(p.workspace_bytes);
    place_outputs(&p);
    return p;
}

#define SPACE p->workspace, p->workspace_bytes, &p->context

static int enqueue_products(const problem *p)
{
    const hqq_weight *w = &p->weight;
    const hqq_lora *l = &p->lora;
    int failed = hqq_linear(p->y, p->x, K, w, p->bias, HQQ_F32, p->M, p->dtype, SPACE) |
                 hqq_linear_dgrad(p->dx, p->dy, N, w, p->M, p->dtype, SPACE) |
                 hqq_lora_linear(p->lora_y, p->xa, p->x, K, w, p->bias, HQQ_F32, l, p->M,
                                 p->dtype, SPACE) |
                 hqq_lora_linear_backward(p->lora_dx, p->dA, p->dB, p->dy, N, p->x, K, p->xa, w,
                                          l, p->M, p->dtype, SPACE);
    hqq_routing routing = {.experts = E, .offsets = p->offsets};
    return failed |
           hqq_grouped_lora_linear(p->grouped_y, p->grouped_xa, p->x, K, w, l, &routing,
                                   p->dtype, SPACE) |
           hqq_grouped_lora_linear_backward(p->grouped_dx, p->grouped_dA, p->grouped_dB, p->dy,
                                            N, p->x, K, p->grouped_xa, w, l, &routing, p->dtype,
                                            SPACE);
}

static int enqueue_all(const problem *p, hqq_solver solver)
{
    const hqq_weight *w = &p->weight;
    hqq_quantize_options options = hqq_quantize_defaults();
    options.solver = solver;
    options.early_stop = 0; /* of a whole matrix: the CUDA library has none */
    int failed =
        enqueue_products(p) |
        hqq_quantize(p->packed, p->scale, p->zero, p->W, HQQ_F32, w, &options, &p->context) |
        hqq_pack(p->words, p->codes, w, &p->context) | hqq_unpack(p->unpacked, w, &p->context);
    if (failed) fprintf(stderr, "a call failed: %s\n", hqq_last_error());
    return failed;
}

/* ---- captured and replayed -------------------------------------------------------------- */

static void poison(const problem *p)
{
    memset(p->outputs, 0xff, p->output_bytes);
    memset(p->workspace, 0xff, p->workspace_bytes);
    uint64_t state = *p->seed; /* W, which is dequantized into, is quantized first */
    for (int i = 0; i < N * K; i++) ((float *)p->W)[i] = random_float(&state, -1, 1);
}

static void *copy_of_outputs(const problem *p)
{
    return memcpy(exact_alloc(p->output_bytes), p->outputs, p->output_bytes);
}

/* What the calls themselves give for the memory as it is; NULL if one fails. */
static void *outputs_of_calls(const problem *p, hqq_solver solver)
{
    poison(p);
    return enqueue_all(p, solver) ? NULL : copy_of_outputs(p);
}

static int replay(const problem *p, hqqlora_emulated_graph *graph)
{
    poison(p);
    int error = hqqlora_emulated_replay(graph);
    if (error) fprintf(stderr, "a replay failed: %d\n", error);
    return error != 0;
}

static int expect(int holds, const char *what, const problem *p)
{
    if (!holds)
        fprintf(stderr, "not so: %s; kernel %d, M %lld, dtype %d\n", what,
                (int)p->context.kernel, (long long)p->M, (int)p->dtype);
    return !holds;
}

static int check(uint64_t *state, int64_t M, hqq_dtype dtype, hqq_kernel kernel,
                 hqq_solver solver)
{
    problem p = make_problem(state, M, dtype, kernel);
    let_host_touch(0);
    hqqlora_emulated_begin_capture();
    int failed = enqueue_all(&p, solver);
    hqqlora_emulated_graph *graph = hqqlora_emulated_end_capture();
    let_host_touch(1);

    static const uint64_t seeds[] = {11, UINT64_MAX, 11}; /* and x stays for the second */
    void *first = NULL;
    for (int round = 0; round < 3 && !failed; round++) {
        *p.seed = seeds[round];
        if (round == 2) hqq_store(p.x, dtype, 0, 3.0f);
        void *wanted = outputs_of_calls(&p, solver);
        failed |= !wanted || replay(&p, graph);
        failed |= expect(wanted && memcmp(p.outputs, wanted, p.output_bytes) == 0,
                         "a replay gives what the calls give", &p);
        if (round == 1)
            failed |= expect(memcmp(p.xa, (char *)first + ((char *)p.xa - p.outputs),
                                    (size_t)M * R * sizeof(float)) != 0,
                             "another seed is another mask", &p);
        if (round == 0)
            first = wanted;
        else
            free(wanted);
    }
    free(first);
    hqqlora_emulated_destroy_graph(graph);
    return failed;
}

int main(void)
{
    device =
        mmap(NULL, DEVICE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (device == MAP_FAILED) return 2;
    signal(SIGSEGV, on_fault);
    signal(SIGBUS, on_fault);
    uint64_t state = 7;
    int failures = 0;
    for (int kernel = HQQ_KERNEL_AUTO; kernel <= LAST_KERNEL; kernel++)
        for (int i = 0; i < 3; i++) {
            int64_t M = kernel == HQQ_KERNEL_AUTO ? 70 : 6; /* 70: blocks and a GEMM */
            failures += check(&state, M, all_dtypes[i], (hqq_kernel)kernel, (hqq_solver)i);
        }
    return failures != 0;
}

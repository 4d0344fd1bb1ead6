/*
 * hqqlora: LoRA fine-tuning on frozen low-bit HQQ weights. The C interface.
 *
 * This one header is all that a program needs; nothing here knows of torch or Python. Two
 * libraries have this interface, libhqqlora for the CPU and libhqqlora_cuda for NVIDIA GPUs
 * from compute capability 8.0 on; one process may use both.
 *
 * Notation, used in every file of the project:
 *   M  tokens (all leading dimensions of x flattened)
 *   N  out_features        K  in_features        R  LoRA rank        G  group size
 *   x [M,K]   y [M,N]   dy [M,N]   dx [M,K]   W [N,K]   A [R,K]   B [N,R]
 * All matrices are row-major. `ld` arguments are row strides in elements.
 *
 *   W  = (q - zero) * scale            q: codes of `nbits` bits; one scale and zero a group
 *   y  = x W^T + bias + scaling * (drop(x) A^T) B^T
 *   dx = dy W + scaling * drop'((dy B) A)
 *   dA = scaling * (dy B)^T drop(x)
 *   dB = scaling * dy^T (drop(x) A^T)
 *
 * Conventions
 *   - Every entry returns a status; on failure hqq_last_error() describes it, with the
 *     values, for the calling thread. Nothing prints, exits or throws.
 *   - Arguments come as: outputs, inputs, shapes, workspace, context.
 *   - Outputs are overwritten (=), never added to. On a non-zero status of an argument check
 *     nothing has been written; after HQQ_NO_MEMORY from within a call, and after
 *     HQQ_CALLBACK, outputs may be partly written.
 *   - M, N, K and R may be 0: an empty product is zero, so y is then the bias.
 *   - There is no global state but immutable tables (and, on a GPU, cuBLASLt's handles and its
 *     choices): any number of threads may call at once.
 *   - Results repeat bitwise, and do not depend on the number of threads: those of large M
 *     insofar as the caller's GEMM does not (torch's own does, in its last bits).
 *
 * On a GPU (libhqqlora_cuda)
 *   - Data pointers are device pointers, of the calling thread's current device. Work is
 *     enqueued on context->stream; nothing waits, and nothing is allocated: a workspace must be
 *     given. A CUDA graph can capture all calls but the first large product on a device, which
 *     loads cuBLASLt. It holds the numbers of these arguments, and follows the memory behind
 *     their pointers: so each replay's dropout mask is that of the seed it finds.
 *   - Nobody looks at the values: hqq_pack does not refuse codes of too many bits, and
 *     hqq_quantize gives NaN for scale and zero, not HQQ_NON_FINITE or HQQ_INVALID, to a group
 *     whose weights are not finite, or whose importance is neither finite nor at least 0.
 *   - context->parallel_for and isa are not used. A gemm that is lent must enqueue on stream.
 */
#ifndef HQQLORA_H
#define HQQLORA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define HQQ_API __attribute__((visibility("default")))
#else
#define HQQ_API
#endif

#define HQQ_VERSION_MAJOR 0
#define HQQ_VERSION_MINOR 1
#define HQQ_VERSION_PATCH 0

typedef enum hqq_status {
    HQQ_OK = 0,
    HQQ_INVALID = 1,     /* an argument is out of range or does not fit the others */
    HQQ_UNSUPPORTED = 2, /* well-formed, but no kernel does it */
    HQQ_NO_MEMORY = 3,   /* an allocation failed, or the workspace given is too small */
    HQQ_NON_FINITE = 4,  /* a weight to quantize is NaN or infinite */
    HQQ_CALLBACK = 5,    /* the caller's parallel_for or gemm failed */
    HQQ_DEVICE = 6       /* the accelerator's runtime reported an error */
} hqq_status;

typedef enum hqq_dtype { HQQ_F32 = 0, HQQ_F16 = 1, HQQ_BF16 = 2 } hqq_dtype;

/* Instruction sets of the CPU kernels, from the plainest up. A context names the highest
 * one that may be used; the library takes the highest that the processor also has. */
typedef enum hqq_isa {
    HQQ_ISA_AUTO = 0,
    HQQ_ISA_PORTABLE = 1,
    HQQ_ISA_AVX2 = 2,        /* AVX2, FMA, F16C */
    HQQ_ISA_AVX512 = 3,      /* AVX-512 F, BW, DQ, VL */
    HQQ_ISA_AVX512_BF16 = 4, /* and AVX512_BF16, AVX512_VBMI */
    HQQ_ISA_AMX = 5          /* and AMX_TILE, AMX_BF16 */
} hqq_isa;

/* How a product with the frozen weight is computed. On a GPU TILED is a product of many tokens
 * with the codes themselves, of compute capability 9.0 alone; a forced DIRECT or TILED gives
 * way to BLOCKED where format, alignment, dtypes or the device do not suit it. */
typedef enum hqq_kernel {
    HQQ_KERNEL_AUTO = 0,
    HQQ_KERNEL_REFERENCE = 1, /* plain loops, the yardstick of the tests */
    HQQ_KERNEL_DIRECT = 2,    /* small M: multiply the codes as they are unpacked */
    HQQ_KERNEL_BLOCKED = 3,   /* large M: dequantize a block that stays in cache, then a GEMM */
    HQQ_KERNEL_TILED = 4      /* in between: the library's own tiles over a dequantized block */
} hqq_kernel;

typedef enum hqq_solver {
    HQQ_SOLVER_DEFAULT = 0,   /* range search, then least squares on scale and zero */
    HQQ_SOLVER_REFERENCE = 1, /* what hqq 0.2.8 computes on a CPU, step by step */
    HQQ_SOLVER_MINMAX = 2     /* the range of each group alone (hqq's optimize=False) */
} hqq_solver;

/* How codes lie in memory. Planes are for 3 bits alone, at exactly 3 bits a weight where hqq's
 * words take 3.2, and fast: E/4 bytes with q >> 1 as hqq packs 2 bits, then E/8 bytes with q &
 * 1 as hqq packs 1 bit, E = N*K. 8 must divide N, and E/G for axis 1 or G for axis 0. */
typedef enum hqq_packing {
    HQQ_PACKING_HQQ = 0,   /* hqq's own words, as in checkpoints */
    HQQ_PACKING_PLANES = 1 /* 3 bits in memory: see hqq_repack */
} hqq_packing;

/* A frozen HQQ weight, in hqq's own layout (see hqq_layout_of) or in planes. */
typedef struct hqq_weight {
    int64_t out_features; /* N */
    int64_t in_features;  /* K */
    int64_t group_size;   /* G: elements in a group; divides N*K */
    int32_t nbits;        /* 8, 4, 3, 2 or 1 */
    int32_t axis;         /* 1: a group runs along a row; 0: down a column */
    hqq_dtype meta_dtype; /* of scale and zero */
    hqq_packing packing;  /* of packed; 0: hqq's own */
    const void *packed;   /* [words] uint8, or int32 for 3 bits in hqq's own packing */
    const void *scale;    /* [N*K/G] */
    const void *zero;     /* [N*K/G] */
} hqq_weight;

#define HQQ_MAX_RANK 256

/* One LoRA adapter on a weight. The mask of its dropout follows from *seed + seed_offset
 * (modulo 2^64), by which forward and backward must agree.
 *
 * The seed is memory like x's: on a CPU it is read during the call; on a GPU it is device
 * memory, read by the kernels that the call enqueues and never by the call itself. There it may
 * still be unwritten when the call is made, if the stream writes it first, and must stay until
 * the kernels are done; where a CUDA graph has captured them, each replay reads the seed that
 * it finds. */
typedef struct hqq_lora {
    int64_t rank;         /* R, 0 to HQQ_MAX_RANK */
    hqq_dtype dtype;      /* of A and B (and of dA and dB): HQQ_F32 or x's own dtype */
    const void *A;        /* [R,K] */
    const void *B;        /* [N,R] */
    float scaling;        /* lora_alpha / R, or lora_alpha / sqrt(R) */
    float dropout;        /* probability in [0,1) that an element of x is dropped; 0: none */
    const uint64_t *seed; /* [1]; not read, and may be NULL, where dropout is 0 */
    uint64_t seed_offset; /* so that adapters that share a seed have masks of their own */
} hqq_lora;

/* Rows that are routed to E experts, sorted by expert: expert e has the rows offsets[e] to
 * offsets[e+1] - 1. */
typedef struct hqq_routing {
    int64_t experts;        /* E */
    const int64_t *offsets; /* [E+1], in host memory: 0, never falling, and M */
} hqq_routing;

/* Calls fn(b, e, data) on subranges that cover [begin, end) exactly once, from any threads,
 * and returns when all are done; 0 on success. torch_parallel_for has this signature. */
typedef int32_t (*hqq_parallel_for_fn)(int64_t begin, int64_t end, int64_t grain,
                                       void (*fn)(int64_t, int64_t, void *), void *data);

/* C [m,n] = op(A) [m,k] * op(B) [k,n] + beta * C; beta is 0 or 1 (0: C is not read).
 * op(A) is A [m,k], or with transpose_a the transpose of A [k,m]; B likewise. One dtype for
 * all three; accumulation in fp32, rounded once. Returns 0 on success. */
typedef int32_t (*hqq_gemm_fn)(void *C, int64_t ldc, const void *A, int64_t lda,
                               int32_t transpose_a, const void *B, int64_t ldb,
                               int32_t transpose_b, int64_t m, int64_t n, int64_t k, float beta,
                               hqq_dtype dtype, void *gemm_data);

/* What the caller lends. All zero is valid: one thread and the library's own GEMM. */
typedef struct hqq_context {
    hqq_parallel_for_fn parallel_for; /* NULL: the calling thread alone */
    hqq_gemm_fn gemm;                 /* NULL: the library's own */
    void *gemm_data;                  /* handed to gemm */
    void *stream;                     /* a cudaStream_t; NULL: the default one; CPU: unused */
    hqq_isa isa;                      /* the highest instruction set to use; 0: any */
    hqq_kernel kernel;                /* force a kernel (tests, benchmarks); 0: chosen */
} hqq_context;

typedef struct hqq_quantize_options {
    hqq_solver solver;
    /* Up to kappa, read by the reference solver alone (round_zero: also by minmax). */
    int32_t iters;      /* 20 */
    int32_t early_stop; /* 1: stop when the mean error of the whole matrix stops falling */
    int32_t round_zero; /* 1: round the start value of zero; only for 4 bits */
    float lp_norm;      /* 0.7; in (0, 1] */
    float beta;         /* 10 */
    float kappa;        /* 1; beta is multiplied by it each step. hqq 0.2.8 keeps beta fixed */
    /* [in_features], for the default solver alone: how much an error in each column counts
     * beside the others (say, the mean square of that input; the unit is of no matter). NULL:
     * as much everywhere, as where all are equal or 0. Of no effect where no group has elements
     * of two columns: at axis 0 if group_size divides out_features. */
    const float *importance;
} hqq_quantize_options;

/* ---- library ---------------------------------------------------------------------- */

/* "0.1.0". Static storage. */
HQQ_API const char *hqq_version(void);

/* The message of the last call that failed on this thread, or "". Valid until the thread's
 * next call into the library. */
HQQ_API const char *hqq_last_error(void);

/* "ok", "invalid argument", ... Static storage; never NULL. */
HQQ_API const char *hqq_status_name(hqq_status status);

/* The instruction set that a context would use on this machine. context may be NULL. */
HQQ_API hqq_isa hqq_isa_in_use(const hqq_context *context);

/* "portable", "avx2", ... Static storage; never NULL. */
HQQ_API const char *hqq_isa_name(hqq_isa isa);

/* The kernel a forward (transpose 0) or dgrad (transpose 1) product of M rows would use.
 * Follows from its arguments and the processor; reads no data behind the pointers. */
HQQ_API hqq_kernel hqq_choose_kernel(const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                                     int32_t transpose, hqq_isa isa);

/* ---- format ----------------------------------------------------------------------- */

/* Sizes of the arrays behind a weight: `words` packed words of `word_bytes` bytes each (1,
 * or 4 for 3 bits in hqq's own packing) and `groups` scales and zeros. Uses out_features,
 * in_features, group_size, nbits, axis and packing. Any output may be NULL. */
HQQ_API hqq_status hqq_layout_of(int64_t *words, int64_t *word_bytes, int64_t *groups,
                                 const hqq_weight *weight);

/* ---- quantizer -------------------------------------------------------------------- */

/* The options hqq 0.2.8 starts from, with the default solver. */
HQQ_API hqq_quantize_options hqq_quantize_defaults(void);

/* Quantizes W [N,K] (contiguous, any dtype). `weight` gives N, K, G, nbits, axis and
 * meta_dtype; its pointers are not read.
 *   packed  = [words], of hqq_layout_of, in hqq's own packing alone; tail slots are zero
 *   scale   = [groups] in meta_dtype
 *   zero    = [groups] in meta_dtype
 * HQQ_NON_FINITE, with nothing written, if W has a NaN or an infinity; HQQ_INVALID if an
 * options->importance is negative or not finite, or comes with another solver than the default.
 */
HQQ_API hqq_status hqq_quantize(void *packed, void *scale, void *zero, const void *W,
                                hqq_dtype W_dtype, const hqq_weight *weight,
                                const hqq_quantize_options *options,
                                const hqq_context *context);

/* Packs codes [N*K] (one byte each, row-major, below 2^nbits) into packed [words]. */
HQQ_API hqq_status hqq_pack(void *packed, const uint8_t *codes, const hqq_weight *weight,
                            const hqq_context *context);

/* The inverse: codes [N*K] = the codes of `weight`. */
HQQ_API hqq_status hqq_unpack(uint8_t *codes, const hqq_weight *weight,
                              const hqq_context *context);

/* packed [words of that packing] = the codes of `weight` in `packing`; they must not overlap.
 * HQQ_INVALID where planes do not fit the weight. */
HQQ_API hqq_status hqq_repack(void *packed, hqq_packing packing, const hqq_weight *weight,
                              const hqq_context *context);

/* ---- frozen weight ---------------------------------------------------------------- */

/* out = W[row_begin:row_end, column_begin:column_end], row i at out + i * ld_out, rounded
 * once to out_dtype. */
HQQ_API hqq_status hqq_dequantize(void *out, int64_t ld_out, hqq_dtype out_dtype,
                                  const hqq_weight *weight, int64_t row_begin, int64_t row_end,
                                  int64_t column_begin, int64_t column_end,
                                  const hqq_context *context);

/* Bytes of workspace for a product of M rows of dtype with weight; lora may be NULL. The
 * same bound serves forward and backward. On a GPU it is that of the current device, and
 * depends on the alignment of weight->packed. */
HQQ_API hqq_status hqq_workspace_size(size_t *bytes, const hqq_weight *weight,
                                      const hqq_lora *lora, int64_t M, hqq_dtype dtype,
                                      const hqq_context *context);

/* For all products: `workspace` is 64-byte aligned memory of workspace_bytes, at least what
 * hqq_workspace_size says, used during the call alone (on a GPU: until the work that the call
 * enqueued is done); NULL: the library allocates it, on a CPU. */

/* y [M,N] (contiguous) = x W^T + bias. bias [N] in bias_dtype, may be NULL. */
HQQ_API hqq_status hqq_linear(void *y, const void *x, int64_t ldx, const hqq_weight *weight,
                              const void *bias, hqq_dtype bias_dtype, int64_t M,
                              hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                              const hqq_context *context);

/* dx [M,K] (contiguous) = dy W. */
HQQ_API hqq_status hqq_linear_dgrad(void *dx, const void *dy, int64_t lddy,
                                    const hqq_weight *weight, int64_t M, hqq_dtype dtype,
                                    void *workspace, size_t workspace_bytes,
                                    const hqq_context *context);

/* y [M,N] (contiguous) = x W^T + bias + scaling * (drop(x) A^T) B^T.
 * xa [M,R] fp32 (contiguous) = drop(x) A^T, for the backward pass; may be NULL. */
HQQ_API hqq_status hqq_lora_linear(void *y, float *xa, const void *x, int64_t ldx,
                                   const hqq_weight *weight, const void *bias,
                                   hqq_dtype bias_dtype, const hqq_lora *lora, int64_t M,
                                   hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                                   const hqq_context *context);

/* The gradients; any output may be NULL, its work is then not done.
 *   dx [M,K] in dtype        needs dy
 *   dA [R,K] in lora->dtype  needs dy and x
 *   dB [N,R] in lora->dtype  needs dy and xa (as hqq_lora_linear gave it), or else x
 * x and xa may be NULL where nothing needs them. */
HQQ_API hqq_status hqq_lora_linear_backward(void *dx, void *dA, void *dB, const void *dy,
                                            int64_t lddy, const void *x, int64_t ldx,
                                            const float *xa, const hqq_weight *weight,
                                            const hqq_lora *lora, int64_t M, hqq_dtype dtype,
                                            void *workspace, size_t workspace_bytes,
                                            const hqq_context *context);

/* ---- layers that share their input ------------------------------------------------- */

/* q, k and v of an attention read the same x, and so do gate and up of an MLP. Their A, laid
 * one under another [R,K] (R the sum of the ranks), give all their xa in one product, and their
 * dyb, side by side [M,R], all their dA and the adapters' part of dx:
 *
 *   hqq_lora_project            xa = x A^T                           once
 *   hqq_lora_linear_from_xa     y = x W^T + bias + scaling xa B^T    for each layer
 *   hqq_lora_factor_gradients   dyb = dy B, dB = scaling dy^T xa     for each layer
 *   hqq_lora_input_gradients    dx = dy W + scaling dyb A            once, with one layer's W
 *                               dA = scaling dyb^T x
 *   hqq_linear_dgrad            dx = dy W, to be added               for each other layer
 *
 * For layers without dropout: lora->dropout and seed are not read. A factor that is not named
 * in a line is not read either, and may be NULL. Arguments are otherwise as above. */

/* Bytes of workspace for one of these calls; of lora, rank and dtype alone are read. For the
 * two without a weight: of one with N = 0 (hqq_lora_project) or K = 0
 * (hqq_lora_factor_gradients), with 8 bits and groups of 1, which fit any other side. */
HQQ_API hqq_status hqq_shared_input_workspace_size(size_t *bytes, const hqq_weight *weight,
                                                   const hqq_lora *lora, int64_t M,
                                                   hqq_dtype dtype, const hqq_context *context);

/* xa [M,R] fp32 = x A^T. */
HQQ_API hqq_status hqq_lora_project(float *xa, const void *x, int64_t ldx, const hqq_lora *lora,
                                    int64_t M, int64_t K, hqq_dtype dtype, void *workspace,
                                    size_t workspace_bytes, const hqq_context *context);

/* y [M,N] = x W^T + bias + scaling xa B^T. */
HQQ_API hqq_status hqq_lora_linear_from_xa(void *y, const float *xa, const void *x, int64_t ldx,
                                           const hqq_weight *weight, const void *bias,
                                           hqq_dtype bias_dtype, const hqq_lora *lora,
                                           int64_t M, hqq_dtype dtype, void *workspace,
                                           size_t workspace_bytes, const hqq_context *context);

/* dyb [M,R] fp32 and dB may be NULL; xa may be where dB is. */
HQQ_API hqq_status hqq_lora_factor_gradients(float *dyb, void *dB, const void *dy, int64_t lddy,
                                             const float *xa, const hqq_lora *lora, int64_t M,
                                             int64_t N, hqq_dtype dtype, void *workspace,
                                             size_t workspace_bytes,
                                             const hqq_context *context);

/* dx and dA may be NULL; dy may be where dx is, and x where dA is. */
HQQ_API hqq_status hqq_lora_input_gradients(void *dx, void *dA, const void *dy, int64_t lddy,
                                            const float *dyb, const void *x, int64_t ldx,
                                            const hqq_weight *weight, const hqq_lora *lora,
                                            int64_t M, hqq_dtype dtype, void *workspace,
                                            size_t workspace_bytes, const hqq_context *context);

/* ---- mixtures of experts ----------------------------------------------------------- */

/* The same products, of each row with the weight of the expert that it is routed to; M is
 * routing->offsets[E]. All experts' weights are of one format, and so are their adapters, one
 * behind the other: `weight` and `lora` describe the first. Packed words are [E,words], scale
 * and zero [E,groups], A [E,R,K], B [E,N,R]; dA and dB likewise, zero for experts without rows.
 * The dropout mask of expert e is that of its own rows and lora->seed_offset + e. */

/* As hqq_workspace_size. */
HQQ_API hqq_status hqq_grouped_workspace_size(size_t *bytes, const hqq_weight *weight,
                                              const hqq_lora *lora, const hqq_routing *routing,
                                              hqq_dtype dtype, const hqq_context *context);

/* y [M,N] = x W^T, W that of each row's expert. Experts have no bias. */
HQQ_API hqq_status hqq_grouped_linear(void *y, const void *x, int64_t ldx,
                                      const hqq_weight *weight, const hqq_routing *routing,
                                      hqq_dtype dtype, void *workspace, size_t workspace_bytes,
                                      const hqq_context *context);

/* dx [M,K] = dy W. */
HQQ_API hqq_status hqq_grouped_linear_dgrad(void *dx, const void *dy, int64_t lddy,
                                            const hqq_weight *weight,
                                            const hqq_routing *routing, hqq_dtype dtype,
                                            void *workspace, size_t workspace_bytes,
                                            const hqq_context *context);

/* y [M,N] and xa [M,R], as hqq_lora_linear gives them. */
HQQ_API hqq_status hqq_grouped_lora_linear(void *y, float *xa, const void *x, int64_t ldx,
                                           const hqq_weight *weight, const hqq_lora *lora,
                                           const hqq_routing *routing, hqq_dtype dtype,
                                           void *workspace, size_t workspace_bytes,
                                           const hqq_context *context);

/* The gradients dx [M,K], dA [E,R,K] and dB [E,N,R], as hqq_lora_linear_backward gives them. */
HQQ_API hqq_status hqq_grouped_lora_linear_backward(
    void *dx, void *dA, void *dB, const void *dy, int64_t lddy, const void *x, int64_t ldx,
    const float *xa, const hqq_weight *weight, const hqq_lora *lora, const hqq_routing *routing,
    hqq_dtype dtype, void *workspace, size_t workspace_bytes, const hqq_context *context);

#ifdef __cplusplus
}
#endif
#endif

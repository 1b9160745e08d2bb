/* pyengine.h: the C API of the engine, the only header that the Python bindings see.
 *
 *   model    immutable weights: views into memory that the caller keeps alive (a mapped frozen file)
 *   context  everything mutable of one engine: KV cache of many sequences, scratch, thread limit
 *   forward  one call for prefill, decode, batches and mixtures
 *
 * Every function that can fail returns a pe_status and, when it is not PE_OK, a sentence in the caller's
 * err[PE_ERR_LEN]. Nothing here prints, exits, aborts or asserts on input. Distinct contexts may be used from distinct
 * threads at the same time; one context by one thread at a time. The arithmetic is fixed by FORMAT.md. */
#ifndef PYENGINE_H
#define PYENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PE_ERR_LEN 256

typedef enum pe_status {
    PE_OK = 0,
    PE_ERR_INVALID_ARGUMENT = 1,
    PE_ERR_OUT_OF_MEMORY = 2,
    PE_ERR_FORMAT = 3, /* the model file contradicts itself or FORMAT.md */
    PE_ERR_CONTEXT_FULL = 4,
    PE_ERR_NOT_FINITE = 5, /* an infinity or NaN appeared */
    PE_ERR_CANCELLED = 6,  /* the poll callback, the deadline or pe_batch.cancel ended the call */
    PE_ERR_SYSTEM = 7,
    PE_ERR_UNSUPPORTED_ISA = 8,
    PE_STATUS_COUNT /* sentinel */
} pe_status;

/* A short constant description of a status. Never NULL. */
const char *pe_status_message(pe_status status);

/* ------------------------------------------------------------------ instruction sets */

/* Bits of pe_cpu_features(): what the CPU has and the operating system saves on a switch. (AMX wants permission besides, which
 * is asked for when its table is considered: pe_isa_available says whether it was given.) */
enum {
    PE_CPU_AVX2 = 1u << 0,
    PE_CPU_FMA = 1u << 1,
    PE_CPU_F16C = 1u << 2,
    PE_CPU_AVX512F = 1u << 3,
    PE_CPU_AVX512BW = 1u << 4,
    PE_CPU_AVX512VL = 1u << 5,
    PE_CPU_AVX512VNNI = 1u << 6,
    PE_CPU_AVX512DQ = 1u << 7,
    PE_CPU_NEON_DOTPROD = 1u << 8,
    PE_CPU_AVXVNNI = 1u << 9, /* vpdpbusd on ymm registers, VEX-encoded: without AVX-512 */
    PE_CPU_NEON_I8MM = 1u << 10,
    PE_CPU_AMX_TILE = 1u << 11,
    PE_CPU_AMX_INT8 = 1u << 12,
};
/* Those that the CPU has and the operating system supports. */
uint32_t pe_cpu_features(void);

/* Names of the tables that this CPU can run and the operating system permits, best first, ending with "scalar"; NULL past the
 * end. */
const char *pe_isa_available(size_t index);
/* Select the table of what is created from now on, contexts and samplers: a name, or NULL for PYENGINE_ISA or else the best one. */
pe_status pe_isa_select(const char *name, char *err);
/* The name of the table that a context created now would use (selecting it first if none is selected). */
pe_status pe_isa_active(const char **name, char *err);

/* ------------------------------------------------------------------ model */

/* What may differ from layer to layer. */
typedef struct pe_layer_spec {
    uint32_t window;        /* a query sees the last `window` positions, its own included; 0 = all. A convolution: 1 to 16 */
    uint32_t rope;          /* which table of RoPE frequencies */
    const char *norm;       /* "rmsnorm" before attention and before the MLP, "rmsnorm_after" them, "rmsnorm_around" both,
                             * "rmsnorm_parallel" one before both, which read the same */
    const char *activation; /* "swiglu", "swiglu_clamped", "geglu_tanh"; without a gate "gelu_tanh", "gelu", "relu2", "xielu" */
    const char *mixer;      /* "attention", which NULL says too, or "short_conv": a gated convolution in its place */
} pe_layer_spec;

typedef struct pe_config {
    uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len;
    float norm_eps;
    bool tie_embeddings, qkv_bias, o_bias, qk_norm;
    bool gate_up_bias, down_bias; /* of every MLP; not with a shared expert */
    bool output_bias;             /* of the output matrix */
    bool qk_norm_all_heads; /* with qk_norm: one norm over all heads of q, and one over those of k */
    bool qk_norm_after_rope; /* with qk_norm of each head: it is normed after RoPE */
    bool attention_sinks;   /* each head has a score without a value */
    bool key_bias;          /* a part of the keys' bias is kept out of the cache; with qkv_bias, without qk_norm */
    uint32_t n_experts, n_experts_used; /* of every layer's MLP, hidden_dim wide each; 0 = a dense MLP */
    bool experts_normalized;            /* the weights of the experts that a row takes sum to 1 */
    bool router_bias;
    uint32_t shared_hidden_dim;         /* of an expert beside them that every row takes; 0 = there is none */
    bool shared_gated;                  /* its weight is a sigmoid of the row; else it is 1 */
    float attention_softcap, logits_softcap; /* 0 = none, or in [2^-10, 2^20] */
    const pe_layer_spec *layers;             /* (n_layers); pe_model_create keeps no pointer to them */
} pe_config;

typedef struct pe_model pe_model;

/* A model without weights. PE_ERR_FORMAT if the config is out of range, contradicts itself or names what is not known. */
pe_status pe_model_create(pe_model **out, const pe_config *config, char *err);
/* A tensor of FORMAT.md section 2: `data` must be 64-byte aligned and stay valid and unchanged until pe_model_destroy. */
typedef struct pe_tensor {
    const char *name;
    const char *kind; /* "int8_g64": codes or scales of a matrix that is stored so; "f32": a vector */
    const void *data;
    size_t n_bytes; /* stored size, padding included */
} pe_tensor;
/* Give the model its weights: every tensor of FORMAT.md section 2 that its config asks for, in that order, and no
 * other. Checks names, kinds and sizes, then reads all values once (on n_threads threads, 0 = default; it also brings a mapped
 * file into memory): codes are never -128, scales and floats are finite. */
pe_status pe_model_set_tensors(pe_model *model, const pe_tensor *tensors, size_t n_tensors, int n_threads, char *err);
/* When nothing that was made with it is left. NULL is allowed. */
void pe_model_destroy(pe_model *model);

/* ------------------------------------------------------------------ adapters */

/* Low-rank adapters (LoRA) beside a model, which rows of a batch may choose: FORMAT.md section 11. The matrices of a layer that
 * one may change; of a layer with experts only the first four. */
typedef enum pe_adapter_matrix {
    PE_ADAPTER_Q,
    PE_ADAPTER_K,
    PE_ADAPTER_V,
    PE_ADAPTER_O,
    PE_ADAPTER_GATE,
    PE_ADAPTER_UP,
    PE_ADAPTER_DOWN,
    PE_ADAPTER_N_MATRICES /* sentinel */
} pe_adapter_matrix;

typedef struct pe_adapter pe_adapter;

/* W x becomes W x + scale * B (A x). */
typedef struct pe_adapter_product {
    const float *a, *b; /* (rank, n_in), (n_out, rank) */
    size_t rank, n_in, n_out;
    float scale;
} pe_adapter_product;

/* An adapter that changes nothing yet. The model must outlive it. */
pe_status pe_adapter_create(pe_adapter **out, const pe_model *model, char *err);
/* Let it change a matrix, once, by a copy of the product. PE_ERR_INVALID_ARGUMENT for another shape than the matrix has, and for
 * values that are not finite. Not while a forward uses the adapter. */
pe_status pe_adapter_set(pe_adapter *adapter, uint32_t layer, pe_adapter_matrix matrix, const pe_adapter_product *product,
                         char *err);
/* Of memory. */
size_t pe_adapter_bytes(const pe_adapter *adapter);
/* When no forward uses it. NULL is allowed. */
void pe_adapter_destroy(pe_adapter *adapter);

/* ------------------------------------------------------------------ threads */

typedef struct pe_thread_info {
    int n_affinity;   /* CPUs in this process's affinity mask */
    double cpu_quota; /* CPUs that the cgroup (v1 or v2) allows, 0 = no limit */
    int n_default;    /* what n_threads = 0 means: min of the two, from 1 to 256 */
} pe_thread_info;
/* Of now: mask and quota may change. Reads a few small files. */
void pe_thread_info_get(pe_thread_info *info);

/* How often the kernel has stopped this process's cgroup, or a parent of it, because its CPU quota was used up. The
 * counters only grow, from the making of the groups on; all are 0 where there is no quota. Reads a few small files. */
typedef struct pe_throttling {
    int64_t n_periods;    /* periods of the quota (100 ms each, unless set otherwise) in which anything ran */
    int64_t n_throttled;  /* those of them that ended in a stop */
    int64_t throttled_us; /* time spent stopped, summed over CPUs */
} pe_throttling;
void pe_throttling_get(pe_throttling *out);

/* ------------------------------------------------------------------ context and sequences */

typedef enum pe_kv_dtype { PE_KV_INT8 = 0, PE_KV_F32 = 1 } pe_kv_dtype;

typedef struct pe_context pe_context;

/* n_threads 0 = pe_thread_info.n_default. The model must outlive the context. */
pe_status pe_context_create(pe_context **out, const pe_model *model, pe_kv_dtype kv_dtype, int n_threads, char *err);
/* Its sequences end with it. NULL is allowed. */
void pe_context_destroy(pe_context *context);
/* The table of kernels that it computes with, and with how many threads. */
const char *pe_context_isa(const pe_context *context);
int pe_context_n_threads(const pe_context *context);
/* Bytes of KV pages in use and of scratch. */
size_t pe_context_memory(const pe_context *context, size_t *scratch_bytes);

/* The cache of keys and values is made of pages of 256 positions (kv_pages.h). A page that no sequence holds may stay
 * cached: a later sequence that begins with the same tokens finds it. Layers with a window keep no more of a sequence than
 * later queries will see. */
typedef struct pe_cache_stats {
    size_t n_sequences;      /* in use */
    size_t page_bytes;       /* of one page, all layers */
    size_t window_bytes;     /* of these, how many belong to layers with a window */
    size_t window;           /* positions that the longest of their windows has; 0 = there are none */
    size_t max_pages;        /* 0 = no limit */
    size_t n_pages;          /* allocated: held by sequences, cached, free; with or without their windows' part */
    size_t n_cached, n_free; /* of these */
    size_t n_bytes;          /* allocated */
    size_t n_held_bytes;     /* of these, what sequences hold; the others can make room */
    uint64_t n_evicted;      /* times that something cached had to make room so far */
} pe_cache_stats;
void pe_context_cache_stats(const pe_context *context, pe_cache_stats *out);
/* At most the memory of so many pages is allocated from now on (0 = no limit); then what is cached makes room, and when nothing
 * is left an append fails with PE_ERR_OUT_OF_MEMORY. */
void pe_context_set_max_pages(pe_context *context, size_t max_pages);
/* Forget every cached page; how many there were. */
size_t pe_context_drop_cached(pe_context *context);
/* Count every reference anew and follow every list. PE_ERR_SYSTEM, and what is wrong, if the books do not balance. */
pe_status pe_context_check(const pe_context *context, char *err);

#define PE_SALT_BYTES 16

/* Sequences are small non-negative ids. A new one is empty, and its pages are freed with it. */
pe_status pe_sequence_new(pe_context *context, int32_t *out, char *err);
/* A sequence that already holds the first *n_matched of tokens (n), as far as pages of them are known under this salt
 * (NULL = all zero): texts under different salts share nothing, and texts computed with different adapters must have
 * different ones. With `keep`, its own pages can be found from now on, and stay cached when it is dropped. What is shared
 * changes no bit of any result. */
pe_status pe_sequence_match(pe_context *context, const int32_t *tokens, size_t n, const uint8_t *salt, bool keep,
                            int32_t *out, size_t *n_matched, char *err);
/* The length that pe_sequence_match would give. Changes nothing. */
size_t pe_sequence_match_length(pe_context *context, const int32_t *tokens, size_t n, const uint8_t *salt);
/* A fork shares the pages of its source until one of them appends. Forks and truncated sequences may be shorter than asked for
 * where layers with a window have let go of what the next token would see: pe_sequence_length tells. */
pe_status pe_sequence_fork(pe_context *context, int32_t source, size_t n_tokens, int32_t *out, char *err);
pe_status pe_sequence_truncate(pe_context *context, int32_t sequence, size_t n_tokens, char *err);
pe_status pe_sequence_drop(pe_context *context, int32_t sequence, char *err);
/* Drafted tokens (pe_batch.drafted) do not count. */
pe_status pe_sequence_length(const pe_context *context, int32_t sequence, size_t *out, char *err);
/* Of the tokens that the last forward drafted for this sequence, the first ones that equal `tokens` (n), what really
 * comes after the sequence's own: *n_accepted of them are the sequence's from now on, and the others are forgotten. */
pe_status pe_sequence_accept(pe_context *context, int32_t sequence, const int32_t *tokens, size_t n, size_t *n_accepted,
                             char *err);
/* Copies at most `capacity` of the tokens that a sequence holds; returns how many it holds. */
size_t pe_sequence_tokens(const pe_context *context, int32_t sequence, int32_t *out, size_t capacity);

/* Keys and values as bytes, to be kept and put back later, by another process or on another machine: what they are is a
 * matter of model, tokens and pe_kv_dtype alone (and of n_ctx, where layers have windows as long). The number of bytes
 * of a sequence, 0 if there is no such one. */
size_t pe_sequence_snapshot_bytes(const pe_context *context, int32_t sequence);
/* out (n_bytes, pe_sequence_snapshot_bytes) = keys and values of a sequence. */
pe_status pe_sequence_save(const pe_context *context, int32_t sequence, void *out, size_t n_bytes, char *err);
/* A sequence that holds tokens (n), with the keys and values in `in` (n_bytes, aligned to 64) instead of a forward's; its pages
 * are found like those of pe_sequence_match with `keep`. Bytes of other tokens make other results, and no further harm:
 * PE_ERR_INVALID_ARGUMENT for numbers that no text has. */
pe_status pe_sequence_restore(pe_context *context, const int32_t *tokens, size_t n, const uint8_t *salt, const void *in,
                              size_t n_bytes, int32_t *out, char *err);

/* ------------------------------------------------------------------ forward */

/* Called by the calling thread between work units, at most every 20 ms; non-zero ends the call. */
typedef int (*pe_poll_fn)(void *user);

/* What a row of a batch asks for. */
enum {
    PE_WANT_LOGITS = 1,
    PE_WANT_HIDDEN = 2 /* its final hidden state, after the last norm */
};

typedef struct pe_batch {
    size_t n_tokens;
    const int32_t *tokens;    /* (n_tokens) ids */
    const int32_t *sequences; /* (n_tokens) row i is appended to sequence[i], at that sequence's next position */
    const uint8_t *wants;     /* (n_tokens) PE_WANT_* bits of each row */
    const uint8_t *drafted;   /* (n_tokens) or NULL: 1 = this token is a guess, see pe_forward */
    const pe_adapter *const *adapters; /* (n_tokens) or NULL: what row i's products are changed by, NULL = nothing. All rows of a
                                        * sequence should name the same, and pages of another adapter are not theirs: see
                                        * the salt of pe_sequence_match. */
    uint8_t *failed;          /* (n_tokens) or NULL: see pe_forward */
    pe_poll_fn poll;          /* may be NULL */
    void *poll_user;
    int64_t deadline_ns; /* CLOCK_MONOTONIC; 0 = none */
    const int *cancel;   /* may be NULL; non-zero, set with pe_request_cancel from any thread, ends the call at the next
                          * work unit. It belongs to the caller, who alone sets it back. */
} pe_batch;

/* Append the batch's tokens to their sequences and compute what the rows want.
 *
 * A row that wants nothing is there for those after it: of the last layer it computes keys and values alone.
 *
 * On any error no sequence has changed: a sequence holds the tokens of the calls that succeeded, and no others. An
 * infinity or NaN in a row is an error, PE_ERR_NOT_FINITE, unless `failed` is given: then the call succeeds, failed[i]
 * is 1 for the rows of every sequence in which one appeared, else 0; those sequences have not changed, their results
 * mean nothing, and all others have their tokens and the very bits that they would have had without such neighbours.
 * After an error, `failed` is all 0.
 *
 * A drafted row is computed like any other, but its token does not become the sequence's: it is forgotten by the next
 * forward, or by whatever else changes the sequence, unless pe_sequence_accept says that it came true. Rows of a sequence
 * that are not drafted come before those that are. */
pe_status pe_forward(pe_context *context, const pe_batch *batch, char *err);
/* Set *cancel so that a forward that was given it ends with PE_ERR_CANCELLED. Callable at any time from any thread. */
void pe_request_cancel(int *cancel);

/* Rows of the last forward: the k-th row that wanted logits (vocab_size) or its hidden state (dim), float32, valid
 * until the next forward; NULL if there are not so many. After a call that failed there are none. */
size_t pe_context_n_logits(const pe_context *context);
const float *pe_context_logits(const pe_context *context, size_t row);
size_t pe_context_n_hidden(const pe_context *context);
const float *pe_context_hidden(const pe_context *context, size_t row);

/* ------------------------------------------------------------------ test hooks */

/* One block in isolation: x (n_tokens, dim) float32 at positions 0.. of a fresh sequence goes through layer `layer` in
 * place. */
pe_status pe_debug_block(pe_context *context, uint32_t layer, float *x, size_t n_tokens, char *err);
/* The keys and values of one page of one layer and kv head of a sequence, as they lie in memory (pe_kv_chunk of
 * kernels/kernels.h). Returns the size; copies at most `capacity` bytes into out. */
size_t pe_debug_kv_page(const pe_context *context, int32_t sequence, uint32_t layer, uint32_t kv_head, size_t page,
                        void *out, size_t capacity);

#endif

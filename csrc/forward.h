/* forward.h: the context (everything mutable of one engine) and the pieces of the forward pass that live in files of
 * their own. */
#ifndef PE_FORWARD_H
#define PE_FORWARD_H

#include <stdatomic.h>

#include "kv_cache.h"
#include "model.h"
#include "threadpool.h"

enum {
    /* Tokens that go through the layers together; a longer batch is cut. Their activations should fit a share of the
     * last-level cache: beyond that a longer slice only saves reading the weights again. */
    PE_SLICE = 256,
    PE_SLICE_MAX = 512,  /* what the buffers may grow to: pe_debug_block looks at longer slices */
    PE_TILE_TOKENS = 64, /* one tile of a matmul with an epilogue: 64 tokens x 4 panels of float32 = 16 KiB */
    PE_TILE_PANELS = 4,
    PE_ATTENTION_ROWS = 32 /* query rows (tokens x heads of one kv head) that share a pass over K and V */
};

/* Consecutive rows of a slice that are consecutive positions of one sequence. */
typedef struct pe_query_block {
    size_t first_token, n_tokens; /* rows of the slice */
    size_t first_position;
    int32_t sequence;
} pe_query_block;

struct pe_context {
    const pe_model *model;
    const struct pe_kernels *kernels;
    pe_kv_cache *kv;
    pe_kv_dtype kv_dtype;
    int n_threads;
    size_t scratch_bytes;

    /* The slice on its way through the layers; buffers for `capacity` tokens. */
    size_t capacity, n_tokens;
    int32_t *sequences;     /* (capacity) */
    size_t *positions;      /* (capacity) */
    float *x;               /* (capacity, pad16(dim)) residual stream */
    float *qkv;             /* (capacity, pad16(q_dim + 2 kv_dim)) */
    float *att;             /* (capacity, q_dim) attention output */
    float *h;               /* (capacity, pad16(hidden_dim)) SwiGLU output */
    pe_activations act;     /* the quantized input of the next matmul */
    int8_t *q;              /* (n_kv_heads, capacity, n_rep, head_dim_p) */
    float *q_scales;        /* (n_kv_heads, capacity, n_rep, head_dim_p / 32) */
    int32_t *q_corrections; /* likewise */
    float *q_f32;           /* (n_kv_heads, capacity, n_rep, head_dim_p), only with a float32 cache */
    float *cos, *sin;       /* (capacity, head_dim / 2) */
    pe_query_block *blocks; /* (capacity) */
    size_t n_blocks;

    float *partials;          /* attention split by chunks: states of (block, kv head, chunk) */
    size_t partials_capacity; /* floats */

    float *logits;                    /* (n_logits, pad16(vocab_size)) */
    size_t n_logits, logits_capacity; /* rows */

    float *thread_scratch; /* (n_threads, thread_scratch_floats) */
    size_t thread_scratch_floats;

    pe_control *control;    /* of the running call */
    atomic_bool not_finite; /* some kernel met an infinity or NaN */
};

/* Grow the slice buffers to n_tokens (at most PE_SLICE_MAX). */
pe_status pe_context_reserve(pe_context *context, size_t n_tokens, char *err);

static inline float *pe_thread_scratch(const pe_context *context, int thread) {
    return context->thread_scratch + (size_t)thread * context->thread_scratch_floats;
}

/* attention.c: context->att = attention of the slice's queries over the cache of `layer`; the slice's own K and V are
 * in it. */
pe_status pe_attention(pe_context *context, uint32_t layer, char *err);
size_t pe_attention_scratch_floats(const pe_model *model);

#endif

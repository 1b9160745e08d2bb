/* model.h: immutable weights, as checked views into memory that somebody else owns (a mapped frozen file), and the few
 * tables that are computed from them once. */
#ifndef PE_MODEL_H
#define PE_MODEL_H

#include "kernels/kernels.h"
#include "key_bias.h"
#include "pyengine.h"

enum { PE_MAX_ROPE_TABLES = 16, PE_MAX_EXPERTS = 1024, PE_MAX_MODEL_EXPERTS = 16384, PE_MAX_TAPS = 16 };

typedef enum pe_activation {
    PE_ACTIVATION_SWIGLU,
    PE_ACTIVATION_SWIGLU_CLAMPED,
    PE_ACTIVATION_GEGLU_TANH,
    PE_ACTIVATION_GELU_TANH,
    PE_ACTIVATION_GELU,
    PE_ACTIVATION_RELU2,
    PE_ACTIVATION_XIELU
} pe_activation;

/* Whether an MLP with it has a gate: the first ones. */
static inline bool pe_has_gate(pe_activation activation) { return activation < PE_ACTIVATION_GELU_TANH; }

/* The matrices of one MLP and their biases. */
typedef struct pe_expert {
    pe_matrix w_gate_up; /* 2 x (hidden_dim, dim), alternating by panel; without a gate w_up, (hidden_dim, dim) */
    pe_matrix w_down;    /* (dim, hidden_dim) */
    const float *gate_up_bias; /* of w_gate_up, in the order of its padded rows, or NULL */
    const float *down_bias;    /* (dim) or NULL */
} pe_expert;

/* A norm that the layer does not have is NULL: it has the two of attention_norm and ffn_norm, or the two that follow what
 * attention and the MLP add, or all four, or attention_norm alone if both read what it gives. */
typedef struct pe_layer {
    bool short_conv;              /* a convolution (short_conv.h) in attention's place, over the last `window` positions */
    uint32_t window;              /* a query sees the last `window` positions, its own included; 0 = all */
    uint32_t rope;                /* its table in inv_freq */
    pe_activation activation;
    bool norm_before, norm_after; /* which of the four there are */
    bool parallel;                /* the MLP reads what attention read: norm_before without an ffn_norm */
    const float *attention_norm;  /* (dim) or NULL */
    pe_matrix wqkv;               /* (q_dim + 2 kv_dim, dim): rows of q, then k, then v; of a convolution conv_in (3 dim, dim) */
    const float *taps;            /* of a convolution (window, dim), the oldest position's first; else NULL */
    const float *wqkv_bias;       /* (q_dim + 2 kv_dim) or NULL */
    const float *key_bias_vector; /* (kv_dim) or NULL: what wqkv_bias lacks of k's bias */
    pe_key_bias *key_bias;        /* the same, made ready; ours */
    const float *q_norm, *k_norm; /* (head_dim), or (q_dim) and (kv_dim) with qk_norm_all_heads, or NULL */
    const float *sinks;           /* (n_heads) or NULL: a score of each head that has no value */
    pe_matrix wo;                 /* (dim, q_dim); of a convolution conv_out (dim, dim) */
    const float *wo_bias;         /* (dim) or NULL */
    const float *post_attention_norm; /* (dim) or NULL: of what wo gives, before it is added */
    const float *ffn_norm;        /* (dim) or NULL */
    const float *xielu;           /* (3) or NULL: the curve of PE_ACTIVATION_XIELU */
    const float *router;          /* (n_experts, dim) or NULL */
    const float *router_bias;     /* (n_experts) or NULL */
    const float *shared_router;   /* (dim) or NULL: of the shared expert's weight */
    pe_expert *experts;           /* (pe_n_mlps): n_experts and then the shared one, or that of a dense MLP; in model->experts */
    const float *post_ffn_norm;   /* (dim) or NULL: of what w_down gives, before it is added */
} pe_layer;

struct pe_model {
    pe_config config; /* without `layers` */
    size_t q_dim, kv_dim;
    size_t head_dim_p;        /* head_dim padded to 16: q, K and V */
    size_t qkv_width;         /* rows of the widest wqkv */
    size_t mixed_width;       /* columns of the widest wo */
    bool has_convolutions;    /* some layer is one */
    pe_matrix tok_embeddings; /* (vocab_size, dim) */
    pe_layer *layers;         /* (n_layers) */
    pe_expert *experts;       /* of all layers, one after the other */
    const float *norm;        /* (dim) */
    pe_matrix output;         /* (vocab_size, dim); the embeddings again when tied */
    const float *output_bias; /* (vocab_size) or NULL */
    bool has_branches;        /* what is added to the residual stream is whole before that in some layer: norms after, parallel */
    uint32_t n_rope_tables;
    const float *inv_freq[PE_MAX_ROPE_TABLES]; /* (n_rope_tables) of (head_dim / 2) */
    float *chunk_angles[PE_MAX_ROPE_TABLES];   /* with key_bias: pe_chunk_angles_create of each; ours */
    bool ready;               /* every tensor is in place and its values are legal */
};

static inline size_t pe_pad(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
/* MLPs of a layer. */
static inline size_t pe_n_mlps(const pe_config *c) {
    return c->n_experts == 0 ? 1 : (size_t)c->n_experts + (c->shared_hidden_dim > 0);
}
/* Of the widest of them. */
static inline size_t pe_widest_mlp(const pe_config *c) {
    return c->shared_hidden_dim > c->hidden_dim ? c->shared_hidden_dim : c->hidden_dim;
}

#endif

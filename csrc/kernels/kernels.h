/* kernels.h: one table of kernels per instruction set, and the layouts that they share.
 *
 * kernels_scalar.c is the specification: it says in plain C what every other table must compute, bit for bit. A kernel
 * never allocates, never fails and never reads past what its contract names. All floating point follows FORMAT.md: the
 * order of every reduction is written there, fmaf where fused is meant, nothing contracted by the compiler. */
#ifndef PE_KERNELS_H
#define PE_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PE_PANEL = 16,         /* rows of a weight panel, positions of a K panel, lanes of every float sum */
    PE_GROUP = 64,         /* weights, and activations, that share a scale; the largest block that is transformed */
    PE_TOKEN_BLOCK = 8,    /* tokens whose activations are packed together */
    PE_TILE_TOKENS = 16,   /* two blocks: tokens whose activations are one tile of a matrix unit */
    PE_CHUNK = 256,        /* positions of an attention chunk = of a KV page */
    PE_PROBABILITY_GROUP = 32, /* positions of a chunk whose probabilities share a scale */
    PE_MAX_HEAD_DIM = 512, /* model.c refuses more: kernels keep heads on their stack */
    PE_HEADS = 16,         /* heads that are quantized in one call: AHEAD times QUADS of lanes16_quantize.h */
};

/* Quantized activations of n_tokens rows of n columns (n a multiple of 64), packed for the matrix kernels. Tokens are
 * cut into blocks of PE_TOKEN_BLOCK; the last block is as narrow as the tokens that are left, rounded up to 1, 2, 4 or 8
 * (pe_block_width): a kernel then knows every distance in a block when it is compiled, and needs no registers for them.
 * What fills it up is zero. In a block of `width` tokens:
 *     codes[k4][token][4]   int8     k4 = column / 4: four inputs of one token are one 32-bit broadcast
 *     scales[group][token]  float32  group = column / 64
 *     corrections[group][token] int32  -128 * (sum of the 64 codes): where the int32 accumulator starts in tables whose
 *                           instructions want unsigned weights (see avx512vnni)
 * Block b begins at codes + b * 8 * n, scales + b * 8 * n / 64, corrections likewise. Buffers have room for whole blocks.
 *
 * A matrix unit wants the inputs of one token side by side and sixteen tokens one after the other. So a table that drives
 * one has its own order of codes for n_tokens >= tiled_from, in the same memory: the codes of each two blocks, `width` tokens
 * together (pe_tile_width), are codes[group][token][64]. Scales and corrections stay where they are. */
typedef struct pe_activations {
    int8_t *codes;
    float *scales;
    int32_t *corrections;
    size_t n; /* columns, padded to 64 */
    size_t n_tokens;
    bool fetch_for_one; /* kernels ask for the weights of a single token themselves (pe_cpu_fetches_late); no bit depends on it */
} pe_activations;

/* Width of a block that holds the first of n_left tokens. */
static inline size_t pe_block_width(size_t n_left) {
    return n_left > 4 ? PE_TOKEN_BLOCK : n_left > 2 ? 4 : n_left;
}

/* Width of two blocks that hold the first of n_left tokens. */
static inline size_t pe_tile_width(size_t n_left) {
    return n_left > PE_TOKEN_BLOCK ? PE_TOKEN_BLOCK + pe_block_width(n_left - PE_TOKEN_BLOCK) : pe_block_width(n_left);
}

/* The Hadamard transform T of FORMAT.md section 4 works on blocks of this many of a row's n elements. */
static inline size_t pe_hadamard_block(size_t n) {
    size_t largest_power = n & (0 - n);
    return largest_power < PE_GROUP ? largest_power : PE_GROUP;
}

/* For blocks of b = 2^k: 2^-floor(k / 2), what activations and queries carry of 1 / b, and 2^-ceil(k / 2), what weights
 * and keys do. */
static inline float pe_input_factor(size_t b) {
    float factor = 1.0f;
    for (; b >= 4; b /= 4) factor *= 0.5f;
    return factor;
}
static inline float pe_weight_factor(size_t b) { return 1.0f / ((float)b * pe_input_factor(b)); }

/* Where the groups of probabilities that hold positions [begin, end) of a chunk begin and end. */
static inline size_t pe_group_begin(size_t begin) { return begin / PE_PROBABILITY_GROUP * PE_PROBABILITY_GROUP; }
static inline size_t pe_group_end(size_t end) {
    return (end + PE_PROBABILITY_GROUP - 1) / PE_PROBABILITY_GROUP * PE_PROBABILITY_GROUP;
}

/* A matrix in panels (FORMAT.md section 3): codes (n_panels, n_groups, 16, 16, 4), scales f16 bits (n_panels, n_groups,
 * 16). */
typedef struct pe_matrix {
    const int8_t *codes;
    const uint16_t *scales;
    size_t n_panels, n_groups;
} pe_matrix;

/* K and V of one layer, one kv head and one chunk of 256 positions. head_dim_p = head_dim padded to 16.
 *   int8: k (16 panels, head_dim_p / 4, 16, 4)   k_scales (256)   v (64, head_dim_p, 4)   v_scales (256)
 *   f32:  k_f32 (16 panels, head_dim_p, 16)      v_f32 (256, head_dim_p)                      the others NULL */
typedef struct pe_kv_chunk {
    int8_t *k;
    float *k_scales;
    int8_t *v;
    float *v_scales;
    float *k_f32, *v_f32;
} pe_kv_chunk;

/* Positions [begin, end) of a chunk that a query sees; none if begin >= end. */
typedef struct pe_visible {
    size_t begin, end;
} pe_visible;

/* Attention states of rows, running or of one chunk. l is at least 1 for a row that saw something, since its own maximum
 * contributes exp(0), or NaN; a row that has seen nothing has l = 0, and its m and o mean nothing. */
typedef struct pe_attention_state {
    float *m, *l; /* (rows) */
    float *o;     /* (rows, head_dim_p) */
} pe_attention_state;

/* At most PE_HEADS heads, of one token or of several, that are quantized in one call. Code i of head h goes to
 * codes[h][i / 4 * four_step + i % 4 * step]: (4, 1) puts a head's codes side by side, (64, 1) makes it a lane of a panel of K,
 * (16, 4) one of the four positions that lie side by side in V. */
typedef struct pe_heads {
    size_t n_heads;
    const float *x[PE_HEADS];
    int8_t *codes[PE_HEADS];
    size_t four_step, step;
    float scales[PE_HEADS];         /* results: as of a group of activations */
    int32_t corrections[PE_HEADS];  /* likewise */
    uint32_t absmax_bits[PE_HEADS]; /* of each head's largest magnitude; PE_NOT_FINITE_BITS or more: an infinity or NaN */
} pe_heads;

struct pe_kernels {
    const char *name;  /* "scalar", "avx2", ...: the words that PYENGINE_ISA accepts */
    uint32_t required; /* PE_CPU_* bits; covers every -m flag given to this file in CMakeLists.txt */
    size_t tiled_from; /* activations of at least so many tokens are in tiles (pe_activations); SIZE_MAX = none are */

    /* A block of activations, tokens [first, first + PE_TOKEN_BLOCK) of x or as many as there are, from a row of n floats
     * each, transformed, in groups of 64; with `norm` (n), an RMSNorm weight or NULL, the rows are normed first. Columns n..x->n
     * become 0, and so do the tokens that fill the block up. Returns bit t set if T(row t), or with `norm` the row's sum of
     * squares, held an infinity or NaN: then that token's codes and scales mean nothing. */
    uint32_t (*quantize)(pe_activations *x, size_t first, const float *const *rows, size_t n, const float *norm,
                         float eps);
    /* Heads of n values each (at most PE_MAX_HEAD_DIM), transformed in blocks of `block` (1 = not at all, else one that divides n),
     * each of them one group: its codes, behind them zeros up to a multiple of 16, its scale, which is multiplied by `factor`,
     * and its correction. Of a head with an infinity or NaN all of these are 0. */
    void (*quantize_heads)(pe_heads *heads, size_t n, size_t block, float factor);
    /* x (n) = T(x) * factor, in place. */
    void (*hadamard)(float *x, size_t n, float factor);

    /* out[t][16 p + r] = row (16 p + r) of w times token t, panels [panel_begin, panel_end), tokens [token_begin,
     * token_end) where token_begin is a multiple of PE_TOKEN_BLOCK. out points at (token_begin, 16 panel_begin), rows
     * out_stride floats apart. bias (all rows of w, or NULL) is added to it; then, if `add`, it is added to what out held. */
    void (*matmul)(float *out, size_t out_stride, const pe_matrix *w, size_t panel_begin, size_t panel_end,
                   const pe_activations *x, size_t token_begin, size_t token_end, const float *bias, bool add);

    /* y = (x * inv_rms) * w over n elements; x == y is allowed. Returns the sum of squares, which is not finite if x
     * overflowed. */
    float (*rmsnorm)(float *y, const float *x, const float *w, size_t n, float eps);

    /* x (head_dim) rotated in place; cos, sin (head_dim / 2). */
    void (*rope)(float *x, const float *cos, const float *sin, size_t head_dim);

    /* h (n_pairs * 16) = silu(gate) * up; gate_up (n_pairs, 2, 16) holds a gate panel, then its up panel, as matmul
     * wrote them. */
    void (*swiglu)(float *h, const float *gate_up, size_t n_pairs);

    /* The same of clamped values: g = min(gate, 7), u = up within [-7, 7], h = g / (1 + exp(-1.702 g)) * (u + 1). */
    void (*swiglu_clamped)(float *h, const float *gate_up, size_t n_pairs);

    /* swiglu with GELU (tanh form) in place of SiLU. */
    void (*geglu_tanh)(float *h, const float *gate_up, size_t n_pairs);

    /* Activations of an MLP without a gate: x[i] = f(x[i]) for n elements, a multiple of 16. f is GELU, in its tanh form and
     * exact, the square of what is positive, or xIELU of `curve` (3), which the others do not read: curvatures above 0 and below,
     * slope at 0. */
    void (*gelu_tanh)(float *x, size_t n, const float *curve);
    void (*gelu)(float *x, size_t n, const float *curve);
    void (*relu2)(float *x, size_t n, const float *curve);
    void (*xielu)(float *x, size_t n, const float *curve);

    /* x[i] = cap * tanh(x[i] / cap) for n elements, cap > 0. */
    void (*softcap)(float *x, size_t n, float cap);

    /* out[r] = the sum of x[i] * w[r][i] over n elements in sixteen lanes, as if both were padded with +0 to a multiple of 16.
     * w (n_rows, n). */
    void (*dots_f32)(float *out, const float *x, const float *w, size_t n_rows, size_t n);
    /* n outputs of a low-rank product: y[i] = d + y[i], d = the sum of t[k] * b[k][i] over k ascending, one fmaf each, from 0.
     * t (rank); b (ceil(n / 16), rank, 16) in panels of 16 outputs, padded with 0; y has its panels `step` floats apart. */
    void (*add_low_rank)(float *y, size_t step, const float *t, const float *b, size_t rank, size_t n);
    /* y[i] = fmaf(a, x[i], y[i]) for n elements. */
    void (*add_scaled)(float *y, const float *x, float a, size_t n);

    /* y[i] = x[i] + y[i] for n elements. */
    void (*add)(float *y, const float *x, size_t n);

    /* scores[r][j] for n_rows query rows against positions j of the panels that cover [0, n_positions):
     * score = (d * (c * q_scale)) * k_scale as FORMAT.md section 8 has it. q (n_rows, head_dim_p) int8, q_scales and
     * q_corrections (n_rows), scores rows 256 floats apart. Positions from n_positions to the end of their panel get values
     * that mean nothing. */
    void (*attention_scores)(float *scores, const int8_t *q, const float *q_scales, const int32_t *q_corrections,
                             size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv, size_t n_positions, float c);
    /* The same with float32 q (n_rows, head_dim_p) and kv->k_f32. */
    void (*attention_scores_f32)(float *scores, const float *q, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                                 size_t n_positions, float c);

    /* scores[r][j] += what the keys' bias adds to it (FORMAT.md section 8), in place, positions and rows as above. rotated
     * (n_rows, 2, n_pairs) is the queries times the bias, rotated back to the beginning of the chunk; pairs (n_pairs)
     * ascending; angles (16 panels, n_half, 2, 16) the cos and sin of the chunk's positions for each of the n_half pairs of
     * RoPE. */
    void (*attention_key_bias)(float *scores, const float *rotated, size_t n_rows, const uint32_t *pairs, size_t n_pairs,
                               const float *angles, size_t n_half, size_t n_positions);

    /* Scores, rows 256 floats apart, become weights w = p * v_scale, or p where v_scales (256) is NULL, in place; m and l (rows)
     * become those of FORMAT.md section 8. Rows come in n_runs runs of n_rep (the heads of a token) that see the same; of one that
     * sees nothing l is 0 and m means nothing. `all` is what any of them sees, not empty: weights of a row fill the groups of 32
     * positions that hold a part of it, and are +0 where the row does not look. Scores and scales there are not looked at. */
    void (*attention_weights)(float *m, float *l, float *scores, const pe_visible *runs, size_t n_runs, size_t n_rep, pe_visible all,
                              const float *v_scales);

    /* out[r][d] = o of FORMAT.md section 8 over positions [begin, end): the weights w[r][j], quantized in groups of 32 positions,
     * times v[j][d]. w as attention_weights left it, rows 256 floats apart, at least 0; out (n_rows, head_dim_p). The codes of V
     * outside of [begin, end) are not looked at, or multiplied by 0. Of a row that holds a NaN, nothing is meant. */
    void (*attention_values)(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                             size_t begin, size_t end);
    /* out[r][d] = sum of w[r][j] * v_f32[j][d], j ascending, one fmaf each from +0; all else as above. */
    void (*attention_values_f32)(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                                 size_t begin, size_t end);

    /* The states of n_rows rows take up a further chunk's as FORMAT.md section 8 merges them; of a row that one side has not
     * seen (l = 0) the other's state is the result. */
    void (*attention_merge)(const pe_attention_state *total, const pe_attention_state *chunk, size_t n_rows, size_t head_dim_p);
    /* y = x * s over n elements. */
    void (*scale)(float *y, const float *x, float s, size_t n);

    /* Whether codes[n] (n a multiple of 64) hold no -128. */
    int (*codes_are_legal)(const int8_t *codes, size_t n);

    /* The sampler's passes over logits (n), n > 0; see sampler.h for what they are of. *most = the largest, of two zeros either
     * one, and anything if there is a NaN; returns whether all are finite. */
    bool (*maximum)(const float *logits, size_t n, float *most);
    /* weights[i] = rint(exp(d) * 2^42) with d = (logits[i] - top) / temperature, or 0 where d < cut; returns their sum. Logits are
     * at most top, or -infinity; cut is from -30 to 0. */
    uint64_t (*weigh)(uint64_t *weights, const float *logits, size_t n, double top, double temperature, double cut);
    /* The sum of exp(logits[i] - top), i ascending. Logits are finite and at most top. */
    double (*sum_of_exps)(const float *logits, size_t n, double top);
};

extern const struct pe_kernels pe_kernels_scalar;
#if defined(__x86_64__)
extern const struct pe_kernels pe_kernels_avx2, pe_kernels_avx512vnni;
extern const struct pe_kernels pe_kernels_avxvnni; /* linked in where the compiler knows it: PE_HAVE_AVXVNNI */
extern const struct pe_kernels pe_kernels_amx;     /* likewise: PE_HAVE_AMX */
#elif defined(__aarch64__)
extern const struct pe_kernels pe_kernels_neon_dotprod;
extern const struct pe_kernels pe_kernels_neon_i8mm; /* linked in where the compiler knows it: PE_HAVE_NEON_I8MM */
#endif

/* Ask the operating system for AMX's tile registers, on a CPU that has them; false where it refuses or knows no such question.
 * Linux grants them to the process for good: to all its threads, earlier ones too, and to children of fork, not beyond exec, and
 * a second question costs nothing. What a thread saves at a context switch grows by 8 KiB once it uses them, and so does the
 * stack that a signal handler needs from the answer on: the kernel refuses if a thread's alternate stack (sigaltstack) is too
 * small, and later refuses such stacks. So only who is about to use the tiles asks: dispatch.c, for a table that is wanted. */
bool pe_tiles_permitted(void);

/* Whether this CPU's hardware fetches a single stream of weights more slowly than it could read them. Cheap. */
bool pe_cpu_fetches_late(void);

/* The selected table (dispatch.c); NULL before the first pe_isa_select or pe_isa_active. */
const struct pe_kernels *pe_kernels_selected(void);
/* A table by name if this CPU can run it, else NULL. */
const struct pe_kernels *pe_kernels_by_name(const char *name);

#endif

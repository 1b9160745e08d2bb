/* lanes16.h: every kernel, written once for sixteen lanes.
 *
 * An instruction set's file defines the primitives below as static inline functions, includes this header, and is done:
 * a table differs from another only in how sixteen lanes are held (one zmm, two ymm, four q registers) and in the int8
 * dot step. The loops follow kernels_scalar.c statement by statement; all lane-wise operations are IEEE, so equal order
 * means equal bits.
 *
 *   v16              16 float32 lanes        v16_load/store (unaligned), v16_set1, v16_add/sub/mul/div/fma(a, b, c) = a * b + c
 *   v16_max(a, b)    a > b ? a : b           v16_rint, v16_from_half(p) 16 f16 -> float
 *   v16_exp_bits(p, n)   p * 2^n, n integral, where that is a normal number, as it is in exp
 *   v16_zero_if_less(x, limit, y)   x < limit ? 0 : y
 *   v16_neg(x)           the sign flipped, of a NaN too
 *   v16_first_lanes(n, x, y)   lanes 0 to n - 1 of x, the others of y
 *   v16_cap(limit, x)    limit < x ? limit : x
 *   v16_swap1/2/4/8(x)   lanes i and i ^ 1, 2, 4 or 8 exchanged
 *   v16_max_in_quads(v)      lane k of each quad: the maximum of that quad of v[k], for four vectors
 *   v16_transpose_quads(v)   quad k (four lanes) of v[c] and quad c of v[k] exchanged, for four vectors
 *   v16_sum_lanes(x)     the tree of FORMAT.md section 7; v16_max_lanes(x): the maximum, any order
 *   i16              16 int32 lanes          i16_zero, i16_to_float, i16_add
 *   v16_store_firsts(p, x)   the first lane of each quad, four floats
 *   i16_store_corrections(p, x)   -128 times the sum of each quad, four int32
 *   v16_from_bits(m)     the float32 whose bits these are
 *   v16_abs_bits_max(m, x)  unsigned maximum of m and the bits of |x|; i16_umax: the maximum over lanes
 *   v16_to_i8(dst, x)    rint to int8, 16 bytes stored; returns the codes as i16
 *   w16, x4          64 bytes of a panel (four inputs of sixteen rows); four inputs of one token, broadcast
 *   w16_load, x4_load, dot_start(correction of x: see pe_activations), dot(acc, w, x)
 *   TILE_PANELS, TILE_TOKENS   register block of the matrix product; TILE_TOKENS at most PE_TOKEN_BLOCK
 *   DOT_UNROLL                 of the sixteen dot steps of a group, so many are written out one after the other
 *   FETCH_FOR_ONE              1 = where the hardware is slow at it (pe_cpu_fetches_late), weights of a single token are fetched
 *   SCORE_ROWS                 queries that share a panel of K; at most 8
 *   v16_four_to_i8(dst, v)   rint to int8 of four vectors, 64 bytes stored; returns the sum of the four vectors of codes
 *   i8_transpose_fours(dst, src)   sixteen bytes, byte c of four k exchanged with byte k of four c
 *   v16x4, p4        64 bytes of V (four positions of sixteen columns); four codes of probabilities, 0..127, broadcast
 *   v16x4_load, p4_load, dot_values(acc, v, p)
 *   VALUE_ROWS, VALUE_COLUMNS  register block of probabilities times V: rows by vectors of 16 columns; at most 8 rows
 *   VALUE_UNROLL               of the eight dot steps of a group of probabilities, so many are written out */
#ifndef PE_LANES16_H
#define PE_LANES16_H

#include <string.h>

#include "kernels.h"
#include "logits.h"
#include "pe_math.h"

#define PE_INLINE static inline __attribute__((always_inline))
#define PE_UNROLL _Pragma("GCC unroll 16")

/* ------------------------------------------------------------------ exp */

PE_INLINE v16 exp16(v16 x) {
    v16 capped = v16_cap(v16_set1(PE_EXP_MAX), x);
    v16 n = v16_rint(v16_mul(capped, v16_set1(PE_EXP_LOG2E)));
    v16 f = v16_fma(n, v16_set1(-PE_EXP_LN2_HI), capped);
    f = v16_fma(n, v16_set1(-PE_EXP_LN2_LO), f);
    v16 p = v16_set1(PE_EXP_C0);
    p = v16_fma(p, f, v16_set1(PE_EXP_C1));
    p = v16_fma(p, f, v16_set1(PE_EXP_C2));
    p = v16_fma(p, f, v16_set1(PE_EXP_C3));
    p = v16_fma(p, f, v16_set1(PE_EXP_C4));
    p = v16_fma(p, f, v16_set1(PE_EXP_C5));
    p = v16_add(v16_fma(p, v16_mul(f, f), f), v16_set1(1.0f));
    return v16_zero_if_less(x, PE_EXP_MIN, v16_exp_bits(p, n));
}

/* ------------------------------------------------------------------ the Hadamard transform, quantization */

/* Of n_r rows of n elements; side by side, because a sum waits for itself at every step. */
PE_INLINE void sums_of_squares(float *sums, const float *const *rows, size_t n, const int n_r) {
    v16 lanes[4];
    size_t i = 0;
    PE_UNROLL for (int r = 0; r < n_r; r++) lanes[r] = v16_set1(0.0f);
    for (; i + 16 <= n; i += 16)
        PE_UNROLL for (int r = 0; r < n_r; r++) lanes[r] = v16_fma(v16_load(rows[r] + i), v16_load(rows[r] + i), lanes[r]);
    PE_UNROLL for (int r = 0; r < n_r; r++) {
        float rest[PE_PANEL] = {0}; /* fmaf(0, 0, a) is a: sums of squares are never -0 */
        memcpy(rest, rows[r] + i, (n - i) * sizeof *rest);
        sums[r] = v16_sum_lanes(v16_fma(v16_load(rest), v16_load(rest), lanes[r]));
    }
}

#include "lanes16_quantize.h"

/* ------------------------------------------------------------------ matrix product */

/* Dot products of 4 n_k4 inputs, for n_p panels and n_t tokens, added to d (n_p, d_stride). Strides: w_stride bytes between
 * panels, x_token bytes between tokens, x_step between consecutive k4 of one token. n_k4, n_p and n_t are constants at
 * every call. */
PE_INLINE void dot_steps(i16 *d, const int d_stride, const int8_t *w, size_t w_stride, const int8_t *x, size_t x_step,
                         size_t x_token, const int n_k4, const int n_p, const int n_t) {
    _Pragma("GCC unroll DOT_UNROLL") for (int k4 = 0; k4 < n_k4; k4++) {
        w16 rows[TILE_PANELS];
        PE_UNROLL for (int p = 0; p < n_p; p++) rows[p] = w16_load(w + (size_t)p * w_stride + k4 * 64);
        PE_UNROLL for (int t = 0; t < n_t; t++) {
            x4 inputs = x4_load(x + (size_t)k4 * x_step + (size_t)t * x_token);
            PE_UNROLL for (int p = 0; p < n_p; p++) d[p * d_stride + t] = dot(d[p * d_stride + t], rows[p], inputs);
        }
    }
}

/* One token block as the matrix kernels see it; offsets of its width are constants wherever that is one. */
typedef struct token_block {
    const int8_t *codes;
    const float *scales;
    const int32_t *corrections;
} token_block;

/* Weights that a tile fetches for those that come after it: for each of its groups n_lines cache lines of `codes`, of which
 * every tile has its share, and one of `scales`. They may lie behind the matrix: a prefetch reads nothing that a program could
 * see, and never faults. (By the letter of C no such pointer may be made, up to two pairs of panels behind the last one. Nobody
 * reads through it or compares it, so in flat memory no more follows. Addresses as integers compile to other loops.) They go into
 * the second-level cache: in the first, the tile's own panels and those to come would push each other out. */
typedef struct fetch_ahead {
    const int8_t *codes;
    const uint16_t *scales;
    size_t n_lines; /* 0 = nothing is fetched */
    size_t n_near;  /* see fetch_near; 0 = as above */
} fetch_ahead;

/* From `panel` on, which may not be there. */
PE_INLINE fetch_ahead fetch_from(const pe_matrix *w, size_t panel, size_t n_lines) {
    size_t group = panel * w->n_groups;
    return (fetch_ahead){w->codes + group * PE_GROUP * PE_PANEL, w->scales + group * PE_PANEL, n_lines, 0};
}

/* For a tile that is alone with its pair of panels, and has long rows or is one token's: the next pair would come many groups too
 * early. So each group fetches one of both panels that is NEAR_GROUPS later: far enough for memory's latency. n_near groups on,
 * where the pair ends, the next one begins. */
enum { NEAR_GROUPS = 3, LONG_ROW = 12, GROUP_LINES = PE_GROUP * PE_PANEL / 64 };
PE_INLINE fetch_ahead fetch_near(const pe_matrix *w, size_t panel) {
    size_t group = panel * w->n_groups + NEAR_GROUPS;
    return (fetch_ahead){w->codes + group * PE_GROUP * PE_PANEL, w->scales + group * PE_PANEL, TILE_PANELS * GROUP_LINES,
                         w->n_groups - NEAR_GROUPS};
}

/* A group of both panels, and its scales. Into the second level, too: a core has more lines on their way there. */
PE_INLINE void fetch_near_group(fetch_ahead *ahead, size_t n_groups) {
    size_t w_stride = n_groups * PE_GROUP * PE_PANEL, scales_stride = n_groups * PE_PANEL;
    PE_UNROLL for (int p = 0; p < TILE_PANELS; p++) {
        PE_UNROLL for (int i = 0; i < GROUP_LINES; i++) __builtin_prefetch(ahead->codes + (size_t)p * w_stride + i * 64, 0, 2);
        __builtin_prefetch(ahead->scales + (size_t)p * scales_stride, 0, 2);
    }
    ahead->codes += PE_GROUP * PE_PANEL, ahead->scales += PE_PANEL;
    if (--ahead->n_near > 0) return;
    ahead->codes += w_stride, ahead->scales += scales_stride, ahead->n_near = n_groups;
}

/* One group's share of codes, and its scales. Locality 2 is the second level (prefetcht1, pldl2keep). */
PE_INLINE void fetch_codes(fetch_ahead *ahead) {
    for (size_t i = 0; i < ahead->n_lines; i++, ahead->codes += 64) __builtin_prefetch(ahead->codes, 0, 2);
}
PE_INLINE void fetch_scales(fetch_ahead *ahead) {
    if (ahead->n_lines == 0) return;
    __builtin_prefetch(ahead->scales, 0, 2);
    ahead->scales += TILE_PANELS * PE_PANEL; /* of two panels that is a line */
}

/* What becomes of a product, see kernels.h. */
typedef struct epilogue {
    const float *bias;
    bool add;
} epilogue;

/* n_p panels from `panel` times tokens [0, n_t) of a block of `width`, of which the first n_out are wanted. */
PE_INLINE void matmul_tile(float *out, size_t out_stride, const pe_matrix *w, size_t panel, token_block x, const int width,
                           const int n_p, const int n_t, size_t n_out, fetch_ahead ahead, epilogue then) {
    size_t n_groups = w->n_groups, w_stride = n_groups * PE_GROUP * PE_PANEL;
    const int8_t *codes = w->codes + panel * w_stride;
    const uint16_t *w_scales = w->scales + panel * n_groups * PE_PANEL;
    v16 acc[TILE_PANELS][TILE_TOKENS];
    PE_UNROLL for (int p = 0; p < n_p; p++) PE_UNROLL for (int t = 0; t < n_t; t++) acc[p][t] = v16_set1(0.0f);
    for (size_t g = 0; g < n_groups; g++) {
        if (ahead.n_near > 0) fetch_near_group(&ahead, n_groups);
        else fetch_codes(&ahead), fetch_scales(&ahead);
        i16 d[TILE_PANELS][TILE_TOKENS];
        PE_UNROLL for (int t = 0; t < n_t; t++)
            PE_UNROLL for (int p = 0; p < n_p; p++) d[p][t] = dot_start(x.corrections[t]);
        dot_steps(&d[0][0], TILE_TOKENS, codes, w_stride, x.codes, width * 4, 4, PE_GROUP / 4, n_p, n_t);
        v16 w_scale[TILE_PANELS];
        PE_UNROLL for (int p = 0; p < n_p; p++) w_scale[p] = v16_from_half(w_scales + (size_t)p * n_groups * PE_PANEL);
        PE_UNROLL for (int t = 0; t < n_t; t++) {
            v16 s = v16_set1(x.scales[t]);
            PE_UNROLL for (int p = 0; p < n_p; p++)
                acc[p][t] = v16_fma(v16_mul(i16_to_float(d[p][t]), s), w_scale[p], acc[p][t]);
        }
        codes += PE_GROUP * PE_PANEL, w_scales += PE_PANEL;
        x.codes += width * PE_GROUP, x.scales += width, x.corrections += width;
    }
    if (then.bias != NULL)
        PE_UNROLL for (int p = 0; p < n_p; p++) {
            v16 bias = v16_load(then.bias + (panel + (size_t)p) * PE_PANEL);
            PE_UNROLL for (int t = 0; t < n_t; t++) acc[p][t] = v16_add(bias, acc[p][t]);
        }
    if (then.add)
        PE_UNROLL for (int t = 0; t < n_t; t++) {
            if ((size_t)t >= n_out) break;
            PE_UNROLL for (int p = 0; p < n_p; p++)
                acc[p][t] = v16_add(acc[p][t], v16_load(out + (size_t)t * out_stride + p * PE_PANEL));
        }
    PE_UNROLL for (int t = 0; t < n_t; t++) {
        if ((size_t)t >= n_out) return;
        PE_UNROLL for (int p = 0; p < n_p; p++) v16_store(out + (size_t)t * out_stride + p * PE_PANEL, acc[p][t]);
    }
}

/* n_p panels times the first n_tokens of a block of `width`. */
PE_INLINE void matmul_block(float *out, size_t out_stride, const pe_matrix *w, size_t panel, token_block x, const int width,
                            const int n_p, size_t n_tokens, fetch_ahead *ahead, epilogue then) {
    const int n_t = width < TILE_TOKENS ? width : TILE_TOKENS;
    for (size_t t = 0; t < n_tokens; t += n_t, ahead->codes += ahead->n_lines * 64 * w->n_groups) {
        token_block tile = {x.codes + t * 4, x.scales + t, x.corrections + t};
        matmul_tile(out + t * out_stride, out_stride, w, panel, tile, width, n_p, n_t, n_tokens - t, *ahead, then);
    }
}

/* Panels [panel, panel_end), at most TILE_PANELS, times one block. */
PE_INLINE void matmul_panels(float *out, size_t out_stride, const pe_matrix *w, size_t panel, size_t panel_end, token_block x,
                             const int width, size_t n_tokens, fetch_ahead *ahead, epilogue then) {
    /* A single token only streams weights: one panel at a time is the order in which they lie in the file, and in which the
     * hardware fetches them. */
    if ((width > 1 || (FETCH_FOR_ONE && ahead->n_near > 0)) && panel_end - panel == TILE_PANELS) {
        matmul_block(out, out_stride, w, panel, x, width, TILE_PANELS, n_tokens, ahead, then);
        return;
    }
    for (; panel < panel_end; panel++, out += PE_PANEL)
        matmul_block(out, out_stride, w, panel, x, width, 1, n_tokens, ahead, then);
}

static void matmul(float *out, size_t out_stride, const pe_matrix *w, size_t panel_begin, size_t panel_end,
                   const pe_activations *x, size_t token_begin, size_t token_end, const float *bias, bool add) {
    /* A few tokens take about as long to compute as their weights take to arrive: every tile fetches its share of the next
     * panels, or memory would rest in all tiles but the first (one tile and long rows: see fetch_near). A single token leaves that
     * to the hardware, which sees one stream, unless it is too slow at that; many tokens have all the time there is. */
    size_t n = token_end - token_begin, n_tiles = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    size_t n_lines = n > 1 ? TILE_PANELS * GROUP_LINES / n_tiles : 0;
    /* Tables whose tiles have one panel go on as they were: the CPUs that run them have not been measured. */
    bool fetch_for_one = FETCH_FOR_ONE && x->fetch_for_one && w->n_groups > NEAR_GROUPS; /* else one panel at a time */
    bool near = TILE_PANELS > 1 && n_tiles == 1 && (n > 1 ? w->n_groups >= LONG_ROW : fetch_for_one);
    epilogue then = {bias, add};
    for (size_t panel = panel_begin; panel < panel_end; panel += TILE_PANELS) {
        fetch_ahead ahead = near ? fetch_near(w, panel) : fetch_from(w, panel + TILE_PANELS, n_lines);
        size_t end = panel_end - panel < TILE_PANELS ? panel_end : panel + TILE_PANELS;
        for (size_t first = token_begin; first < token_end; first += PE_TOKEN_BLOCK) {
            size_t offset = first * (x->n / PE_GROUP);
            token_block block = {x->codes + first * x->n, x->scales + offset, x->corrections + offset};
            size_t n_tokens = token_end - first < PE_TOKEN_BLOCK ? token_end - first : PE_TOKEN_BLOCK;
            float *tile = out + (first - token_begin) * out_stride + (panel - panel_begin) * PE_PANEL;
            switch (pe_block_width(x->n_tokens - first)) {
            case 1: matmul_panels(tile, out_stride, w, panel, end, block, 1, n_tokens, &ahead, then); break;
            case 2: matmul_panels(tile, out_stride, w, panel, end, block, 2, n_tokens, &ahead, then); break;
            case 4: matmul_panels(tile, out_stride, w, panel, end, block, 4, n_tokens, &ahead, then); break;
            default: matmul_panels(tile, out_stride, w, panel, end, block, PE_TOKEN_BLOCK, n_tokens, &ahead, then);
            }
        }
    }
}

/* ------------------------------------------------------------------ norm, RoPE, SwiGLU */

static float rmsnorm(float *y, const float *x, const float *w, size_t n, float eps) {
    float sum;
    sums_of_squares(&sum, &x, n, 1);
    float inv_rms = 1.0f / sqrtf(sum / (float)n + eps);
    v16 inv = v16_set1(inv_rms);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(y + i, v16_mul(v16_mul(v16_load(x + i), inv), v16_load(w + i)));
    for (; i < n; i++) y[i] = (x[i] * inv_rms) * w[i];
    return sum;
}

static void rope(float *x, const float *cos, const float *sin, size_t head_dim) {
    size_t half = head_dim / 2, i = 0;
    for (; i + 16 <= half; i += 16) {
        v16 x0 = v16_load(x + i), x1 = v16_load(x + i + half), c = v16_load(cos + i), s = v16_load(sin + i);
        v16_store(x + i, v16_fma(x0, c, v16_neg(v16_mul(x1, s))));
        v16_store(x + i + half, v16_fma(x1, c, v16_mul(x0, s)));
    }
    for (; i < half; i++) {
        float x0 = x[i], x1 = x[i + half];
        x[i] = fmaf(x0, cos[i], -(x1 * sin[i]));
        x[i + half] = fmaf(x1, cos[i], x0 * sin[i]);
    }
}

static void swiglu(float *h, const float *gate_up, size_t n_pairs) {
    v16 one = v16_set1(1.0f);
    for (size_t pair = 0; pair < n_pairs; pair++) {
        v16 gate = v16_load(gate_up + pair * 32), up = v16_load(gate_up + pair * 32 + 16);
        v16 sigmoid = v16_div(one, v16_add(one, exp16(v16_neg(gate))));
        v16_store(h + pair * PE_PANEL, v16_mul(v16_mul(gate, sigmoid), up));
    }
}

static void swiglu_clamped(float *h, const float *gate_up, size_t n_pairs) {
    v16 one = v16_set1(1.0f), limit = v16_set1(PE_CLAMP);
    for (size_t pair = 0; pair < n_pairs; pair++) {
        v16 gate = v16_cap(limit, v16_load(gate_up + pair * 32)), up = v16_cap(limit, v16_load(gate_up + pair * 32 + 16));
        up = v16_max(v16_set1(-PE_CLAMP), up);
        v16 sigmoid = v16_div(one, v16_add(one, exp16(v16_neg(v16_mul(gate, v16_set1(PE_CLAMPED_SLOPE))))));
        v16_store(h + pair * PE_PANEL, v16_mul(v16_mul(gate, sigmoid), v16_add(up, one)));
    }
}

static void geglu_tanh(float *h, const float *gate_up, size_t n_pairs) {
    v16 one = v16_set1(1.0f);
    for (size_t pair = 0; pair < n_pairs; pair++) {
        v16 gate = v16_load(gate_up + pair * 32), up = v16_load(gate_up + pair * 32 + 16);
        v16 z = v16_mul(gate, v16_fma(v16_mul(gate, gate), v16_set1(PE_GELU_C3), v16_set1(PE_GELU_C1)));
        v16 sigmoid = v16_div(one, v16_add(one, exp16(v16_neg(z))));
        v16_store(h + pair * PE_PANEL, v16_mul(v16_mul(gate, sigmoid), up));
    }
}

static void gelu_tanh(float *x, size_t n, const float *curve) {
    (void)curve;
    v16 one = v16_set1(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        v16 a = v16_load(x + i);
        v16 z = v16_mul(a, v16_fma(v16_mul(a, a), v16_set1(PE_GELU_C3), v16_set1(PE_GELU_C1)));
        v16_store(x + i, v16_mul(a, v16_div(one, v16_add(one, exp16(v16_neg(z))))));
    }
}

static void gelu(float *x, size_t n, const float *curve) {
    (void)curve;
    v16 one = v16_set1(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        v16 a = v16_load(x + i), z = v16_max(v16_neg(a), a), positive = v16_max(v16_set1(0.0f), a);
        v16 t = v16_div(one, v16_fma(z, v16_set1(PE_GELU_T), one)), q = v16_set1(PE_GELU_Q5);
        q = v16_fma(q, t, v16_set1(PE_GELU_Q4));
        q = v16_fma(q, t, v16_set1(PE_GELU_Q3));
        q = v16_fma(q, t, v16_set1(PE_GELU_Q2));
        q = v16_fma(q, t, v16_set1(PE_GELU_Q1));
        q = v16_fma(q, t, v16_set1(PE_GELU_Q0));
        v16 tail = v16_mul(v16_mul(q, t), exp16(v16_mul(v16_mul(z, z), v16_set1(-0.5f))));
        v16_store(x + i, v16_fma(v16_neg(z), tail, positive));
    }
}

static void relu2(float *x, size_t n, const float *curve) {
    (void)curve;
    for (size_t i = 0; i < n; i += 16) {
        v16 positive = v16_max(v16_set1(0.0f), v16_load(x + i));
        v16_store(x + i, v16_mul(positive, positive));
    }
}

static void xielu(float *x, size_t n, const float *curve) {
    v16 zero = v16_set1(0.0f), one = v16_set1(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        v16 a = v16_load(x + i), positive = v16_max(zero, a), negative = v16_cap(zero, a);
        v16 bend = v16_sub(v16_sub(exp16(negative), one), negative);
        v16 below = v16_fma(v16_set1(curve[1]), bend, v16_mul(a, v16_set1(curve[2])));
        v16_store(x + i, v16_fma(v16_set1(curve[0]), v16_mul(positive, positive), below));
    }
}

static void softcap(float *x, size_t n, float cap) {
    float twice = 2.0f / cap;
    v16 one = v16_set1(1.0f);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 e = exp16(v16_mul(v16_load(x + i), v16_set1(twice)));
        v16_store(x + i, v16_mul(v16_set1(cap), v16_div(v16_sub(e, one), v16_add(e, one))));
    }
    for (; i < n; i++) {
        float e = pe_expf(x[i] * twice);
        x[i] = cap * ((e - 1.0f) / (e + 1.0f));
    }
}

/* n_r dot products (a constant, at most LOW_RANK_BLOCK) that read x once. */
enum { LOW_RANK_BLOCK = 4 };
PE_INLINE void dots_block(float *out, const float *x, const float *w, size_t n, const int n_r) {
    v16 lanes[LOW_RANK_BLOCK];
    PE_UNROLL for (int r = 0; r < n_r; r++) lanes[r] = v16_set1(0.0f);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 inputs = v16_load(x + i);
        PE_UNROLL for (int r = 0; r < n_r; r++) lanes[r] = v16_fma(inputs, v16_load(w + (size_t)r * n + i), lanes[r]);
    }
    if (i < n) {
        float rest[1 + LOW_RANK_BLOCK][PE_PANEL] = {{0}};
        memcpy(rest[LOW_RANK_BLOCK], x + i, (n - i) * sizeof *x);
        for (int r = 0; r < n_r; r++) memcpy(rest[r], w + (size_t)r * n + i, (n - i) * sizeof *w);
        PE_UNROLL for (int r = 0; r < n_r; r++)
            lanes[r] = v16_fma(v16_load(rest[LOW_RANK_BLOCK]), v16_load(rest[r]), lanes[r]);
    }
    PE_UNROLL for (int r = 0; r < n_r; r++) out[r] = v16_sum_lanes(lanes[r]);
}

static void dots_f32(float *out, const float *x, const float *w, size_t n_rows, size_t n) {
    size_t r = 0;
    for (; r + LOW_RANK_BLOCK <= n_rows; r += LOW_RANK_BLOCK) dots_block(out + r, x, w + r * n, n, LOW_RANK_BLOCK);
    for (; r < n_rows; r++) dots_block(out + r, x, w + r * n, n, 1);
}

/* n_p panels of 16 outputs (a constant, at most LOW_RANK_BLOCK) that read t once. */
PE_INLINE void low_rank_block(float *y, size_t step, const float *t, const float *b, size_t rank, const int n_p) {
    v16 d[LOW_RANK_BLOCK];
    PE_UNROLL for (int p = 0; p < n_p; p++) d[p] = v16_set1(0.0f);
    for (size_t k = 0; k < rank; k++) {
        v16 factor = v16_set1(t[k]);
        PE_UNROLL for (int p = 0; p < n_p; p++) d[p] = v16_fma(factor, v16_load(b + ((size_t)p * rank + k) * PE_PANEL), d[p]);
    }
    PE_UNROLL for (int p = 0; p < n_p; p++) v16_store(y + p * step, v16_add(d[p], v16_load(y + p * step)));
}

static void add_low_rank(float *y, size_t step, const float *t, const float *b, size_t rank, size_t n) {
    const size_t wide = LOW_RANK_BLOCK * PE_PANEL;
    for (; n >= wide; n -= wide, y += LOW_RANK_BLOCK * step, b += rank * wide)
        low_rank_block(y, step, t, b, rank, LOW_RANK_BLOCK);
    for (; n >= PE_PANEL; n -= PE_PANEL, y += step, b += rank * PE_PANEL) low_rank_block(y, step, t, b, rank, 1);
    if (n == 0) return;
    float rest[PE_PANEL] = {0};
    memcpy(rest, y, n * sizeof *y);
    low_rank_block(rest, PE_PANEL, t, b, rank, 1);
    memcpy(y, rest, n * sizeof *y);
}

static void add_scaled(float *y, const float *x, float a, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(y + i, v16_fma(v16_set1(a), v16_load(x + i), v16_load(y + i)));
    for (; i < n; i++) y[i] = fmaf(a, x[i], y[i]);
}

static void add(float *y, const float *x, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(y + i, v16_add(v16_load(x + i), v16_load(y + i)));
    for (; i < n; i++) y[i] = x[i] + y[i];
}

static void scale(float *y, const float *x, float s, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(y + i, v16_mul(v16_load(x + i), v16_set1(s)));
    for (; i < n; i++) y[i] = x[i] * s;
}

#include "lanes16_attention.h"

/* ------------------------------------------------------------------ checks */

static int codes_are_legal(const int8_t *codes, size_t n) {
    int illegal = 0;
    for (size_t i = 0; i < n; i++) illegal |= codes[i] == -128;
    return !illegal;
}

/* ------------------------------------------------------------------ logits */

/* Two strips side by side: a maximum waits for the one before it. */
static bool maximum(const float *logits, size_t n, float *most) {
    v16 largest[2] = {v16_set1(logits[0]), v16_set1(logits[0])};
    i16 bits[2] = {i16_zero(), i16_zero()}; /* of |logits| */
    size_t i = 0;
    for (; i + 2 * PE_PANEL <= n; i += 2 * PE_PANEL)
        PE_UNROLL for (int k = 0; k < 2; k++) {
            v16 x = v16_load(logits + i + k * PE_PANEL);
            largest[k] = v16_max(x, largest[k]);
            bits[k] = v16_abs_bits_max(bits[k], x);
        }
    *most = v16_max_lanes(v16_max(largest[0], largest[1]));
    uint32_t absmax_bits = i16_umax(v16_abs_bits_max(bits[0], v16_from_bits(bits[1])));
    for (; i < n; i++) {
        uint32_t its_bits = pe_float_bits(logits[i]) & 0x7fffffffu;
        absmax_bits = its_bits > absmax_bits ? its_bits : absmax_bits;
        *most = logits[i] > *most ? logits[i] : *most;
    }
    return absmax_bits < PE_NOT_FINITE_BITS;
}

#define PE_LANES16_TABLE(table_name, table_required) \
    PE_LANES16_TABLE_WITH(table_name, table_required, SIZE_MAX, quantize, matmul, attention_scores, attention_values)

/* The same with int8 products of its own, and from n_tiled tokens on with another way to lay out their inputs. */
#define PE_LANES16_TABLE_WITH(table_name, table_required, n_tiled, its_quantize, its_matmul, its_scores, its_values) \
    { \
        .name = table_name, .required = (table_required), .tiled_from = (n_tiled), \
        .quantize = its_quantize, .quantize_heads = quantize_heads, .hadamard = hadamard, .matmul = its_matmul, \
        .rmsnorm = rmsnorm, .rope = rope, \
        .swiglu = swiglu, .swiglu_clamped = swiglu_clamped, .geglu_tanh = geglu_tanh, \
        .gelu_tanh = gelu_tanh, .gelu = gelu, .relu2 = relu2, .xielu = xielu, .softcap = softcap, \
        .dots_f32 = dots_f32, .add_low_rank = add_low_rank, .add_scaled = add_scaled, .add = add, \
        .attention_scores = its_scores, .attention_scores_f32 = attention_scores_f32, .attention_key_bias = attention_key_bias, \
        .attention_weights = attention_weights, \
        .attention_values = its_values, .attention_values_f32 = attention_values_f32, \
        .attention_merge = attention_merge, .scale = scale, \
        .codes_are_legal = codes_are_legal, .maximum = maximum, .weigh = logits_weigh, .sum_of_exps = logits_sum_of_exps, \
    }

#endif

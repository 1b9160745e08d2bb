/* kernels_scalar.c: the specification. Plain C that computes FORMAT.md line by line; every other table must give the
 * same bits. It is written to be read, not to be fast. */
#include <string.h>

#include "kernels.h"
#include "logits.h"
#include "pe_math.h"

/* ------------------------------------------------------------------ Hadamard transform, quantization (FORMAT.md sections 4, 5) */

/* T of every block of n elements. */
static void hadamard_blocks(float *x, size_t n, size_t block) {
    for (size_t h = 1; h < block; h *= 2)
        for (size_t i = 0; i < n; i++) {
            if (i & h) continue;
            float a = x[i], b = x[i + h];
            x[i] = a + b;
            x[i + h] = a - b;
        }
}

static void hadamard(float *x, size_t n, float factor) {
    hadamard_blocks(x, n, pe_hadamard_block(n));
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

static const float smallest_absmax = 0x1p-64f; /* below it 127 / absmax could overflow: the group is zero */

static uint32_t absmax_bits(const float *x, size_t n) {
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = pe_float_bits(x[i]) & 0x7fffffffu;
        if (bits > most) most = bits;
    }
    return most;
}

/* One group of n values. code i goes to codes[i / 4 * four_step + i % 4 * step]: (4, 1) is plain, wider ones interleave
 * tokens. */
static uint32_t quantize_strided(int8_t *codes, size_t four_step, size_t step, float *scale, int32_t *correction,
                                 const float *x, size_t n, float factor) {
    uint32_t bits = absmax_bits(x, n);
    float absmax = pe_float_from_bits(bits);
    int zero = absmax < smallest_absmax || bits >= PE_NOT_FINITE_BITS;
    float inv = zero ? 0.0f : 127.0f / absmax;
    *scale = zero ? 0.0f : absmax / 127.0f * factor;
    *correction = 0;
    for (size_t i = 0; i < n; i++) {
        int8_t code = zero ? 0 : (int8_t)lrintf(x[i] * inv);
        codes[i / 4 * four_step + i % 4 * step] = code;
        *correction -= 128 * code;
    }
    return bits;
}

/* RMSNorm of section 7: *sum is the sum of squares of x (n), the result 1 / rms. */
static float inverse_rms(float *sum, const float *x, size_t n, float eps) {
    float a[PE_PANEL] = {0};
    for (size_t i = 0; i < n; i++) a[i % PE_PANEL] = fmaf(x[i], x[i], a[i % PE_PANEL]);
    *sum = pe_sum_lanes(a);
    return 1.0f / sqrtf(*sum / (float)n + eps);
}

static uint32_t quantize(pe_activations *x, size_t first, const float *const *rows, size_t n, const float *norm,
                         float eps) {
    size_t n_left = x->n_tokens - first, width = pe_block_width(n_left);
    size_t n_groups = x->n / PE_GROUP, block = pe_hadamard_block(n);
    uint32_t not_finite = 0;
    for (size_t t = 0; t < width; t++) {
        const float *row = t < n_left ? rows[t] : NULL;
        float sum = 0.0f, inv_rms = row != NULL && norm != NULL ? inverse_rms(&sum, row, n, eps) : 1.0f;
        uint32_t most = pe_float_bits(sum);
        for (size_t group = 0; group < n_groups; group++) {
            float transformed[PE_GROUP] = {0}; /* the last group may end in zeros; n is whole blocks */
            size_t begin = group * PE_GROUP, at = first * n_groups + group * width + t;
            for (size_t i = begin; i < begin + PE_GROUP && i < n && row != NULL; i++)
                transformed[i - begin] = norm != NULL ? (row[i] * inv_rms) * norm[i] : row[i];
            hadamard_blocks(transformed, PE_GROUP, block);
            uint32_t bits = quantize_strided(x->codes + first * x->n + begin * width + t * 4, 4 * width, 1,
                                             x->scales + at, x->corrections + at, transformed, PE_GROUP, pe_input_factor(block));
            if (bits > most) most = bits;
        }
        if ((most & 0x7fffffffu) >= PE_NOT_FINITE_BITS) not_finite |= 1u << t;
    }
    return not_finite;
}

static void quantize_heads(pe_heads *heads, size_t n, size_t block, float factor) {
    for (size_t h = 0; h < heads->n_heads; h++) {
        float transformed[PE_MAX_HEAD_DIM] = {0};
        memcpy(transformed, heads->x[h], n * sizeof *transformed);
        hadamard_blocks(transformed, n, block);
        heads->absmax_bits[h] = quantize_strided(heads->codes[h], heads->four_step, heads->step, &heads->scales[h],
                                                 &heads->corrections[h], transformed, (n + PE_PANEL - 1) / PE_PANEL * PE_PANEL, factor);
    }
}

/* ------------------------------------------------------------------ matrix product (section 6) */

/* acc of one row and one token; w points at that row in its panel, x at that token in its block. */
static float dot_row(const int8_t *w, const uint16_t *w_scale, size_t n_groups, const int8_t *x, const float *x_scale,
                     size_t width) {
    float acc = 0.0f;
    for (size_t group = 0; group < n_groups; group++) {
        int32_t d = 0; /* exact, as a float too: 64 * 127 * 127 < 2^24 */
        for (size_t k4 = 0; k4 < PE_GROUP / 4; k4++)
            for (size_t k = 0; k < 4; k++) d += w[(group * 16 + k4) * 64 + k] * x[(group * 16 + k4) * 4 * width + k];
        acc = fmaf((float)d * x_scale[group * width], pe_half_to_float(w_scale[group * PE_PANEL]), acc);
    }
    return acc;
}

static void matmul(float *out, size_t out_stride, const pe_matrix *w, size_t panel_begin, size_t panel_end,
                   const pe_activations *x, size_t token_begin, size_t token_end, const float *bias, bool add) {
    for (size_t token = token_begin; token < token_end; token++) {
        size_t block = token / PE_TOKEN_BLOCK * PE_TOKEN_BLOCK;
        size_t width = pe_block_width(x->n_tokens - block);
        const int8_t *x_codes = x->codes + block * x->n + (token - block) * 4;
        const float *x_scales = x->scales + block * (x->n / PE_GROUP) + (token - block);
        for (size_t panel = panel_begin; panel < panel_end; panel++) {
            const int8_t *codes = w->codes + panel * w->n_groups * PE_GROUP * PE_PANEL;
            const uint16_t *scales = w->scales + panel * w->n_groups * PE_PANEL;
            for (size_t row = 0; row < PE_PANEL; row++) {
                float *y = &out[(token - token_begin) * out_stride + (panel - panel_begin) * PE_PANEL + row];
                float product = dot_row(codes + row * 4, scales + row, w->n_groups, x_codes, x_scales, width);
                if (bias != NULL) product = product + bias[panel * PE_PANEL + row];
                *y = add ? product + *y : product;
            }
        }
    }
}

/* ------------------------------------------------------------------ norm, RoPE, SwiGLU and its like (section 7) */

static float rmsnorm(float *y, const float *x, const float *w, size_t n, float eps) {
    float sum, inv_rms = inverse_rms(&sum, x, n, eps);
    for (size_t i = 0; i < n; i++) y[i] = (x[i] * inv_rms) * w[i];
    return sum;
}

static void rope(float *x, const float *cos, const float *sin, size_t head_dim) {
    size_t half = head_dim / 2;
    for (size_t i = 0; i < half; i++) {
        float x0 = x[i], x1 = x[i + half];
        x[i] = fmaf(x0, cos[i], -(x1 * sin[i]));
        x[i + half] = fmaf(x1, cos[i], x0 * sin[i]);
    }
}

static void swiglu(float *h, const float *gate_up, size_t n_pairs) {
    for (size_t pair = 0; pair < n_pairs; pair++)
        for (size_t row = 0; row < PE_PANEL; row++) {
            float gate = gate_up[pair * 2 * PE_PANEL + row], up = gate_up[(pair * 2 + 1) * PE_PANEL + row];
            h[pair * PE_PANEL + row] = (gate * (1.0f / (1.0f + pe_expf(-gate)))) * up;
        }
}

static void swiglu_clamped(float *h, const float *gate_up, size_t n_pairs) {
    for (size_t pair = 0; pair < n_pairs; pair++)
        for (size_t row = 0; row < PE_PANEL; row++) {
            float gate = gate_up[pair * 2 * PE_PANEL + row], up = gate_up[(pair * 2 + 1) * PE_PANEL + row];
            gate = PE_CLAMP < gate ? PE_CLAMP : gate; /* a NaN stays one */
            up = PE_CLAMP < up ? PE_CLAMP : up;
            up = -PE_CLAMP > up ? -PE_CLAMP : up;
            float sigmoid = 1.0f / (1.0f + pe_expf(-(gate * PE_CLAMPED_SLOPE)));
            h[pair * PE_PANEL + row] = (gate * sigmoid) * (up + 1.0f);
        }
}

static void geglu_tanh(float *h, const float *gate_up, size_t n_pairs) {
    for (size_t pair = 0; pair < n_pairs; pair++)
        for (size_t row = 0; row < PE_PANEL; row++) {
            float gate = gate_up[pair * 2 * PE_PANEL + row], up = gate_up[(pair * 2 + 1) * PE_PANEL + row];
            float z = gate * fmaf(gate * gate, PE_GELU_C3, PE_GELU_C1);
            h[pair * PE_PANEL + row] = (gate * (1.0f / (1.0f + pe_expf(-z)))) * up;
        }
}

static void gelu_tanh(float *x, size_t n, const float *curve) {
    (void)curve;
    for (size_t i = 0; i < n; i++) {
        float z = x[i] * fmaf(x[i] * x[i], PE_GELU_C3, PE_GELU_C1);
        x[i] = x[i] * (1.0f / (1.0f + pe_expf(-z)));
    }
}

/* The comparisons below are written so that a NaN stays one. */
static void gelu(float *x, size_t n, const float *curve) {
    (void)curve;
    for (size_t i = 0; i < n; i++) {
        float z = -x[i] > x[i] ? -x[i] : x[i], positive = 0.0f > x[i] ? 0.0f : x[i];
        float t = 1.0f / fmaf(z, PE_GELU_T, 1.0f);
        float q = PE_GELU_Q5;
        q = fmaf(q, t, PE_GELU_Q4);
        q = fmaf(q, t, PE_GELU_Q3);
        q = fmaf(q, t, PE_GELU_Q2);
        q = fmaf(q, t, PE_GELU_Q1);
        q = fmaf(q, t, PE_GELU_Q0);
        float tail = (q * t) * pe_expf((z * z) * -0.5f);
        x[i] = fmaf(-z, tail, positive);
    }
}

static void relu2(float *x, size_t n, const float *curve) {
    (void)curve;
    for (size_t i = 0; i < n; i++) {
        float positive = 0.0f > x[i] ? 0.0f : x[i];
        x[i] = positive * positive;
    }
}

static void xielu(float *x, size_t n, const float *curve) {
    for (size_t i = 0; i < n; i++) {
        float positive = 0.0f > x[i] ? 0.0f : x[i], negative = 0.0f < x[i] ? 0.0f : x[i];
        float below = fmaf(curve[1], (pe_expf(negative) - 1.0f) - negative, x[i] * curve[2]);
        x[i] = fmaf(curve[0], positive * positive, below);
    }
}

static void softcap(float *x, size_t n, float cap) {
    float twice = 2.0f / cap;
    for (size_t i = 0; i < n; i++) {
        float e = pe_expf(x[i] * twice);
        x[i] = cap * ((e - 1.0f) / (e + 1.0f));
    }
}

static void dots_f32(float *out, const float *x, const float *w, size_t n_rows, size_t n) {
    for (size_t r = 0; r < n_rows; r++, w += n) {
        float a[PE_PANEL] = {0};
        for (size_t i = 0; i < (n + PE_PANEL - 1) / PE_PANEL * PE_PANEL; i++)
            a[i % PE_PANEL] = i < n ? fmaf(x[i], w[i], a[i % PE_PANEL]) : fmaf(0.0f, 0.0f, a[i % PE_PANEL]);
        out[r] = pe_sum_lanes(a);
    }
}

static void add_low_rank(float *y, size_t step, const float *t, const float *b, size_t rank, size_t n) {
    for (size_t i = 0; i < n; i++) {
        size_t panel = i / PE_PANEL, lane = i % PE_PANEL;
        float d = 0.0f;
        for (size_t k = 0; k < rank; k++) d = fmaf(t[k], b[(panel * rank + k) * PE_PANEL + lane], d);
        y[panel * step + lane] = d + y[panel * step + lane];
    }
}

static void add_scaled(float *y, const float *x, float a, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = fmaf(a, x[i], y[i]);
}

static void add(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = x[i] + y[i];
}

/* ------------------------------------------------------------------ attention (section 8) */

static void attention_scores(float *scores, const int8_t *q, const float *q_scales, const int32_t *q_corrections,
                             size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv, size_t n_positions, float c) {
    (void)q_corrections;
    for (size_t r = 0; r < n_rows; r++)
        for (size_t j = 0; j < n_positions; j++) {
            const int8_t *k = kv->k + j / PE_PANEL * head_dim_p * PE_PANEL + j % PE_PANEL * 4;
            int32_t d = 0; /* exact, as a float too: 512 * 127 * 127 < 2^24 */
            for (size_t i = 0; i < head_dim_p; i++) d += q[r * head_dim_p + i] * k[i / 4 * 4 * PE_PANEL + i % 4];
            scores[r * PE_CHUNK + j] = (float)d * (c * q_scales[r]) * kv->k_scales[j];
        }
}

static void attention_scores_f32(float *scores, const float *q, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                                 size_t n_positions, float c) {
    for (size_t r = 0; r < n_rows; r++)
        for (size_t j = 0; j < n_positions; j++) {
            float acc = 0.0f;
            for (size_t i = 0; i < head_dim_p; i++)
                acc = fmaf(q[r * head_dim_p + i], kv->k_f32[(j / PE_PANEL * head_dim_p + i) * PE_PANEL + j % PE_PANEL],
                           acc);
            scores[r * PE_CHUNK + j] = c * acc;
        }
}

static void attention_key_bias(float *scores, const float *rotated, size_t n_rows, const uint32_t *pairs, size_t n_pairs,
                               const float *angles, size_t n_half, size_t n_positions) {
    for (size_t r = 0; r < n_rows; r++) {
        const float *u = rotated + r * 2 * n_pairs, *w = u + n_pairs;
        for (size_t j = 0; j < n_positions; j++) {
            float score = scores[r * PE_CHUNK + j];
            for (size_t p = 0; p < n_pairs; p++) {
                const float *cos = angles + (j / PE_PANEL * n_half + pairs[p]) * 2 * PE_PANEL + j % PE_PANEL;
                score = fmaf(u[p], cos[0], score);
                score = fmaf(w[p], cos[PE_PANEL], score);
            }
            scores[r * PE_CHUNK + j] = score;
        }
    }
}

static void attention_weights(float *m, float *l, float *scores, const pe_visible *runs, size_t n_runs, size_t n_rep, pe_visible all,
                              const float *v_scales) {
    for (size_t r = 0; r < n_runs * n_rep; r++, scores += PE_CHUNK) {
        pe_visible seen = runs[r / n_rep];
        float a[PE_PANEL] = {0};
        m[r] = seen.begin < seen.end ? scores[seen.begin] : 0.0f;
        for (size_t j = seen.begin; j < seen.end; j++) m[r] = scores[j] > m[r] ? scores[j] : m[r];
        for (size_t j = pe_group_begin(all.begin); j < pe_group_end(all.end); j++) {
            bool visible = j >= seen.begin && j < seen.end;
            float p = visible ? pe_expf(scores[j] - m[r]) : 0.0f;
            a[j % PE_PANEL] += p;
            scores[j] = visible && v_scales != NULL ? p * v_scales[j] : p;
        }
        l[r] = pe_sum_lanes(a);
    }
}

/* One group of weights: codes 0..127. Returns their scale. */
static float quantize_weights(int8_t codes[PE_PROBABILITY_GROUP], const float weights[PE_PROBABILITY_GROUP]) {
    float most = 0.0f;
    for (size_t j = 0; j < PE_PROBABILITY_GROUP; j++) most = weights[j] > most ? weights[j] : most;
    int zero = most < smallest_absmax;
    float inv = zero ? 0.0f : 127.0f / most;
    for (size_t j = 0; j < PE_PROBABILITY_GROUP; j++) codes[j] = (int8_t)lrintf(weights[j] * inv);
    return zero ? 0.0f : most / 127.0f;
}

static void attention_values(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                             size_t begin, size_t end) {
    for (size_t r = 0; r < n_rows; r++) {
        float weights[PE_CHUNK] = {0};
        for (size_t j = begin; j < end; j++) weights[j] = w[r * PE_CHUNK + j];
        for (size_t d = 0; d < head_dim_p; d++) out[r * head_dim_p + d] = 0.0f;
        for (size_t first = 0; first < PE_CHUNK; first += PE_PROBABILITY_GROUP) {
            int8_t codes[PE_PROBABILITY_GROUP];
            float scale = quantize_weights(codes, weights + first);
            for (size_t i = 0; i < head_dim_p; i++) {
                int32_t d = 0; /* exact, as a float too: 32 * 127 * 127 < 2^24 */
                for (size_t j = 0; j < PE_PROBABILITY_GROUP; j++)
                    d += codes[j] * kv->v[((first + j) / 4 * head_dim_p + i) * 4 + j % 4];
                out[r * head_dim_p + i] = fmaf((float)d, scale, out[r * head_dim_p + i]);
            }
        }
    }
}

static void attention_values_f32(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                                 size_t begin, size_t end) {
    for (size_t r = 0; r < n_rows; r++)
        for (size_t d = 0; d < head_dim_p; d++) {
            float o = 0.0f;
            for (size_t j = begin; j < end; j++) o = fmaf(w[r * PE_CHUNK + j], kv->v_f32[j * head_dim_p + d], o);
            out[r * head_dim_p + d] = o;
        }
}

static void attention_merge(const pe_attention_state *total, const pe_attention_state *chunk, size_t n_rows, size_t head_dim_p) {
    for (size_t r = 0; r < n_rows; r++) {
        float *m = &total->m[r], *l = &total->l[r], *o = total->o + r * head_dim_p, m_chunk = chunk->m[r];
        const float *o_chunk = chunk->o + r * head_dim_p;
        if (chunk->l[r] == 0.0f) continue;
        if (*l == 0.0f) {
            *m = m_chunk, *l = chunk->l[r];
            memcpy(o, o_chunk, head_dim_p * sizeof *o);
            continue;
        }
        float most = m_chunk > *m ? m_chunk : *m;
        float a = pe_expf(*m - most), b = pe_expf(m_chunk - most);
        *m = most;
        *l = fmaf(chunk->l[r], b, *l * a);
        for (size_t i = 0; i < head_dim_p; i++) o[i] = fmaf(o_chunk[i], b, o[i] * a);
    }
}

static void scale(float *y, const float *x, float s, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = x[i] * s;
}

static int codes_are_legal(const int8_t *codes, size_t n) {
    int illegal = 0;
    for (size_t i = 0; i < n; i++) illegal |= codes[i] == -128;
    return !illegal;
}

static bool maximum(const float *logits, size_t n, float *most) {
    *most = logits[0];
    for (size_t i = 1; i < n; i++) *most = logits[i] > *most ? logits[i] : *most;
    return absmax_bits(logits, n) < PE_NOT_FINITE_BITS;
}

const struct pe_kernels pe_kernels_scalar = {
    .name = "scalar",
    .required = 0,
    .tiled_from = SIZE_MAX,
    .quantize = quantize,
    .quantize_heads = quantize_heads,
    .hadamard = hadamard,
    .matmul = matmul,
    .rmsnorm = rmsnorm,
    .rope = rope,
    .swiglu = swiglu,
    .swiglu_clamped = swiglu_clamped,
    .geglu_tanh = geglu_tanh,
    .gelu_tanh = gelu_tanh,
    .gelu = gelu,
    .relu2 = relu2,
    .xielu = xielu,
    .softcap = softcap,
    .dots_f32 = dots_f32,
    .add_low_rank = add_low_rank,
    .add_scaled = add_scaled,
    .add = add,
    .attention_scores = attention_scores,
    .attention_scores_f32 = attention_scores_f32,
    .attention_key_bias = attention_key_bias,
    .attention_weights = attention_weights,
    .attention_values = attention_values,
    .attention_values_f32 = attention_values_f32,
    .attention_merge = attention_merge,
    .scale = scale,
    .codes_are_legal = codes_are_legal,
    .maximum = maximum,
    .weigh = logits_weigh,
    .sum_of_exps = logits_sum_of_exps,
};

/* kernels_neon_i8mm.c: sixteen lanes in four q registers, and int8 products of many rows by smmla. Armv8.2-A with the
 * dot product and the int8 matrix extension.
 *
 * smmla multiplies a matrix of 2 x 8 signed bytes by the transpose of another and adds the 2 x 2 products to four int32
 * lanes: 32 multiplications where sdot has 16. Its operand is eight inputs of one row, then eight of the next. In memory
 * the fours of a panel's sixteen rows lie side by side, as those of a block's tokens do, so two vectors, eight inputs of
 * four rows, are zipped into the operands of two pairs of rows. Done anew for every product that would cost half of what
 * smmla saves: both sides are zipped once into the stack, in eights of rows, and multiplied from there, weights with up
 * to 64 tokens, tokens with up to 64 rows of weights.
 *
 * Fewer than five tokens go to the loops of lanes16.h and their sdot: zipping would cost what smmla brings. */
#include "lanes16_neon.h"
#include "pyengine.h"

/* As in kernels_neon_dotprod.c. */
enum { TILE_PANELS = 1, TILE_TOKENS = 4, DOT_UNROLL = 16, FETCH_FOR_ONE = 0 };
enum { SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_COLUMNS = 1, VALUE_UNROLL = 8 };

#include "lanes16.h"

/* ------------------------------------------------------------------ eights */

enum {
    EIGHT = 8, /* rows (weights, positions, columns of V) or tokens (tokens, queries) that are zipped together */
    PAIRS = EIGHT / 2,
    OPERAND = 16, /* bytes: eight inputs of two rows */
    INPUTS = 8,   /* of each row in an operand */
    EIGHT_BYTES = PAIRS * OPERAND
};

/* Sums of eight tokens times eight rows: [u][p] is tokens t = 2 u and t + 1 times rows r = 2 p and r + 1, in lanes (t, r),
 * (t, r + 1), (t + 1, r), (t + 1, r + 1). */
typedef int32x4_t pair_sums[PAIRS][PAIRS];

/* Eight rows whose fours of inputs lie side by side, `step` bytes from one k4 to the next -> operands (n_steps, 4, 2, 8),
 * a step being eight inputs. */
LANES void zip_eight(int8_t *operands, const int8_t *codes, size_t step, size_t n_steps) {
    for (size_t k8 = 0; k8 < n_steps; k8++, codes += 2 * step, operands += EIGHT_BYTES)
        PE_UNROLL for (int half = 0; half < 2; half++) {
            int32x4_t first = vreinterpretq_s32_s8(vld1q_s8(codes + half * 16));
            int32x4_t second = vreinterpretq_s32_s8(vld1q_s8(codes + step + half * 16));
            vst1q_s8(operands + (2 * half) * OPERAND, vreinterpretq_s8_s32(vzip1q_s32(first, second)));
            vst1q_s8(operands + (2 * half + 1) * OPERAND, vreinterpretq_s8_s32(vzip2q_s32(first, second)));
        }
}

/* The first n_rows of eight, which lie one after the other, `stride` bytes apart -> operands (n_steps, 4, 2, 8); what
 * fills the eight up is zero. */
LANES void zip_rows(int8_t *operands, const int8_t *rows, size_t stride, size_t n_rows, size_t n_steps) {
    if (n_rows < EIGHT) memset(operands, 0, n_steps * EIGHT_BYTES);
    for (size_t r = 0; r < n_rows; r++)
        for (size_t k8 = 0; k8 < n_steps; k8++)
            memcpy(operands + k8 * EIGHT_BYTES + r * INPUTS, rows + r * stride + k8 * INPUTS, INPUTS);
}

/* Scales of eight where the sums have them: of tokens (s0, s0, s1, s1) for each pair, of rows (s0, s1, s0, s1). */
typedef float pair_scales[PAIRS][4];

LANES void spread_over_tokens(pair_scales out, const float *scales) {
    PE_UNROLL for (int half = 0; half < 2; half++) {
        float32x4_t four = vld1q_f32(scales + half * 4);
        vst1q_f32(out[2 * half], vzip1q_f32(four, four));
        vst1q_f32(out[2 * half + 1], vzip2q_f32(four, four));
    }
}

/* Of sixteen rows. */
LANES void spread_over_rows(pair_scales out[2], v16 scales) {
    PE_UNROLL for (int p = 0; p < 2 * PAIRS; p++) {
        float32x4_t four = scales.val[p / 2];
        float32x2_t two = p % 2 ? vget_high_f32(four) : vget_low_f32(four);
        vst1q_f32(out[p / PAIRS][p % PAIRS], vcombine_f32(two, two));
    }
}

/* sums = tokens times rows, both zipped, over n_steps. Not unrolled: one step keeps two dozen registers busy, and of
 * several GCC makes chains, one sum after the other, and spills. */
LANES void multiply_eights(pair_sums sums, const int8_t *tokens, const int8_t *rows, size_t n_steps) {
    PE_UNROLL for (int u = 0; u < PAIRS; u++) PE_UNROLL for (int p = 0; p < PAIRS; p++) sums[u][p] = vdupq_n_s32(0);
    _Pragma("GCC unroll 1") for (size_t k8 = 0; k8 < n_steps; k8++, tokens += EIGHT_BYTES, rows += EIGHT_BYTES) {
        int8x16_t t[PAIRS], r[PAIRS];
        PE_UNROLL for (int p = 0; p < PAIRS; p++)
            t[p] = vld1q_s8(tokens + p * OPERAND), r[p] = vld1q_s8(rows + p * OPERAND);
        PE_UNROLL for (int u = 0; u < PAIRS; u++)
            PE_UNROLL for (int p = 0; p < PAIRS; p++) sums[u][p] = vmmlaq_s32(sums[u][p], t[u], r[p]);
    }
}

/* How many of n rows or tokens are worked on in eights, the last one perhaps not full; at most four are left. */
static inline size_t in_eights(size_t n) { return n % EIGHT > PAIRS ? n : n - n % EIGHT; }

/* ------------------------------------------------------------------ matrix product */

enum {
    STRIP_PANELS = 4, /* weights that are zipped together, and the tokens that they are multiplied with: */
    STRIP_BLOCKS = 8  /* blocks of PE_TOKEN_BLOCK. 16 KiB of float sums */
};
_Static_assert((int)PE_TOKEN_BLOCK == (int)EIGHT && (int)PE_PANEL == 2 * (int)EIGHT,
               "a block of tokens is an eight, a panel is two");

/* One group of a block of tokens. */
typedef struct token_group {
    int8_t operands[PE_GROUP / INPUTS][EIGHT_BYTES];
    pair_scales scales;
} token_group;

/* One group of a panel, as two eights of rows. */
typedef struct panel_group {
    int8_t operands[2][PE_GROUP / INPUTS][EIGHT_BYTES];
    pair_scales scales[2];
} panel_group;

/* acc, in the order of pair_sums, takes up one group. */
LANES void add_group(float acc[PAIRS][PAIRS][4], const token_group *tokens, const int8_t *rows,
                     const pair_scales scales) {
    pair_sums d;
    multiply_eights(d, tokens->operands[0], rows, PE_GROUP / INPUTS);
    PE_UNROLL for (int u = 0; u < PAIRS; u++)
        PE_UNROLL for (int p = 0; p < PAIRS; p++) {
            float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(d[u][p]), vld1q_f32(tokens->scales[u]));
            vst1q_f32(acc[u][p], vfmaq_f32(vld1q_f32(acc[u][p]), scaled, vld1q_f32(scales[p])));
        }
}

/* The sixteen outputs of token t of a block, from those of both eights of a panel. */
LANES v16 outputs_of(float acc[2][PAIRS][PAIRS][4], size_t t) {
    size_t lane = t % 2 * 2;
    EACH(v16, vcombine_f32(vld1_f32(acc[q / 2][t / 2][q % 2 * 2] + lane), vld1_f32(acc[q / 2][t / 2][q % 2 * 2 + 1] + lane)));
}

/* n_p panels from `panel`, at most STRIP_PANELS, times tokens [first, first + n_tokens), at most STRIP_BLOCKS blocks, each
 * eight wide. out points at (first, 16 panel). */
static void matmul_strip(float *out, size_t out_stride, const pe_matrix *w, size_t panel, size_t n_p,
                         const pe_activations *x, size_t first, size_t n_tokens, fetch_ahead ahead, epilogue then) {
    float acc[STRIP_PANELS][STRIP_BLOCKS][2][PAIRS][PAIRS][4];
    size_t n_groups = w->n_groups, n_blocks = (n_tokens + EIGHT - 1) / EIGHT;
    for (size_t p = 0; p < n_p; p++) memset(acc[p], 0, n_blocks * sizeof acc[p][0]);
    for (size_t g = 0; g < n_groups; g++) {
        panel_group rows[STRIP_PANELS];
        fetch_codes(&ahead);
        fetch_scales(&ahead);
        for (size_t p = 0; p < n_p; p++) {
            size_t group = (panel + p) * n_groups + g;
            const int8_t *codes = w->codes + group * PE_GROUP * PE_PANEL;
            for (size_t half = 0; half < 2; half++)
                zip_eight(rows[p].operands[half][0], codes + half * EIGHT * 4, PE_PANEL * 4, PE_GROUP / INPUTS);
            spread_over_rows(rows[p].scales, v16_from_half(w->scales + group * PE_PANEL));
        }
        for (size_t b = 0; b < n_blocks; b++) {
            token_group tokens;
            size_t block = first + b * EIGHT;
            zip_eight(tokens.operands[0], x->codes + block * x->n + g * PE_GROUP * EIGHT, EIGHT * 4, PE_GROUP / INPUTS);
            spread_over_tokens(tokens.scales, x->scales + block * n_groups + g * EIGHT);
            for (size_t p = 0; p < n_p; p++)
                for (int half = 0; half < 2; half++)
                    add_group(acc[p][b][half], &tokens, rows[p].operands[half][0], rows[p].scales[half]);
        }
    }
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t p = 0; p < n_p; p++) {
            float *to = out + t * out_stride + p * PE_PANEL;
            v16 y = outputs_of(acc[p][t / EIGHT], t % EIGHT);
            if (then.bias != NULL) y = v16_add(v16_load(then.bias + (panel + p) * PE_PANEL), y);
            if (then.add) y = v16_add(y, v16_load(to));
            v16_store(to, y);
        }
}

static void matmul_by_eights(float *out, size_t out_stride, const pe_matrix *w, size_t panel_begin, size_t panel_end,
                             const pe_activations *x, size_t token_begin, size_t token_end, const float *bias,
                             bool add) {
    size_t n_in_eights = in_eights(x->n_tokens);
    size_t end = token_end < n_in_eights ? token_end : n_in_eights, rest = token_begin > end ? token_begin : end;
    epilogue then = {bias, add};
    for (size_t panel = panel_begin; panel < panel_end; panel += STRIP_PANELS) {
        size_t n_p = panel_end - panel < STRIP_PANELS ? panel_end - panel : STRIP_PANELS;
        float *columns = out + (panel - panel_begin) * PE_PANEL;
        /* The first strip of tokens fetches the next panels, see matmul in lanes16.h. */
        fetch_ahead ahead = fetch_from(w, panel + n_p, n_p * PE_PANEL);
        for (size_t first = token_begin; first < end; first += STRIP_BLOCKS * EIGHT, ahead.n_lines = 0) {
            size_t n_tokens = end - first < STRIP_BLOCKS * EIGHT ? end - first : STRIP_BLOCKS * EIGHT;
            matmul_strip(columns + (first - token_begin) * out_stride, out_stride, w, panel, n_p, x, first, n_tokens,
                         ahead, then);
        }
        if (rest < token_end)
            matmul(columns + (rest - token_begin) * out_stride, out_stride, w, panel, panel + n_p, x, rest, token_end,
                   bias, add);
    }
}

/* ------------------------------------------------------------------ attention */

enum {
    STRIP_QUERIES = 4, /* eights of queries for which K and V are zipped once: as many as attention.c has in a block */
    MAX_HEAD_STEPS = PE_MAX_HEAD_DIM / INPUTS,
    CHUNK_STEPS = PE_CHUNK / INPUTS,
    GROUP_STEPS = PE_PROBABILITY_GROUP / INPUTS
};

/* Rows [0, n_rows) of eight, in the order of pair_sums, to out: eight columns each, rows `stride` floats apart. */
LANES void store_eight(float *out, size_t stride, float32x4_t x[PAIRS][PAIRS], size_t n_rows) {
    PE_UNROLL for (int t = 0; t < EIGHT; t++) {
        if ((size_t)t >= n_rows) return;
        PE_UNROLL for (int p = 0; p < PAIRS; p += 2) {
            float32x4_t a = x[t / 2][p], b = x[t / 2][p + 1];
            vst1q_f32(out + (size_t)t * stride + p * 2,
                      t % 2 ? vcombine_f32(vget_high_f32(a), vget_high_f32(b))
                            : vcombine_f32(vget_low_f32(a), vget_low_f32(b)));
        }
    }
}

/* At most STRIP_QUERIES eights of queries; all else as attention_scores has it. */
static void scores_strip(float *scores, const int8_t *q, const float *q_scales, size_t n_rows, size_t head_dim_p,
                         const pe_kv_chunk *kv, size_t n_positions, float c) {
    int8_t queries[STRIP_QUERIES][MAX_HEAD_STEPS * EIGHT_BYTES], keys[2][MAX_HEAD_STEPS * EIGHT_BYTES];
    pair_scales query_scales[STRIP_QUERIES], key_scales[2];
    size_t n_steps = head_dim_p / INPUTS;
    for (size_t r = 0; r < n_rows; r += EIGHT) {
        size_t n_r = n_rows - r < EIGHT ? n_rows - r : EIGHT;
        float scaled[EIGHT] = {0};
        for (size_t i = 0; i < n_r; i++) scaled[i] = c * q_scales[r + i];
        spread_over_tokens(query_scales[r / EIGHT], scaled);
        zip_rows(queries[r / EIGHT], q + r * head_dim_p, head_dim_p, n_r, n_steps);
    }
    for (size_t j = 0; j < n_positions; j += PE_PANEL) {
        for (size_t half = 0; half < 2; half++)
            zip_eight(keys[half], kv->k + j * head_dim_p + half * EIGHT * 4, PE_PANEL * 4, n_steps);
        spread_over_rows(key_scales, v16_load(kv->k_scales + j));
        for (size_t r = 0; r < n_rows; r += EIGHT)
            for (size_t half = 0; half < 2; half++) {
                pair_sums d;
                float32x4_t score[PAIRS][PAIRS];
                multiply_eights(d, queries[r / EIGHT], keys[half], n_steps);
                PE_UNROLL for (int u = 0; u < PAIRS; u++) {
                    float32x4_t scale = vld1q_f32(query_scales[r / EIGHT][u]);
                    PE_UNROLL for (int p = 0; p < PAIRS; p++)
                        score[u][p] = vmulq_f32(vmulq_f32(vcvtq_f32_s32(d[u][p]), scale), vld1q_f32(key_scales[half][p]));
                }
                store_eight(scores + r * PE_CHUNK + j + half * EIGHT, PE_CHUNK, score, n_rows - r);
            }
    }
}

static void scores_by_eights(float *scores, const int8_t *q, const float *q_scales, const int32_t *q_corrections,
                             size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv, size_t n_positions, float c) {
    size_t n = in_eights(n_rows);
    for (size_t r = 0; r < n; r += STRIP_QUERIES * EIGHT) {
        size_t n_r = n - r < STRIP_QUERIES * EIGHT ? n - r : STRIP_QUERIES * EIGHT;
        scores_strip(scores + r * PE_CHUNK, q + r * head_dim_p, q_scales + r, n_r, head_dim_p, kv, n_positions, c);
    }
    attention_scores(scores + n * PE_CHUNK, q + n * head_dim_p, q_scales + n, q_corrections + n, n_rows - n, head_dim_p,
                     kv, n_positions, c);
}

/* Eight rows of a chunk's weights, quantized (FORMAT.md section 8) and zipped; the scales of their groups. */
typedef struct probability_eight {
    int8_t operands[CHUNK_STEPS * EIGHT_BYTES];
    pair_scales scales[PE_CHUNK / PE_PROBABILITY_GROUP];
} probability_eight;

_Static_assert((int)PROBABILITY_ROWS >= (int)EIGHT, "they are quantized at once");

/* From n_rows rows of w, at most eight, over the groups of [begin, end); all else becomes 0. */
static void quantize_eight(probability_eight *eight, const float *w, size_t n_rows, size_t begin, size_t end) {
    enum { N_GROUPS = PE_CHUNK / PE_PROBABILITY_GROUP };
    int8_t codes[EIGHT][PE_CHUNK] = {{0}};
    float scales[N_GROUPS][EIGHT] = {{0}};
    probability_block block;
    quantize_probabilities(&block, w, n_rows, begin, end);
    size_t first = block.first, n_groups = block.n_groups;
    for (size_t r = 0; r < n_rows; r++) {
        memcpy(codes[r] + first, block.codes[r], n_groups * PE_PROBABILITY_GROUP);
        for (size_t g = 0; g < n_groups; g++) scales[first / PE_PROBABILITY_GROUP + g][r] = block.scales[r * block.n_fours * 4 + g];
    }
    zip_rows(eight->operands, codes[0], PE_CHUNK, EIGHT, CHUNK_STEPS);
    for (size_t g = 0; g < N_GROUPS; g++) spread_over_tokens(eight->scales[g], scales[g]);
}

/* out (n_rows of eight, eight columns; rows `stride` floats apart) = probabilities times eight columns of V, zipped from
 * the first group of [begin, end) on. */
LANES void values_eight(float *out, size_t stride, size_t n_rows, const probability_eight *p, const int8_t *columns,
                        size_t begin, size_t end) {
    float32x4_t o[PAIRS][PAIRS];
    PE_UNROLL for (int u = 0; u < PAIRS; u++) PE_UNROLL for (int i = 0; i < PAIRS; i++) o[u][i] = vdupq_n_f32(0.0f);
    for (size_t j = pe_group_begin(begin); j < end; j += PE_PROBABILITY_GROUP, columns += GROUP_STEPS * EIGHT_BYTES) {
        pair_sums d;
        multiply_eights(d, p->operands + j / INPUTS * EIGHT_BYTES, columns, GROUP_STEPS);
        PE_UNROLL for (int u = 0; u < PAIRS; u++) {
            float32x4_t scale = vld1q_f32(p->scales[j / PE_PROBABILITY_GROUP][u]);
            PE_UNROLL for (int i = 0; i < PAIRS; i++) o[u][i] = vfmaq_f32(o[u][i], vcvtq_f32_s32(d[u][i]), scale);
        }
    }
    store_eight(out, stride, o, n_rows);
}

/* At most STRIP_QUERIES eights of rows; all else as attention_values has it. */
static void values_strip(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                         size_t begin, size_t end) {
    probability_eight probabilities[STRIP_QUERIES];
    int8_t columns[2][CHUNK_STEPS * EIGHT_BYTES];
    size_t first = pe_group_begin(begin), n_steps = (pe_group_end(end) - first) / INPUTS;
    for (size_t r = 0; r < n_rows; r += EIGHT)
        quantize_eight(&probabilities[r / EIGHT], w + r * PE_CHUNK, n_rows - r < EIGHT ? n_rows - r : EIGHT, begin, end);
    for (size_t d = 0; d < head_dim_p; d += PE_PANEL) {
        for (size_t half = 0; half < 2; half++)
            zip_eight(columns[half], kv->v + first * head_dim_p + (d + half * EIGHT) * 4, head_dim_p * 4, n_steps);
        for (size_t r = 0; r < n_rows; r += EIGHT)
            for (size_t half = 0; half < 2; half++)
                values_eight(out + r * head_dim_p + d + half * EIGHT, head_dim_p, n_rows - r, &probabilities[r / EIGHT],
                             columns[half], begin, end);
    }
}

static void values_by_eights(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                             size_t begin, size_t end) {
    size_t n = in_eights(n_rows);
    for (size_t r = 0; r < n; r += STRIP_QUERIES * EIGHT) {
        size_t n_r = n - r < STRIP_QUERIES * EIGHT ? n - r : STRIP_QUERIES * EIGHT;
        values_strip(out + r * head_dim_p, w + r * PE_CHUNK, n_r, head_dim_p, kv, begin, end);
    }
    attention_values(out + n * head_dim_p, w + n * PE_CHUNK, n_rows - n, head_dim_p, kv, begin, end);
}

const struct pe_kernels pe_kernels_neon_i8mm = PE_LANES16_TABLE_WITH(
    "neon_i8mm", PE_CPU_NEON_DOTPROD | PE_CPU_NEON_I8MM, SIZE_MAX, quantize, matmul_by_eights, scores_by_eights, values_by_eights);

/* kernels_neon_i8mm.c: sixteen lanes in four q registers, and int8 products of many rows by smmla. Armv8.2-A with the dot
 * product and the int8 matrix extension.
 *
 * smmla multiplies a matrix of 2 x 8 signed bytes by the transpose of another and adds the 2 x 2 products to four int32
 * lanes: 32 multiplications where sdot has 16. Its operand is eight inputs of one row, then eight of the next. In memory
 * the fours of a panel's sixteen rows lie side by side, as those of a block's tokens do, so two vectors, eight inputs of four rows, are
 * zipped into the operands of two pairs of rows. That would cost half of what smmla saves if it were done for every product: both
 * sides are zipped once into the stack, in eights, and multiplied from there, weights with up to 64 tokens, tokens with up
 * to 64 weight rows.
 *
 * Fewer than five rows or tokens go to the loops of lanes16.h and their sdot: nothing would come back of what zipping costs. */
#include "lanes16_neon.h"
#include "pyengine.h"

/* As in kernels_neon_dotprod.c. */
enum { TILE_PANELS = 1, TILE_TOKENS = 4, DOT_UNROLL = 16, SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_COLUMNS = 1, VALUE_UNROLL = 8 };

#include "lanes16.h"

/* ------------------------------------------------------------------ eights */

enum {
    EIGHT = 8, /* rows (weights, positions, columns of V) or tokens (tokens, queries) that are zipped together */
    PAIRS = EIGHT / 2,
    OPERAND = 16, /* bytes: eight inputs of two rows */
    INPUTS = 8,   /* of each row in an operand */
    EIGHT_BYTES = PAIRS * OPERAND
};

/* Sums of eight tokens times eight rows: [u][p] is tokens 2 u, 2 u + 1 times rows 2 p, 2 p + 1, in lanes (t, r), (t, r + 1),
 * (t + 1, r), (t + 1, r + 1). */
typedef int32x4_t pair_sums[PAIRS][PAIRS];

/* Eight rows whose fours of inputs lie side by side, `step` bytes from one k4 to the next -> operands (n_steps, 4, 2, 8). */
LANES void zip_eight(int8_t *operands, const int8_t *codes, size_t step, size_t n_steps) {
    for (size_t k8 = 0; k8 < n_steps; k8++, codes += 2 * step, operands += EIGHT_BYTES)
        PE_UNROLL for (int half = 0; half < 2; half++) {
            int32x4_t first = vreinterpretq_s32_s8(vld1q_s8(codes + half * 16));
            int32x4_t second = vreinterpretq_s32_s8(vld1q_s8(codes + step + half * 16));
            vst1q_s8(operands + (2 * half) * OPERAND, vreinterpretq_s8_s32(vzip1q_s32(first, second)));
            vst1q_s8(operands + (2 * half + 1) * OPERAND, vreinterpretq_s8_s32(vzip2q_s32(first, second)));
        }
}

/* sums += tokens times rows, both zipped, over n_steps eights of inputs. */
LANES void multiply_eights(pair_sums sums, const int8_t *tokens, const int8_t *rows, size_t n_steps) {
    for (size_t k8 = 0; k8 < n_steps; k8++, tokens += EIGHT_BYTES, rows += EIGHT_BYTES) {
        int8x16_t t[PAIRS], r[PAIRS];
        PE_UNROLL for (int p = 0; p < PAIRS; p++) t[p] = vld1q_s8(tokens + p * OPERAND), r[p] = vld1q_s8(rows + p * OPERAND);
        PE_UNROLL for (int u = 0; u < PAIRS; u++)
            PE_UNROLL for (int p = 0; p < PAIRS; p++) sums[u][p] = vmmlaq_s32(sums[u][p], t[u], r[p]);
    }
}

/* ------------------------------------------------------------------ matrix product */

enum {
    STRIP_PANELS = 4, /* weights that are zipped together, and the tokens that they are multiplied with: */
    STRIP_BLOCKS = 8  /* blocks of PE_TOKEN_BLOCK. 16 KiB of float sums */
};
_Static_assert((int)PE_TOKEN_BLOCK == (int)EIGHT && (int)PE_PANEL == 2 * (int)EIGHT, "a block of tokens is an eight, a panel is two");

/* One group of eight tokens or rows, zipped; the scale of each where the sums have it: of tokens as (s0, s0, s1, s1) for each pair, of
 * rows as (s0, s1, s0, s1). */
typedef struct eight {
    int8_t operands[PE_GROUP / INPUTS][PAIRS][OPERAND];
    float scales[PAIRS][4];
} eight;

/* One group of a panel, codes (16, 16, 4) and scales (16). */
LANES void zip_panel(eight rows[2], const int8_t *codes, const uint16_t *scales) {
    v16 scale = v16_from_half(scales);
    PE_UNROLL for (int half = 0; half < 2; half++) {
        zip_eight(rows[half].operands[0][0], codes + half * EIGHT * 4, PE_PANEL * 4, PE_GROUP / INPUTS);
        PE_UNROLL for (int p = 0; p < PAIRS; p++) {
            float32x4_t four = scale.val[half * 2 + p / 2];
            float32x2_t two = p % 2 ? vget_high_f32(four) : vget_low_f32(four);
            vst1q_f32(rows[half].scales[p], vcombine_f32(two, two));
        }
    }
}

/* One group of a block of eight tokens, codes (16, 8, 4) and scales (8). */
LANES void zip_tokens(eight *tokens, const int8_t *codes, const float *scales) {
    zip_eight(tokens->operands[0][0], codes, EIGHT * 4, PE_GROUP / INPUTS);
    PE_UNROLL for (int half = 0; half < 2; half++) {
        float32x4_t four = vld1q_f32(scales + half * 4);
        vst1q_f32(tokens->scales[2 * half], vzip1q_f32(four, four));
        vst1q_f32(tokens->scales[2 * half + 1], vzip2q_f32(four, four));
    }
}

/* acc, in the order of pair_sums, takes up one group. */
LANES void add_group(float acc[PAIRS][PAIRS][4], const eight *tokens, const eight *rows) {
    pair_sums d;
    PE_UNROLL for (int u = 0; u < PAIRS; u++) PE_UNROLL for (int p = 0; p < PAIRS; p++) d[u][p] = vdupq_n_s32(0);
    multiply_eights(d, tokens->operands[0][0], rows->operands[0][0], PE_GROUP / INPUTS);
    PE_UNROLL for (int u = 0; u < PAIRS; u++)
        PE_UNROLL for (int p = 0; p < PAIRS; p++) {
            float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(d[u][p]), vld1q_f32(tokens->scales[u]));
            vst1q_f32(acc[u][p], vfmaq_f32(vld1q_f32(acc[u][p]), scaled, vld1q_f32(rows->scales[p])));
        }
}

/* The sixteen outputs of token t of a block, from those of both eights of a panel. */
LANES v16 outputs_of(float acc[2][PAIRS][PAIRS][4], size_t t) {
    EACH(v16, vcombine_f32(vld1_f32(acc[q / 2][t / 2][q % 2 * 2] + t % 2 * 2), vld1_f32(acc[q / 2][t / 2][q % 2 * 2 + 1] + t % 2 * 2)));
}

/* n_p panels from `panel`, at most STRIP_PANELS, times tokens [first, first + n_tokens), at most STRIP_BLOCKS blocks, all of
 * eight tokens. out points at both. */
static void matmul_strip(float *out, size_t out_stride, const pe_matrix *w, size_t panel, size_t n_p, const pe_activations *x,
                         size_t first, size_t n_tokens, fetch_ahead ahead, epilogue then) {
    float acc[STRIP_PANELS][STRIP_BLOCKS][2][PAIRS][PAIRS][4];
    size_t n_groups = w->n_groups, n_blocks = (n_tokens + EIGHT - 1) / EIGHT;
    for (size_t p = 0; p < n_p; p++) memset(acc[p], 0, n_blocks * sizeof acc[p][0]);
    for (size_t g = 0; g < n_groups; g++) {
        eight rows[STRIP_PANELS][2];
        fetch(&ahead);
        for (size_t p = 0; p < n_p; p++) {
            size_t group = (panel + p) * n_groups + g;
            zip_panel(rows[p], w->codes + group * PE_GROUP * PE_PANEL, w->scales + group * PE_PANEL);
        }
        for (size_t b = 0; b < n_blocks; b++) {
            eight tokens;
            size_t block = first + b * EIGHT;
            zip_tokens(&tokens, x->codes + block * x->n + g * PE_GROUP * EIGHT, x->scales + block * n_groups + g * EIGHT);
            for (size_t p = 0; p < n_p; p++)
                for (int half = 0; half < 2; half++) add_group(acc[p][b][half], &tokens, &rows[p][half]);
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
                             const pe_activations *x, size_t token_begin, size_t token_end, const float *bias, bool add) {
    size_t n_last = x->n_tokens % EIGHT, n_in_eights = pe_block_width(n_last) == EIGHT ? x->n_tokens : x->n_tokens - n_last;
    size_t end = token_end < n_in_eights ? token_end : n_in_eights, rest = token_begin > end ? token_begin : end;
    epilogue then = {bias, add};
    for (size_t panel = panel_begin; panel < panel_end; panel += STRIP_PANELS) {
        size_t n_p = panel_end - panel < STRIP_PANELS ? panel_end - panel : STRIP_PANELS;
        float *columns = out + (panel - panel_begin) * PE_PANEL;
        /* The first strip of tokens fetches the next panels, see matmul in lanes16.h. */
        fetch_ahead ahead = {w->codes + (panel + n_p) * w->n_groups * PE_GROUP * PE_PANEL, n_p * PE_PANEL};
        for (size_t first = token_begin; first < end; first += STRIP_BLOCKS * EIGHT, ahead.n_lines = 0) {
            size_t n_tokens = end - first < STRIP_BLOCKS * EIGHT ? end - first : STRIP_BLOCKS * EIGHT;
            matmul_strip(columns + (first - token_begin) * out_stride, out_stride, w, panel, n_p, x, first, n_tokens, ahead, then);
        }
        if (rest < token_end)
            matmul(columns + (rest - token_begin) * out_stride, out_stride, w, panel, panel + n_p, x, rest, token_end, bias, add);
    }
}

const struct pe_kernels pe_kernels_neon_i8mm = PE_LANES16_TABLE_WITH(
    "neon_i8mm", PE_CPU_NEON_DOTPROD | PE_CPU_NEON_I8MM, matmul_by_eights, attention_scores, attention_values);

/* test_matmul_attention.c: the matrix product and the attention kernels of a table equal the scalar table's, bit for bit. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "harness.h"
#include "kernels/pe_math.h"

/* ------------------------------------------------------------------ matrix product */

enum { RANDOM, ALL_PLUS, ALL_MINUS, OPPOSITE, WILD_SCALES, ZERO_GROUPS, N_PATTERNS };

typedef struct product {
    block w_codes, w_scales, x_codes, x_scales, x_corrections;
    pe_matrix w;
    pe_activations x;
} product;

static int8_t pick_code(int pattern, int side, rng *r) {
    switch (pattern) {
    case ALL_PLUS: return 127;
    case ALL_MINUS: return -127;
    case OPPOSITE: return side ? 127 : -127;
    default: return rng_code(r);
    }
}

static float pick_scale(int pattern, rng *r) {
    if (pattern == ZERO_GROUPS && rng_below(r, 2)) return 0.0f;
    if (pattern == WILD_SCALES)
        return pe_float_from_bits((uint32_t)rng_below(r, 0x7f000000u)); /* subnormals to 1.7e38: sums overflow, too */
    return 0.001f + fabsf(rng_float(r));
}

/* The corrections that belong to the codes, in the packed order of kernels.h. */
static void fill_corrections(pe_activations *x) {
    for (size_t block = 0; block < x->n_tokens; block += PE_TOKEN_BLOCK) {
        size_t width = pe_block_width(x->n_tokens - block);
        for (size_t group = 0; group < x->n / 64; group++)
            for (size_t t = 0; t < width; t++) {
                int32_t sum = 0;
                for (size_t i = 0; i < 64; i++)
                    sum += x->codes[block * x->n + (group * 16 + i / 4) * 4 * width + t * 4 + i % 4];
                x->corrections[block * (x->n / 64) + group * width + t] = -128 * sum;
            }
    }
}

static product product_new(size_t n_panels, size_t n_groups, size_t n_tokens, int pattern, rng *r) {
    size_t n = n_groups * 64, n_scales = n_panels * n_groups * 16;
    size_t n_packed = n_packed_tokens(n_tokens);
    product p = {.w_codes = block_new(n_scales * 64, 0), .w_scales = block_new(n_scales * 2, 0),
                 .x_codes = block_new(n_packed * n, 0), .x_scales = block_new(n_packed * n / 64 * 4, 0),
                 .x_corrections = block_new(n_packed * n / 64 * 4, 0)};
    uint16_t *halves = (uint16_t *)(void *)p.w_scales.data;
    for (size_t i = 0; i < p.w_codes.n; i++) CODES(p.w_codes)[i] = pick_code(pattern, 0, r);
    for (size_t i = 0; i < p.x_codes.n; i++) CODES(p.x_codes)[i] = pick_code(pattern, 1, r);
    for (size_t i = 0; i < n_scales; i++) halves[i] = rng_half(r);
    for (size_t i = 0; i < n_packed * n / 64; i++) FLOATS(p.x_scales)[i] = pick_scale(pattern, r);
    p.w = (pe_matrix){CODES(p.w_codes), halves, n_panels, n_groups};
    p.x = (pe_activations){CODES(p.x_codes), FLOATS(p.x_scales), INTS(p.x_corrections), n, n_tokens, false};
    fill_corrections(&p.x);
    return p;
}

static void product_free(product *p) {
    block_free(&p->w_codes), block_free(&p->w_scales), block_free(&p->x_codes), block_free(&p->x_scales), block_free(&p->x_corrections);
}

static void compare_matmul(const struct pe_kernels *k, const product *p, size_t panel_begin, size_t panel_end, size_t token_begin,
                           size_t token_end, rng *r) {
    size_t n_rows = (panel_end - panel_begin) * 16, stride = n_rows + rng_below(r, 20), n_tokens = token_end - token_begin;
    size_t n = (n_tokens - 1) * stride + n_rows, misaligned = 4 * rng_below(r, 16);
    block a = block_new(n * 4, misaligned), b = block_new(n * 4, misaligned), codes = block_new(p->x_codes.n, 0);
    pe_activations x = p->x; /* in the table's order */
    x.codes = CODES(codes);
    for (size_t t = 0; t < n_packed_tokens(x.n_tokens); t++)
        for (size_t i = 0; i < x.n; i++) x.codes[code_offset(k, &x, t, i)] = p->x.codes[code_offset(&pe_kernels_scalar, &x, t, i)];
    float bias[16 * 9];
    for (size_t i = 0; i < p->w.n_panels * 16; i++) bias[i] = rng_float(r);
    bool biased = rng_below(r, 2), add = rng_below(r, 2);
    for (size_t i = 0; i < n; i++) FLOATS(a)[i] = FLOATS(b)[i] = rng_float(r);
    pe_kernels_scalar.matmul(FLOATS(a), stride, &p->w, panel_begin, panel_end, &p->x, token_begin, token_end, biased ? bias : NULL, add);
    k->matmul(FLOATS(b), stride, &p->w, panel_begin, panel_end, &x, token_begin, token_end, biased ? bias : NULL, add);
    CHECK(same_floats(FLOATS(a), FLOATS(b), n) && block_intact(&b), "%s: panels %zu-%zu of %zu, tokens %zu-%zu of %zu, %zu groups",
          k->name, panel_begin, panel_end, p->w.n_panels, token_begin, token_end, p->x.n_tokens, p->w.n_groups);
    block_free(&a), block_free(&b), block_free(&codes);
}

/* The whole product, and a part of its panels and tokens. */
static void compare_parts(const struct pe_kernels *k, size_t n_panels, size_t n_groups, size_t n_tokens, int pattern, rng *r) {
    product p = product_new(n_panels, n_groups, n_tokens, pattern, r);
    compare_matmul(k, &p, 0, n_panels, 0, n_tokens, r);
    p.x.fetch_for_one = true; /* another order of panels for a single token */
    compare_matmul(k, &p, 0, n_panels, 0, n_tokens, r);
    size_t panel = rng_below(r, n_panels), token = rng_below(r, n_tokens) / PE_TOKEN_BLOCK * PE_TOKEN_BLOCK;
    compare_matmul(k, &p, panel, panel + 1 + rng_below(r, n_panels - panel), token, token + 1 + rng_below(r, n_tokens - token), r);
    product_free(&p);
}

static void test_matmul(const struct pe_kernels *k) {
    rng r = {21};
    for (size_t n_tokens = 1; n_tokens <= 19; n_tokens++)
        for (size_t n_panels = 1; n_panels <= 5; n_panels++)
            compare_parts(k, n_panels, 1 + rng_below(&r, 4), n_tokens, (int)(n_tokens + n_panels) % N_PATTERNS, &r);
    for (size_t n_tokens = 20; n_tokens <= 148; n_tokens += 8) /* more than any table works on at a time, in tiles of any width */
        compare_parts(k, 1 + rng_below(&r, 9), 1 + rng_below(&r, 5), n_tokens - rng_below(&r, 8), RANDOM, &r);
    for (size_t n_groups = 11; n_groups <= 14; n_groups++) /* rows around the length from which weights are fetched in another order */
        for (size_t n_tokens = 1; n_tokens <= 9; n_tokens++) compare_parts(k, 1 + rng_below(&r, 5), n_groups, n_tokens, RANDOM, &r);
    for (int pattern = 0; pattern < N_PATTERNS; pattern++) { /* a long row: the order of many groups */
        product p = product_new(4, 40, 9, pattern, &r);
        compare_matmul(k, &p, 0, 4, 0, 9, &r);
        product_free(&p);
    }
}

/* All finite halves through the table's own conversion: one weight of 1, one input of 1, so that the result is the scale. */
static void test_every_weight_scale(const struct pe_kernels *k) {
    rng r = {22};
    product p = product_new(1, 1, 1, RANDOM, &r);
    memset(p.w_codes.data, 0, p.w_codes.n), memset(p.x_codes.data, 0, p.x_codes.n);
    for (size_t row = 0; row < 16; row++) CODES(p.w_codes)[row * 4] = 1;
    CODES(p.x_codes)[0] = 1;
    FLOATS(p.x_scales)[0] = 1.0f;
    fill_corrections(&p.x);
    for (uint32_t half = 0; half < 65536; half += 16) {
        if ((half & 0x7c00u) == 0x7c00u) continue;
        float out[16];
        for (uint32_t row = 0; row < 16; row++) ((uint16_t *)(void *)p.w_scales.data)[row] = (uint16_t)(half + row);
        k->matmul(out, 16, &p.w, 0, 1, &p.x, 0, 1, NULL, false);
        for (uint32_t row = 0; row < 16; row++) {
            float expected = pe_half_to_float((uint16_t)(half + row));
            CHECK(out[row] == expected, "%s: half %04x gives %a, expected %a", k->name, half + row, (double)out[row], (double)expected);
        }
    }
    product_free(&p);
}

/* The scalar product against exact integers: with all scales 1 a row is its int64 dot product (below 2^24, so exact in float32). */
static void test_matmul_law(void) {
    rng r = {23};
    product p = product_new(3, 2, 11, RANDOM, &r);
    for (size_t i = 0; i < 3 * 2 * 16; i++) ((uint16_t *)(void *)p.w_scales.data)[i] = 0x3c00; /* 1 */
    for (size_t i = 0; i < p.x_scales.n / 4; i++) FLOATS(p.x_scales)[i] = 1.0f;
    float out[11 * 48], sum[11 * 48], bias[48]; /* whole numbers, which add exactly */
    for (size_t i = 0; i < 48; i++) bias[i] = (float)i * 3.0f;
    for (size_t i = 0; i < 11 * 48; i++) sum[i] = -(float)i;
    pe_kernels_scalar.matmul(out, 48, &p.w, 0, 3, &p.x, 0, 11, NULL, false);
    pe_kernels_scalar.matmul(sum, 48, &p.w, 0, 3, &p.x, 0, 11, bias, true);
    for (size_t token = 0; token < 11; token++)
        for (size_t row = 0; row < 48; row++) {
            size_t width = token < 8 ? 8 : 4;
            int64_t expected = 0;
            for (size_t i = 0; i < 128; i++)
                expected += (int64_t)p.w.codes[(row / 16 * 2 + i / 64) * 1024 + i % 64 / 4 * 64 + row % 16 * 4 + i % 4] *
                            p.x.codes[token / 8 * 8 * 128 + i / 4 * 4 * width + token % 8 * 4 + i % 4];
            size_t at = token * 48 + row;
            CHECK((double)out[at] == (double)expected, "token %zu row %zu", token, row);
            CHECK((double)sum[at] == (double)expected + (double)bias[row] - (double)at, "token %zu row %zu, added", token, row);
        }
    product_free(&p);
}

/* ------------------------------------------------------------------ attention */

typedef struct cache {
    block k, k_scales, v, v_scales, k_f32, v_f32;
    pe_kv_chunk chunk;
} cache;

/* A chunk whose first n_positions are filled; what is behind holds NaN scales, as if never written. */
static cache cache_new(size_t d, size_t n_positions, bool extreme, rng *r) {
    cache c = {block_new(256 * d, 0),     block_new(256 * 4, 0),          block_new(256 * d, 0),
               block_new(256 * 4, 0),     block_new(256 * d * 4, 0),      block_new(256 * d * 4, 0), {0}};
    for (size_t i = 0; i < 256 * d; i++) CODES(c.k)[i] = extreme ? 127 : rng_code(r), CODES(c.v)[i] = rng_code(r);
    for (size_t i = 0; i < 256 * d; i++) FLOATS(c.k_f32)[i] = rng_float(r), FLOATS(c.v_f32)[i] = rng_float(r);
    for (size_t i = 0; i < 256; i++) FLOATS(c.k_scales)[i] = i < n_positions ? fabsf(rng_float(r)) * 0.01f : NAN;
    for (size_t i = 0; i < 256; i++) FLOATS(c.v_scales)[i] = i < n_positions ? fabsf(rng_float(r)) : NAN;
    c.chunk = (pe_kv_chunk){CODES(c.k), FLOATS(c.k_scales), CODES(c.v), FLOATS(c.v_scales), FLOATS(c.k_f32), FLOATS(c.v_f32)};
    return c;
}

static void cache_free(cache *c) {
    block_free(&c->k), block_free(&c->k_scales), block_free(&c->v), block_free(&c->v_scales), block_free(&c->k_f32),
        block_free(&c->v_f32);
}

static void compare_scores(const struct pe_kernels *k, size_t n_rows, size_t d, size_t n_positions, bool f32, rng *r) {
    cache kv = cache_new(d, n_positions, rng_below(r, 4) == 0, r);
    block q = block_new(n_rows * d, 0), scales = block_new(n_rows * 4, 0), corrections = block_new(n_rows * 4, 0);
    block q_f32 = block_new(n_rows * d * 4, 0);
    for (size_t i = 0; i < n_rows * d; i++) CODES(q)[i] = rng_code(r), FLOATS(q_f32)[i] = rng_float(r);
    for (size_t row = 0; row < n_rows; row++) {
        FLOATS(scales)[row] = fabsf(rng_float(r));
        INTS(corrections)[row] = 0;
        for (size_t i = 0; i < d; i++) INTS(corrections)[row] -= 128 * CODES(q)[row * d + i];
    }
    size_t n = n_rows * 256, covered = (n_positions + 15) / 16 * 16;
    block out[2] = {block_new(n * 4, 0), block_new(n * 4, 0)}, untouched = block_new(n * 4, 0);
    for (int which = 0; which < 2; which++) {
        const struct pe_kernels *table = which ? k : &pe_kernels_scalar;
        if (f32) {
            table->attention_scores_f32(FLOATS(out[which]), FLOATS(q_f32), n_rows, d, &kv.chunk, n_positions, 0.3f);
        } else {
            table->attention_scores(FLOATS(out[which]), CODES(q), FLOATS(scales), INTS(corrections), n_rows, d, &kv.chunk, n_positions, 0.3f);
        }
    }
    for (size_t row = 0; row < n_rows; row++) {
        CHECK(same_floats(FLOATS(out[0]) + row * 256, FLOATS(out[1]) + row * 256, n_positions),
              "%s: f32 %d, row %zu of %zu, head_dim %zu, %zu positions", k->name, f32, row, n_rows, d, n_positions);
        CHECK(memcmp(FLOATS(out[1]) + row * 256 + covered, FLOATS(untouched) + row * 256 + covered, (256 - covered) * 4) == 0,
              "%s: panels behind %zu positions were written", k->name, n_positions);
    }
    CHECK(block_intact(&out[1]), "%s: scores outside the rows", k->name);
    block_free(&out[0]), block_free(&out[1]), block_free(&untouched);
    block_free(&q), block_free(&scales), block_free(&corrections), block_free(&q_f32);
    cache_free(&kv);
}

static void compare_key_bias(const struct pe_kernels *k, size_t n_rows, size_t n_half, size_t n_positions, rng *r) {
    uint32_t pairs[PE_MAX_HEAD_DIM / 2];
    size_t n_pairs = 0, n = n_rows * 256, covered = (n_positions + 15) / 16 * 16;
    for (uint32_t i = 0; i < n_half; i++)
        if (rng_below(r, 2)) pairs[n_pairs++] = i;
    block turned = block_new(n_rows * 2 * n_pairs * 4, 0), angles = block_new(256 * n_half * 2 * 4, 0);
    block out[2] = {block_new(n * 4, 0), block_new(n * 4, 0)}, before = block_new(n * 4, 0);
    for (size_t i = 0; i < n_rows * 2 * n_pairs; i++) FLOATS(turned)[i] = rng_float(r) * 30.0f;
    for (size_t i = 0; i < 256 * n_half * 2; i++) FLOATS(angles)[i] = rng_float(r);
    for (size_t i = 0; i < n; i++) FLOATS(out[0])[i] = FLOATS(out[1])[i] = FLOATS(before)[i] = rng_float(r);
    pe_kernels_scalar.attention_key_bias(FLOATS(out[0]), FLOATS(turned), n_rows, pairs, n_pairs, FLOATS(angles), n_half, n_positions);
    k->attention_key_bias(FLOATS(out[1]), FLOATS(turned), n_rows, pairs, n_pairs, FLOATS(angles), n_half, n_positions);
    for (size_t row = 0; row < n_rows; row++) {
        CHECK(same_floats(FLOATS(out[0]) + row * 256, FLOATS(out[1]) + row * 256, n_positions),
              "%s: key bias, row %zu of %zu, %zu of %zu pairs, %zu positions", k->name, row, n_rows, n_pairs, n_half, n_positions);
        CHECK(memcmp(FLOATS(out[1]) + row * 256 + covered, FLOATS(before) + row * 256 + covered, (256 - covered) * 4) == 0,
              "%s: key bias behind %zu positions", k->name, n_positions);
    }
    CHECK(block_intact(&out[1]), "%s: key bias outside the rows", k->name);
    block_free(&turned), block_free(&angles), block_free(&out[0]), block_free(&out[1]), block_free(&before);
}

/* TINY: some groups lie below the bound of zero groups. EXTREME: every sum of products is as large as it gets. */
enum { MIXED, TINY, EXTREME, N_WEIGHTS };

static float pick_weight(int pattern, size_t j, rng *r) {
    if (pattern == EXTREME) return 1.0f;
    if (pattern == TINY && rng_below(r, 40) != 0 && j / 32 % 2 == 0) return pe_float_from_bits((uint32_t)rng_below(r, 0x1f800000u)); /* below 2^-64 */
    return rng_below(r, 9) == 0 ? 1e-38f : (float)rng_below(r, 1 << 20) * 0x1p-20f;
}

static void compare_values(const struct pe_kernels *k, size_t n_rows, size_t d, size_t begin, size_t end, int pattern, bool f32, rng *r) {
    cache kv = cache_new(d, end, false, r);
    for (size_t i = 0; pattern == EXTREME && i < 256 * d; i++) CODES(kv.v)[i] = i / 4 % 2 ? 127 : -127;
    block w = block_new(n_rows * 1024, 0), a = block_new(n_rows * d * 4, 0), b = block_new(n_rows * d * 4, 0);
    memset(w.data, 0, w.n);
    for (size_t row = 0; row < n_rows; row++) {
        size_t first = begin + rng_below(r, end - begin); /* this row's own mask */
        for (size_t j = first; j < end; j++) FLOATS(w)[row * 256 + j] = pick_weight(pattern, j, r);
    }
    for (int which = 0; which < 2; which++) {
        const struct pe_kernels *table = which ? k : &pe_kernels_scalar;
        (f32 ? table->attention_values_f32 : table->attention_values)(FLOATS(which ? b : a), FLOATS(w), n_rows, d, &kv.chunk, begin, end);
    }
    CHECK(same_floats(FLOATS(a), FLOATS(b), n_rows * d) && block_intact(&b), "%s: f32 %d, pattern %d, %zu rows, head_dim %zu, positions %zu-%zu",
          k->name, f32, pattern, n_rows, d, begin, end);
    block_free(&w), block_free(&a), block_free(&b);
    cache_free(&kv);
}

/* The scalar product of weights and V against exact integers: with 127 as the largest weight of every group codes are the weights
 * and all sums are below 2^24. */
static void test_values_law(void) {
    rng r = {32};
    const size_t d = 48, n_rows = 3, begin = 37, end = 250;
    cache kv = cache_new(d, end, false, &r);
    float w[3 * 256] = {0}, out[3 * 48];
    for (size_t row = 0; row < n_rows; row++)
        for (size_t j = begin; j < end; j++) w[row * 256 + j] = j == begin || j % 32 == 9 ? 127.0f : (float)rng_below(&r, 128);
    pe_kernels_scalar.attention_values(out, w, n_rows, d, &kv.chunk, begin, end);
    for (size_t row = 0; row < n_rows; row++)
        for (size_t i = 0; i < d; i++) {
            int64_t expected = 0;
            for (size_t j = begin; j < end; j++) expected += (int64_t)w[row * 256 + j] * kv.chunk.v[j / 4 * 4 * d + i * 4 + j % 4];
            CHECK((double)out[row * d + i] == (double)expected, "row %zu column %zu: %f", row, i, (double)out[row * d + i]);
        }
    cache_free(&kv);
}

/* Runs that all see something of [begin, end), if `sparse` some of them nothing. */
static void pick_runs(pe_visible *runs, size_t n_runs, size_t begin, size_t end, bool sparse, rng *r) {
    for (size_t run = 0; run < n_runs; run++) {
        size_t first = run == 0 ? begin : begin + rng_below(r, end - begin);
        runs[run] = (pe_visible){first, run == 0 ? end : first + 1 + rng_below(r, end - first)};
        if (sparse && run > 0 && rng_below(r, 3) == 0) runs[run].end = rng_below(r, 2) ? first : 0;
    }
}

static float pick_score(int pattern, size_t j, rng *r) {
    float x = rng_float(r);
    if (pattern == 1) return 7.25f;                           /* all equal */
    if (pattern == 2) return x * 100.0f;                      /* most below exp's limit */
    if (pattern == 3) return (float)j * -0.5f;                /* crosses the limit */
    if (pattern == 4) return rng_below(r, 2) ? 3e38f : -3e38f; /* differences overflow */
    return pattern == 5 && rng_below(r, 20) == 0 ? NAN : x;
}

/* Scores and scales of what a row does not see mean nothing, and must not matter. */
static void compare_weights(const struct pe_kernels *k, const pe_visible *runs, size_t n_runs, size_t n_rep, pe_visible all, bool scaled,
                            int pattern, rng *r) {
    size_t n = n_runs * n_rep;
    block w[2] = {block_new(n * 1024, 0), block_new(n * 1024, 0)}, m[2] = {block_new(n * 4, 0), block_new(n * 4, 0)};
    block l[2] = {block_new(n * 4, 0), block_new(n * 4, 0)}, scales = block_new(1024, 0);
    for (size_t i = 0; i < n * 256; i++) {
        pe_visible seen = runs[i / 256 / n_rep];
        size_t j = i % 256;
        float x = j >= seen.begin && j < seen.end ? pick_score(pattern, j, r) : rng_below(r, 2) ? NAN : 1e30f;
        FLOATS(w[0])[i] = FLOATS(w[1])[i] = x;
    }
    for (size_t j = 0; j < 256; j++) FLOATS(scales)[j] = j >= all.begin && j < all.end ? fabsf(rng_float(r)) : NAN;
    for (int which = 0; which < 2; which++)
        (which ? k : &pe_kernels_scalar)->attention_weights(FLOATS(m[which]), FLOATS(l[which]), FLOATS(w[which]), runs, n_runs, n_rep, all,
                                                            scaled ? FLOATS(scales) : NULL);
    for (size_t row = 0; row < n; row++) {
        pe_visible seen = runs[row / n_rep];
        const float *a = FLOATS(w[0]) + row * 256, *b = FLOATS(w[1]) + row * 256, *l_a = FLOATS(l[0]) + row, *l_b = FLOATS(l[1]) + row;
        bool has_nan = *l_a != *l_a; /* then the call ends with PE_ERR_NOT_FINITE, and which maximum was found is of no interest */
        bool same_m = seen.begin >= seen.end || FLOATS(m[0])[row] == FLOATS(m[1])[row];
        CHECK(same_floats(l_a, l_b, 1) && (has_nan || (same_m && same_floats(a, b, 256))),
              "%s: row %zu of %zu times %zu sees %zu-%zu of %zu-%zu, pattern %d, scaled %d: l %a %a", k->name, row, n_runs, n_rep, seen.begin,
              seen.end, all.begin, all.end, pattern, scaled, (double)*l_a, (double)*l_b);
        for (size_t j = pe_group_begin(all.begin); j < pe_group_end(all.end) && !has_nan; j++)
            if (j < seen.begin || j >= seen.end) CHECK(pe_float_bits(b[j]) == 0, "%s: masked position %zu is not +0", k->name, j);
    }
    CHECK(block_intact(&w[1]) && block_intact(&m[1]) && block_intact(&l[1]), "%s: weights outside the rows", k->name);
    for (int which = 0; which < 2; which++) block_free(&w[which]), block_free(&m[which]), block_free(&l[which]);
    block_free(&scales);
}

/* One row and its own range, then runs of rows. */
static void test_weights(const struct pe_kernels *k, rng *r) {
    pe_visible runs[6];
    for (int pattern = 0; pattern < 6; pattern++) {
        for (size_t begin = 0; begin < 34; begin++)
            for (size_t length = 1; length < 34; length++) {
                pe_visible seen = {begin, begin + length};
                compare_weights(k, &seen, 1, 1, seen, length % 2, pattern, r);
            }
        for (int i = 0; i < 60; i++) {
            size_t begin = i < 2 ? 0 : i == 2 ? 255 : rng_below(r, 256), end = i < 2 ? 256 : begin + 1 + rng_below(r, 256 - begin);
            size_t n_runs = 1 + rng_below(r, 6);
            pick_runs(runs, n_runs, begin, end, i % 3 == 0, r);
            compare_weights(k, runs, n_runs, 1 + rng_below(r, 9), (pe_visible){begin, end}, i % 2, pattern, r);
        }
    }
}

static void test_attention(const struct pe_kernels *k) {
    rng r = {31};
    for (size_t n_rows = 1; n_rows <= 17; n_rows++)
        for (int i = 0; i < 6; i++) {
            size_t d = i == 1 ? PE_MAX_HEAD_DIM : 16 * (1 + rng_below(&r, 10)), n_positions = i == 0 ? 256 : 1 + rng_below(&r, 256), begin = rng_below(&r, n_positions);
            for (int f32 = 0; f32 < 2; f32++) {
                compare_scores(k, n_rows, d, n_positions, f32, &r);
                compare_values(k, n_rows, d, begin, n_positions, i % N_WEIGHTS, f32, &r);
            }
            compare_key_bias(k, n_rows, 1 + rng_below(&r, 70), n_positions, &r);
        }
    for (size_t n_rows = 31; n_rows <= 40; n_rows += 3) { /* more than any table works on at a time */
        compare_scores(k, n_rows, 32, 70, false, &r);
        compare_values(k, n_rows, 32, 40, 70, MIXED, false, &r);
    }
    for (size_t n_positions = 1; n_positions <= 33; n_positions++) compare_scores(k, 3, 64, n_positions, false, &r);
    test_weights(k, &r);
}

void test_matmul_and_attention(const struct pe_kernels *k) {
    if (k == &pe_kernels_scalar) test_matmul_law(), test_values_law();
    test_matmul(k);
    test_every_weight_scale(k);
    test_attention(k);
}

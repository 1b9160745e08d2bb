/* test_kernels.c: every element-wise kernel and quantizer of a table equals the scalar table's, bit for bit. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "harness.h"
#include "kernels/pe_math.h"

/* ------------------------------------------------------------------ inputs */

enum { RANDOM, ZERO, SUBNORMAL, TINY, HUGE_VALUES, TIES, ONE_SIGN, INFINITE, NOT_A_NUMBER, N_PATTERNS };

static const char *const pattern_names[N_PATTERNS] = {"random", "zero",     "subnormal", "tiny",        "huge",
                                                      "ties",   "one sign", "infinite",  "not a number"};

static void fill(float *x, size_t n, int pattern, rng *r) {
    for (size_t i = 0; i < n; i++) {
        float sign = rng_below(r, 2) ? 1.0f : -1.0f;
        switch (pattern) {
        case ZERO: x[i] = sign * 0.0f; break;
        case SUBNORMAL: x[i] = pe_float_from_bits((uint32_t)rng_below(r, 1 << 23)) * sign; break;
        case TINY: x[i] = sign * 0x1p-64f * (0.9f + (float)rng_below(r, 3) * 0.1f); break; /* on both sides of the zero group */
        case HUGE_VALUES: x[i] = sign * 3.4e38f / (float)(1 + rng_below(r, 9)); break;
        case TIES: x[i] = i == 0 ? 127.0f : sign * ((float)rng_below(r, 127) + 0.5f); break; /* scale 1: exact halves */
        case ONE_SIGN: x[i] = fabsf(rng_float(r)); break;
        default: x[i] = rng_float(r);
        }
    }
    if (pattern == INFINITE) x[rng_below(r, n)] = rng_below(r, 2) ? INFINITY : -INFINITY;
    if (pattern == NOT_A_NUMBER) x[rng_below(r, n)] = NAN;
}

/* ------------------------------------------------------------------ quantizers */

/* Equal maxima, or both not finite: which NaN it is does not matter. */
static bool same_outcome(uint32_t a, uint32_t b) { return a == b || (a >= PE_NOT_FINITE_BITS && b >= PE_NOT_FINITE_BITS); }

/* Activations of n_tokens rows, padded to n_padded columns, in guarded memory. */
typedef struct packed_rows {
    block codes, scales, corrections;
    pe_activations x;
} packed_rows;

static packed_rows packed_new(size_t n_tokens, size_t n_padded) {
    size_t n_packed = n_packed_tokens(n_tokens), n_scales = n_packed * (n_padded / 64);
    packed_rows p = {.codes = block_new(n_packed * n_padded, 0), .scales = block_new(n_scales * 4, 0),
                     .corrections = block_new(n_scales * 4, 0)};
    p.x = (pe_activations){CODES(p.codes), FLOATS(p.scales), INTS(p.corrections), n_padded, n_tokens, false};
    return p;
}

static void packed_free(packed_rows *p) { block_free(&p->codes), block_free(&p->scales), block_free(&p->corrections); }

/* Zero what means nothing: the outputs of a token that is not finite. */
static void packed_forget(const struct pe_kernels *table, packed_rows *p, size_t token) {
    size_t first = token / 8 * 8, width = pe_block_width(p->x.n_tokens - first), n_groups = p->x.n / 64;
    for (size_t column = 0; column < p->x.n; column++) p->x.codes[code_offset(table, &p->x, token, column)] = 0;
    for (size_t g = 0; g < n_groups; g++) {
        p->x.scales[first * n_groups + g * width + token - first] = 0.0f;
        p->x.corrections[first * n_groups + g * width + token - first] = 0;
    }
}

/* Whether `table` has written to b what the scalar one wrote to a. */
static bool packed_equal(const packed_rows *a, const struct pe_kernels *table, const packed_rows *b) {
    bool equal = block_intact(&b->codes) && block_intact(&b->scales) && block_intact(&b->corrections);
    for (size_t token = 0; token < n_packed_tokens(a->x.n_tokens); token++)
        for (size_t column = 0; column < a->x.n; column++)
            equal = equal && a->x.codes[code_offset(&pe_kernels_scalar, &a->x, token, column)] ==
                                 b->x.codes[code_offset(table, &b->x, token, column)];
    return equal && memcmp(a->scales.data, b->scales.data, a->scales.n) == 0 &&
           memcmp(a->corrections.data, b->corrections.data, a->corrections.n) == 0;
}

/* One head by itself: codes (n padded to 16). Returns the bits of its largest magnitude. */
static uint32_t quantize_one(const struct pe_kernels *k, int8_t *codes, float *scale, int32_t *correction, const float *x, size_t n,
                             size_t block, float factor) {
    pe_heads heads = {.n_heads = 1, .x = {x}, .codes = {codes}, .four_step = 4, .step = 1};
    k->quantize_heads(&heads, n, block, factor);
    *scale = heads.scales[0], *correction = heads.corrections[0];
    return heads.absmax_bits[0];
}

/* The last block of n_tokens rows, each filled by a pattern of its own; the blocks before it must stay as they were. */
static void test_quantize_once(const struct pe_kernels *k, size_t n, size_t n_padded, size_t n_tokens, bool normed, rng *r) {
    size_t first = (n_tokens - 1) / 8 * 8, n_rows = n_tokens - first;
    block x[8], norm = block_new(n * 4, 4 * rng_below(r, 4));
    const float *rows[8];
    uint32_t not_finite[2];
    packed_rows out[2];
    fill(FLOATS(norm), n, RANDOM, r);
    for (size_t t = 0; t < n_rows; t++) {
        x[t] = block_new(n * 4, 4 * rng_below(r, 4));
        rows[t] = FLOATS(x[t]);
        fill(FLOATS(x[t]), n, (int)rng_below(r, N_PATTERNS), r);
    }
    float eps = rng_below(r, 2) ? 1e-5f : 0.0f;
    for (int which = 0; which < 2; which++) {
        const struct pe_kernels *table = which ? k : &pe_kernels_scalar;
        out[which] = packed_new(n_tokens, n_padded);
        not_finite[which] = table->quantize(&out[which].x, first, rows, n, normed ? FLOATS(norm) : NULL, eps);
        for (size_t t = 0; t < n_rows; t++)
            if (not_finite[0] >> t & 1) packed_forget(table, &out[which], first + t);
    }
    CHECK(not_finite[0] == not_finite[1] && packed_equal(&out[0], k, &out[1]), "%s: n %zu of %zu, %zu tokens, normed %d", k->name, n,
          n_padded, n_tokens, normed);
    packed_free(&out[0]), packed_free(&out[1]);
    for (size_t t = 0; t < n_rows; t++) block_free(&x[t]);
    block_free(&norm);
}

static void test_quantize(const struct pe_kernels *k) {
    rng r = {11};
    for (size_t n = 1; n <= 260; n += quick && n > 70 ? 11 : 1)
        for (size_t n_tokens = 1; n_tokens <= 9; n_tokens++)
            test_quantize_once(k, n, (n + 63) / 64 * 64 + 64 * rng_below(&r, 2), n_tokens, n_tokens % 2, &r);
    for (size_t n = 576; n <= 1600; n += 64) /* rows longer than what is worked on together */
        for (size_t n_tokens = 1; n_tokens <= 16; n_tokens++) test_quantize_once(k, n, n, n_tokens, rng_below(&r, 2), &r);
    for (size_t n_tokens = 17; n_tokens <= 33; n_tokens++) { /* whole tiles, and narrow ones */
        test_quantize_once(k, 200, 256, n_tokens, rng_below(&r, 2), &r);
        test_quantize_once(k, 576, 576, n_tokens, rng_below(&r, 2), &r);
    }
}

/* The kernel beside what it is made of: each row normed, transformed and quantized group by group. And which rows are not
 * finite. */
static void test_quantize_composition(const struct pe_kernels *k) {
    enum { N = 200 };
    rng r = {17};
    float x[5][N], norm[N];
    const float *rows[5] = {x[0], x[1], x[2], x[3], x[4]};
    packed_rows out = packed_new(5, 256);
    for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
        for (int t = 0; t < 5; t++) fill(x[t], N, t == 3 ? pattern : RANDOM, &r);
        fill(norm, N, RANDOM, &r);
        uint32_t not_finite = k->quantize(&out.x, 0, rows, N, norm, 1e-5f);
        float y[N], scale;
        int8_t codes[64];
        int32_t correction;
        for (size_t t = 0; t < 5; t++) {
            bool finite = isfinite(pe_kernels_scalar.rmsnorm(y, x[t], norm, N, 1e-5f));
            pe_kernels_scalar.hadamard(y, N, 1.0f);
            for (size_t i = 0; i < N; i++) finite = finite && isfinite(y[i]);
            CHECK((not_finite >> t & 1) == !finite, "%s: token %zu, %s", k->name, t, pattern_names[pattern]);
            for (size_t g = 0; g < 3 && finite; g++) {
                quantize_one(&pe_kernels_scalar, codes, &scale, &correction, y + g * 64, 64, 1, pe_input_factor(pe_hadamard_block(N)));
                CHECK(scale == out.x.scales[g * 8 + t] && correction == out.x.corrections[g * 8 + t], "%s: group %zu", k->name, g);
                for (size_t i = 0; i < 64; i++)
                    CHECK(codes[i] == out.x.codes[((g * 16 + i / 4) * 8 + t) * 4 + i % 4], "%s: code %zu of %zu", k->name, i, g);
            }
        }
        for (size_t t = 5; t < 8; t++)
            for (size_t i = 0; i < 256; i++) CHECK(out.x.codes[(i / 4 * 8 + t) * 4 + i % 4] == 0, "%s: filling %zu", k->name, t);
    }
    packed_free(&out);
}

/* Where head h is, of so many codes each: side by side, as lanes of a panel of K, among positions of V, and among positions of V
 * in another order, since heads of one call may be of tokens that do not follow each other. */
enum { PLAIN, KEYS, VALUES, SHUFFLED_VALUES, N_LAYOUTS };
static size_t head_offset(int layout, size_t h, size_t n_codes) {
    if (layout == PLAIN) return h * n_codes;
    if (layout == KEYS) return h * 4;
    size_t position = layout == VALUES ? h : h * 5 % PE_HEADS;
    return position / 4 * 4 * n_codes + position % 4;
}

static pe_heads heads_of(const block *x, const block *codes, size_t n_heads, size_t n, int layout) {
    pe_heads heads = {.n_heads = n_heads, .four_step = layout == PLAIN ? 4 : layout == KEYS ? 64 : 16, .step = layout >= VALUES ? 4 : 1};
    for (size_t h = 0; h < n_heads; h++) {
        heads.x[h] = FLOATS(*x) + h * n;
        heads.codes[h] = CODES(*codes) + head_offset(layout, h, (n + 15) / 16 * 16);
    }
    return heads;
}

static void test_quantize_heads(const struct pe_kernels *k) {
    rng r = {12};
    for (size_t n = 1; n <= 512; n += n < 70 ? 1 : 17)
        for (int round = 0; round < 8; round++) {
            size_t n_heads = round < 4 ? PE_HEADS : 1 + rng_below(&r, PE_HEADS), n_bytes = (n + 15) / 16 * 16 * PE_HEADS;
            size_t transformed = rng_below(&r, 3) == 0 ? 1 : pe_hadamard_block(n);
            int layout = round % N_LAYOUTS;
            block x = block_new(n_heads * n * 4, 4 * rng_below(&r, 4)), a = block_new(n_bytes, 0), b = block_new(n_bytes, rng_below(&r, 8));
            for (size_t h = 0; h < n_heads; h++) fill(FLOATS(x) + h * n, n, (int)rng_below(&r, N_PATTERNS), &r);
            pe_heads of_a = heads_of(&x, &a, n_heads, n, layout), of_b = heads_of(&x, &b, n_heads, n, layout);
            pe_kernels_scalar.quantize_heads(&of_a, n, transformed, 0.125f);
            k->quantize_heads(&of_b, n, transformed, 0.125f);
            CHECK(memcmp(a.data, b.data, n_bytes) == 0 && block_intact(&b), "%s: %zu heads of %zu, layout %d", k->name, n_heads, n, layout);
            for (size_t h = 0; h < n_heads; h++)
                CHECK(same_outcome(of_a.absmax_bits[h], of_b.absmax_bits[h]) && of_a.corrections[h] == of_b.corrections[h] &&
                          pe_float_bits(of_a.scales[h]) == pe_float_bits(of_b.scales[h]),
                      "%s: head %zu of %zu values", k->name, h, n);
            block_free(&x), block_free(&a), block_free(&b);
        }
}

static void test_hadamard(const struct pe_kernels *k) {
    rng r = {14};
    for (size_t n = 1; n <= 260; n++) {
        block a = block_new(n * 4, 4 * rng_below(&r, 4)), b = block_new(n * 4, 4 * rng_below(&r, 4));
        fill(FLOATS(a), n, (int)n % TIES, &r);
        memcpy(b.data, a.data, n * 4);
        pe_kernels_scalar.hadamard(FLOATS(a), n, 0.25f);
        k->hadamard(FLOATS(b), n, 0.25f);
        CHECK(same_floats(FLOATS(a), FLOATS(b), n) && block_intact(&b), "%s: Hadamard transform of %zu", k->name, n);
        block_free(&a), block_free(&b);
    }
}

/* The scalar transform against the Hadamard matrix, whose element (i, j) is (-1)^(bits that i and j share), on whole numbers; and
 * the two factors, whose product is 1 / block. */
static void test_hadamard_law(void) {
    rng r = {15};
    for (size_t n = 1; n <= 200; n++) {
        float x[200], transformed[200];
        size_t block = pe_hadamard_block(n);
        for (size_t i = 0; i < n; i++) x[i] = transformed[i] = (float)rng_below(&r, 1000) - 500.0f;
        pe_kernels_scalar.hadamard(transformed, n, 1.0f);
        for (size_t i = 0; i < n; i++) {
            float expected = 0.0f; /* whole numbers below 2^24: exact */
            for (size_t j = 0; j < block; j++) {
                float sign = __builtin_popcountl(i % block & j) % 2 ? -1.0f : 1.0f;
                expected += sign * x[i / block * block + j];
            }
            CHECK(transformed[i] == expected, "Hadamard transform of %zu, element %zu: %a, expected %a", n, i,
                  (double)transformed[i], (double)expected);
        }
        CHECK(n % block == 0 && block <= 64 && pe_input_factor(block) * pe_weight_factor(block) * (float)block == 1.0f, "factors of %zu", n);
    }
}

/* The scalar quantizer against the words of FORMAT.md section 5, in double where that is exact. */
static void test_quantize_law(void) {
    rng r = {13};
    for (int round = 0; round < 200; round++) {
        float x[32], scale;
        int8_t codes[32];
        int32_t correction, expected_sum = 0;
        fill(x, 32, round % TIES + (round % 3 == 0), &r);
        uint32_t bits = quantize_one(&pe_kernels_scalar, codes, &scale, &correction, x, 32, 1, 0.5f);
        float absmax = 0;
        for (int i = 0; i < 32; i++) absmax = fmaxf(absmax, fabsf(x[i]));
        bool zero = absmax < 0x1p-64f;
        CHECK(bits == pe_float_bits(absmax), "absmax %a", (double)absmax);
        CHECK(scale == (zero ? 0.0f : absmax / 127.0f * 0.5f), "scale %a", (double)scale);
        for (int i = 0; i < 32; i++) {
            float scaled = zero ? 0.0f : x[i] * (127.0f / absmax);
            double below = floor((double)scaled), fraction = (double)scaled - below;
            bool up = fraction > 0.5 || (fraction == 0.5 && fmod(below, 2) != 0); /* half to even */
            expected_sum += (int)below + up;
            CHECK(codes[i] == (int)below + up, "code %d of %a", codes[i], (double)scaled);
        }
        CHECK(correction == -128 * expected_sum, "correction %d of the sum %d", correction, expected_sum);
    }
}

/* A row is transformed as a whole, and each of its groups of 64 is then what quantize_heads makes of it. */
static void test_groups_law(void) {
    rng r = {16};
    for (size_t n = 1; n <= 200; n++) {
        float x[200], scales[4];
        int8_t codes[256], head[64];
        int32_t corrections[4];
        size_t n_groups = (n + 63) / 64;
        fill(x, n, RANDOM, &r);
        const float *row = x;
        pe_activations packed = {codes, scales, corrections, n_groups * 64, 1, false};
        pe_kernels_scalar.quantize(&packed, 0, &row, n, NULL, 0.0f);
        pe_kernels_scalar.hadamard(x, n, 1.0f);
        for (size_t g = 0; g < n_groups; g++) {
            size_t n_group = n - g * 64 < 64 ? n - g * 64 : 64;
            float scale;
            int32_t correction;
            quantize_one(&pe_kernels_scalar, head, &scale, &correction, x + g * 64, n_group, 1, pe_input_factor(pe_hadamard_block(n)));
            CHECK(memcmp(head, codes + g * 64, n_group) == 0 && scale == scales[g] && correction == corrections[g], "group %zu of %zu", g, n);
            for (size_t i = n_group; i < 64; i++) CHECK(codes[g * 64 + i] == 0, "column %zu behind %zu", g * 64 + i, n);
        }
    }
}

/* Of values that float32 holds, a transform may make some that it does not: those are told, and a block of one is never
 * transformed. */
static void test_hadamard_overflow(const struct pe_kernels *k) {
    float x[64], scale;
    const float *row = x;
    int8_t codes[64];
    int32_t correction;
    pe_activations packed = {codes, &scale, &correction, 64, 1, false};
    for (size_t i = 0; i < 64; i++) x[i] = 3e38f;
    CHECK(k->quantize(&packed, 0, &row, 64, NULL, 0.0f) == 1, "%s: a row", k->name);
    CHECK(quantize_one(k, codes, &scale, &correction, x, 64, 64, 0.125f) >= PE_NOT_FINITE_BITS, "%s: a head", k->name);
    CHECK(k->quantize(&packed, 0, &row, 63, NULL, 0.0f) == 0 && scale == 3e38f / 127.0f, "%s: an odd row, scale %a", k->name,
          (double)scale);
    for (size_t i = 1; i < 64; i++) x[i] = 0.0f;
    CHECK(k->quantize(&packed, 0, &row, 64, NULL, 0.0f) == 0 && scale == 3e38f / 127.0f * 0.125f, "%s: one large value, scale %a",
          k->name, (double)scale);
    for (size_t i = 0; i < 64; i++) CHECK(codes[i] == 127, "%s: code %zu of one large value is %d", k->name, i, codes[i]);
}

/* ------------------------------------------------------------------ rows of floats */

static void test_rmsnorm(const struct pe_kernels *k) {
    rng r = {14};
    for (size_t n = 1; n <= 600; n += n < 70 ? 1 : 53)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            block x = block_new(n * 4, 4 * rng_below(&r, 4)), w = block_new(n * 4, 4 * rng_below(&r, 4));
            block a = block_new(n * 4, 4), b = block_new(n * 4, 8);
            fill(FLOATS(x), n, pattern, &r), fill(FLOATS(w), n, RANDOM, &r);
            float eps = rng_below(&r, 2) ? 1e-5f : 0.0f;
            float sum_a = pe_kernels_scalar.rmsnorm(FLOATS(a), FLOATS(x), FLOATS(w), n, eps);
            float sum_b = k->rmsnorm(FLOATS(b), FLOATS(x), FLOATS(w), n, eps);
            CHECK(same_floats(&sum_a, &sum_b, 1) && same_floats(FLOATS(a), FLOATS(b), n) && block_intact(&b), "%s: n %zu, %s", k->name,
                  n, pattern_names[pattern]);
            k->rmsnorm(FLOATS(x), FLOATS(x), FLOATS(w), n, eps); /* in place */
            CHECK(same_floats(FLOATS(a), FLOATS(x), n), "%s: in place, n %zu", k->name, n);
            block_free(&x), block_free(&w), block_free(&a), block_free(&b);
        }
}

static void test_rope(const struct pe_kernels *k) {
    rng r = {15};
    for (size_t head_dim = 2; head_dim <= 134; head_dim += 2)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            size_t half = head_dim / 2;
            block a = block_new(head_dim * 4, 4), b = block_new(head_dim * 4, 12);
            block cosine = block_new(half * 4, 4), sine = block_new(half * 4, 8);
            fill(FLOATS(a), head_dim, pattern, &r);
            memcpy(b.data, a.data, head_dim * 4);
            for (size_t i = 0; i < half; i++) pe_cos_sin((float)rng_below(&r, 4000), FLOATS(cosine) + i, FLOATS(sine) + i);
            pe_kernels_scalar.rope(FLOATS(a), FLOATS(cosine), FLOATS(sine), head_dim);
            k->rope(FLOATS(b), FLOATS(cosine), FLOATS(sine), head_dim);
            CHECK(same_floats(FLOATS(a), FLOATS(b), head_dim) && block_intact(&b), "%s: head_dim %zu, %s", k->name, head_dim,
                  pattern_names[pattern]);
            block_free(&a), block_free(&b), block_free(&cosine), block_free(&sine);
        }
}

/* The gates of a table beside those of scalar; and the activations without one. */
static void compare_gates(const struct pe_kernels *k, const float *gate_up, size_t n_pairs, const char *what) {
    const struct pe_kernels *scalar = &pe_kernels_scalar;
    void (*const expected[])(float *, const float *, size_t) = {scalar->swiglu, scalar->swiglu_clamped, scalar->geglu_tanh};
    void (*const gates[])(float *, const float *, size_t) = {k->swiglu, k->swiglu_clamped, k->geglu_tanh};
    for (int gate = 0; gate < 3; gate++) {
        block a = block_new(n_pairs * 64, 4), b = block_new(n_pairs * 64, 4);
        expected[gate](FLOATS(a), gate_up, n_pairs);
        gates[gate](FLOATS(b), gate_up, n_pairs);
        CHECK(same_floats(FLOATS(a), FLOATS(b), n_pairs * 16) && block_intact(&b), "%s: gate %d, %zu pairs, %s", k->name, gate,
              n_pairs, what);
        block_free(&a), block_free(&b);
    }
    void (*const plain[])(float *, size_t, const float *) = {scalar->gelu_tanh, scalar->gelu, scalar->relu2, scalar->xielu};
    void (*const its[])(float *, size_t, const float *) = {k->gelu_tanh, k->gelu, k->relu2, k->xielu};
    static const float curve[3] = {0.8f, 1.3f, 0.5f};
    for (int i = 0; i < 4; i++) {
        block a = block_new(n_pairs * 128, 4), b = block_new(n_pairs * 128, 4);
        memcpy(a.data, gate_up, n_pairs * 128), memcpy(b.data, gate_up, n_pairs * 128);
        plain[i](FLOATS(a), n_pairs * 32, curve);
        its[i](FLOATS(b), n_pairs * 32, curve);
        CHECK(same_floats(FLOATS(a), FLOATS(b), n_pairs * 32) && block_intact(&b), "%s: activation %d, %zu pairs, %s", k->name, i,
              n_pairs, what);
        block_free(&a), block_free(&b);
    }
}

static void test_gates(const struct pe_kernels *k) {
    rng r = {16};
    for (size_t n_pairs = 1; n_pairs <= 5; n_pairs++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            block x = block_new(n_pairs * 128, 4);
            fill(FLOATS(x), n_pairs * 32, pattern, &r);
            compare_gates(k, FLOATS(x), n_pairs, pattern_names[pattern]);
            block_free(&x);
        }
    /* exp's every regime: a sweep over all exponents and signs, up = 1 */
    uint32_t step = quick ? 262139u : 65521u;
    for (uint32_t bits = 0; bits < 0xff800000u; bits += 16 * step) {
        float x[32];
        for (uint32_t i = 0; i < 16; i++) x[i] = pe_float_from_bits(bits + i * step), x[16 + i] = 1.0f;
        compare_gates(k, x, 1, "sweep");
    }
}

static void compare_softcap(const struct pe_kernels *k, const float *x, size_t n, float cap, const char *what) {
    block a = block_new(n * 4, 4), b = block_new(n * 4, 4);
    memcpy(FLOATS(a), x, n * 4), memcpy(FLOATS(b), x, n * 4);
    pe_kernels_scalar.softcap(FLOATS(a), n, cap);
    k->softcap(FLOATS(b), n, cap);
    CHECK(same_floats(FLOATS(a), FLOATS(b), n) && block_intact(&b), "%s: softcap %g of %zu, %s", k->name, (double)cap, n, what);
    block_free(&a), block_free(&b);
}

static void test_softcap(const struct pe_kernels *k) {
    rng r = {18};
    for (size_t n = 1; n <= 50; n++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            block x = block_new(n * 4, 4);
            fill(FLOATS(x), n, pattern, &r);
            compare_softcap(k, FLOATS(x), n, 30.0f, pattern_names[pattern]);
            block_free(&x);
        }
    uint32_t step = quick ? 262139u : 65521u;
    for (uint32_t bits = 0; bits < 0xff800000u; bits += 16 * step) {
        float x[16];
        for (uint32_t i = 0; i < 16; i++) x[i] = pe_float_from_bits(bits + i * step);
        compare_softcap(k, x, 16, 0x1p-10f, "sweep"), compare_softcap(k, x, 16, 50.0f, "sweep");
        compare_softcap(k, x, 16, 0x1p20f, "sweep");
    }
}

static void test_add_scaled(const struct pe_kernels *k) {
    rng r = {19};
    for (size_t n = 1; n <= 70; n++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            block x = block_new(n * 4, 4), a = block_new(n * 4, 4), b = block_new(n * 4, 4);
            fill(FLOATS(x), n, pattern, &r), fill(FLOATS(a), n, pattern, &r);
            memcpy(FLOATS(b), FLOATS(a), n * 4);
            pe_kernels_scalar.add_scaled(FLOATS(a), FLOATS(x), 0.3f, n);
            k->add_scaled(FLOATS(b), FLOATS(x), 0.3f, n);
            CHECK(same_floats(FLOATS(a), FLOATS(b), n) && block_intact(&b), "%s: add_scaled of %zu, %s", k->name, n,
                  pattern_names[pattern]);
            block_free(&x), block_free(&a), block_free(&b);
        }
}

static void test_dots(const struct pe_kernels *k) {
    rng r = {20};
    for (size_t n = 1; n <= 70; n++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            size_t n_rows = 1 + n % 9;
            block x = block_new(n * 4, 4), w = block_new(n_rows * n * 4, 4), out = block_new(n_rows * 4, 4);
            float expected[9];
            fill(FLOATS(x), n, pattern, &r), fill(FLOATS(w), n_rows * n, pattern, &r);
            pe_kernels_scalar.dots_f32(expected, FLOATS(x), FLOATS(w), n_rows, n);
            k->dots_f32(FLOATS(out), FLOATS(x), FLOATS(w), n_rows, n);
            CHECK(same_floats(expected, FLOATS(out), n_rows) && block_intact(&out), "%s: %zu dots of %zu, %s", k->name, n_rows, n,
                  pattern_names[pattern]);
            block_free(&x), block_free(&w), block_free(&out);
        }
}

/* y's panels lie side by side, or every second one is another matrix's. */
static void test_low_rank(const struct pe_kernels *k) {
    rng r = {21};
    for (size_t n = 1; n <= 150; n++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            size_t rank = 1 + n % 7, panels = (n + 15) / 16, step = n % 2 == 0 ? 16 : 32, size = (panels - 1) * step + (n - 1) % 16 + 1;
            block t = block_new(rank * 4, 4), b = block_new(panels * rank * 64, 4), y = block_new(size * 4, 4), z = block_new(size * 4, 4);
            fill(FLOATS(t), rank, pattern, &r), fill(FLOATS(b), panels * rank * 16, pattern, &r), fill(FLOATS(y), size, pattern, &r);
            memcpy(FLOATS(z), FLOATS(y), size * 4);
            pe_kernels_scalar.add_low_rank(FLOATS(y), step, FLOATS(t), FLOATS(b), rank, n);
            k->add_low_rank(FLOATS(z), step, FLOATS(t), FLOATS(b), rank, n);
            CHECK(same_floats(FLOATS(y), FLOATS(z), size) && block_intact(&z), "%s: rank %zu of %zu outputs, %s", k->name, rank, n,
                  pattern_names[pattern]);
            block_free(&t), block_free(&b), block_free(&y), block_free(&z);
        }
}

static void test_add_scale(const struct pe_kernels *k) {
    rng r = {17};
    for (size_t n = 1; n <= 100; n++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            block x = block_new(n * 4, 4 * rng_below(&r, 4)), a[2], b[2];
            fill(FLOATS(x), n, pattern, &r);
            for (int i = 0; i < 2; i++) {
                a[i] = block_new(n * 4, 4), b[i] = block_new(n * 4, 8);
                fill(FLOATS(a[i]), n, RANDOM, &r);
                memcpy(b[i].data, a[i].data, n * 4);
            }
            float s = rng_float(&r);
            pe_kernels_scalar.add(FLOATS(a[0]), FLOATS(x), n), k->add(FLOATS(b[0]), FLOATS(x), n);
            pe_kernels_scalar.scale(FLOATS(a[1]), FLOATS(x), s, n), k->scale(FLOATS(b[1]), FLOATS(x), s, n);
            for (int i = 0; i < 2; i++) {
                CHECK(same_floats(FLOATS(a[i]), FLOATS(b[i]), n) && block_intact(&b[i]), "%s: kernel %d, n %zu, %s", k->name, i, n,
                      pattern_names[pattern]);
                block_free(&a[i]), block_free(&b[i]);
            }
            block_free(&x);
        }
}

/* States of n_rows rows in guarded memory: one in four has seen nothing, and its m is a NaN; one in sixteen is lost to a NaN. */
static void fill_state(block parts[3], size_t n_rows, size_t head_dim_p, int pattern, rng *r) {
    parts[0] = block_new(n_rows * 4, 4), parts[1] = block_new(n_rows * 4, 4), parts[2] = block_new(n_rows * head_dim_p * 4, 4);
    fill(FLOATS(parts[2]), n_rows * head_dim_p, pattern, r);
    for (size_t row = 0; row < n_rows; row++) {
        bool seen = rng_below(r, 4) != 0;
        FLOATS(parts[0])[row] = seen ? rng_float(r) * 9 : NAN;
        FLOATS(parts[1])[row] = !seen ? 0.0f : rng_below(r, 16) == 0 ? NAN : 1.0f + fabsf(rng_float(r));
    }
}

static pe_attention_state state_of(const block parts[3]) {
    return (pe_attention_state){FLOATS(parts[0]), FLOATS(parts[1]), FLOATS(parts[2])};
}

static void test_merge(const struct pe_kernels *k) {
    rng r = {22};
    for (size_t n_rows = 1; n_rows <= 40; n_rows++)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            size_t head_dim_p = 16 * (1 + n_rows % 5), sizes[3] = {n_rows, n_rows, n_rows * head_dim_p};
            block expected[3], merged[3], chunk[3];
            fill_state(expected, n_rows, head_dim_p, RANDOM, &r), fill_state(chunk, n_rows, head_dim_p, pattern, &r);
            for (int i = 0; i < 3; i++) {
                merged[i] = block_new(sizes[i] * 4, 8);
                memcpy(merged[i].data, expected[i].data, sizes[i] * 4);
            }
            pe_attention_state a = state_of(expected), b = state_of(merged), c = state_of(chunk);
            pe_kernels_scalar.attention_merge(&a, &c, n_rows, head_dim_p), k->attention_merge(&b, &c, n_rows, head_dim_p);
            for (int i = 0; i < 3; i++) {
                CHECK(same_floats(FLOATS(expected[i]), FLOATS(merged[i]), sizes[i]) && block_intact(&merged[i]),
                      "%s: %zu merged rows, part %d, %s", k->name, n_rows, i, pattern_names[pattern]);
                block_free(&expected[i]), block_free(&merged[i]), block_free(&chunk[i]);
            }
        }
}

static void test_codes_are_legal(const struct pe_kernels *k) {
    rng r = {18};
    for (size_t n = 64; n <= 256; n += 64) {
        block b = block_new(n, 0);
        for (size_t i = 0; i < n; i++) CODES(b)[i] = rng_code(&r);
        CHECK(k->codes_are_legal(CODES(b), n), "%s: legal codes are refused", k->name);
        for (size_t i = 0; i < n; i++) {
            int8_t kept = CODES(b)[i];
            CODES(b)[i] = -128;
            CHECK(!k->codes_are_legal(CODES(b), n), "%s: -128 at %zu of %zu is not seen", k->name, i, n);
            CODES(b)[i] = kept;
        }
        block_free(&b);
    }
}

/* The maximum of any values; weights and exponentials of those that have one, below which some are banned. */
static void test_logits(const struct pe_kernels *k) {
    rng r = {26};
    for (size_t n = 1; n <= 200; n += 1 + n / 40)
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            block x = block_new(n * 4, 4), expected = block_new(n * 8, 8), weights = block_new(n * 8, 8);
            float top, found;
            fill(FLOATS(x), n, pattern, &r);
            bool finite = pe_kernels_scalar.maximum(FLOATS(x), n, &top);
            CHECK(k->maximum(FLOATS(x), n, &found) == finite && (pattern == NOT_A_NUMBER || found == top), "%s: maximum of %zu, %s",
                  k->name, n, pattern_names[pattern]);
            if (finite) {
                double sum = pe_kernels_scalar.sum_of_exps(FLOATS(x), n, top), its_sum = k->sum_of_exps(FLOATS(x), n, top);
                CHECK(memcmp(&sum, &its_sum, sizeof sum) == 0, "%s: %zu exponentials, %s", k->name, n, pattern_names[pattern]);
                for (size_t i = 0; i < n; i++)
                    if (FLOATS(x)[i] < top && rng_below(&r, 4) == 0) FLOATS(x)[i] = -INFINITY;
                double temperature = rng_below(&r, 2) ? 0.7 : 30.0, cut = rng_below(&r, 2) ? -30.0 : -2.0;
                uint64_t *a = (uint64_t *)(void *)expected.data, *b = (uint64_t *)(void *)weights.data;
                CHECK(pe_kernels_scalar.weigh(a, FLOATS(x), n, top, temperature, cut) == k->weigh(b, FLOATS(x), n, top, temperature, cut) &&
                          memcmp(a, b, n * sizeof *a) == 0 && block_intact(&weights),
                      "%s: %zu weights, %s", k->name, n, pattern_names[pattern]);
            }
            block_free(&x), block_free(&expected), block_free(&weights);
        }
}

void test_kernels(const struct pe_kernels *k) {
    if (k == &pe_kernels_scalar) test_quantize_law(), test_groups_law(), test_hadamard_law();
    test_quantize(k);
    test_quantize_composition(k);
    test_quantize_heads(k);
    test_hadamard(k);
    test_hadamard_overflow(k);
    test_rmsnorm(k);
    test_rope(k);
    test_gates(k);
    test_softcap(k);
    test_add_scaled(k);
    test_dots(k);
    test_low_rank(k);
    test_add_scale(k);
    test_merge(k);
    test_codes_are_legal(k);
    test_logits(k);
}

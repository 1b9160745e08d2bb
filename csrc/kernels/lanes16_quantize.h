/* lanes16_quantize.h: the Hadamard transform and the quantizers of lanes16.h, which includes this; FORMAT.md sections 4 and 5.
 *
 * A block of tokens is quantized four groups of 64 values at a time, transposed by quads of four lanes: of the sixteen
 * vectors that they fill, vector c then holds elements 4 c to 4 c + 3 of all four, those of group k in its quad k. Stages of
 * the transform that pair elements four or more apart are additions of whole vectors, a group's maximum is one of vectors and
 * then of four lanes, four groups share a division, and rounded to bytes a vector is what a block of four tokens or more has
 * side by side. */
#ifndef PE_LANES16_QUANTIZE_H
#define PE_LANES16_QUANTIZE_H

enum {
    QUADS = 4, /* groups that are worked on together = quads of a vector */
    AHEAD = 4  /* fours that are transformed before the first of them is rounded: by then its maximum and division are done */
};

/* ------------------------------------------------------------------ the Hadamard transform */

/* The sign of the second half of every pair that is h lanes apart, for h = 1, 2, 4, 8. */
static const float pe_hadamard_signs[4][16] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

PE_INLINE void butterfly(v16 *a, v16 *b) {
    v16 sum = v16_add(*a, *b);
    *b = v16_sub(*a, *b);
    *a = sum;
}

/* A stage of the transform within each of four vectors, if blocks of `block` have it. Lane i becomes its partner plus or minus
 * itself: one fma, whose product is exact. */
#define PE_HADAMARD_LANES(v, block, h, swap, index) \
    if ((block) > (h)) { \
        v16 sign = v16_load(pe_hadamard_signs[index]); \
        PE_UNROLL for (int i = 0; i < 4; i++) (v)[i] = v16_fma((v)[i], sign, swap((v)[i])); \
    }

/* T of the blocks of 64 values. */
PE_INLINE void hadamard_64(v16 v[4], size_t block) {
    PE_HADAMARD_LANES(v, block, 1, v16_swap1, 0)
    PE_HADAMARD_LANES(v, block, 2, v16_swap2, 1)
    PE_HADAMARD_LANES(v, block, 4, v16_swap4, 2)
    PE_HADAMARD_LANES(v, block, 8, v16_swap8, 3)
    if (block > 16) butterfly(&v[0], &v[1]), butterfly(&v[2], &v[3]);
    if (block > 32) butterfly(&v[0], &v[2]), butterfly(&v[1], &v[3]);
}

/* The first n of 64 values at x, zeros after them. */
PE_INLINE void load_64(v16 v[4], const float *x, size_t n) {
    if (n >= PE_GROUP) {
        PE_UNROLL for (int i = 0; i < 4; i++) v[i] = v16_load(x + i * 16);
        return;
    }
    float padded[PE_GROUP] = {0};
    memcpy(padded, x, n * sizeof *x);
    PE_UNROLL for (int i = 0; i < 4; i++) v[i] = v16_load(padded + i * 16);
}

static void hadamard(float *x, size_t n, float factor) {
    size_t block = pe_hadamard_block(n);
    for (size_t begin = 0; begin < n; begin += PE_GROUP) {
        size_t left = n - begin < PE_GROUP ? n - begin : PE_GROUP;
        float transformed[PE_GROUP];
        v16 v[4];
        load_64(v, x + begin, left);
        hadamard_64(v, block);
        PE_UNROLL for (int i = 0; i < 4; i++) v16_store(transformed + i * 16, v16_mul(v[i], v16_set1(factor)));
        memcpy(x + begin, transformed, left * sizeof *x);
    }
}

/* ------------------------------------------------------------------ four groups */

static const float pe_zero_group[PE_GROUP];

/* The first n of 64 values at x, in place or copied to `padded` with zeros after them. */
static inline const float *whole_group(float padded[PE_GROUP], const float *x, size_t n) {
    if (n >= PE_GROUP) return x;
    memset(padded, 0, PE_GROUP * sizeof *padded);
    memcpy(padded, x, n * sizeof *x);
    return padded;
}

/* Four groups of 64 values, and what they are multiplied with if their rows are normed. */
typedef struct four_groups {
    const float *x[QUADS], *norm[QUADS];
    float inv_rms[QUADS];
} four_groups;

/* The four, transposed, after the transform; absmax: the bits of each group's largest magnitude in all lanes of its quad. */
typedef struct transformed_four {
    v16 v[16];
    i16 absmax;
} transformed_four;

PE_INLINE i16 absmax_four(const v16 v[16]) {
    i16 most[4];
    PE_UNROLL for (int i = 0; i < 4; i++) {
        most[i] = v16_abs_bits_max(i16_zero(), v[i]);
        PE_UNROLL for (int c = 4; c < 16; c += 4) most[i] = v16_abs_bits_max(most[i], v[c + i]);
    }
    PE_UNROLL for (int i = 1; i < 4; i++) most[0] = v16_abs_bits_max(most[0], v16_from_bits(most[i]));
    most[0] = v16_abs_bits_max(most[0], v16_swap1(v16_from_bits(most[0])));
    return v16_abs_bits_max(most[0], v16_swap2(v16_from_bits(most[0])));
}

PE_INLINE void transform_four(transformed_four *out, const four_groups *in, size_t block, const int normed) {
    v16 v[16];
    PE_UNROLL for (int j = 0; j < 4; j++) {
        v16 *q = v + j * 4;
        PE_UNROLL for (int k = 0; k < QUADS; k++) {
            q[k] = v16_load(in->x[k] + j * 16);
            if (normed) q[k] = v16_mul(v16_mul(q[k], v16_set1(in->inv_rms[k])), v16_load(in->norm[k] + j * 16));
        }
        PE_HADAMARD_LANES(q, block, 1, v16_swap1, 0)
        PE_HADAMARD_LANES(q, block, 2, v16_swap2, 1)
        v16_transpose_quads(q);
        if (block > 4) butterfly(&q[0], &q[1]), butterfly(&q[2], &q[3]);
        if (block > 8) butterfly(&q[0], &q[2]), butterfly(&q[1], &q[3]);
    }
    PE_UNROLL for (int i = 0; i < 4; i++) {
        if (block > 16) butterfly(&v[i], &v[4 + i]), butterfly(&v[8 + i], &v[12 + i]);
        if (block > 32) butterfly(&v[i], &v[8 + i]), butterfly(&v[4 + i], &v[12 + i]);
    }
    out->absmax = absmax_four(v);
    PE_UNROLL for (int c = 0; c < 16; c++) out->v[c] = v[c]; /* here, not stage by stage */
}

/* What the values of four groups are multiplied with, in all lanes of a quad like absmax; scales (QUADS), those of the groups. */
PE_INLINE v16 group_scales(float scales[QUADS], v16 absmax, float factor) {
    v16 most_code = v16_set1(127.0f), scale = v16_mul(v16_div(absmax, most_code), v16_set1(factor));
    v16_store_firsts(scales, v16_zero_if_less(absmax, 0x1p-64f, scale));
    return v16_zero_if_less(absmax, 0x1p-64f, v16_div(most_code, absmax));
}

/* Codes of vector c go to codes + c * step, sixteen of them; scales and corrections are those of the four groups. */
PE_INLINE void round_four(int8_t *codes, size_t step, float scales[QUADS], int32_t corrections[QUADS], const transformed_four *in,
                          float factor) {
    v16 inv = group_scales(scales, v16_from_bits(in->absmax), factor);
    i16 total = i16_zero();
    PE_UNROLL for (int c = 0; c < 16; c++)
        total = i16_add(total, v16_to_i8(codes + (size_t)c * step, v16_mul(in->v[c], inv)));
    i16_store_corrections(corrections, total);
}

/* ------------------------------------------------------------------ heads */

/* Heads [first, first + n_h), at most QUADS of them, have their codes at a constant distance. */
static inline bool heads_are_apart(const pe_heads *heads, size_t first, size_t n_h, ptrdiff_t n_bytes) {
    bool apart = n_h == QUADS;
    for (size_t h = first + 1; h < first + n_h; h++) apart &= heads->codes[h] - heads->codes[h - 1] == n_bytes;
    return apart;
}

/* Fours of codes (n_fours, QUADS, 4) of these heads to where they belong. */
static void put_heads(const pe_heads *heads, size_t first, size_t n_h, const int8_t *fours, size_t n_fours) {
    size_t four_step = heads->four_step, step = heads->step;
    int8_t *to = heads->codes[first];
    if (step == 1 && heads_are_apart(heads, first, n_h, 4)) { /* lanes of a panel of K */
        for (size_t c = 0; c < n_fours; c++) memcpy(to + c * four_step, fours + c * 16, 16);
        return;
    }
    if (step == QUADS && heads_are_apart(heads, first, n_h, 1)) { /* positions of V */
        for (size_t c = 0; c < n_fours; c++) i8_transpose_fours(to + c * four_step, fours + c * 16);
        return;
    }
    for (size_t h = 0; h < n_h; h++, fours += 4) {
        to = heads->codes[first + h];
        for (size_t c = 0; c < n_fours; c++, to += four_step) {
            if (step == 1) memcpy(to, fours + c * 16, 4);
            else for (size_t i = 0; i < 4; i++) to[i * step] = fours[c * 16 + i];
        }
    }
}

/* Heads [first, first + n_h), at most QUADS of them, of n values: transformed (n / 64), and absmax, the bits of their largest
 * magnitudes in all lanes of their quads. */
PE_INLINE void transform_heads(transformed_four *transformed, i16 *absmax, const pe_heads *heads, size_t first, size_t n_h, size_t n,
                               size_t block) {
    float padded[QUADS][PE_GROUP];
    *absmax = i16_zero();
    for (size_t begin = 0; begin < n; begin += PE_GROUP, transformed++) {
        four_groups four = {.x = {pe_zero_group, pe_zero_group, pe_zero_group, pe_zero_group}};
        for (size_t h = 0; h < n_h; h++) four.x[h] = whole_group(padded[h], heads->x[first + h] + begin, n - begin);
        transform_four(transformed, &four, block, 0);
        *absmax = v16_abs_bits_max(*absmax, v16_from_bits(transformed->absmax));
    }
}

/* These heads' results, from what transform_heads gave. */
PE_INLINE void round_heads(pe_heads *heads, size_t first, size_t n_h, const transformed_four *transformed, i16 absmax, size_t n,
                           float factor) {
    int8_t fours[PE_MAX_HEAD_DIM * QUADS];
    float scales[QUADS], magnitudes[QUADS];
    int32_t corrections[QUADS];
    size_t n_fours = (n + PE_PANEL - 1) / PE_PANEL * (PE_PANEL / 4);
    i16 total = i16_zero();
    v16 inv = group_scales(scales, v16_from_bits(absmax), factor);
    for (size_t c = 0; c < n_fours; c += 4) {
        v16 x[4];
        PE_UNROLL for (int i = 0; i < 4; i++) x[i] = v16_mul(transformed[c / 16].v[c % 16 + i], inv);
        total = i16_add(total, v16_four_to_i8(fours + c * 16, x));
    }
    i16_store_corrections(corrections, total);
    v16_store_firsts(magnitudes, v16_from_bits(absmax));
    for (size_t h = 0; h < n_h; h++) {
        uint32_t bits = pe_float_bits(magnitudes[h]);
        bool finite = bits < PE_NOT_FINITE_BITS;
        heads->absmax_bits[first + h] = bits;
        heads->scales[first + h] = finite ? scales[h] : 0.0f;
        heads->corrections[first + h] = finite ? corrections[h] : 0;
        for (size_t c = 0; c < n_fours && !finite; c++) memset(fours + c * 16 + h * 4, 0, 4);
    }
    put_heads(heads, first, n_h, fours, n_fours);
}

static void quantize_heads(pe_heads *heads, size_t n, size_t block, float factor) {
    transformed_four transformed[PE_MAX_HEAD_DIM / PE_GROUP];
    i16 absmax[AHEAD];
    size_t n_transformed = (n + PE_GROUP - 1) / PE_GROUP, at_once = n_transformed < AHEAD ? AHEAD / n_transformed * QUADS : QUADS;
    for (size_t begin = 0; begin < heads->n_heads; begin += at_once) {
        size_t end = heads->n_heads - begin < at_once ? heads->n_heads : begin + at_once;
        for (size_t h = begin, i = 0; h < end; h += QUADS, i++)
            transform_heads(transformed + i * n_transformed, &absmax[i], heads, h, end - h < QUADS ? end - h : QUADS, n, block);
        for (size_t h = begin, i = 0; h < end; h += QUADS, i++)
            round_heads(heads, h, end - h < QUADS ? end - h : QUADS, transformed + i * n_transformed, absmax[i], n, factor);
    }
}

/* ------------------------------------------------------------------ a block of tokens */

/* The rows of a block and what becomes of them. Its items are the groups of all tokens in the order of their scales: item
 * i is group i / width of token i % width. */
typedef struct block_rows {
    const float *const *rows; /* (n_rows), n floats each */
    size_t n_rows, n;
    const float *norm; /* (n) or NULL */
    float inv_rms[PE_TOKEN_BLOCK];
    size_t width_bits; /* log2 of the width */
    int8_t *codes;
    size_t group_bytes; /* from the codes of a group to those of the next */
    float *scales;
    int32_t *corrections;
} block_rows;

static inline size_t item_token(const block_rows *b, size_t item) { return item & (((size_t)1 << b->width_bits) - 1); }
static inline size_t item_group(const block_rows *b, size_t item) { return item >> b->width_bits; }

/* Items from `item` on. Those that are not there are zero. */
PE_INLINE void take_four(four_groups *four, float padded[2 * QUADS][PE_GROUP], const block_rows *b, size_t item) {
    PE_UNROLL for (size_t k = 0; k < QUADS; k++) {
        size_t token = item_token(b, item + k), begin = item_group(b, item + k) * PE_GROUP;
        four->x[k] = four->norm[k] = pe_zero_group;
        four->inv_rms[k] = 0.0f;
        if (token >= b->n_rows || begin >= b->n) continue;
        four->x[k] = whole_group(padded[k], b->rows[token] + begin, b->n - begin);
        if (b->norm == NULL) continue;
        four->norm[k] = whole_group(padded[QUADS + k], b->norm + begin, b->n - begin);
        four->inv_rms[k] = b->inv_rms[token];
    }
}

/* n_items items, at most four, from `item` on to where kernels.h has them. In a block of four tokens or more each
 * vector's codes lie side by side. */
PE_INLINE void put_four(const block_rows *b, size_t item, size_t n_items, const transformed_four *four, float factor) {
    size_t width = (size_t)1 << b->width_bits;
    int8_t dense[QUADS * PE_GROUP];
    int8_t *first = b->codes + item_group(b, item) * b->group_bytes + item_token(b, item) * 4;
    float scales[QUADS];
    int32_t corrections[QUADS];
    if (width >= QUADS) {
        round_four(first, width * 4, b->scales + item, b->corrections + item, four, factor);
        return;
    }
    round_four(dense, PE_PANEL, scales, corrections, four, factor);
    for (size_t k = 0; k < n_items; k++) {
        int8_t *to = b->codes + item_group(b, item + k) * b->group_bytes + item_token(b, item + k) * 4;
        for (size_t k4 = 0; k4 < PE_GROUP / 4; k4++) memcpy(to + k4 * 4 * width, dense + k4 * PE_PANEL + k * 4, 4);
        b->scales[item + k] = scales[k], b->corrections[item + k] = corrections[k];
    }
}

/* inv_rms of every row. Returns a bit for each whose sum of squares is not finite. */
static uint32_t norm_rows(block_rows *b, float eps) {
    float sums[PE_TOKEN_BLOCK];
    uint32_t not_finite = 0;
    size_t t = 0;
    for (; t + 4 <= b->n_rows; t += 4) sums_of_squares(sums + t, b->rows + t, b->n, 4);
    for (; t < b->n_rows; t++) sums_of_squares(sums + t, b->rows + t, b->n, 1);
    for (t = 0; t < b->n_rows; t++) {
        b->inv_rms[t] = 1.0f / sqrtf(sums[t] / (float)b->n + eps);
        not_finite |= (uint32_t)((pe_float_bits(sums[t]) & 0x7fffffffu) >= PE_NOT_FINITE_BITS) << t;
    }
    return not_finite;
}

/* A bit for each token that has a scale which is not finite, as it is where the group's largest magnitude is not. */
static uint32_t not_finite_tokens(const block_rows *b, size_t n_items) {
    i16 most = i16_zero();
    float lanes[PE_PANEL];
    uint32_t not_finite = 0;
    size_t item = 0;
    for (; item + PE_PANEL <= n_items; item += PE_PANEL) most = v16_abs_bits_max(most, v16_load(b->scales + item));
    v16_store(lanes, v16_from_bits(most)); /* widths divide 16: a lane has scales of one token */
    for (size_t lane = 0; lane < PE_PANEL; lane++)
        not_finite |= (uint32_t)(pe_float_bits(lanes[lane]) >= PE_NOT_FINITE_BITS) << item_token(b, lane);
    for (; item < n_items; item++)
        not_finite |= (uint32_t)((pe_float_bits(b->scales[item]) & 0x7fffffffu) >= PE_NOT_FINITE_BITS) << item_token(b, item);
    return not_finite;
}

/* quantize of kernels.h, whose codes of the block begin at `codes` and are group_bytes apart from group to group. */
static uint32_t quantize_block(pe_activations *x, size_t first, int8_t *codes, size_t group_bytes, const float *const *rows,
                               size_t n, const float *norm, float eps) {
    size_t left = x->n_tokens - first, width = pe_block_width(left), block = pe_hadamard_block(n);
    size_t first_scale = first * (x->n / PE_GROUP);
    block_rows b = {.rows = rows,
                    .n_rows = left < width ? left : width,
                    .n = n,
                    .norm = norm,
                    .width_bits = (size_t)__builtin_ctzll(width),
                    .codes = codes,
                    .group_bytes = group_bytes,
                    .scales = x->scales + first_scale,
                    .corrections = x->corrections + first_scale};
    uint32_t not_finite = norm != NULL ? norm_rows(&b, eps) : 0;
    transformed_four transformed[AHEAD];
    float padded[2 * QUADS][PE_GROUP], factor = pe_input_factor(block);
    size_t end = x->n / PE_GROUP * width;
    for (size_t begin = 0; begin < end; begin += AHEAD * QUADS) {
        size_t n_items = end - begin < AHEAD * QUADS ? end - begin : AHEAD * QUADS;
        for (size_t i = 0; i < n_items; i += QUADS) {
            transformed_four *t = &transformed[i / QUADS];
            four_groups four;
            take_four(&four, padded, &b, begin + i);
            if (norm != NULL) transform_four(t, &four, block, 1);
            else transform_four(t, &four, block, 0);
        }
        for (size_t i = 0; i < n_items; i += QUADS)
            put_four(&b, begin + i, n_items - i < QUADS ? n_items - i : QUADS, &transformed[i / QUADS], factor);
    }
    return not_finite | not_finite_tokens(&b, end);
}

static uint32_t quantize(pe_activations *x, size_t first, const float *const *rows, size_t n, const float *norm,
                         float eps) {
    size_t group_bytes = pe_block_width(x->n_tokens - first) * PE_GROUP;
    return quantize_block(x, first, x->codes + first * x->n, group_bytes, rows, n, norm, eps);
}

#undef PE_HADAMARD_LANES

#endif

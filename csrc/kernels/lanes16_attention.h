/* lanes16_attention.h: the attention of lanes16.h, which includes this, over one chunk of positions; FORMAT.md section 8.
 *
 * Scores are int8 products of queries with panels of K, sixteen positions in the lanes; values are int8 products of quantized
 * probabilities with V, sixteen columns in the lanes. So no integer product adds across lanes. */
#ifndef PE_LANES16_ATTENTION_H
#define PE_LANES16_ATTENTION_H

/* RUN(n) with the constant that n_rows (1..most, most at most 8) is: register blocks must know their size. */
#define PE_WITH_ROWS(n_rows, most, RUN) \
    switch (n_rows) { \
    case 1: RUN(1); break; \
    case 2: RUN((most) < 2 ? (most) : 2); break; \
    case 3: RUN((most) < 3 ? (most) : 3); break; \
    case 4: RUN((most) < 4 ? (most) : 4); break; \
    case 5: RUN((most) < 5 ? (most) : 5); break; \
    case 6: RUN((most) < 6 ? (most) : 6); break; \
    case 7: RUN((most) < 7 ? (most) : 7); break; \
    default: RUN(most); \
    }

/* ------------------------------------------------------------------ scores */

/* Up to SCORE_ROWS queries at distances that are constants. */
typedef struct query_block {
    int8_t codes[SCORE_ROWS][PE_MAX_HEAD_DIM];
    float scales[SCORE_ROWS]; /* times c */
    int32_t corrections[SCORE_ROWS];
} query_block;

PE_INLINE void pack_queries(query_block *packed, const int8_t *q, const float *q_scales, const int32_t *q_corrections,
                            size_t n_rows, size_t head_dim_p, float c) {
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t i = 0; i < head_dim_p; i += 16) memcpy(packed->codes[r] + i, q + r * head_dim_p + i, 16);
        packed->scales[r] = c * q_scales[r];
        packed->corrections[r] = q_corrections[r];
    }
}

/* One panel of 16 positions against n_r queries. */
PE_INLINE void scores_block(float *scores, const query_block *q, size_t head_dim_p, const int8_t *k, const float *k_scales,
                            const int n_r) {
    i16 d[SCORE_ROWS];
    PE_UNROLL for (int r = 0; r < n_r; r++) d[r] = dot_start(q->corrections[r]);
    for (size_t i = 0; i < head_dim_p; i += 16)
        dot_steps(d, SCORE_ROWS, k + i * PE_PANEL, 0, q->codes[0] + i, 4, PE_MAX_HEAD_DIM, 4, 1, n_r);
    v16 k_scale = v16_load(k_scales);
    PE_UNROLL for (int r = 0; r < n_r; r++)
        v16_store(scores + r * PE_CHUNK, v16_mul(v16_mul(i16_to_float(d[r]), v16_set1(q->scales[r])), k_scale));
}

/* Into the second level: more lines can be on their way there than into the first. */
PE_INLINE void prefetch(const int8_t *p, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* V of the same positions is on its way while K is worked on: a decode reads both from memory, once. */
static void attention_scores(float *scores, const int8_t *q, const float *q_scales, const int32_t *q_corrections, size_t n_rows,
                             size_t head_dim_p, const pe_kv_chunk *kv, size_t n_positions, float c) {
    for (size_t r = 0; r < n_rows; r += SCORE_ROWS) {
        size_t n_r = n_rows - r < SCORE_ROWS ? n_rows - r : SCORE_ROWS;
        query_block packed;
        pack_queries(&packed, q + r * head_dim_p, q_scales + r, q_corrections + r, n_r, head_dim_p, c);
#define PE_SCORES(n) \
    for (size_t j = 0; j < n_positions; j += PE_PANEL) { \
        if (r == 0) prefetch(kv->v + j * head_dim_p, PE_PANEL * head_dim_p); \
        scores_block(scores + r * PE_CHUNK + j, &packed, head_dim_p, kv->k + j * head_dim_p, kv->k_scales + j, n); \
    }
        PE_WITH_ROWS(n_r, SCORE_ROWS, PE_SCORES)
#undef PE_SCORES
    }
}

static void attention_scores_f32(float *scores, const float *q, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                                 size_t n_positions, float c) {
    for (size_t r = 0; r < n_rows; r++)
        for (size_t j = 0; j < n_positions; j += PE_PANEL) {
            v16 acc = v16_set1(0.0f);
            for (size_t i = 0; i < head_dim_p; i++)
                acc = v16_fma(v16_set1(q[r * head_dim_p + i]), v16_load(kv->k_f32 + (j / PE_PANEL * head_dim_p + i) * PE_PANEL), acc);
            v16_store(scores + r * PE_CHUNK + j, v16_mul(v16_set1(c), acc));
        }
}

/* One panel of 16 positions for n_r queries; angles (n_half, 2, 16). */
PE_INLINE void key_bias_block(float *scores, const float *rotated, const uint32_t *pairs, size_t n_pairs, const float *angles,
                              const int n_r) {
    v16 score[SCORE_ROWS];
    PE_UNROLL for (int r = 0; r < n_r; r++) score[r] = v16_load(scores + r * PE_CHUNK);
    for (size_t p = 0; p < n_pairs; p++) {
        const float *u = rotated + p, *w = u + n_pairs, *angle = angles + pairs[p] * 2 * PE_PANEL;
        v16 cos = v16_load(angle), sin = v16_load(angle + PE_PANEL);
        PE_UNROLL for (int r = 0; r < n_r; r++) {
            score[r] = v16_fma(v16_set1(u[(size_t)r * 2 * n_pairs]), cos, score[r]);
            score[r] = v16_fma(v16_set1(w[(size_t)r * 2 * n_pairs]), sin, score[r]);
        }
    }
    PE_UNROLL for (int r = 0; r < n_r; r++) v16_store(scores + r * PE_CHUNK, score[r]);
}

static void attention_key_bias(float *scores, const float *rotated, size_t n_rows, const uint32_t *pairs, size_t n_pairs,
                               const float *angles, size_t n_half, size_t n_positions) {
    for (size_t r = 0; r < n_rows; r += SCORE_ROWS) {
        size_t n_r = n_rows - r < SCORE_ROWS ? n_rows - r : SCORE_ROWS;
#define PE_KEY_BIAS(n) \
    for (size_t j = 0; j < n_positions; j += PE_PANEL) \
        key_bias_block(scores + r * PE_CHUNK + j, rotated + r * 2 * n_pairs, pairs, n_pairs, angles + j * 2 * n_half, n);
        PE_WITH_ROWS(n_r, SCORE_ROWS, PE_KEY_BIAS)
#undef PE_KEY_BIAS
    }
}

/* ------------------------------------------------------------------ softmax */

/* Strip j (a multiple of 16), which has lanes of [seen.begin, seen.end): those are x's, the others y's. */
PE_INLINE v16 visible_lanes(v16 x, v16 y, size_t j, pe_visible seen) {
    if (j < seen.begin) x = v16_first_lanes(seen.begin - j, y, x);
    return seen.end - j < 16 ? v16_first_lanes(seen.end - j, x, y) : x;
}

/* The largest scores of n_r rows (a constant, at most ROWS_OF_MAXIMA) that see the same, which is something. */
enum { ROWS_OF_MAXIMA = 4 };
PE_INLINE void largest_scores(float *m, const float *scores, pe_visible seen, const int n_r) {
    v16 most[ROWS_OF_MAXIMA], nothing = v16_set1(-INFINITY);
    float lanes[PE_PANEL];
    size_t j = seen.begin / 16 * 16;
    PE_UNROLL for (int r = 0; r < n_r; r++) most[r] = visible_lanes(v16_load(scores + r * PE_CHUNK + j), nothing, j, seen);
    for (j += 16; j + 16 <= seen.end; j += 16)
        PE_UNROLL for (int r = 0; r < n_r; r++) most[r] = v16_max(v16_load(scores + r * PE_CHUNK + j), most[r]);
    if (j < seen.end)
        PE_UNROLL for (int r = 0; r < n_r; r++)
            most[r] = v16_max(visible_lanes(v16_load(scores + r * PE_CHUNK + j), nothing, j, seen), most[r]);
    if (n_r == 1) {
        m[0] = v16_max_lanes(most[0]);
        return;
    }
    PE_UNROLL for (int r = n_r; r < ROWS_OF_MAXIMA; r++) most[r] = most[0];
    v16 largest = v16_max_in_quads(most);
    largest = v16_max(largest, v16_swap4(largest));
    v16_store(lanes, v16_max(largest, v16_swap8(largest)));
    memcpy(m, lanes, (size_t)n_r * sizeof *m);
}

/* One row, from its maximum on; returns l. The groups that weights fill are those of [first, last). v_scales if `scaled`. */
PE_INLINE float weigh_row(float *scores, pe_visible seen, size_t first, size_t last, float m, const float *v_scales,
                          const int scaled) {
    v16 total = v16_set1(0.0f), nothing = v16_set1(0.0f), maximum = v16_set1(m);
    size_t j = first;
    for (; j + 16 <= seen.begin; j += 16) v16_store(scores + j, nothing);
    for (; j < seen.end; j += 16) {
        bool whole = j >= seen.begin && seen.end - j >= 16;
        v16 x = v16_sub(v16_load(scores + j), maximum);
        v16 p = exp16(whole ? x : visible_lanes(x, v16_set1(-INFINITY), j, seen));
        total = v16_add(total, p);
        if (scaled) {
            p = v16_mul(p, v16_load(v_scales + j));
            if (!whole) p = visible_lanes(p, nothing, j, seen);
        }
        v16_store(scores + j, p);
    }
    for (; j < last; j += 16) v16_store(scores + j, nothing);
    return v16_sum_lanes(total);
}

/* All maxima first: a row's exponentials wait for its own, those of other rows need not. */
static void attention_weights(float *m, float *l, float *scores, const pe_visible *runs, size_t n_runs, size_t n_rep, pe_visible all,
                              const float *v_scales) {
    size_t first = pe_group_begin(all.begin), last = pe_group_end(all.end);
    for (size_t run = 0; run < n_runs; run++) {
        if (runs[run].begin >= runs[run].end) continue;
        for (size_t i = 0, r = run * n_rep; i < n_rep; i += ROWS_OF_MAXIMA, r += ROWS_OF_MAXIMA) {
#define PE_LARGEST(n) largest_scores(m + r, scores + r * PE_CHUNK, runs[run], n)
            PE_WITH_ROWS(n_rep - i, ROWS_OF_MAXIMA, PE_LARGEST)
#undef PE_LARGEST
        }
    }
    for (size_t run = 0; run < n_runs; run++)
        for (size_t r = run * n_rep; r < (run + 1) * n_rep; r++) {
            bool nothing = runs[run].begin >= runs[run].end;
            pe_visible seen = nothing ? (pe_visible){0, 0} : runs[run];
            if (nothing) m[r] = 0.0f;
            l[r] = v_scales == NULL ? weigh_row(scores + r * PE_CHUNK, seen, first, last, m[r], NULL, 0)
                                    : weigh_row(scores + r * PE_CHUNK, seen, first, last, m[r], v_scales, 1);
        }
}

/* ------------------------------------------------------------------ values */

enum { PROBABILITY_ROWS = 4 * VALUE_ROWS }; /* rows that are quantized before they are multiplied */

/* Rows of a chunk's weights, quantized, from the group of position `first` on. */
typedef struct probability_block {
    int8_t codes[PROBABILITY_ROWS][PE_CHUNK];
    float scales[PROBABILITY_ROWS * PE_CHUNK / PE_PROBABILITY_GROUP]; /* (rows, 4 n_fours) */
    size_t first, n_groups, n_fours;
} probability_block;

/* Lane k of each quad: the largest weight of the k-th of four groups in that quad's lanes; n_left groups are there, the others
 * are the last one again. */
PE_INLINE v16 four_maxima(const float *weights, size_t n_left) {
    v16 most[4];
    PE_UNROLL for (size_t k = 0; k < 4; k++) {
        const float *group = weights + (k < n_left ? k : n_left - 1) * PE_PROBABILITY_GROUP;
        most[k] = v16_max(v16_load(group), v16_load(group + 16));
    }
    return v16_max_in_quads(most);
}

/* Scales and inverses (rows, 4 n_fours) of rows of weights from their first group on; four fours share two divisions. */
PE_INLINE void scales_of_rows(float *scales, float *inverses, const float *w, size_t n_rows, size_t n_groups, size_t n_fours) {
    v16 most_code = v16_set1(127.0f);
    for (size_t i = 0, row = 0, four = 0; i < n_rows * n_fours; i += 4) {
        v16 most[4];
        PE_UNROLL for (int k = 0; k < 4; k++) {
            most[k] = four_maxima(w + row * PE_CHUNK + four * 4 * PE_PROBABILITY_GROUP, n_groups - four * 4);
            if (++four == n_fours) four = 0, row = row + 1 < n_rows ? row + 1 : row;
        }
        v16_transpose_quads(most);
        v16 largest = v16_max(v16_max(most[0], most[1]), v16_max(most[2], most[3]));
        v16_store(scales + i * 4, v16_zero_if_less(largest, 0x1p-64f, v16_div(largest, most_code)));
        v16_store(inverses + i * 4, v16_zero_if_less(largest, 0x1p-64f, v16_div(most_code, largest)));
    }
}

/* Rows of weights, PE_CHUNK apart. Row by row each of the two steps would wait for the one before. */
PE_INLINE void quantize_probabilities(probability_block *block, const float *w, size_t n_rows, size_t begin, size_t end) {
    size_t first = pe_group_begin(begin), n_groups = (pe_group_end(end) - first) / PE_PROBABILITY_GROUP, n_fours = (n_groups + 3) / 4;
    float inverses[PROBABILITY_ROWS * PE_CHUNK / PE_PROBABILITY_GROUP];
    block->first = first, block->n_groups = n_groups, block->n_fours = n_fours;
    scales_of_rows(block->scales, inverses, w + first, n_rows, n_groups, n_fours);
    for (size_t r = 0; r < n_rows; r++)
        for (size_t g = 0; g < n_groups; g += 2) { /* two at a time, the last one perhaps twice */
            size_t next = g + 1 < n_groups ? g + 1 : g;
            const float *a = w + r * PE_CHUNK + first + g * PE_PROBABILITY_GROUP, *b = a + (next - g) * PE_PROBABILITY_GROUP;
            v16 to_a = v16_set1(inverses[r * n_fours * 4 + g]), to_b = v16_set1(inverses[r * n_fours * 4 + next]);
            v16 x[4] = {v16_mul(v16_load(a), to_a), v16_mul(v16_load(a + 16), to_a), v16_mul(v16_load(b), to_b),
                        v16_mul(v16_load(b + 16), to_b)};
            v16_four_to_i8(block->codes[r] + g * PE_PROBABILITY_GROUP, x);
        }
}

/* n_r rows of codes, PE_CHUNK apart, and scales, scales_stride apart, times n_c vectors of 16 columns of V over n_groups groups; all
 * at the first of them. */
PE_INLINE void values_block(float *out, const int8_t *codes, const float *scales, size_t scales_stride, size_t n_groups,
                            const int8_t *v, size_t head_dim_p, const int n_r, const int n_c) {
    v16 o[VALUE_ROWS][VALUE_COLUMNS];
    PE_UNROLL for (int r = 0; r < n_r; r++) PE_UNROLL for (int c = 0; c < n_c; c++) o[r][c] = v16_set1(0.0f);
    for (size_t j = 0; j < n_groups * PE_PROBABILITY_GROUP; j += PE_PROBABILITY_GROUP, scales++) {
        i16 sums[VALUE_ROWS][VALUE_COLUMNS];
        PE_UNROLL for (int r = 0; r < n_r; r++) PE_UNROLL for (int c = 0; c < n_c; c++) sums[r][c] = i16_zero();
        _Pragma("GCC unroll VALUE_UNROLL") for (size_t k = 0; k < PE_PROBABILITY_GROUP; k += 4) {
            v16x4 columns[VALUE_COLUMNS];
            PE_UNROLL for (int c = 0; c < n_c; c++) columns[c] = v16x4_load(v + (j + k) * head_dim_p + (size_t)c * 64);
            PE_UNROLL for (int r = 0; r < n_r; r++) {
                p4 four = p4_load(codes + r * PE_CHUNK + j + k);
                PE_UNROLL for (int c = 0; c < n_c; c++) sums[r][c] = dot_values(sums[r][c], columns[c], four);
            }
        }
        PE_UNROLL for (int r = 0; r < n_r; r++) {
            v16 scale = v16_set1(scales[(size_t)r * scales_stride]);
            PE_UNROLL for (int c = 0; c < n_c; c++) o[r][c] = v16_fma(i16_to_float(sums[r][c]), scale, o[r][c]);
        }
    }
    PE_UNROLL for (int r = 0; r < n_r; r++)
        PE_UNROLL for (int c = 0; c < n_c; c++) v16_store(out + (size_t)r * head_dim_p + c * 16, o[r][c]);
}

/* All columns, for n_r rows (a constant) from `row` on. */
PE_INLINE void values_rows(float *out, const probability_block *p, size_t row, const int8_t *v, size_t head_dim_p,
                           const int n_r) {
    size_t stride = 4 * p->n_fours, d = 0;
    const float *scales = p->scales + row * stride;
    v += p->first * head_dim_p;
    for (; d + VALUE_COLUMNS * 16 <= head_dim_p; d += VALUE_COLUMNS * 16)
        values_block(out + d, p->codes[row], scales, stride, p->n_groups, v + d * 4, head_dim_p, n_r, VALUE_COLUMNS);
    for (; d < head_dim_p; d += 16)
        values_block(out + d, p->codes[row], scales, stride, p->n_groups, v + d * 4, head_dim_p, n_r, 1);
}

/* Not inlined: a compiler that saw the most that n_rows can be would write a copy of the loop's body for each of its passes. */
static __attribute__((noinline)) void multiply_values(float *out, const probability_block *p, size_t n_rows, const int8_t *v,
                                                      size_t head_dim_p) {
    for (size_t row = 0; row < n_rows; row += VALUE_ROWS) {
#define PE_VALUES(n_r) values_rows(out + row * head_dim_p, p, row, v, head_dim_p, n_r)
        PE_WITH_ROWS(n_rows - row, VALUE_ROWS, PE_VALUES)
#undef PE_VALUES
    }
}

static void attention_values(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv, size_t begin,
                             size_t end) {
    probability_block block;
    for (size_t row = 0; row < n_rows; row += PROBABILITY_ROWS) {
        size_t n = n_rows - row < PROBABILITY_ROWS ? n_rows - row : PROBABILITY_ROWS;
        quantize_probabilities(&block, w + row * PE_CHUNK, n, begin, end);
        multiply_values(out + row * head_dim_p, &block, n, kv->v, head_dim_p);
    }
}

static void attention_values_f32(float *out, const float *w, size_t n_rows, size_t head_dim_p, const pe_kv_chunk *kv,
                                 size_t begin, size_t end) {
    for (size_t r = 0; r < n_rows; r++)
        for (size_t d = 0; d < head_dim_p; d += 16) {
            v16 o = v16_set1(0.0f);
            for (size_t j = begin; j < end; j++)
                o = v16_fma(v16_set1(w[r * PE_CHUNK + j]), v16_load(kv->v_f32 + j * head_dim_p + d), o);
            v16_store(out + r * head_dim_p + d, o);
        }
}

/* ------------------------------------------------------------------ states of chunks */

/* Row r of the states. Of a row that both sides have seen, total->m[r] becomes `most`, and a and b are what their parts are
 * multiplied with. */
PE_INLINE void merge_row(const pe_attention_state *total, const pe_attention_state *chunk, size_t r, size_t head_dim_p, float most,
                         float a, float b) {
    float *o = total->o + r * head_dim_p;
    const float *o_chunk = chunk->o + r * head_dim_p;
    if (chunk->l[r] == 0.0f) return;
    if (total->l[r] == 0.0f) {
        total->m[r] = chunk->m[r], total->l[r] = chunk->l[r];
        for (size_t i = 0; i < head_dim_p; i += 16) v16_store(o + i, v16_load(o_chunk + i));
        return;
    }
    total->m[r] = most;
    total->l[r] = fmaf(chunk->l[r], b, total->l[r] * a);
    for (size_t i = 0; i < head_dim_p; i += 16)
        v16_store(o + i, v16_fma(v16_load(o_chunk + i), v16_set1(b), v16_mul(v16_load(o + i), v16_set1(a))));
}

/* Sixteen rows' exponentials at once. */
static void attention_merge(const pe_attention_state *total, const pe_attention_state *chunk, size_t n_rows, size_t head_dim_p) {
    for (size_t first = 0; first < n_rows; first += PE_PANEL) {
        size_t n_r = n_rows - first < PE_PANEL ? n_rows - first : PE_PANEL;
        float m[PE_PANEL] = {0}, m_chunk[PE_PANEL] = {0}, most[PE_PANEL], a[PE_PANEL], b[PE_PANEL];
        memcpy(m, total->m + first, n_r * sizeof *m);
        memcpy(m_chunk, chunk->m + first, n_r * sizeof *m);
        v16 ours = v16_load(m), theirs = v16_load(m_chunk), larger = v16_max(theirs, ours);
        v16_store(most, larger);
        v16_store(a, exp16(v16_sub(ours, larger)));
        v16_store(b, exp16(v16_sub(theirs, larger)));
        for (size_t r = 0; r < n_r; r++) merge_row(total, chunk, first + r, head_dim_p, most[r], a[r], b[r]);
    }
}

#undef PE_WITH_ROWS

#endif

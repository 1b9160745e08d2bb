/* sample.c: one call, logits -> token: step 1 (edits.c), then the greedy choice or steps 2 to 7 (choice.c), then
 * log-probabilities (logprobs.c). */
#include <math.h>

#include "float_env.h"
#include "kernels/pe_math.h"
#include "state.h"
#include "status.h"

/* ------------------------------------------------------------------ passes over the logits */

bool pe_sampler_finite_maximum(const float *logits, size_t n, float *out) {
    float lanes[16];
    uint32_t largest_bits = 0;
    size_t i = 0;
    for (int l = 0; l < 16; l++) lanes[l] = logits[0];
    for (; i + 16 <= n; i += 16) {
        int32_t bad = 0;
        for (size_t l = 0; l < 16; l++) {
            float x = logits[i + l];
            bad |= (int32_t)(pe_float_bits(x) & 0x7fffffffu) >= (int32_t)PE_NOT_FINITE_BITS;
            lanes[l] = x > lanes[l] ? x : lanes[l];
        }
        if (bad) return false;
    }
    for (; i < n; i++) {
        uint32_t bits = pe_float_bits(logits[i]) & 0x7fffffffu;
        largest_bits = bits > largest_bits ? bits : largest_bits;
        lanes[0] = logits[i] > lanes[0] ? logits[i] : lanes[0];
    }
    for (int l = 1; l < 16; l++) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
    *out = lanes[0];
    return largest_bits < PE_NOT_FINITE_BITS;
}

static float maximum(const float *logits, size_t n) {
    float lanes[16];
    size_t i = 0;
    for (int l = 0; l < 16; l++) lanes[l] = logits[0];
    for (; i + 16 <= n; i += 16)
        for (size_t l = 0; l < 16; l++) lanes[l] = logits[i + l] > lanes[l] ? logits[i + l] : lanes[l];
    for (; i < n; i++) lanes[0] = logits[i] > lanes[0] ? logits[i] : lanes[0];
    for (int l = 1; l < 16; l++) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
    return lanes[0];
}

/* ------------------------------------------------------------------ one call */

/* What came of a row. */
typedef struct choice {
    size_t index;          /* of the token chosen */
    const float *adjusted; /* (n) logits after step 1 */
    float raw_top, top;    /* the largest logit before and after step 1 */
} choice;

static pe_status choose(pe_sampler *s, const pe_logit_row *row, uint64_t position, const uint32_t *mask, choice *c, char *err) {
    if (!pe_sampler_finite_maximum(row->values, row->n, &c->raw_top))
        return pe_fail(PE_ERR_NOT_FINITE, err, "a logit at position %llu is an infinity or NaN",
                       (unsigned long long)position);
    pe_status status = pe_sampler_edit(s, row, mask, &c->adjusted, err);
    if (status != PE_OK) return status;
    c->top = c->adjusted == row->values ? c->raw_top : maximum(c->adjusted, row->n);
    if (c->top == -INFINITY)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err,
                       "every token is banned: allowed_token_ids, bad tokens, logit_bias, min_tokens and the mask "
                       "leave none");
    if (s->params.temperature == 0.0)
        for (c->index = 0; c->adjusted[c->index] != c->top;) c->index++;
    else
        c->index = (size_t)pe_sampler_choose(s, c->adjusted, row->n, c->top, position);
    return PE_OK;
}

static pe_status sample(pe_sampler *s, const float *logits, uint64_t position, const uint32_t *mask,
                        pe_sample_result *out, char *err) {
    choice c;
    pe_status status = choose(s, &(pe_logit_row){logits, NULL, s->vocab_size}, position, mask, &c, err);
    if (status != PE_OK) return status;
    out->token = (int32_t)c.index;
    out->n_top = 0;
    out->logprob = 0.0;
    if (s->params.n_top_logprobs >= 0)
        pe_sampler_fill_logprobs(logits, s->vocab_size, c.raw_top, (size_t)s->params.n_top_logprobs, out);
    return PE_OK;
}

pe_status pe_sampler_sample(pe_sampler *sampler, const float *logits, uint64_t position, const uint32_t *mask,
                            pe_sample_result *out, char *err) {
    uint64_t env = pe_float_env_enter();
    pe_status status = sample(sampler, logits, position, mask, out, err);
    pe_float_env_leave(env);
    return status;
}

pe_status pe_sampler_guess(pe_sampler *s, const float *logits, const int32_t *ids, size_t n, uint64_t position,
                           const uint32_t *mask, pe_guess *out, char *err) {
    if (n < 1 || n > s->vocab_size || (ids == NULL && n != s->vocab_size))
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%zu logits for a vocabulary of %zu", n, s->vocab_size);
    choice c;
    uint64_t env = pe_float_env_enter();
    pe_status status = choose(s, &(pe_logit_row){logits, ids, n}, position, mask, &c, err);
    if (status == PE_OK) {
        double temperature = s->params.temperature > 0.0 ? s->params.temperature : 1.0;
        out->token = ids == NULL ? (int32_t)c.index : ids[c.index];
        out->probability = pe_sampler_probability(c.adjusted, n, c.index, c.top, temperature);
    }
    pe_float_env_leave(env);
    return status;
}

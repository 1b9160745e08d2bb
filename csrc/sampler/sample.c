/* sample.c: one call, logits -> token: step 1 (edits.c), then the greedy choice or the filters and the draw (spread.c, choice.c),
 * then log-probabilities (logprobs.c). */
#include <math.h>

#include "candidates.h"
#include "float_env.h"
#include "philox.h"
#include "status.h"

/* ------------------------------------------------------------------ one call */

/* What came of a row. */
typedef struct choice {
    size_t index;          /* of the token chosen */
    const float *adjusted; /* (n) logits after step 1, and from `choose` on after step 2 */
    float raw_top, top;    /* the largest logit before and after step 1 */
} choice;

/* The first of the logits (n) that equals `top`, which is one of them. */
static size_t first_of(const float *logits, size_t n, float top) {
    size_t i = 0;
    for (; n - i >= PE_SAMPLER_BLOCK; i += PE_SAMPLER_BLOCK) {
        int any = 0;
        for (size_t k = 0; k < PE_SAMPLER_BLOCK; k++) any |= logits[i + k] == top;
        if (any) break;
    }
    while (logits[i] != top) i++;
    return i;
}

/* Step 1: the row's adjusted logits and their largest. */
static pe_status adjust(pe_sampler *s, const pe_logit_row *row, uint64_t position, const uint32_t *mask, choice *c, char *err) {
    if (!s->kernels->maximum(row->values, row->n, &c->raw_top))
        return pe_fail(PE_ERR_NOT_FINITE, err, "a logit at position %llu is an infinity or NaN",
                       (unsigned long long)position);
    c->top = -INFINITY;
    for (int with_ngrams = s->params.no_repeat_ngram_size > 0; with_ngrams >= 0 && c->top == -INFINITY; with_ngrams--) {
        pe_status status = pe_sampler_edit(s, row, mask, with_ngrams, &c->adjusted, err);
        if (status != PE_OK) return status;
        c->top = c->raw_top;
        if (c->adjusted != row->values) s->kernels->maximum(c->adjusted, row->n, &c->top); /* banned ones are -infinity */
    }
    if (c->top == -INFINITY)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err,
                       "every token is banned: allowed_token_ids, bad tokens and words, logit_bias, min_tokens and the mask "
                       "leave none");
    return PE_OK;
}

static pe_status choose(pe_sampler *s, const pe_logit_row *row, uint64_t position, const uint32_t *mask, choice *c, char *err) {
    pe_status status = adjust(s, row, position, mask, c, err);
    if (status != PE_OK) return status;
    double temperature = s->params.temperature;
    if (temperature > 0.0) {
        if (s->params.top_n_sigma > 0.0) pe_sampler_keep_sigma(s, s->adjusted, row->n, c->top);
        temperature = pe_sampler_temperature(s, c->adjusted, row->n, c->top);
    }
    if (temperature == 0.0)
        c->index = first_of(c->adjusted, row->n, c->top);
    else
        c->index = (size_t)pe_sampler_choose(s, c->adjusted, row->n, c->top, temperature, position);
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
        pe_sampler_fill_logprobs(s->kernels, logits, s->vocab_size, c.raw_top, NULL, (size_t)s->params.n_top_logprobs, out);
    return PE_OK;
}

pe_status pe_sampler_sample(pe_sampler *sampler, const float *logits, uint64_t position, const uint32_t *mask,
                            pe_sample_result *out, char *err) {
    uint64_t env = pe_float_env_enter();
    pe_status status = sample(sampler, logits, position, mask, out, err);
    pe_float_env_leave(env);
    return status;
}

static pe_status guess(pe_sampler *s, const pe_logit_row *row, uint64_t position, const uint32_t *mask, pe_guess_kind kind,
                       pe_guess *out, char *err) {
    choice c;
    const bool is_greedy = s->params.temperature == 0.0;
    const double temperature = is_greedy ? 1.0 : s->params.temperature;
    pe_status status = kind == PE_GUESS_DRAWN ? choose(s, row, position, mask, &c, err) : adjust(s, row, position, mask, &c, err);
    if (status != PE_OK) return status;
    if (kind == PE_GUESS_LIKELIEST) c.index = first_of(c.adjusted, row->n, c.top);
    out->token = row->ids == NULL ? (int32_t)c.index : row->ids[c.index];
    out->probability = pe_sampler_probability(c.adjusted, row->n, c.index, c.top, temperature);
    if (kind == PE_GUESS_DRAWN || is_greedy) return PE_OK;
    float random = (float)(pe_philox_draw(s->params.seed, position, s->params.sample_index) >> 40) * 0x1p-24f;
    if (random > out->probability) out->probability *= out->probability / random;
    return PE_OK;
}

/* Whether ids (n) ascend in the vocabulary. A head knows some ten thousand: compilers make vectors of this loop, of one with a bool
 * they do not. */
static bool ids_ascend(const int32_t *ids, size_t n, size_t vocab_size) {
    int32_t falls = ids[0] < 0 || (size_t)ids[n - 1] >= vocab_size;
    for (size_t i = 1; i < n; i++) falls |= ids[i - 1] >= ids[i];
    return falls == 0;
}

pe_status pe_sampler_guess(pe_sampler *s, const float *logits, const int32_t *ids, size_t n, uint64_t position,
                           const uint32_t *mask, pe_guess_kind kind, pe_guess *out, char *err) {
    if (n < 1 || n > s->vocab_size || (ids == NULL && n != s->vocab_size))
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%zu logits for a vocabulary of %zu", n, s->vocab_size);
    if (ids != NULL && !ids_ascend(ids, n, s->vocab_size))
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "ids of %zu tokens, which must ascend in a vocabulary of %zu", n, s->vocab_size);
    uint64_t env = pe_float_env_enter();
    pe_status status = guess(s, &(pe_logit_row){logits, ids, n}, position, mask, kind, out, err);
    pe_float_env_leave(env);
    return status;
}

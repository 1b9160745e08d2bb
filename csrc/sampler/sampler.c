/* sampler.c: logits -> token. The law is in sampler.h; this half keeps what has been said, edits the logits by it
 * (step 1) and owns the memory. choice.c has the other steps.
 *
 * Reads in the order of a call: passes over the logits, penalties and masks, the call itself, log-probabilities without
 * a sampler, then the life of a sampler. */
#include "sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "double_math.h"
#include "float_env.h"
#include "kernels/pe_math.h"
#include "state.h"
#include "status.h"

/* ------------------------------------------------------------------ passes over the logits */

/* The largest logit; false if any is an infinity or NaN. */
static bool finite_maximum(const float *logits, size_t n, float *out) {
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

/* ------------------------------------------------------------------ step 1: penalties, bias, masks */

static pe_status penalize(pe_sampler *s, char *err) {
    const pe_sampler_params *p = &s->params;
    for (size_t i = 0; i < s->n_seen; i++) {
        int32_t id = s->seen[i];
        double l = s->adjusted[id];
        l = l > 0.0 ? l / p->repetition_penalty : l * p->repetition_penalty;
        if (s->n_output[id]) l = l - p->frequency_penalty * s->n_output[id] - p->presence_penalty;
        float rounded = (float)l;
        if ((pe_float_bits(rounded) & 0x7fffffffu) >= PE_NOT_FINITE_BITS)
            return pe_fail(PE_ERR_NOT_FINITE, err, "the logit of token %d overflows under the penalties", (int)id);
        s->adjusted[id] = rounded;
    }
    return PE_OK;
}

/* Step 1 whole: *out is `logits` itself when there is nothing to change. */
static pe_status adjust(pe_sampler *s, const float *logits, const float **out, char *err) {
    const pe_sampler_params *p = &s->params;
    bool ban_stop = p->n_stop && s->n_outputs < (uint64_t)p->min_tokens;
    *out = logits;
    if (!s->adjusted || !(s->n_seen || p->n_bias || p->n_bad || s->banned || ban_stop)) return PE_OK;
    memcpy(s->adjusted, logits, s->vocab_size * sizeof *logits);
    *out = s->adjusted;
    pe_status status = penalize(s, err);
    if (status != PE_OK) return status;
    for (size_t i = 0; i < p->n_bias; i++) {
        float *l = &s->adjusted[p->bias_ids[i]];
        *l = *l + p->bias_values[i];
        if (*l > 3.4028234664e38f)
            return pe_fail(PE_ERR_NOT_FINITE, err, "the logit of token %d overflows under its bias", (int)p->bias_ids[i]);
    }
    if (s->banned)
        for (size_t i = 0; i < s->vocab_size; i++) s->adjusted[i] = s->banned[i] ? -INFINITY : s->adjusted[i];
    for (size_t i = 0; i < p->n_bad; i++) s->adjusted[p->bad[i]] = -INFINITY;
    for (size_t i = 0; ban_stop && i < p->n_stop; i++) s->adjusted[p->stop[i]] = -INFINITY;
    return PE_OK;
}

/* ------------------------------------------------------------------ one call */

static pe_status sample(pe_sampler *s, const float *logits, uint64_t position, pe_sample_result *out, char *err) {
    const float *adjusted;
    float raw_top, top;
    if (!finite_maximum(logits, s->vocab_size, &raw_top))
        return pe_fail(PE_ERR_NOT_FINITE, err, "a logit at position %llu is an infinity or NaN",
                       (unsigned long long)position);
    pe_status status = adjust(s, logits, &adjusted, err);
    if (status != PE_OK) return status;
    top = adjusted == logits ? raw_top : maximum(adjusted, s->vocab_size);
    if (top == -INFINITY)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err,
                       "every token is banned: allowed_token_ids, bad tokens, logit_bias and min_tokens leave none");
    if (s->params.temperature == 0.0) {
        size_t i = 0;
        while (adjusted[i] != top) i++;
        out->token = (int32_t)i;
    } else {
        out->token = pe_sampler_choose(s, adjusted, top, position);
    }
    out->n_top = 0;
    out->logprob = 0.0;
    if (s->params.n_top_logprobs >= 0)
        pe_sampler_fill_logprobs(logits, s->vocab_size, raw_top, (size_t)s->params.n_top_logprobs, out);
    return PE_OK;
}

pe_status pe_sampler_sample(pe_sampler *sampler, const float *logits, uint64_t position, pe_sample_result *out,
                            char *err) {
    uint64_t env = pe_float_env_enter();
    pe_status status = sample(sampler, logits, position, out, err);
    pe_float_env_leave(env);
    return status;
}

pe_status pe_sampler_accept(pe_sampler *s, int32_t token, bool is_prompt, char *err) {
    if (token < 0 || (size_t)token >= s->vocab_size)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token %d is not in a vocabulary of %zu", (int)token,
                       s->vocab_size);
    if (!is_prompt) s->n_outputs++;
    if (!s->seen) return PE_OK;
    if (!s->in_prompt[token] && !s->n_output[token]) s->seen[s->n_seen++] = token;
    if (is_prompt)
        s->in_prompt[token] = 1;
    else if (s->n_output[token] < UINT32_MAX)
        s->n_output[token]++;
    return PE_OK;
}

void pe_sampler_reset(pe_sampler *s) {
    for (size_t i = 0; i < s->n_seen; i++) {
        s->in_prompt[s->seen[i]] = 0;
        s->n_output[s->seen[i]] = 0;
    }
    s->n_seen = 0;
    s->n_outputs = 0;
}

/* ------------------------------------------------------------------ log-probabilities of a given text */

pe_status pe_logprobs(const float *logits, size_t vocab_size, int32_t token, size_t n_top, pe_sample_result *out,
                      char *err) {
    if (vocab_size == 0 || vocab_size > PE_SAMPLER_MAX_VOCAB)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "vocab_size %zu is not in [1, %u]", vocab_size,
                       PE_SAMPLER_MAX_VOCAB);
    if (token < 0 || (size_t)token >= vocab_size)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token %d is not in a vocabulary of %zu", (int)token, vocab_size);
    if (n_top > PE_SAMPLER_MAX_TOP_LOGPROBS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%zu alternatives asked for, at most %d", n_top,
                       PE_SAMPLER_MAX_TOP_LOGPROBS);
    uint64_t env = pe_float_env_enter();
    float top;
    bool finite = finite_maximum(logits, vocab_size, &top);
    if (finite) {
        out->token = token;
        pe_sampler_fill_logprobs(logits, vocab_size, top, n_top, out);
    }
    pe_float_env_leave(env);
    return finite ? PE_OK : pe_fail(PE_ERR_NOT_FINITE, err, "a logit is an infinity or NaN");
}

/* ------------------------------------------------------------------ life */

void pe_sampler_params_init(pe_sampler_params *params) {
    *params = (pe_sampler_params){.top_p = 1.0, .typical_p = 1.0, .repetition_penalty = 1.0, .n_top_logprobs = -1};
}

static bool finite_double(double x) { return (pe_double_bits(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u; }

static pe_status check_numbers(size_t vocab_size, const pe_sampler_params *p, char *err) {
    if (vocab_size == 0 || vocab_size > PE_SAMPLER_MAX_VOCAB)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "vocab_size %zu is not in [1, %u]", vocab_size,
                       PE_SAMPLER_MAX_VOCAB);
    const struct {
        const char *name;
        double value;
        bool valid;
    } checks[] = {
        {"temperature", p->temperature, p->temperature >= 0.0},
        {"top_k", p->top_k, p->top_k >= 0},
        {"top_p", p->top_p, p->top_p > 0.0 && p->top_p <= 1.0},
        {"min_p", p->min_p, p->min_p >= 0.0 && p->min_p <= 1.0},
        {"typical_p", p->typical_p, p->typical_p > 0.0 && p->typical_p <= 1.0},
        {"repetition_penalty", p->repetition_penalty, p->repetition_penalty > 0.0},
        {"frequency_penalty", p->frequency_penalty, true},
        {"presence_penalty", p->presence_penalty, true},
        {"min_tokens", p->min_tokens, p->min_tokens >= 0},
        {"n_top_logprobs", p->n_top_logprobs,
         p->n_top_logprobs >= -1 && p->n_top_logprobs <= PE_SAMPLER_MAX_TOP_LOGPROBS},
    };
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        if (!checks[i].valid || !finite_double(checks[i].value))
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%s = %g is out of range", checks[i].name, checks[i].value);
    return PE_OK;
}

static pe_status check_ids(const char *name, const int32_t *ids, size_t n, size_t vocab_size, char *err) {
    if (n && !ids) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%s has a length but no elements", name);
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || (size_t)ids[i] >= vocab_size)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%s: token %d is not in a vocabulary of %zu", name, (int)ids[i],
                           vocab_size);
    return PE_OK;
}

static pe_status check_lists(size_t vocab_size, const pe_sampler_params *p, char *err) {
    pe_status status = check_ids("logit_bias", p->bias_ids, p->n_bias, vocab_size, err);
    if (status == PE_OK) status = check_ids("allowed tokens", p->allowed, p->n_allowed, vocab_size, err);
    if (status == PE_OK) status = check_ids("bad tokens", p->bad, p->n_bad, vocab_size, err);
    if (status == PE_OK) status = check_ids("stop tokens", p->stop, p->n_stop, vocab_size, err);
    if (status != PE_OK || !p->n_bias) return status;
    if (!p->bias_values) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "logit_bias has ids but no values");
    for (size_t i = 0; i < p->n_bias; i++)
        if (!(p->bias_values[i] < INFINITY)) /* a NaN too */
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "logit_bias of token %d is not finite", (int)p->bias_ids[i]);
    return PE_OK;
}

/* calloc that refuses instead of returning NULL for 0 elements, and remembers a failure. */
static void *allocate(size_t count, size_t size, bool *ok) {
    void *memory = calloc(count ? count : 1, size);
    *ok = *ok && memory;
    return memory;
}

static void copy_ids(int32_t **cursor, const int32_t **list, size_t n) {
    if (n) memcpy(*cursor, *list, n * sizeof **cursor);
    *list = *cursor;
    *cursor += n;
}

/* Copies of the caller's lists. */
static bool own_lists(pe_sampler *s) {
    pe_sampler_params *p = &s->params;
    bool ok = true;
    s->id_lists = allocate(p->n_bias + p->n_bad + p->n_stop, sizeof *s->id_lists, &ok);
    s->bias_values = allocate(p->n_bias, sizeof *s->bias_values, &ok);
    if (p->allowed) s->banned = allocate(s->vocab_size, sizeof *s->banned, &ok);
    if (!ok) return false;
    int32_t *cursor = s->id_lists;
    copy_ids(&cursor, &p->bias_ids, p->n_bias);
    copy_ids(&cursor, &p->bad, p->n_bad);
    copy_ids(&cursor, &p->stop, p->n_stop);
    if (p->n_bias) memcpy(s->bias_values, p->bias_values, p->n_bias * sizeof *s->bias_values);
    p->bias_values = s->bias_values;
    if (s->banned) {
        memset(s->banned, 1, s->vocab_size);
        for (size_t i = 0; i < p->n_allowed; i++) s->banned[p->allowed[i]] = 0;
    }
    p->allowed = NULL;
    return true;
}

/* Only what these parameters can ever use: a greedy sampler without edits holds no buffer. */
static bool own_buffers(pe_sampler *s) {
    const pe_sampler_params *p = &s->params;
    const size_t n = s->vocab_size;
    bool ok = true,
         penalties = p->repetition_penalty != 1.0 || p->frequency_penalty != 0.0 || p->presence_penalty != 0.0;
    if (penalties) {
        s->n_output = allocate(n, sizeof *s->n_output, &ok);
        s->in_prompt = allocate(n, sizeof *s->in_prompt, &ok);
        s->seen = allocate(n, sizeof *s->seen, &ok);
    }
    if (penalties || p->n_bias || p->n_bad || s->banned || (p->n_stop && p->min_tokens))
        s->adjusted = allocate(n, sizeof *s->adjusted, &ok);
    if (p->temperature > 0.0) {
        bool few = p->top_k > 0 && (size_t)p->top_k < n, all_weights = !few || p->typical_p < 1.0;
        s->pool = allocate(all_weights ? n : (size_t)p->top_k, sizeof *s->pool, &ok);
        if (all_weights) s->weights = allocate(n, sizeof *s->weights, &ok);
    }
    return ok;
}

pe_status pe_sampler_create(pe_sampler **out, size_t vocab_size, const pe_sampler_params *params, char *err) {
    *out = NULL;
    pe_status status = check_numbers(vocab_size, params, err);
    if (status == PE_OK) status = check_lists(vocab_size, params, err);
    if (status != PE_OK) return status;
    pe_sampler *s = calloc(1, sizeof *s);
    if (s) {
        s->vocab_size = vocab_size;
        s->params = *params;
    }
    if (!s || !own_lists(s) || !own_buffers(s)) {
        pe_sampler_destroy(s);
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "no memory for a sampler over %zu tokens", vocab_size);
    }
    *out = s;
    return PE_OK;
}

void pe_sampler_destroy(pe_sampler *s) {
    if (!s) return;
    free(s->id_lists), free(s->bias_values), free(s->banned);
    free(s->n_output), free(s->in_prompt), free(s->seen);
    free(s->adjusted), free(s->weights), free(s->pool);
    free(s);
}

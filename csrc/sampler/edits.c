/* edits.c: step 1 of the specification in sampler.h: what has been said, and the logits edited by it (with repeats.c). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/pe_math.h"
#include "state.h"
#include "status.h"

/* ------------------------------------------------------------------ history */

/* Room for twice the tokens; false without memory, and then nothing has changed. */
static bool grow_history(pe_sampler *s) {
    size_t capacity = s->history_capacity ? 2 * s->history_capacity : 256;
    if (capacity > SIZE_MAX / sizeof *s->history) return false;
    int32_t *history = realloc(s->history, capacity * sizeof *history);
    if (history) s->history = history;
    uint32_t *common = history ? realloc(s->common, capacity * sizeof *common) : NULL;
    if (common) s->common = common;
    if (common) s->history_capacity = capacity;
    return common != NULL;
}

/* What the penalties count: a token comes, and one leaves their window. */
static void count(pe_sampler *s, int32_t token, bool is_prompt) {
    if (!s->is_seen[token]) s->seen[s->n_seen++] = token;
    s->is_seen[token] = 1;
    uint32_t *n = is_prompt ? &s->n_prompt[token] : &s->n_output[token];
    if (*n < UINT32_MAX) (*n)++;
    const size_t window = s->params.repeat_last_n > 0 ? (size_t)s->params.repeat_last_n : SIZE_MAX;
    if (s->n_history <= window) return;
    int32_t leaving = s->history[s->n_history - window - 1];
    n = s->n_prompt[leaving] ? &s->n_prompt[leaving] : &s->n_output[leaving]; /* the prompt came first */
    (*n)--;
}

pe_status pe_sampler_accept(pe_sampler *s, int32_t token, bool is_prompt, char *err) {
    if (token < 0 || (size_t)token >= s->vocab_size)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token %d is not in a vocabulary of %zu", (int)token,
                       s->vocab_size);
    if (s->keeps_history) {
        if (s->n_history == s->history_capacity && !grow_history(s))
            return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "no memory for a history of %zu tokens", s->n_history + 1);
        s->history[s->n_history++] = token;
    }
    if (!is_prompt) s->n_outputs++;
    if (s->seen) count(s, token, is_prompt);
    return PE_OK;
}

void pe_sampler_reset(pe_sampler *s) {
    for (size_t i = 0; i < s->n_seen; i++) {
        s->n_prompt[s->seen[i]] = 0;
        s->is_seen[s->seen[i]] = 0;
        s->n_output[s->seen[i]] = 0;
    }
    s->n_seen = 0;
    s->n_outputs = 0;
    s->n_history = 0;
}

/* ------------------------------------------------------------------ penalties, bias, bans */

static pe_status penalize(pe_sampler *s, const pe_logit_row *row, char *err) {
    const pe_sampler_params *p = &s->params;
    for (size_t i = 0; i < s->n_seen; i++) {
        int32_t id = s->seen[i];
        if (!s->n_prompt[id] && !s->n_output[id]) continue; /* it has left the window */
        size_t at = pe_logit_row_find(row, id);
        if (at == row->n) continue;
        double l = s->adjusted[at];
        l = l > 0.0 ? l / p->repetition_penalty : l * p->repetition_penalty;
        if (s->n_output[id]) l = l - p->frequency_penalty * s->n_output[id] - p->presence_penalty;
        float rounded = (float)l;
        if ((pe_float_bits(rounded) & 0x7fffffffu) >= PE_NOT_FINITE_BITS)
            return pe_fail(PE_ERR_NOT_FINITE, err, "the logit of token %d overflows under the penalties", (int)id);
        s->adjusted[at] = rounded;
    }
    return PE_OK;
}

static pe_status add_bias(pe_sampler *s, const pe_logit_row *row, char *err) {
    const pe_sampler_params *p = &s->params;
    for (size_t i = 0; i < p->n_bias; i++) {
        size_t at = pe_logit_row_find(row, p->bias_ids[i]);
        if (at == row->n) continue;
        float *l = &s->adjusted[at];
        *l = *l + p->bias_values[i];
        if (*l > 3.4028234664e38f)
            return pe_fail(PE_ERR_NOT_FINITE, err, "the logit of token %d overflows under its bias",
                           (int)p->bias_ids[i]);
    }
    return PE_OK;
}

/* Tokens whose bit in mask is 0. */
static void ban_unmasked(float *logits, const pe_logit_row *row, const uint32_t *mask) {
    for (size_t i = 0; row->ids != NULL && i < row->n; i++)
        if (!(mask[row->ids[i] / 32] >> row->ids[i] % 32 & 1)) logits[i] = -INFINITY;
    for (size_t begin = 0; row->ids == NULL && begin < row->n; begin += 32) {
        uint32_t word = mask[begin / 32];
        size_t length = row->n - begin < 32 ? row->n - begin : 32;
        if (word == UINT32_MAX) continue;
        for (size_t i = 0; i < length; i++) logits[begin + i] = word >> i & 1 ? logits[begin + i] : -INFINITY;
    }
}

static void ban(float *logits, const pe_logit_row *row, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) {
        size_t at = pe_logit_row_find(row, ids[i]);
        if (at < row->n) logits[at] = -INFINITY;
    }
}

pe_status pe_sampler_edit(pe_sampler *s, const pe_logit_row *row, const uint32_t *mask, bool with_ngrams, const float **out, char *err) {
    const pe_sampler_params *p = &s->params;
    bool ban_stop = p->n_stop && s->n_outputs < (uint64_t)p->min_tokens;
    *out = row->values;
    const bool looks_back = pe_sampler_looks_back(p);
    const bool has_spread = p->temperature > 0.0 && p->top_n_sigma > 0.0; /* which is written into the copy */
    if (!(s->n_seen || p->n_bias || p->n_bad || s->banned || ban_stop || mask || looks_back || has_spread)) return PE_OK;
    if (!s->adjusted) s->adjusted = malloc(s->vocab_size * sizeof *s->adjusted); /* this sampler's first mask */
    if (!s->adjusted) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "no memory for %zu masked logits", s->vocab_size);
    *out = s->adjusted;
    memcpy(s->adjusted, row->values, row->n * sizeof *row->values);
    pe_status status = penalize(s, row, err);
    if (status != PE_OK) return status;
    if (looks_back) {
        pe_sampler_find_repeats(s, with_ngrams);
        pe_sampler_penalize_repeats(s, row);
    }
    status = add_bias(s, row, err);
    if (status != PE_OK) return status;
    for (size_t i = 0; s->banned != NULL && i < row->n; i++)
        if (s->banned[row->ids == NULL ? i : (size_t)row->ids[i]]) s->adjusted[i] = -INFINITY;
    if (mask) ban_unmasked(s->adjusted, row, mask);
    ban(s->adjusted, row, p->bad, p->n_bad);
    if (ban_stop) ban(s->adjusted, row, p->stop, p->n_stop);
    if (looks_back) pe_sampler_ban_repeats(s, row, with_ngrams);
    return PE_OK;
}

/* edits.c: step 1 of the specification in sampler.h: what has been said, and the logits edited by it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/pe_math.h"
#include "state.h"
#include "status.h"

/* ------------------------------------------------------------------ history */

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

/* ------------------------------------------------------------------ penalties, bias, bans */

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

static pe_status add_bias(pe_sampler *s, char *err) {
    const pe_sampler_params *p = &s->params;
    for (size_t i = 0; i < p->n_bias; i++) {
        float *l = &s->adjusted[p->bias_ids[i]];
        *l = *l + p->bias_values[i];
        if (*l > 3.4028234664e38f)
            return pe_fail(PE_ERR_NOT_FINITE, err, "the logit of token %d overflows under its bias",
                           (int)p->bias_ids[i]);
    }
    return PE_OK;
}

/* Tokens whose bit in mask is 0. */
static void ban_unmasked(float *logits, size_t n, const uint32_t *mask) {
    for (size_t begin = 0; begin < n; begin += 32) {
        uint32_t word = mask[begin / 32];
        size_t length = n - begin < 32 ? n - begin : 32;
        if (word == UINT32_MAX) continue;
        for (size_t i = 0; i < length; i++) logits[begin + i] = word >> i & 1 ? logits[begin + i] : -INFINITY;
    }
}

pe_status pe_sampler_edit(pe_sampler *s, const float *logits, const uint32_t *mask, const float **out, char *err) {
    const pe_sampler_params *p = &s->params;
    bool ban_stop = p->n_stop && s->n_outputs < (uint64_t)p->min_tokens;
    *out = logits;
    if (!(s->n_seen || p->n_bias || p->n_bad || s->banned || ban_stop || mask)) return PE_OK;
    if (!s->adjusted) s->adjusted = malloc(s->vocab_size * sizeof *s->adjusted); /* this sampler's first mask */
    if (!s->adjusted) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "no memory for %zu masked logits", s->vocab_size);
    *out = s->adjusted;
    memcpy(s->adjusted, logits, s->vocab_size * sizeof *logits);
    pe_status status = penalize(s, err);
    if (status == PE_OK) status = add_bias(s, err);
    if (status != PE_OK) return status;
    if (s->banned)
        for (size_t i = 0; i < s->vocab_size; i++) s->adjusted[i] = s->banned[i] ? -INFINITY : s->adjusted[i];
    if (mask) ban_unmasked(s->adjusted, s->vocab_size, mask);
    for (size_t i = 0; i < p->n_bad; i++) s->adjusted[p->bad[i]] = -INFINITY;
    for (size_t i = 0; ban_stop && i < p->n_stop; i++) s->adjusted[p->stop[i]] = -INFINITY;
    return PE_OK;
}

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

/* Where the token lies in the row; row->n if it is not there. */
static size_t find(const pe_logit_row *row, int32_t id) {
    if (row->ids == NULL) return (size_t)id;
    size_t begin = 0, end = row->n;
    while (begin < end) {
        size_t middle = begin + (end - begin) / 2;
        if (row->ids[middle] < id)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin < row->n && row->ids[begin] == id ? begin : row->n;
}

static pe_status penalize(pe_sampler *s, const pe_logit_row *row, char *err) {
    const pe_sampler_params *p = &s->params;
    for (size_t i = 0; i < s->n_seen; i++) {
        int32_t id = s->seen[i];
        size_t at = find(row, id);
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
        size_t at = find(row, p->bias_ids[i]);
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
        size_t at = find(row, ids[i]);
        if (at < row->n) logits[at] = -INFINITY;
    }
}

pe_status pe_sampler_edit(pe_sampler *s, const pe_logit_row *row, const uint32_t *mask, const float **out, char *err) {
    const pe_sampler_params *p = &s->params;
    bool ban_stop = p->n_stop && s->n_outputs < (uint64_t)p->min_tokens;
    *out = row->values;
    if (!(s->n_seen || p->n_bias || p->n_bad || s->banned || ban_stop || mask)) return PE_OK;
    if (!s->adjusted) s->adjusted = malloc(s->vocab_size * sizeof *s->adjusted); /* this sampler's first mask */
    if (!s->adjusted) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "no memory for %zu masked logits", s->vocab_size);
    *out = s->adjusted;
    memcpy(s->adjusted, row->values, row->n * sizeof *row->values);
    pe_status status = penalize(s, row, err);
    if (status == PE_OK) status = add_bias(s, row, err);
    if (status != PE_OK) return status;
    for (size_t i = 0; s->banned != NULL && i < row->n; i++)
        if (s->banned[row->ids == NULL ? i : (size_t)row->ids[i]]) s->adjusted[i] = -INFINITY;
    if (mask) ban_unmasked(s->adjusted, row, mask);
    ban(s->adjusted, row, p->bad, p->n_bad);
    if (ban_stop) ban(s->adjusted, row, p->stop, p->n_stop);
    return PE_OK;
}

/* create.c: the life of a sampler: its parameters checked, its lists copied, its memory. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/double_math.h"
#include "state.h"
#include "status.h"

/* ------------------------------------------------------------------ parameters */

void pe_sampler_params_init(pe_sampler_params *params) {
    *params = (pe_sampler_params){
        .top_p = 1.0,
        .typical_p = 1.0,
        .repetition_penalty = 1.0,
        .repeat_last_n = -1,
        .dry_base = 1.75,
        .dry_allowed_length = 2,
        .dry_last_n = -1,
        .dynatemp_exponent = 1.0,
        .xtc_threshold = 0.1,
        .n_top_logprobs = -1,
    };
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
        {"top_n_sigma", p->top_n_sigma, p->top_n_sigma >= 0.0},
        {"dynatemp_range", p->temperature + p->dynatemp_range, p->dynatemp_range >= 0.0},
        {"dynatemp_exponent", p->dynatemp_exponent, p->dynatemp_exponent >= 0.0},
        {"xtc_probability", p->xtc_probability, p->xtc_probability >= 0.0 && p->xtc_probability <= 1.0},
        {"xtc_threshold", p->xtc_threshold, p->xtc_threshold >= 0.0 && p->xtc_threshold <= 1.0},
        {"repetition_penalty", p->repetition_penalty, p->repetition_penalty > 0.0},
        {"frequency_penalty", p->frequency_penalty, true},
        {"presence_penalty", p->presence_penalty, true},
        {"repeat_last_n", p->repeat_last_n, p->repeat_last_n >= -1},
        {"dry_multiplier", p->dry_multiplier, p->dry_multiplier >= 0.0},
        {"dry_base", p->dry_base, p->dry_base >= 1.0},
        {"dry_allowed_length", p->dry_allowed_length, p->dry_allowed_length >= 1},
        {"dry_penalty_last_n", p->dry_last_n, p->dry_last_n >= -1},
        {"no_repeat_ngram_size", p->no_repeat_ngram_size, p->no_repeat_ngram_size >= 0},
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
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%s: token %d is not in a vocabulary of %zu", name,
                           (int)ids[i], vocab_size);
    return PE_OK;
}

/* How many ids they have together. */
static size_t n_sequence_ids(const pe_id_sequences *sequences) {
    size_t n = 0;
    for (size_t i = 0; i < sequences->n; i++) n += (size_t)sequences->lengths[i];
    return n;
}

static pe_status check_sequences(const char *name, const pe_id_sequences *sequences, size_t vocab_size, char *err) {
    if (sequences->n && !sequences->lengths) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%s have no lengths", name);
    for (size_t i = 0; i < sequences->n; i++)
        if (sequences->lengths[i] < 1)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%s: sequence %zu has a length of %d", name, i, (int)sequences->lengths[i]);
    return check_ids(name, sequences->ids, n_sequence_ids(sequences), vocab_size, err);
}

static pe_status check_lists(size_t vocab_size, const pe_sampler_params *p, char *err) {
    pe_status status = check_ids("logit_bias", p->bias_ids, p->n_bias, vocab_size, err);
    if (status == PE_OK) status = check_ids("allowed_token_ids", p->allowed, p->n_allowed, vocab_size, err);
    if (status == PE_OK) status = check_ids("bad_token_ids", p->bad, p->n_bad, vocab_size, err);
    if (status == PE_OK) status = check_ids("stop_token_ids", p->stop, p->n_stop, vocab_size, err);
    if (status == PE_OK) status = check_sequences("bad_words", &p->bad_sequences, vocab_size, err);
    if (status == PE_OK) status = check_sequences("dry_sequence_breakers", &p->breakers, vocab_size, err);
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

static void copy_sequences(int32_t **cursor, pe_id_sequences *sequences) {
    copy_ids(cursor, &sequences->ids, n_sequence_ids(sequences));
    copy_ids(cursor, &sequences->lengths, sequences->n);
}

/* Copies of the caller's lists. */
static bool own_lists(pe_sampler *s) {
    pe_sampler_params *p = &s->params;
    bool ok = true;
    size_t n_ids = p->n_bias + p->n_bad + p->n_stop;
    n_ids += n_sequence_ids(&p->bad_sequences) + p->bad_sequences.n + n_sequence_ids(&p->breakers) + p->breakers.n;
    s->id_lists = allocate(n_ids, sizeof *s->id_lists, &ok);
    s->bias_values = allocate(p->n_bias, sizeof *s->bias_values, &ok);
    if (p->allowed) s->banned = allocate(s->vocab_size, sizeof *s->banned, &ok);
    if (!ok) return false;
    int32_t *cursor = s->id_lists;
    copy_ids(&cursor, &p->bias_ids, p->n_bias);
    copy_ids(&cursor, &p->bad, p->n_bad);
    copy_ids(&cursor, &p->stop, p->n_stop);
    copy_sequences(&cursor, &p->bad_sequences);
    copy_sequences(&cursor, &p->breakers);
    if (p->n_bias) memcpy(s->bias_values, p->bias_values, p->n_bias * sizeof *s->bias_values);
    p->bias_values = s->bias_values;
    if (s->banned) {
        memset(s->banned, 1, s->vocab_size);
        for (size_t i = 0; i < p->n_allowed; i++) s->banned[p->allowed[i]] = 0;
    }
    p->allowed = NULL;
    return true;
}

/* What DRY computes with: its breakers are found by their first tokens. */
static bool own_dry(pe_sampler *s) {
    const pe_id_sequences *breakers = &s->params.breakers;
    bool ok = true;
    s->longest = allocate(s->vocab_size, sizeof *s->longest, &ok);
    s->breaker_from = allocate(s->vocab_size, sizeof *s->breaker_from, &ok);
    s->breaker_next = allocate(breakers->n, sizeof *s->breaker_next, &ok);
    s->breaker_ids = allocate(breakers->n, sizeof *s->breaker_ids, &ok);
    const int32_t *ids = breakers->ids;
    for (size_t i = 0; ok && i < breakers->n; ids += breakers->lengths[i++]) {
        s->breaker_ids[i] = ids;
        s->breaker_next[i] = s->breaker_from[*ids];
        s->breaker_from[*ids] = (uint32_t)i + 1;
    }
    return ok;
}

/* Only what these parameters can ever use: a greedy sampler without edits holds no buffer. */
static bool own_buffers(pe_sampler *s) {
    const pe_sampler_params *p = &s->params;
    const size_t n = s->vocab_size;
    bool ok = true;
    const bool samples = p->temperature > 0.0, looks_back = pe_sampler_looks_back(p);
    const bool penalties = p->repeat_last_n != 0 && (p->repetition_penalty != 1.0 || p->frequency_penalty != 0.0 || p->presence_penalty != 0.0);
    s->keeps_history = looks_back || (penalties && p->repeat_last_n > 0);
    if (penalties) {
        s->n_output = allocate(n, sizeof *s->n_output, &ok);
        s->n_prompt = allocate(n, sizeof *s->n_prompt, &ok);
        s->is_seen = allocate(n, sizeof *s->is_seen, &ok);
        s->seen = allocate(n, sizeof *s->seen, &ok);
    }
    if (pe_sampler_has_dry(p) && !own_dry(s)) return false;
    if (penalties || looks_back || p->n_bias || p->n_bad || s->banned || (p->n_stop && p->min_tokens) ||
        (samples && p->top_n_sigma > 0.0))
        s->adjusted = allocate(n, sizeof *s->adjusted, &ok);
    if (samples) {
        bool few = p->top_k > 0 && (size_t)p->top_k < n, typical = p->typical_p < 1.0;
        if (few || typical) s->pool = allocate(typical ? n : (size_t)p->top_k, sizeof *s->pool, &ok);
        if (!few || typical || p->dynatemp_range > 0.0) s->weights = allocate(n, sizeof *s->weights, &ok);
        if (!few) s->reachable = allocate(n, sizeof *s->reachable, &ok);
    }
    return ok;
}

pe_status pe_sampler_create(pe_sampler **out, size_t vocab_size, const pe_sampler_params *params, char *err) {
    *out = NULL;
    const char *isa;
    pe_status status = check_numbers(vocab_size, params, err);
    if (status == PE_OK) status = check_lists(vocab_size, params, err);
    if (status == PE_OK) status = pe_isa_active(&isa, err);
    if (status != PE_OK) return status;
    pe_sampler *s = calloc(1, sizeof *s);
    if (s) {
        s->kernels = pe_kernels_selected();
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
    free(s->n_output), free(s->n_prompt), free(s->is_seen), free(s->seen);
    free(s->history), free(s->common), free(s->longest);
    free(s->breaker_from), free(s->breaker_next), free((void *)s->breaker_ids);
    free(s->adjusted), free(s->weights), free(s->reachable), free(s->pool);
    free(s);
}

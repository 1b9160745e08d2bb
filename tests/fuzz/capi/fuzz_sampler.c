/* fuzz_sampler.c: see fuzz_api.h. Whatever the parameters and logits, a sampled token is one that may come, and the same again. */
#include <math.h>
#include <string.h>

#include "failing.h"
#include "fuzz_api.h"
#include "sampler/sampler.h"

enum { MAX_VOCAB = 70, MAX_IDS = 5, MAX_ROWS = 4, N_USUAL = 7 };

typedef struct asked {
    pe_sampler_params params;
    size_t vocab_size;
    int32_t bias_ids[MAX_IDS], allowed[MAX_IDS], bad[MAX_IDS], stop[MAX_IDS];
    float bias_values[MAX_IDS];
    int32_t sequences[2][MAX_IDS], lengths[2][MAX_IDS];
} asked;

static double number(rng *r) {
    static const double numbers[] = {0,     -0.0, 1,   -1,     0.5,      0.9,       1e-30, 1e30,
                                     1e300, 2,    100, 1e-300, INFINITY, -INFINITY, NAN,   0.7};
    return numbers[rng_below(r, sizeof numbers / sizeof *numbers)];
}

/* Mostly ids of the vocabulary; returns how many, and *is_right goes false for one that is not. */
static size_t ids(rng *r, int32_t *out, size_t vocab_size, bool *is_right) {
    size_t n = rng_below(r, 3) == 0 ? rng_below(r, MAX_IDS + 1) : 0;
    for (size_t i = 0; i < n; i++) {
        out[i] = rng_below(r, 40) == 0 ? (int32_t)rng_next(r) : (int32_t)rng_below(r, vocab_size);
        *is_right &= out[i] >= 0 && (size_t)out[i] < vocab_size;
    }
    return n;
}

/* Sequences that share these ids: mostly of the few that the history has. */
static pe_id_sequences sequences(rng *r, int32_t *out, int32_t *lengths, size_t vocab_size, bool *is_right) {
    size_t n_left = ids(r, out, vocab_size, is_right), n = 0;
    for (size_t i = 0; i < n_left; i++)
        if (out[i] >= 0 && (size_t)out[i] < vocab_size && rng_below(r, 8)) out[i] %= N_USUAL;
    for (; n_left > 0; n_left -= (size_t)lengths[n++]) lengths[n] = 1 + (int32_t)rng_below(r, n_left);
    if (n > 0 && rng_below(r, 30) == 0) lengths[n - 1] = 0, *is_right = false;
    return (pe_id_sequences){out, lengths, n};
}

/* What looks at the order of the history, or at the spread of the logits. */
static void ask_more(rng *r, asked *a, bool *is_right) {
    pe_sampler_params *p = &a->params;
    double *const numbers[] = {&p->top_n_sigma, &p->dynatemp_range, &p->dynatemp_exponent, &p->dry_multiplier, &p->dry_base,
                               &p->xtc_probability, &p->xtc_threshold}; /* the last two are shares */
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (rng_below(r, 2)) {
            *numbers[i] = rng_below(r, 30) ? (double)rng_below(r, 5) / 4 + (i < 5) : number(r);
            *is_right &= isfinite(*numbers[i]) != 0;
        }
    int32_t *const counts[] = {&p->repeat_last_n, &p->dry_allowed_length, &p->dry_last_n, &p->no_repeat_ngram_size};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (rng_below(r, 3) == 0) *counts[i] = rng_below(r, 60) ? 1 + (int32_t)rng_below(r, 3) : (int32_t)rng_next(r);
    p->bad_sequences = sequences(r, a->sequences[0], a->lengths[0], a->vocab_size, is_right);
    p->breakers = sequences(r, a->sequences[1], a->lengths[1], a->vocab_size, is_right);
}

/* Parameters of any kind. Returns false if some are certainly wrong (others may be too: then the status decides). */
static bool ask(rng *r, asked *a) {
    bool is_right = true;
    a->vocab_size = 1 + rng_below(r, MAX_VOCAB);
    pe_sampler_params_init(&a->params);
    pe_sampler_params *p = &a->params;
    double *const numbers[] = {
        &p->temperature,       &p->top_p,           &p->min_p, &p->typical_p, &p->repetition_penalty,
        &p->frequency_penalty, &p->presence_penalty};
    p->temperature = rng_below(r, 3) ? 0.8 : 0;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (rng_below(r, 5) == 0) {
            *numbers[i] = number(r);
            is_right &= isfinite(*numbers[i]) != 0;
        }
    p->seed = rng_next(r), p->sample_index = rng_below(r, 3);
    if (rng_below(r, 3) == 0) p->top_k = (int32_t)rng_below(r, 80) - 3;
    if (rng_below(r, 3) == 0) p->n_top_logprobs = (int32_t)rng_below(r, 70) - 2;
    if (rng_below(r, 4) == 0) p->min_tokens = (int32_t)rng_below(r, 4);
    p->n_bias = ids(r, a->bias_ids, a->vocab_size, &is_right), p->bias_ids = a->bias_ids,
    p->bias_values = a->bias_values;
    for (size_t i = 0; i < p->n_bias; i++) {
        a->bias_values[i] = rng_below(r, 4) ? rng_float(r) : (float)number(r);
        is_right &= !isnan(a->bias_values[i]) && a->bias_values[i] != INFINITY;
    }
    p->n_allowed = ids(r, a->allowed, a->vocab_size, &is_right), p->allowed = p->n_allowed ? a->allowed : NULL;
    p->n_bad = ids(r, a->bad, a->vocab_size, &is_right), p->bad = a->bad;
    p->n_stop = ids(r, a->stop, a->vocab_size, &is_right), p->stop = a->stop;
    if (rng_below(r, 2)) ask_more(r, a, &is_right);
    return is_right;
}

static bool contains(const int32_t *list, size_t n, int32_t id) {
    for (size_t i = 0; i < n; i++)
        if (list[i] == id) return true;
    return false;
}

static void check_token(const asked *a, const uint32_t *mask, const pe_sample_result *result) {
    int32_t token = result->token;
    if (token < 0 || (size_t)token >= a->vocab_size) violation("token %d of %zu", (int)token, a->vocab_size);
    if (a->params.allowed != NULL && !contains(a->allowed, a->params.n_allowed, token))
        violation("token %d is not allowed", (int)token);
    if (contains(a->bad, a->params.n_bad, token)) violation("token %d is banned", (int)token);
    if (mask != NULL && !(mask[token / 32] >> token % 32 & 1)) violation("token %d is masked", (int)token);
    if (isnan(result->logprob) || result->n_top < 0 || result->n_top > PE_SAMPLER_MAX_TOP_LOGPROBS)
        violation("log-probability %g, %d of them", result->logprob, (int)result->n_top);
}

/* Sample `n` rows, one by one or together; both ways the same. */
static size_t sample(rng *r, pe_sampler *sampler, const asked *a, size_t *failed) {
    float logits[MAX_VOCAB];
    uint32_t mask[(MAX_VOCAB + 31) / 32];
    for (size_t i = 0; i < a->vocab_size; i++) logits[i] = rng_below(r, 60) ? rng_float(r) : (float)number(r);
    for (size_t i = 0; i < sizeof mask / sizeof *mask; i++) mask[i] = (uint32_t)rng_next(r) | (uint32_t)rng_next(r);
    const uint32_t *chosen = rng_below(r, 3) ? NULL : mask;
    uint64_t position = rng_below(r, 4) ? rng_below(r, 1000) : rng_next(r);
    pe_sample_result first = {0};
    char err[PE_ERR_LEN] = "";
    if (rng_below(r, 6) == 0) failing_arm(rng_below(r, 2), rng_below(r, 2));
    pe_status status = pe_sampler_sample(sampler, logits, position, chosen, &first, err);
    size_t n_failed = failing_disarm();
    *failed += n_failed;
    if (status == PE_ERR_OUT_OF_MEMORY && n_failed == 0) violation("sample: %s", err);
    if (status == PE_ERR_OUT_OF_MEMORY) return 1;
    if (status != PE_OK && status != PE_ERR_NOT_FINITE && status != PE_ERR_INVALID_ARGUMENT)
        violation("sample: status %d (%s)", (int)status, err);
    if (status == PE_OK) check_token(a, chosen, &first);
    pe_sample_row again = {.sampler = sampler, .logits = logits, .position = position, .mask = chosen};
    if (pe_sample_many(&again, 1, 1 + (int)rng_below(r, 3), err) != PE_OK) violation("sample_many: %s", err);
    if (again.status != status) violation("status %d, and then %d", (int)status, (int)again.status);
    if (status == PE_OK && (again.result.token != first.token || again.result.logprob != first.logprob ||
                            again.result.n_top != first.n_top))
        violation("token %d, and then %d", (int)first.token, (int)again.result.token);
    return status != PE_OK;
}

/* A history of few tokens, which grows; one that there is no memory for may come again. Returns how many allocations failed. */
static size_t accept_many(rng *r, pe_sampler *sampler, size_t vocab_size) {
    char err[PE_ERR_LEN] = "";
    size_t n_failed = 0;
    if (rng_below(r, 2)) failing_arm(rng_below(r, 3), rng_below(r, 2));
    for (size_t k = rng_below(r, 600); k > 0; k--) {
        const int32_t token = (int32_t)(k * k % N_USUAL % vocab_size);
        pe_status status = pe_sampler_accept(sampler, token, k % 2, err);
        if (status == PE_ERR_OUT_OF_MEMORY && (n_failed += failing_disarm()) > 0) status = pe_sampler_accept(sampler, token, k % 2, err);
        if (status != PE_OK) violation("accept: status %d (%s)", (int)status, err);
    }
    return n_failed + failing_disarm();
}

size_t fuzz_sampler(rng *r, size_t *failed) {
    asked a;
    bool is_right = ask(r, &a);
    char err[PE_ERR_LEN] = "";
    pe_sampler *sampler = NULL;
    if (rng_below(r, 4) == 0) failing_arm(rng_below(r, 6), rng_below(r, 2));
    pe_status status = pe_sampler_create(&sampler, a.vocab_size, &a.params, err);
    size_t n_failed = failing_disarm(), n_refused = status != PE_OK;
    *failed += n_failed;
    if (status == PE_OK && !is_right) violation("wrong parameters of a sampler were taken");
    if (status == PE_OK && n_failed > 0) violation("an allocation of a sampler failed unnoticed");
    if (status != PE_OK && status != PE_ERR_INVALID_ARGUMENT && !(status == PE_ERR_OUT_OF_MEMORY && n_failed > 0))
        violation("sampler: status %d (%s)", (int)status, err);
    for (size_t i = 0; status == PE_OK && i < MAX_ROWS; i++) {
        int32_t token = rng_below(r, 20) ? (int32_t)rng_below(r, a.vocab_size) : (int32_t)rng_next(r);
        if (rng_below(r, 4) == 0) *failed += accept_many(r, sampler, a.vocab_size);
        bool is_token = token >= 0 && (size_t)token < a.vocab_size;
        if ((pe_sampler_accept(sampler, token, rng_below(r, 2), err) == PE_OK) != is_token)
            violation("accept of token %d of %zu", (int)token, a.vocab_size);
        n_refused += sample(r, sampler, &a, failed);
        if (rng_below(r, 8) == 0) pe_sampler_reset(sampler);
    }
    if (status == PE_OK) pe_sampler_destroy(sampler);
    return n_refused;
}

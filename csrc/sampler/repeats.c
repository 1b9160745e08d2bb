/* repeats.c: what the order of the history's tokens says in step 1 of the specification in sampler.h: DRY, n-grams that may not come
 * again, sequences that may not come at all.
 *
 * DRY and n-grams both ask where the end of the text stands in it already, how much of it, and what came next there. One pass of the
 * Z algorithm over the reversed text answers that for every place, in a time that is linear in the text, whatever it says. */
#include <math.h>
#include <string.h>

#include "state.h"

/* common[k], 0 < k < n: how many tokens the text (n) and the text without its last k tokens have in common at their ends. [begin, end)
 * is, of all stretches found so far that equal the reversed text's beginning, the one that reaches farthest. */
static void measure(const int32_t *text, size_t n, uint32_t *common) {
    size_t begin = 0, end = 0;
    for (size_t k = 1; k < n; k++) {
        size_t length = 0;
        if (k < end) length = common[k - begin] < end - k ? common[k - begin] : end - k;
        while (k + length < n && text[n - 1 - length] == text[n - 1 - k - length]) length++;
        common[k] = (uint32_t)length;
        if (k + length > end) begin = k, end = k + length;
    }
}

/* Of the tokens that DRY looks at. */
static size_t n_dry(const pe_sampler *s) {
    size_t window = s->params.dry_last_n < 0 ? SIZE_MAX : (size_t)s->params.dry_last_n;
    return s->n_history < window ? s->n_history : window;
}

void pe_sampler_find_repeats(pe_sampler *s, bool with_ngrams) {
    size_t n = pe_sampler_has_dry(&s->params) ? n_dry(s) : 0;
    if (with_ngrams) n = s->n_history;
    if (n) measure(s->history + (s->n_history - n), n, s->common); /* in both cases of the history's end, so DRY's window cuts it */
}

/* ------------------------------------------------------------------ DRY */

/* How many of the last tokens of the text (n) stand behind its last breaker; n without one. */
static size_t n_behind_breaker(const pe_sampler *s, const int32_t *text, size_t n) {
    const pe_id_sequences *breakers = &s->params.breakers;
    for (size_t i = 0; i < n; i++) { /* tokens behind the one that is looked at */
        size_t longest = 0;
        for (uint32_t b = s->breaker_from[text[n - 1 - i]]; b != 0; b = s->breaker_next[b - 1]) {
            const size_t length = (size_t)breakers->lengths[b - 1];
            if (length <= longest || length > i + 1) continue;
            if (memcmp(s->breaker_ids[b - 1], text + n - 1 - i, length * sizeof *text) == 0) longest = length;
        }
        if (longest) return i + 1 - longest;
    }
    return n;
}

static bool breaks_alone(const pe_sampler *s, int32_t token) {
    for (uint32_t b = s->breaker_from[token]; b != 0; b = s->breaker_next[b - 1])
        if (s->params.breakers.lengths[b - 1] == 1) return true;
    return false;
}

static void penalize(const pe_sampler *s, float *logit, size_t n_repeated) {
    const pe_sampler_params *p = &s->params;
    const double largest = 3.4028234663852886e38;
    double penalty = p->dry_multiplier;
    for (size_t i = (size_t)p->dry_allowed_length; i < n_repeated && p->dry_base > 1.0 && penalty < 1e40; i++) penalty *= p->dry_base;
    double l = *logit - penalty;
    *logit = l > -largest ? (float)l : (float)-largest;
}

void pe_sampler_penalize_repeats(pe_sampler *s, const pe_logit_row *row) {
    if (!pe_sampler_has_dry(&s->params)) return;
    const size_t n = n_dry(s), allowed = (size_t)s->params.dry_allowed_length;
    if (n <= allowed) return; /* of an empty history there is no memory */
    const int32_t *text = s->history + (s->n_history - n);
    const size_t limit = n_behind_breaker(s, text, n);
    if (limit < allowed) return;
    for (size_t k = 1; k < n; k++) {
        size_t length = s->common[k] < n - k ? s->common[k] : n - k;
        uint32_t *longest = &s->longest[text[n - k]];
        length = length < limit ? length : limit;
        if (length >= allowed && length > *longest) *longest = (uint32_t)length;
    }
    for (size_t k = 1; k < n; k++) {
        int32_t token = text[n - k];
        uint32_t length = s->longest[token];
        s->longest[token] = 0;
        size_t at = length && !breaks_alone(s, token) ? pe_logit_row_find(row, token) : row->n;
        if (at < row->n) penalize(s, &s->adjusted[at], length);
    }
}

/* ------------------------------------------------------------------ bans */

static void ban(pe_sampler *s, const pe_logit_row *row, int32_t token) {
    size_t at = pe_logit_row_find(row, token);
    if (at < row->n) s->adjusted[at] = -INFINITY;
}

static void ban_ngrams(pe_sampler *s, const pe_logit_row *row) {
    const size_t n = s->n_history, size = (size_t)s->params.no_repeat_ngram_size;
    for (size_t k = 1; k <= n; k++)
        if ((k < n ? s->common[k] : 0) >= size - 1) ban(s, row, s->history[n - k]);
}

static void ban_sequences(pe_sampler *s, const pe_logit_row *row) {
    const pe_id_sequences *bad = &s->params.bad_sequences;
    const int32_t *ids = bad->ids;
    for (size_t i = 0; i < bad->n; ids += bad->lengths[i++]) {
        const size_t n_before = (size_t)bad->lengths[i] - 1;
        if (n_before > s->n_outputs || n_before > s->n_history) continue;
        if (n_before && memcmp(s->history + (s->n_history - n_before), ids, n_before * sizeof *ids) != 0) continue;
        ban(s, row, ids[n_before]);
    }
}

void pe_sampler_ban_repeats(pe_sampler *s, const pe_logit_row *row, bool with_ngrams) {
    ban_sequences(s, row);
    if (with_ngrams) ban_ngrams(s, row);
}

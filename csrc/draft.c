/* draft.c: see draft.h. */
#include "draft.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/double_math.h"
#include "status.h"

/* ------------------------------------------------------------------ n-grams */

enum { WAYS = 4 };

typedef struct entry {
    uint32_t check; /* of the context's hash, 0 = empty */
    int32_t token;
    uint32_t count; /* times that it came again in a row, at most PE_DRAFT_N_COUNTS - 1 */
} entry;

struct pe_ngrams {
    size_t n_sets; /* a power of two */
    entry entries[];
};

static const size_t orders[PE_DRAFT_N_ORDERS] = {1, 2, 3, 6, 12};

pe_status pe_ngrams_create(pe_ngrams **out, size_t n_tokens, char *err) {
    size_t n_sets = 64, wanted = n_tokens < (1u << 17) ? n_tokens * PE_DRAFT_N_ORDERS / WAYS : (1u << 17);
    while (n_sets < wanted) n_sets *= 2;
    *out = calloc(1, sizeof **out + n_sets * WAYS * sizeof(entry));
    if (*out == NULL) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the n-grams of %zu tokens", n_tokens);
    (*out)->n_sets = n_sets;
    return PE_OK;
}

void pe_ngrams_destroy(pe_ngrams *ngrams) { free(ngrams); }

/* hashes[i] of the last orders[i] tokens, as far as there are so many; for how many orders. */
static size_t hash_contexts(const int32_t *recent, size_t n_recent, uint64_t hashes[PE_DRAFT_N_ORDERS]) {
    uint64_t hash = 0x9E3779B97F4A7C15u;
    size_t i = 0;
    for (size_t length = 1; length <= n_recent && i < PE_DRAFT_N_ORDERS; length++) {
        hash = (hash ^ (uint32_t)recent[n_recent - length]) * 0xD6E8FEB86659FD93u;
        hash ^= hash >> 32;
        if (length == orders[i]) hashes[i++] = hash * 0x9FB21C651E98DF25u;
    }
    return i;
}

static entry *set_of(pe_ngrams *ngrams, uint64_t hash) {
    return ngrams->entries + (hash >> 32 & (ngrams->n_sets - 1)) * WAYS;
}

static entry *find(pe_ngrams *ngrams, uint64_t hash) {
    entry *set = set_of(ngrams, hash);
    for (size_t i = 0; i < WAYS; i++)
        if (set[i].check == ((uint32_t)hash | 1u)) return &set[i];
    return NULL;
}

static void remember(pe_ngrams *ngrams, uint64_t hash, int32_t token) {
    entry *e = find(ngrams, hash);
    if (e != NULL) {
        bool again = e->token == token;
        e->token = token;
        e->count = !again ? 0 : e->count + 1 < PE_DRAFT_N_COUNTS ? e->count + 1 : e->count;
        return;
    }
    entry *set = set_of(ngrams, hash);
    e = &set[hash >> 20 & (WAYS - 1)];
    for (size_t i = 0; i < WAYS && e->check != 0; i++)
        if (set[i].check == 0 || set[i].count < e->count) e = &set[i];
    *e = (entry){(uint32_t)hash | 1u, token, 0};
}

/* ------------------------------------------------------------------ chances */

void pe_draft_chances_init(pe_draft_chances *chances) {
    static const float right[PE_DRAFT_N_ORDERS][PE_DRAFT_N_COUNTS] = {{0.3f, 0.6f, 0.8f, 0.85f},
                                                                      {0.6f, 0.8f, 0.9f, 0.95f},
                                                                      {0.7f, 0.85f, 0.95f, 0.95f},
                                                                      {0.85f, 0.9f, 0.95f, 0.95f},
                                                                      {0.95f, 0.95f, 0.95f, 0.95f}};
    for (size_t source = 0; source < 2; source++)
        for (size_t i = 0; i < PE_DRAFT_N_ORDERS; i++)
            for (size_t k = 0; k < PE_DRAFT_N_COUNTS; k++) {
                chances->all[source][i][k] = 16.0f;
                chances->right[source][i][k] = (source == 0 ? 16.0f : 10.0f) * right[i][k];
            }
    for (size_t i = 0; i < PE_DRAFT_N_EIGHTHS; i++) chances->came[i] = chances->expected[i] = 4.0f;
}

/* Of this text's own experience and, as if seen eight times, that of all. */
static float chance_of(const pe_drafter *d, size_t source, size_t order, uint32_t count) {
    float shared = d->shared->right[source][order][count] / d->shared->all[source][order][count];
    return (d->chances.right[source][order][count] + 8.0f * shared) / (d->chances.all[source][order][count] + 8.0f);
}

/* What is left of old experience after each new one: a text remembers its last thirty or so, all texts together a thousand. */
static const float own_memory = 0.97f, shared_memory = 0.999f;

static void learn(pe_draft_chances *c, size_t source, size_t order, uint32_t count, bool right, float memory) {
    c->right[source][order][count] = c->right[source][order][count] * memory + (right ? 1.0f : 0.0f);
    c->all[source][order][count] = c->all[source][order][count] * memory + 1.0f;
}

/* ------------------------------------------------------------------ one text */

static void push(int32_t *recent, size_t *n_recent, int32_t token) {
    if (*n_recent == PE_DRAFT_MAX_ORDER) {
        memmove(recent, recent + 1, (PE_DRAFT_MAX_ORDER - 1) * sizeof *recent);
        --*n_recent;
    }
    recent[(*n_recent)++] = token;
}

/* The likeliest of the predictions after a context with these hashes (n_hashes), or NULL; its chance, and its token. */
static const entry *likeliest(const pe_drafter *d, const uint64_t *hashes, size_t n_hashes, float *chance) {
    const entry *best = NULL;
    *chance = 0.0f;
    for (size_t source = 0; source < 2; source++) {
        pe_ngrams *ngrams = source == 0 ? d->own : d->others;
        for (size_t i = n_hashes; ngrams != NULL && i-- > 0;) {
            const entry *e = find(ngrams, hashes[i]);
            if (e == NULL) continue;
            float one = chance_of(d, source, i, e->count);
            if (one > *chance) *chance = one, best = e;
        }
    }
    return best;
}

static size_t eighth(float chance) {
    size_t i = (size_t)(chance * PE_DRAFT_N_EIGHTHS);
    return i < PE_DRAFT_N_EIGHTHS ? i : PE_DRAFT_N_EIGHTHS - 1;
}

static void learn_likeliest(pe_draft_chances *c, float chance, bool right, float memory) {
    size_t i = eighth(chance);
    c->came[i] = c->came[i] * memory + (right ? 1.0f : 0.0f);
    c->expected[i] = c->expected[i] * memory + chance;
}

/* What the chance of the likeliest prediction is worth: by the experience of all texts, with the weight of four that were expected, and
 * by that of this one. Never more than 0.98: nothing is sure. */
static float corrected(const pe_drafter *d, float chance) {
    size_t i = eighth(chance);
    float shared = d->shared->came[i] / d->shared->expected[i];
    float factor = (d->chances.came[i] + 4.0f * shared) / (d->chances.expected[i] + 4.0f);
    return factor * chance < 0.98f ? factor * chance : 0.98f;
}

void pe_drafter_read(pe_drafter *d, int32_t token, bool is_output) {
    uint64_t hashes[PE_DRAFT_N_ORDERS];
    size_t n = hash_contexts(d->recent, d->n_recent, hashes);
    float chance = 0.0f;
    const entry *best = is_output ? likeliest(d, hashes, n, &chance) : NULL;
    if (best != NULL) {
        learn_likeliest(&d->chances, chance, best->token == token, own_memory);
        learn_likeliest(d->shared, chance, best->token == token, shared_memory);
    }
    for (size_t source = 0; source < 2; source++) {
        pe_ngrams *ngrams = source == 0 ? d->own : d->others;
        if (ngrams == NULL || (source == 1 && !is_output)) continue;
        for (size_t i = 0; i < n; i++) {
            const entry *e = is_output ? find(ngrams, hashes[i]) : NULL;
            if (e != NULL) {
                learn(&d->chances, source, i, e->count, e->token == token, own_memory);
                learn(d->shared, source, i, e->count, e->token == token, shared_memory);
            }
            remember(ngrams, hashes[i], token);
        }
    }
    push(d->recent, &d->n_recent, token);
}

/* The likeliest prediction; its chance, 0 if there is none. */
static float predict(const pe_drafter *d, const int32_t *recent, size_t n_recent, int32_t *token) {
    uint64_t hashes[PE_DRAFT_N_ORDERS];
    float chance;
    const entry *best = likeliest(d, hashes, hash_contexts(recent, n_recent, hashes), &chance);
    if (best == NULL) return 0.0f;
    *token = best->token;
    return corrected(d, chance);
}

size_t pe_drafter_propose(const pe_drafter *d, const int32_t *behind, size_t n_behind, size_t most, float least,
                          int32_t *tokens, float *chances) {
    int32_t recent[PE_DRAFT_MAX_ORDER];
    size_t n_recent = d->n_recent, n = 0;
    float all_right = 1.0f;
    memcpy(recent, d->recent, sizeof recent);
    for (size_t i = 0; i < n_behind; i++) push(recent, &n_recent, behind[i]);
    while (n < most) {
        chances[n] = predict(d, recent, n_recent, &tokens[n]);
        all_right *= chances[n];
        if (chances[n] <= 0.0f || all_right < least) break;
        push(recent, &n_recent, tokens[n++]);
    }
    return n;
}

/* ------------------------------------------------------------------ what a step costs */

/* Before anything is known: the weights are read once, and a row adds a twentieth of that. */
static double expected_cost(size_t n_rows) { return n_rows == 1 ? 1.0 : 1.15 + 0.05 * (double)(n_rows - 1); }

void pe_step_costs_init(pe_step_costs *costs) {
    memset(costs, 0, sizeof *costs);
    for (size_t r = 1; r <= PE_DRAFT_MAX_ROWS; r++) costs->cost[r] = expected_cost(r);
}

/* cost[n_rows] was measured to be 1 + error times what it is thought to be. The first measurements move it by half of that, then by
 * less and less, down to a twentieth. */
static void learn_cost(pe_step_costs *costs, size_t n_rows, double error) {
    uint32_t n_seen = costs->n_seen[n_rows]++;
    double gain = 0.05 + (n_seen < 100 ? 0.45 / (n_seen + 1.0) : 0.0);
    for (size_t r = 1; r <= PE_DRAFT_MAX_ROWS; r++) {
        size_t distance = r > n_rows ? r - n_rows : n_rows - r;
        /* Sizes that were never seen follow their neighbours. Those that seemed dear are forgotten by and by, and tried again. */
        if (distance == 0 || costs->n_seen[r] == 0) costs->cost[r] *= 1.0 + gain / (1.0 + (double)distance) * error;
        if (distance > 0 && costs->cost[r] > expected_cost(r)) costs->cost[r] += 1e-4 * (expected_cost(r) - costs->cost[r]);
    }
}

static double clipped(double error) { return error > 1.0 ? 1.0 : error < -0.5 ? -0.5 : error; }

void pe_step_costs_note(pe_step_costs *costs, size_t n_rows, double seconds) {
    if (n_rows > PE_DRAFT_MAX_ROWS || (n_rows > 0 && !(seconds > 0.0))) return;
    size_t before = costs->last_rows;
    double last_seconds = costs->last_seconds;
    costs->last_rows = n_rows, costs->last_seconds = seconds;
    if (n_rows == 0) costs->is_cold = true;
    if (costs->is_cold) {
        costs->is_cold = n_rows == 0, costs->last_rows = 0;
        return;
    }
    /* One step beside the one before it, of another size: whatever slows both alike, a neighbour or a longer context, cancels. */
    if (before != 0 && before != n_rows) {
        double ratio = seconds / last_seconds * (costs->cost[before] / costs->cost[n_rows]);
        learn_cost(costs, n_rows, clipped(ratio - 1.0));
        learn_cost(costs, before, clipped(1.0 / ratio - 1.0));
    }
    if (costs->scale == 0.0) costs->scale = seconds / costs->cost[n_rows];
    costs->scale *= 1.0 + 0.3 * clipped(seconds / (costs->scale * costs->cost[n_rows]) - 1.0);
}

/* A larger step is not cheaper, whatever was measured. */
static double cost_of(const pe_step_costs *costs, size_t n_rows, double least) {
    return costs->cost[n_rows] > least ? costs->cost[n_rows] : least;
}

/* A draft pays if it is expected to be right more often than what its rows add to the cost, by the tokens that this time
 * gives without a draft; its last guess, the least likely one, at least by as much as the cheapest further row adds. */
float pe_draft_least_chance(const pe_step_costs *costs, size_t n_rows) {
    if (n_rows < 1 || n_rows >= PE_DRAFT_MAX_ROWS) return 1.0f;
    double without = costs->cost[n_rows], cheapest = without, cost = without;
    for (size_t rows = n_rows + 1; rows <= PE_DRAFT_MAX_ROWS; rows++) {
        cost = cost_of(costs, rows, cost);
        double each = (cost - without) / (double)(rows - n_rows);
        cheapest = each < cheapest ? each : cheapest;
    }
    double least = cheapest * (double)n_rows / without;
    return least < 0.01 ? 0.01f : (float)least;
}

double pe_draft_choose(const pe_step_costs *costs, size_t n_rows, size_t n, const float *chances,
                       const size_t *n_proposed, size_t *n_chosen) {
    for (size_t i = 0; i < n; i++) n_chosen[i] = 0;
    if (n_rows < 1 || n_rows >= PE_DRAFT_MAX_ROWS) return 0.0;
    size_t taken[PE_DRAFT_MAX_ROWS] = {0}; /* n <= n_rows */
    float reached[PE_DRAFT_MAX_ROWS];      /* the chance that all that is taken of a proposal is right */
    double expected[PE_DRAFT_MAX_ROWS];    /* tokens that a text gets of the step; those without a draft get one */
    for (size_t i = 0; i < n; i++) reached[i] = 1.0f, expected[i] = 1.0;
    double cost = costs->cost[n_rows], log_speeds = 0.0, plain = -(double)n_rows * pe_log(cost);
    double best = plain + (double)n_rows * pe_log(1.04);
    bool pays = false;
    for (size_t rows = n_rows + 1; rows <= PE_DRAFT_MAX_ROWS; rows++) {
        size_t likeliest = n;
        float chance = 0.0f;
        for (size_t i = 0; i < n; i++) {
            if (taken[i] == n_proposed[i]) continue;
            float next = reached[i] * chances[i * PE_DRAFT_MAX + taken[i]];
            if (next > chance) chance = next, likeliest = i;
        }
        if (likeliest == n) break;
        reached[likeliest] = chance;
        taken[likeliest]++;
        log_speeds -= pe_log(expected[likeliest]);
        log_speeds += pe_log(expected[likeliest] += chance);
        cost = cost_of(costs, rows, cost);
        if (log_speeds - (double)n_rows * pe_log(cost) <= best) continue;
        best = log_speeds - (double)n_rows * pe_log(cost);
        pays = true;
        memcpy(n_chosen, taken, n * sizeof *taken);
    }
    return pays ? (best - plain) / (double)n_rows : 0.0;
}

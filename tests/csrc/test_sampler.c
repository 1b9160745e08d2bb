/* test_sampler.c: many rows at once equal one after the other, on any number of threads. What the tokens must be is checked against
 * plain NumPy by tests/engine/test_sampler.py; this runs under sanitizers and emulators, and its hash is the same everywhere. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "sampler/sampler.h"

#define EXPECT(expected, call) \
    do { \
        char err[PE_ERR_LEN] = ""; \
        pe_status got = (call); \
        CHECK(got == (expected) && (got == PE_OK || err[0] != '\0'), "%s: %d '%s'", #call, (int)got, err); \
    } while (0)

enum { VOCAB = 700, N_ROWS = 37, N_STEPS = 6, MASK_WORDS = (VOCAB + 31) / 32 };
/* Of everything that comes out, the same on every machine; without what looks at the order of the history or at the spread, and with. */
static const uint64_t golden[2] = {0x3c343e6e76d34915, 0x7ea980635ea8ea1e};

/* What looks at the order of the history, which in this test is full of repeats, or at the spread of the logits. */
static void ask_more(pe_sampler_params *p, size_t row) {
    static const int32_t ids[4] = {3, 4, 3, 5}, lengths[3] = {1, 2, 1};
    if (row % 2 == 1) p->dry_multiplier = 4.0, p->dry_base = 1.5, p->dry_allowed_length = 1, p->dry_last_n = (int32_t)(row % 9) - 1;
    if (row % 5 == 2) p->breakers = (pe_id_sequences){ids, lengths, 2};
    if (row % 4 == 0) p->no_repeat_ngram_size = (int32_t)(row % 3) + 1;
    if (row % 3 == 0) p->bad_sequences = (pe_id_sequences){ids, lengths, 3};
    if (row % 6 == 4) p->repeat_last_n = 3;
    if (row % 4 == 2) p->top_n_sigma = 1.5;
    if (row % 4 == 3) p->xtc_probability = 0.5, p->xtc_threshold = 0.001;
    if (row % 7 == 1) p->dynatemp_range = 0.3, p->dynatemp_exponent = 0.7;
}

/* Parameters that differ from row to row: greedy, every filter, penalties, log-probabilities. */
static pe_sampler *sampler_new(size_t row, bool asks_more) {
    pe_sampler *s = NULL;
    pe_sampler_params p;
    static const int32_t bad[2] = {5, 600};
    pe_sampler_params_init(&p);
    p.seed = 1234 + row, p.sample_index = row % 3;
    p.temperature = row % 5 == 0 ? 0.0 : 0.3 * (double)(row % 7 + 1);
    p.top_k = row % 4 == 1 ? 20 : 0;
    if (row % 3 == 1) p.top_p = 0.8;
    if (row % 6 == 2) p.min_p = 0.01;
    if (row % 11 == 3) p.typical_p = 0.7;
    if (row % 2 == 0) p.repetition_penalty = 1.3, p.frequency_penalty = 0.2, p.presence_penalty = 0.1;
    p.n_top_logprobs = (int32_t)(row % 4) - 1;
    p.bad = bad, p.n_bad = row % 3 == 0 ? 2 : 0;
    if (asks_more) ask_more(&p, row);
    EXPECT(PE_OK, pe_sampler_create(&s, VOCAB, &p, err));
    return s;
}

/* What step `step` gives to every row: logits (one row of them not finite) and masks (one of them empty, some NULL). */
typedef struct inputs {
    float logits[N_ROWS][VOCAB];
    uint32_t masks[N_ROWS][MASK_WORDS];
    const uint32_t *mask[N_ROWS];
} inputs;

static void make_inputs(inputs *in, size_t step) {
    rng r = {step + 1};
    for (size_t row = 0; row < N_ROWS; row++) {
        for (size_t i = 0; i < VOCAB; i++) in->logits[row][i] = (float)rng_below(&r, 1 << 16) * 0x1p-13f;
        for (size_t i = 0; i < MASK_WORDS; i++) in->masks[row][i] = (uint32_t)rng_next(&r);
        in->mask[row] = rng_below(&r, 3) ? in->masks[row] : NULL;
    }
    size_t empty = rng_below(&r, N_ROWS);
    in->logits[rng_below(&r, N_ROWS)][rng_below(&r, VOCAB)] = rng_below(&r, 2) ? NAN : INFINITY;
    memset(in->masks[empty], 0, sizeof in->masks[empty]);
    in->mask[empty] = in->masks[empty];
}

static uint64_t hash_row(uint64_t hash, const pe_sample_row *row) {
    hash = hash_bytes(hash, &row->status, sizeof row->status);
    if (row->status != PE_OK) return hash;
    hash = hash_bytes(hash, &row->result.token, sizeof row->result.token);
    hash = hash_bytes(hash, &row->result.logprob, sizeof row->result.logprob);
    hash = hash_bytes(hash, row->result.top_ids, (size_t)row->result.n_top * sizeof row->result.top_ids[0]);
    return hash_bytes(hash, row->result.top_logprobs, (size_t)row->result.n_top * sizeof row->result.top_logprobs[0]);
}

/* All steps on n_threads threads, 0 = one call of pe_sampler_sample after the other; a hash of everything that came out. */
static uint64_t run(int n_threads, bool asks_more) {
    static inputs in;
    pe_sample_row *rows = calloc(N_ROWS, sizeof *rows);
    uint64_t hash = HASH_START;
    size_t n_failed_rows = 0;
    if (rows == NULL) exit(2);
    for (size_t i = 0; i < N_ROWS; i++) rows[i].sampler = sampler_new(i, asks_more);
    for (size_t i = 0; i < 60 * N_ROWS && asks_more; i++) /* a prompt of few tokens */
        EXPECT(PE_OK, pe_sampler_accept(rows[i % N_ROWS].sampler, 3 + (int32_t)(i / N_ROWS * i % 7), true, err));
    for (size_t step = 0; step < N_STEPS; step++) {
        make_inputs(&in, step);
        for (size_t i = 0; i < N_ROWS; i++) rows[i].logits = in.logits[i], rows[i].mask = in.mask[i], rows[i].position = 1000 * i + step;
        if (n_threads > 0) EXPECT(PE_OK, pe_sample_many(rows, N_ROWS, n_threads, err));
        for (size_t i = 0; i < N_ROWS; i++) {
            pe_sample_row *row = &rows[i];
            if (n_threads == 0)
                row->status = pe_sampler_sample(row->sampler, row->logits, row->position, row->mask, &row->result, row->err);
            hash = hash_row(hash, row);
            n_failed_rows += row->status != PE_OK;
            CHECK(row->status == PE_OK || row->err[0] != '\0', "row %zu fails without a word", i);
            if (row->status != PE_OK) continue;
            int32_t token = row->result.token;
            CHECK(row->mask == NULL || (row->mask[token / 32] >> token % 32 & 1), "row %zu: token %d is masked", i, (int)token);
            EXPECT(PE_OK, pe_sampler_accept(row->sampler, token, false, err));
        }
    }
    CHECK(n_failed_rows >= N_STEPS && n_failed_rows <= 2 * N_STEPS, "%zu rows failed", n_failed_rows);
    for (size_t i = 0; i < N_ROWS; i++) pe_sampler_destroy(rows[i].sampler);
    free(rows);
    return hash;
}

static void test_refusals(void) {
    float logits[VOCAB] = {0};
    pe_sample_row rows[3] = {{.logits = logits}, {.logits = logits}, {.logits = logits}};
    for (size_t i = 0; i < 3; i++) rows[i].sampler = sampler_new(i, false), rows[i].status = PE_ERR_SYSTEM;
    pe_sampler *last = rows[2].sampler;
    rows[2].sampler = rows[0].sampler;
    for (int round = 0; round < 2; round++) EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sample_many(rows, 3, 2, err));
    rows[2].sampler = last;
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sample_many(rows, 3, 0, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sample_many(rows, 3, 257, err));
    for (size_t i = 0; i < 3; i++) CHECK(rows[i].status == PE_ERR_SYSTEM, "row %zu was looked at", i);
    EXPECT(PE_OK, pe_sample_many(rows, 3, 2, err)); /* no mark was left */
    EXPECT(PE_OK, pe_sample_many(NULL, 0, 2, err));
    for (size_t i = 0; i < 3; i++) pe_sampler_destroy(rows[i].sampler);
}

void test_sampler(void) {
    for (int more = 0; more < 2; more++) {
        uint64_t expected = run(0, more);
        CHECK(expected == golden[more], "the sampler's bits changed: %016llx, golden %016llx", (unsigned long long)expected,
              (unsigned long long)golden[more]);
        for (int n_threads = 1; n_threads <= 4; n_threads++) CHECK(run(n_threads, more) == expected, "%d threads", n_threads);
    }
    test_refusals();
}

/* fuzz_api.c: a state machine over the C API. Every thread has contexts of its own and calls whatever it likes on them, right or wrong,
 * with allocations that fail at the n-th request, while the others cancel its forwards; all share two models and the thread pool.
 *
 *     fuzz_api SEED N_THREADS OPERATIONS      so many operations a thread, the same ones for the same seed
 *
 * Beside each context runs a plain model of it: which sequences there are and which tokens they hold. After every operation the two are
 * compared, and the status must be one that the call's contract allows. Now and then a sequence's tokens are computed again in a fresh
 * context, and the logits compared bit for bit. To be built under sanitizers (capi.py does). Prints counts; the first violation is
 * printed and ends the program with status 1. */
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failing.h"
#include "fuzz_api.h"
#include "harness.h"
#include "pyengine.h"
#include "tiny_model.h"

enum { MAX_SEQUENCES = 12, MAX_LENGTH = 600, MAX_BATCH = 300, MAX_THREADS = 64, OPERATIONS_PER_CONTEXT = 60 };

static const pe_layer_spec layers[] = {{.window = 0, .rope = 0, .norm = "rmsnorm", .activation = "swiglu"},
                                       {.window = 70, .rope = 0, .norm = "rmsnorm", .activation = "swiglu"},
                                       {.window = 3, .rope = 0, .norm = "rmsnorm", .activation = "swiglu", .mixer = "short_conv"}};
static const pe_config config = {.dim = 32,
                                 .hidden_dim = 48,
                                 .n_layers = 3,
                                 .n_heads = 4,
                                 .n_kv_heads = 2,
                                 .head_dim = 8,
                                 .vocab_size = 100,
                                 .max_seq_len = MAX_LENGTH,
                                 .norm_eps = 1e-5f,
                                 .tie_embeddings = true,
                                 .layers = layers};
static tiny_model sane, loud; /* the second overflows somewhere: rows fail */

static atomic_llong n_operations, n_forwards, n_refused, n_failed_requests, n_compared;
static int cancels[MAX_THREADS]; /* read by the forward of one thread, set by any with pe_request_cancel */

void violation(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("violation: ", stdout);
    vprintf(format, arguments);
    puts("");
    va_end(arguments);
    fflush(stdout);
    _Exit(1);
}

/* ------------------------------------------------------------------ the plain model */

typedef struct sequence {
    int32_t id;
    size_t length;
    int32_t tokens[MAX_LENGTH];
    size_t n_drafted; /* by the last forward, and nothing happened to the sequence since */
    int32_t drafted[MAX_BATCH];
} sequence;

typedef struct machine {
    rng r;
    int thread, n_threads;
    const tiny_model *weights;
    pe_kv_dtype kv_dtype;
    pe_context *context;
    size_t max_pages; /* as set: 0 = no limit */
    size_t n_sequences;
    sequence sequences[MAX_SEQUENCES];
    char err[PE_ERR_LEN];
} machine;

static bool chance(machine *m, size_t one_in) { return rng_below(&m->r, one_in) == 0; }

/* A call may always fail for want of memory if a request failed or pages are limited; `failed` is how many requests did. */
static void expect(machine *m, pe_status status, size_t failed, bool is_right, bool pages, pe_status refusal,
                   const char *what) {
    atomic_fetch_add(&n_failed_requests, (long long)failed);
    if (status != PE_OK) atomic_fetch_add(&n_refused, 1);
    if (status == PE_OK && is_right) return;
    if (status == refusal && !is_right) return;
    if ((status == PE_ERR_OUT_OF_MEMORY || status == PE_ERR_SYSTEM) && (failed > 0 || (pages && m->max_pages > 0)))
        return;
    violation("%s: status %d (%s), %s arguments, %zu failed requests", what, (int)status, m->err,
              is_right ? "right" : "wrong", failed);
}

static void maybe_arm(machine *m) {
    if (chance(m, 6)) failing_arm(rng_below(&m->r, 12), chance(m, 2));
}

/* The context holds what the model says: lengths, tokens, balanced books. */
static void compare(machine *m) {
    int32_t tokens[MAX_LENGTH];
    for (size_t i = 0; i < m->n_sequences; i++) {
        const sequence *s = &m->sequences[i];
        size_t length = 0, n = pe_sequence_tokens(m->context, s->id, tokens, MAX_LENGTH);
        if (pe_sequence_length(m->context, s->id, &length, m->err) != PE_OK)
            violation("a sequence is gone: %s", m->err);
        if (length != s->length || n != s->length)
            violation("length %zu (%zu tokens), expected %zu", length, n, s->length);
        if (memcmp(tokens, s->tokens, n * sizeof *tokens) != 0) violation("a sequence holds other tokens");
    }
    if (pe_context_check(m->context, m->err) != PE_OK) violation("the books: %s", m->err);
    pe_cache_stats stats;
    pe_context_cache_stats(m->context, &stats);
    if (stats.n_sequences != m->n_sequences)
        violation("%zu sequences, expected %zu", stats.n_sequences, m->n_sequences);
    if (m->max_pages > 0 && stats.n_bytes > m->max_pages * stats.page_bytes && stats.n_bytes > stats.n_held_bytes)
        violation("%zu bytes, %zu pages are allowed, and not all in use", stats.n_bytes, m->max_pages);
}

/* What is left of n tokens of a sequence: a window may have slid too far for all of them. */
static size_t length_left(machine *m, int32_t id, size_t n) {
    size_t length = SIZE_MAX;
    if (pe_sequence_length(m->context, id, &length, m->err) != PE_OK || length > n)
        violation("%zu tokens are left of %zu", length, n);
    return length;
}

/* An id that no sequence has. */
static int32_t unknown_id(machine *m) {
    for (;;) {
        int32_t id = chance(m, 2) ? (int32_t)rng_next(&m->r) : (int32_t)rng_below(&m->r, 2 * MAX_SEQUENCES);
        bool known = false;
        for (size_t i = 0; i < m->n_sequences; i++) known |= m->sequences[i].id == id;
        if (!known) return id;
    }
}

static void salt_of(machine *m, uint8_t salt[PE_SALT_BYTES]) { memset(salt, (int)rng_below(&m->r, 3), PE_SALT_BYTES); }

/* ------------------------------------------------------------------ sequences */

static void operate_new(machine *m) {
    if (m->n_sequences == MAX_SEQUENCES) return;
    sequence *s = &m->sequences[m->n_sequences];
    maybe_arm(m);
    pe_status status = pe_sequence_new(m->context, &s->id, m->err);
    expect(m, status, failing_disarm(), true, false, PE_OK, "new");
    if (status == PE_OK) m->n_sequences++, s->length = s->n_drafted = 0;
}

static void operate_match(machine *m) {
    if (m->n_sequences == MAX_SEQUENCES) return;
    sequence *s = &m->sequences[m->n_sequences];
    size_t n = rng_below(&m->r, MAX_LENGTH);
    if (m->n_sequences > 0 && !chance(m, 4)) { /* the beginning of another, and something of its own */
        const sequence *like = &m->sequences[rng_below(&m->r, m->n_sequences)];
        memcpy(s->tokens, like->tokens, sizeof s->tokens);
        for (size_t i = like->length; i < MAX_LENGTH; i++) s->tokens[i] = (int32_t)rng_below(&m->r, 3);
    } else {
        for (size_t i = 0; i < MAX_LENGTH; i++) s->tokens[i] = (int32_t)rng_below(&m->r, 3);
    }
    uint8_t salt[PE_SALT_BYTES];
    salt_of(m, salt);
    bool unsalted = chance(m, 3);
    size_t would = pe_sequence_match_length(m->context, s->tokens, n, unsalted ? NULL : salt), matched = 0;
    maybe_arm(m);
    pe_status status =
        pe_sequence_match(m->context, s->tokens, n, unsalted ? NULL : salt, !chance(m, 4), &s->id, &matched, m->err);
    expect(m, status, failing_disarm(), true, false, PE_OK, "match");
    if (status != PE_OK) return;
    if (matched > n || matched != would) violation("matched %zu of %zu tokens, promised %zu", matched, n, would);
    m->n_sequences++, s->length = matched, s->n_drafted = 0;
}

static void operate_fork(machine *m) {
    if (m->n_sequences == 0 || m->n_sequences == MAX_SEQUENCES) return;
    const sequence *source = &m->sequences[rng_below(&m->r, m->n_sequences)];
    sequence *s = &m->sequences[m->n_sequences];
    size_t n = chance(m, 4) ? rng_next(&m->r) : rng_below(&m->r, source->length + 2);
    bool is_known = !chance(m, 10);
    maybe_arm(m);
    pe_status status = pe_sequence_fork(m->context, is_known ? source->id : unknown_id(m), n, &s->id, m->err);
    expect(m, status, failing_disarm(), is_known && n <= source->length, false, PE_ERR_INVALID_ARGUMENT, "fork");
    if (status != PE_OK) return;
    memcpy(s->tokens, source->tokens, n * sizeof *s->tokens);
    m->n_sequences++, s->length = length_left(m, s->id, n), s->n_drafted = 0;
}

static void operate_truncate(machine *m) {
    if (m->n_sequences == 0) return;
    sequence *s = &m->sequences[rng_below(&m->r, m->n_sequences)];
    size_t n = chance(m, 4) ? rng_next(&m->r) : rng_below(&m->r, s->length + 2);
    bool is_known = !chance(m, 10);
    maybe_arm(m);
    pe_status status = pe_sequence_truncate(m->context, is_known ? s->id : unknown_id(m), n, m->err);
    expect(m, status, failing_disarm(), is_known && n <= s->length, false, PE_ERR_INVALID_ARGUMENT, "truncate");
    if (status == PE_OK) s->length = length_left(m, s->id, n), s->n_drafted = 0;
}

/* Guesses that came true, then one that did not. */
static void operate_accept(machine *m) {
    if (m->n_sequences == 0) return;
    sequence *s = &m->sequences[rng_below(&m->r, m->n_sequences)];
    int32_t truth[MAX_BATCH + 1];
    size_t n_right = rng_below(&m->r, s->n_drafted + 1), n_accepted = SIZE_MAX;
    bool is_known = !chance(m, 10);
    memcpy(truth, s->drafted, n_right * sizeof *truth);
    truth[n_right] = n_right < s->n_drafted ? s->drafted[n_right] + 1 : 0;
    size_t n = n_right + rng_below(&m->r, 2);
    pe_status status =
        pe_sequence_accept(m->context, is_known ? s->id : unknown_id(m), truth, n, &n_accepted, m->err);
    expect(m, status, 0, is_known, false, PE_ERR_INVALID_ARGUMENT, "accept");
    if (status != PE_OK) return;
    if (n_accepted != n_right) violation("%zu guesses came true, %zu were accepted", n_right, n_accepted);
    memcpy(s->tokens + s->length, truth, n_right * sizeof *truth);
    s->length += n_right, s->n_drafted = 0;
}

static void operate_drop(machine *m) {
    if (m->n_sequences == 0) return;
    bool is_known = !chance(m, 10);
    size_t i = rng_below(&m->r, m->n_sequences);
    pe_status status = pe_sequence_drop(m->context, is_known ? m->sequences[i].id : unknown_id(m), m->err);
    expect(m, status, 0, is_known, false, PE_ERR_INVALID_ARGUMENT, "drop");
    if (status == PE_OK) m->sequences[i] = m->sequences[--m->n_sequences];
}

static void operate_unknown(machine *m) {
    size_t length = 0;
    int32_t id = unknown_id(m), token;
    if (pe_sequence_length(m->context, id, &length, m->err) == PE_OK)
        violation("a sequence %d that was never made has a length", (int)id);
    if (pe_sequence_tokens(m->context, id, &token, 1) != 0)
        violation("a sequence %d that was never made has tokens", (int)id);
}

static void operate_pages(machine *m) {
    switch (rng_below(&m->r, 3)) {
    case 0: pe_context_drop_cached(m->context); break;
    case 1: m->max_pages = 0; break;
    default: m->max_pages = 1 + rng_below(&m->r, 40);
    }
    pe_context_set_max_pages(m->context, m->max_pages);
}

/* ------------------------------------------------------------------ forward */

typedef struct rows {
    size_t n, n_logits, n_hidden;
    int32_t tokens[MAX_BATCH], sequences[MAX_BATCH];
    uint8_t wants[MAX_BATCH], drafted[MAX_BATCH], failed[MAX_BATCH];
    size_t owner[MAX_BATCH]; /* index of the sequence; MAX_SEQUENCES = one that is not there */
    bool is_right, is_full;
} rows;

static int poll_sometimes(void *user) { return rng_below(user, 3) == 0; }

static void rows_make(machine *m, rows *b) {
    size_t added[MAX_SEQUENCES] = {0}, i = 0;
    bool drafts[MAX_SEQUENCES] = {false}, has_drafts = chance(m, 3); /* once a sequence's rows are guesses, all of them are */
    *b = (rows){.n = 1 + rng_below(&m->r, chance(m, 8) ? MAX_BATCH : 12), .is_right = true};
    if (chance(m, 60)) b->n = 0, b->is_right = false;
    for (size_t k = 0; k < b->n; k++) {
        if (k == 0 || chance(m, 3)) i = rng_below(&m->r, m->n_sequences); /* runs of one sequence, interleaved */
        b->owner[k] = i, b->sequences[k] = m->sequences[i].id,
        b->tokens[k] = (int32_t)rng_below(&m->r, chance(m, 3) ? config.vocab_size : 3);
        b->wants[k] = (uint8_t)rng_below(&m->r, 4);
        bool is_behind_guesses = drafts[i];
        b->drafted[k] = drafts[i] |= has_drafts && chance(m, 4);
        if (is_behind_guesses && chance(m, 500)) b->drafted[k] = 0, b->is_right = false;
        if (chance(m, 1500)) b->tokens[k] = chance(m, 2) ? -1 : (int32_t)config.vocab_size, b->is_right = false;
        if (chance(m, 1500))
            b->owner[k] = MAX_SEQUENCES, b->sequences[k] = unknown_id(m), b->is_right = false;
        else
            b->is_full |= m->sequences[i].length + ++added[i] > MAX_LENGTH;
        b->n_logits += (b->wants[k] & PE_WANT_LOGITS) != 0, b->n_hidden += (b->wants[k] & PE_WANT_HIDDEN) != 0;
    }
}

/* What succeeded is appended; a sequence with a failed row has not changed. */
static void rows_append(machine *m, const rows *b) {
    bool has_failed[MAX_SEQUENCES] = {false};
    for (size_t k = 0; k < b->n; k++) has_failed[b->owner[k]] |= b->failed[k] != 0;
    for (size_t i = 0; i < m->n_sequences; i++) m->sequences[i].n_drafted = 0;
    for (size_t k = 0; k < b->n; k++) {
        sequence *s = &m->sequences[b->owner[k]];
        if (b->failed[k] != has_failed[b->owner[k]]) violation("one row of a sequence failed, another did not");
        if (has_failed[b->owner[k]]) continue;
        if (b->drafted[k])
            s->drafted[s->n_drafted++] = b->tokens[k];
        else
            s->tokens[s->length++] = b->tokens[k];
    }
}

static void rows_read(machine *m, const rows *b) {
    volatile float sum = 0;
    if (pe_context_n_logits(m->context) != b->n_logits || pe_context_n_hidden(m->context) != b->n_hidden)
        violation("other rows than were wanted");
    for (size_t k = 0; k < b->n_logits; k++) sum += pe_context_logits(m->context, k)[config.vocab_size - 1];
    for (size_t k = 0; k < b->n_hidden; k++) sum += pe_context_hidden(m->context, k)[config.dim - 1];
    if (pe_context_logits(m->context, b->n_logits) != NULL || pe_context_hidden(m->context, b->n_hidden) != NULL)
        violation("a row past the end");
}

/* The last token of a sequence, computed again with all before it in a fresh context of one thread, has the same logits. */
static void compare_bits(machine *m, size_t i, const float *logits) {
    const sequence *s = &m->sequences[i];
    float kept[100];
    int32_t id, ids[MAX_LENGTH];
    uint8_t wants[MAX_LENGTH] = {0};
    memcpy(kept, logits, sizeof kept);
    pe_context *fresh = NULL;
    bool good = pe_context_create(&fresh, m->weights->model, m->kv_dtype, 1, m->err) == PE_OK &&
                pe_sequence_new(fresh, &id, m->err) == PE_OK;
    if (!good) violation("a fresh context: %s", m->err);
    for (size_t k = 0; k < s->length; k++) ids[k] = id;
    wants[s->length - 1] = PE_WANT_LOGITS;
    pe_batch batch = {.n_tokens = s->length, .tokens = s->tokens, .sequences = ids, .wants = wants};
    if (pe_forward(fresh, &batch, m->err) != PE_OK) violation("a fresh forward: %s", m->err);
    if (memcmp(kept, pe_context_logits(fresh, 0), sizeof kept) != 0)
        violation("other bits after %zu tokens", s->length);
    pe_context_destroy(fresh);
    atomic_fetch_add(&n_compared, 1);
}

static void operate_forward(machine *m) {
    if (m->n_sequences == 0) return;
    static _Thread_local rows b;
    rows_make(m, &b);
    bool has_poll =
        chance(m, 5) && m->n_threads > 1; /* when it is asked depends on the clock: a thread alone goes without */
    bool is_late = chance(m, 20), can_cancel = chance(m, 4), per_sequence = !chance(m, 4);
    __atomic_store_n(&cancels[m->thread], chance(m, 12), __ATOMIC_RELAXED); /* others may set it at any time */
    pe_batch batch = {.n_tokens = b.n,
                      .tokens = b.tokens,
                      .sequences = b.sequences,
                      .wants = b.wants,
                      .drafted = b.drafted,
                      .failed = per_sequence ? b.failed : NULL,
                      .poll = has_poll ? poll_sometimes : NULL,
                      .poll_user = &m->r,
                      .deadline_ns = is_late,
                      .cancel = can_cancel ? &cancels[m->thread] : NULL};
    memset(b.failed, 0xAA, sizeof b.failed);
    maybe_arm(m);
    pe_status status = pe_forward(m->context, &batch, m->err);
    size_t failed = failing_disarm();
    atomic_fetch_add(&n_forwards, 1);
    if (!per_sequence) memset(b.failed, 0, sizeof b.failed);
    if (status == PE_ERR_CANCELLED && (has_poll || is_late || can_cancel))
        status = PE_ERR_CANCELLED;
    else if (status == PE_ERR_NOT_FINITE && m->weights == &loud && !per_sequence)
        status = PE_ERR_NOT_FINITE;
    else if (status == PE_ERR_CONTEXT_FULL && b.is_full)
        status = PE_ERR_CONTEXT_FULL;
    else
        expect(m, status, failed, b.is_right && !b.is_full, true, PE_ERR_INVALID_ARGUMENT, "forward");
    if (status != PE_OK) {
        for (size_t k = 0; k < b.n && b.is_right; k++)
            if (b.failed[k] != 0) violation("a call that failed as a whole says that a row did");
        if (pe_context_n_logits(m->context) != 0 || pe_context_logits(m->context, 0) != NULL)
            violation("rows of a call that failed (status %d, %s)", (int)status, m->err);
        for (size_t i = 0; i < m->n_sequences; i++) m->sequences[i].n_drafted = 0; /* forgotten all the same */
        return;
    }
    rows_append(m, &b);
    rows_read(m, &b);
    size_t last = b.owner[b.n - 1];
    if (m->weights == &sane && (b.wants[b.n - 1] & PE_WANT_LOGITS) && !b.drafted[b.n - 1] && chance(m, 12))
        compare_bits(m, last, pe_context_logits(m->context, b.n_logits - 1));
}

/* ------------------------------------------------------------------ snapshots */

/* Numbers of another text, or of none, in the place of some. */
static void damage(machine *m, char *bytes, size_t n_bytes) {
    static const float numbers[] = {0.0f, -1.0f, 1e-40f, 3e38f, INFINITY, NAN};
    for (size_t n = n_bytes == 0 ? 0 : rng_below(&m->r, 200); n > 0; n--) {
        size_t at = rng_below(&m->r, n_bytes);
        if (chance(m, 2))
            bytes[at] = (char)rng_next(&m->r);
        else
            memcpy(bytes + at / 4 * 4, &numbers[rng_below(&m->r, sizeof numbers / sizeof *numbers)], 4);
    }
}

/* Whatever a sequence of strange keys and values computes, nothing breaks; nobody else finds them. */
static void restore_strange(machine *m, const sequence *of, char *bytes, size_t n_bytes) {
    uint8_t salt[PE_SALT_BYTES];
    int32_t tokens[MAX_LENGTH], id, token = 0;
    memset(salt, 0xFF, sizeof salt);
    memcpy(tokens, of->tokens, sizeof tokens);
    size_t n = chance(m, 4) ? rng_below(&m->r, MAX_LENGTH + 20) : of->length;
    if (n > 0 && n <= MAX_LENGTH && chance(m, 8)) tokens[rng_below(&m->r, n)] = (int32_t)rng_next(&m->r);
    damage(m, bytes, n_bytes);
    if (chance(m, 6)) n_bytes = rng_below(&m->r, n_bytes + 1);
    maybe_arm(m);
    pe_status status = pe_sequence_restore(m->context, tokens, n, salt, bytes, n_bytes, &id, m->err);
    size_t failed = failing_disarm();
    if (status == PE_ERR_CONTEXT_FULL && n > MAX_LENGTH) return;
    expect(m, status, failed, status == PE_OK, true, PE_ERR_INVALID_ARGUMENT, "restore of anything");
    if (status != PE_OK) return;
    const uint8_t wants = PE_WANT_LOGITS;
    pe_batch batch = {.n_tokens = 1, .tokens = &token, .sequences = &id, .wants = &wants};
    status = pe_forward(m->context, &batch, m->err);
    for (size_t i = 0; i < m->n_sequences; i++) m->sequences[i].n_drafted = 0;
    if (status != PE_OK && status != PE_ERR_NOT_FINITE && !(status == PE_ERR_CONTEXT_FULL && n == MAX_LENGTH))
        expect(m, status, 0, true, true, PE_OK, "forward after anything");
    if (pe_context_check(m->context, m->err) != PE_OK) violation("the books: %s", m->err);
    if (pe_sequence_drop(m->context, id, m->err) != PE_OK) violation("drop: %s", m->err);
}

/* Keys and values of a sequence, taken out and put back as they are, or damaged. */
static void operate_snapshot(machine *m) {
    if (m->n_sequences == 0 || m->n_sequences == MAX_SEQUENCES) return;
    const sequence *of = &m->sequences[rng_below(&m->r, m->n_sequences)];
    sequence *s = &m->sequences[m->n_sequences];
    size_t n_bytes = pe_sequence_snapshot_bytes(m->context, of->id);
    char *bytes = aligned_alloc(64, n_bytes + 64); /* a multiple of 64: whole chunks */
    if (bytes == NULL) violation("no memory for a snapshot of %zu bytes", n_bytes);
    if (pe_sequence_save(m->context, of->id, bytes, n_bytes, m->err) != PE_OK) violation("save: %s", m->err);
    if (chance(m, 2)) {
        restore_strange(m, of, bytes, n_bytes);
    } else {
        uint8_t salt[PE_SALT_BYTES];
        salt_of(m, salt);
        maybe_arm(m);
        pe_status status = pe_sequence_restore(m->context, of->tokens, of->length, salt, bytes, n_bytes, &s->id, m->err);
        expect(m, status, failing_disarm(), true, true, PE_OK, "restore");
        if (status == PE_OK) {
            memcpy(s->tokens, of->tokens, sizeof s->tokens);
            m->n_sequences++, s->length = of->length, s->n_drafted = 0;
        }
    }
    free(bytes);
}

/* ------------------------------------------------------------------ all together */

static void machine_open(machine *m) {
    m->weights = chance(m, 8) ? &loud : &sane;
    m->kv_dtype = chance(m, 4) ? PE_KV_F32 : PE_KV_INT8;
    int n_threads = 1 + (int)rng_below(&m->r, 4);
    bool is_right = !chance(m, 20);
    for (m->context = NULL; m->context == NULL;) {
        maybe_arm(m);
        pe_status status = pe_context_create(&m->context, m->weights->model, m->kv_dtype,
                                             is_right ? n_threads : -(int)rng_below(&m->r, 3) - 1, m->err);
        expect(m, status, failing_disarm(), is_right, false, PE_ERR_INVALID_ARGUMENT, "create");
        is_right = true;
    }
    m->n_sequences = m->max_pages = 0;
}

static void operate_sampler(machine *m) {
    size_t failed = 0, refused = fuzz_sampler(&m->r, &failed);
    atomic_fetch_add(&n_refused, (long long)refused);
    atomic_fetch_add(&n_failed_requests, (long long)failed);
}

static void operate_cancel_another(machine *m) { pe_request_cancel(&cancels[rng_below(&m->r, (size_t)m->n_threads)]); }

static void operate(machine *m) {
    static void (*const operations[])(machine *) = {
        operate_new,     operate_new,     operate_match,   operate_fork,    operate_truncate,
        operate_drop,    operate_unknown, operate_pages,   operate_forward, operate_forward,
        operate_forward, operate_forward, operate_forward, operate_sampler, operate_cancel_another,
        operate_accept,  operate_forward, operate_forward, operate_snapshot,
    };
    operations[rng_below(&m->r, sizeof operations / sizeof *operations)](m);
    atomic_fetch_add(&n_operations, 1);
}

typedef struct job {
    uint64_t seed;
    int thread, n_threads;
    long long operations;
} job;

static void *run(void *arg) {
    const job *j = arg;
    static _Thread_local machine m;
    m.r.state = j->seed * 1000003 + (uint64_t)j->thread, m.thread = j->thread, m.n_threads = j->n_threads;
    for (long long i = 0; i < j->operations;) {
        machine_open(&m);
        for (int k = 0; k < OPERATIONS_PER_CONTEXT && i < j->operations; k++, i++) {
            operate(&m);
            compare(&m);
        }
        pe_context_destroy(m.context);
    }
    return NULL;
}

int main(int argc, char **argv) {
    int n_threads = argc == 4 ? atoi(argv[2]) : 0;
    if (n_threads < 1 || n_threads > MAX_THREADS) {
        fprintf(stderr, "usage: fuzz_api SEED N_THREADS OPERATIONS\n");
        return 2;
    }
    char err[PE_ERR_LEN] = "";
    tiny_model_make(&sane, &config, 1, 1.0f);
    tiny_model_make(&loud, &config, 2, 1e18f);
    if (tiny_model_load(&sane, 2, err) != PE_OK || tiny_model_load(&loud, 2, err) != PE_OK)
        violation("the models: %s", err);
    pthread_t threads[MAX_THREADS];
    job jobs[MAX_THREADS];
    for (int i = 0; i < n_threads; i++) {
        jobs[i] = (job){strtoull(argv[1], NULL, 10), i, n_threads, atoll(argv[3])};
        if (pthread_create(&threads[i], NULL, run, &jobs[i]) != 0) return 2;
    }
    for (int i = 0; i < n_threads; i++) pthread_join(threads[i], NULL);
    tiny_model_free(&sane), tiny_model_free(&loud);
    printf("operations %lld forwards %lld compared %lld refused %lld failed_requests %lld\n", (long long)n_operations,
           (long long)n_forwards, (long long)n_compared, (long long)n_refused, (long long)n_failed_requests);
    return 0;
}

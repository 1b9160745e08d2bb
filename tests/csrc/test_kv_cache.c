/* test_kv_cache.c: random schedules of everything that can happen to sequences and pages, beside a plain model of them.
 *
 * Instead of keys, each position is written a number in every layer that depends on its salt and on every token up to it, as real
 * keys do. A page that is shared wrongly, copied too late, written twice or found under other tokens shows as a wrong number, and a
 * window that slides too early as one that is gone. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "kv_cache.h"
#include "kv_snapshot.h"

enum { MAX_LENGTH = 1500, MAX_LIVE = 12, N_BASES = 4, N_SAVED = 3, CONV_DIM = 32 };

/* What a sequence should hold. */
typedef struct expected {
    int32_t id;
    size_t length;
    uint8_t salt[PE_SALT_BYTES];
    int32_t tokens[MAX_LENGTH];
} expected;

/* What a sequence held once: bytes (n_bytes), NULL = nothing has been saved here. */
typedef struct snapshot {
    expected of;
    char *bytes;
    size_t n_bytes;
} snapshot;

/* The layers of a model: their windows, 0 = none; which of them are convolutions; and the pages that are too few for a schedule. */
typedef struct layer_windows {
    size_t too_few;
    uint32_t n, window[3];
    bool short_conv[3];
} layer_windows;

typedef struct world {
    rng random;
    layer_windows layers;
    pe_kv_cache *cache;
    size_t max_pages, n_live;
    expected live[MAX_LIVE];
    snapshot saved[N_SAVED];
    int32_t bases[N_BASES][MAX_LENGTH]; /* texts that prompts begin with */
    size_t max_window, n_refused, n_matched, n_accepted, n_shortened, n_restored;
} world;

/* The number that belongs to the last of tokens (n): 24 bits, exact in a float. */
static uint64_t next_number(uint64_t hash, int32_t token) { return hash_bytes(hash, &token, sizeof token); }
static float as_float(uint64_t hash) { return (float)(hash >> 40); }

/* NULL if it is gone. */
static float *number_at(const world *w, int32_t id, size_t position, uint32_t layer) {
    if (w->layers.short_conv[layer]) {
        float *inputs = pe_kv_inputs_at(w->cache, id, position / PE_CHUNK, layer);
        return inputs == NULL ? NULL : inputs + position % PE_CHUNK * CONV_DIM + CONV_DIM - 1;
    }
    pe_kv_chunk chunk = pe_kv_chunk_at(w->cache, id, position / PE_CHUNK, layer, 0);
    return chunk.k == NULL ? NULL : &chunk.v_scales[position % PE_CHUNK];
}

/* Of a sequence of n tokens: whether all layers hold `number` at a position, but those that do not see it any more. */
static bool hold_number(const world *w, int32_t id, size_t n, size_t position, float number) {
    for (uint32_t layer = 0; layer < w->layers.n; layer++) {
        const float *held = number_at(w, id, position, layer);
        size_t window = w->layers.window[layer];
        if (held == NULL ? window == 0 || position + window > n : *held != number) return false;
    }
    return true;
}

static void check_sequence(world *w, const expected *e) {
    int32_t tokens[MAX_LENGTH];
    size_t n = pe_kv_tokens(w->cache, e->id, tokens, MAX_LENGTH);
    CHECK(n == e->length && pe_kv_length(w->cache, e->id) >= n, "length %zu, expected %zu", n, e->length);
    if (n != e->length) return;
    uint64_t hash = hash_bytes(HASH_START, e->salt, sizeof e->salt);
    size_t n_wrong = 0;
    for (size_t i = 0; i < n; i++) {
        hash = next_number(hash, e->tokens[i]);
        n_wrong += tokens[i] != e->tokens[i] || !hold_number(w, e->id, n, i, as_float(hash));
    }
    CHECK(n_wrong == 0, "%zu of %zu positions hold something else", n_wrong, n);
}

static void check_world(world *w) {
    char err[PE_ERR_LEN] = "";
    CHECK(pe_kv_cache_check(w->cache, err) == PE_OK, "%s", err);
    pe_cache_stats stats;
    pe_kv_cache_stats(w->cache, &stats);
    CHECK(stats.n_sequences == w->n_live, "%zu sequences, expected %zu", stats.n_sequences, w->n_live);
    CHECK(stats.n_held_bytes <= stats.n_bytes, "%zu bytes are held of %zu", stats.n_held_bytes, stats.n_bytes);
    CHECK(w->max_pages == 0 || stats.n_bytes <= w->max_pages * stats.page_bytes, "%zu bytes, %zu pages allowed", stats.n_bytes,
          w->max_pages);
    for (size_t i = 0; i < w->n_live; i++) check_sequence(w, &w->live[i]);
}

/* A text that begins like one of the bases, by now and then a whole number of pages. */
static size_t make_text(world *w, int32_t *tokens) {
    size_t n = 1 + rng_below(&w->random, MAX_LENGTH - 400);
    size_t n_shared = rng_below(&w->random, n + 1);
    if (rng_below(&w->random, 3) == 0) n_shared = n_shared / PE_CHUNK * PE_CHUNK;
    const int32_t *base = w->bases[rng_below(&w->random, N_BASES)];
    for (size_t i = 0; i < n; i++) tokens[i] = i < n_shared ? base[i] : (int32_t)rng_below(&w->random, 2);
    return n;
}

static void begin(world *w) {
    if (w->n_live == MAX_LIVE) return;
    expected *e = &w->live[w->n_live];
    char err[PE_ERR_LEN];
    int32_t text[MAX_LENGTH];
    size_t n = make_text(w, text);
    memset(e->salt, 0, sizeof e->salt);
    e->length = 0;
    if (rng_below(&w->random, 8) == 0) {
        CHECK(pe_kv_new(w->cache, &e->id, err) == PE_OK, "%s", err);
    } else {
        e->salt[3] = (uint8_t)rng_below(&w->random, 2);
        size_t foreseen = pe_kv_match_length(w->cache, text, n, e->salt);
        bool keep = rng_below(&w->random, 6) != 0;
        CHECK(pe_kv_match(w->cache, text, n, e->salt, keep, &e->id, &e->length, err) == PE_OK, "%s", err);
        CHECK(e->length == foreseen && e->length <= n, "matched %zu, foreseen %zu", e->length, foreseen);
        memcpy(e->tokens, text, e->length * sizeof *text);
        w->n_matched += e->length;
    }
    w->n_live++;
}

/* One sequence of a batch on its way: `hash` of the positions written so far, `next` to be written. The last n_drafted are
 * guesses. */
typedef struct row_state {
    expected *e;
    const int32_t *base; /* its next tokens are those of this text */
    uint64_t hash;
    size_t next, end, n_drafted;
} row_state;

/* Extend by one position and write it. */
static bool place(world *w, row_state *r, bool valid) {
    char err[PE_ERR_LEN];
    pe_status status = pe_kv_extend(w->cache, r->e->id, 1, err);
    CHECK(status == PE_OK || (status == PE_ERR_OUT_OF_MEMORY && w->max_pages > 0), "%s", err);
    if (status != PE_OK) return false;
    r->e->tokens[r->next] = r->base[r->next];
    r->hash = next_number(r->hash, r->base[r->next]);
    for (uint32_t layer = 0; layer < w->layers.n; layer++)
        *number_at(w, r->e->id, r->next, layer) = valid ? as_float(r->hash) : -1.0f;
    r->next++;
    return true;
}

/* The guesses that came true are accepted, or an exception comes between: then nobody knows of them. */
static void settle_drafts(world *w, row_state *r) {
    expected *e = r->e;
    char err[PE_ERR_LEN];
    int32_t truth[MAX_LENGTH];
    size_t n_right = rng_below(&w->random, r->n_drafted + 1), n_accepted = 99;
    if (rng_below(&w->random, 4) == 0) return;
    memcpy(truth, e->tokens + e->length, r->n_drafted * sizeof *truth);
    if (n_right < r->n_drafted) truth[n_right] += 5;
    bool is_short = rng_below(&w->random, 2) == 0; /* nothing is known beyond what came true */
    pe_status status = pe_kv_accept(w->cache, e->id, truth, is_short ? n_right : r->n_drafted, &n_accepted, err);
    CHECK(status == PE_OK && n_accepted == n_right, "%zu of %zu guesses accepted", n_accepted, n_right);
    e->length += n_right;
    CHECK(pe_kv_length(w->cache, e->id) == e->length, "wrong guesses are left");
    w->n_accepted += n_right;
}

/* What a forward does with a few sequences side by side: extend, write, then commit all or roll all back. They continue like a base, so
 * that pages can be found again. */
static void append(world *w) {
    pe_kv_forget_drafts(w->cache);
    row_state rows[3];
    size_t n_rows = 0, first = rng_below(&w->random, w->n_live), n_wanted = 1 + rng_below(&w->random, 3);
    for (size_t i = 0; i < w->n_live && n_rows < n_wanted; i++) {
        expected *e = &w->live[(first + i) % w->n_live];
        size_t n = 1 + rng_below(&w->random, 300);
        if (e->length + n > MAX_LENGTH) continue;
        row_state *r = &rows[n_rows++];
        *r = (row_state){e, w->bases[rng_below(&w->random, N_BASES)], hash_bytes(HASH_START, e->salt, sizeof e->salt),
                         e->length, e->length + n, rng_below(&w->random, n)};
        for (size_t k = 0; k < e->length; k++) r->hash = next_number(r->hash, e->tokens[k]);
    }
    bool fails = rng_below(&w->random, 5) == 0, refused = false, busy = true;
    while (busy && !refused) { /* row by row in turn, as a batch may lie */
        busy = false;
        for (size_t i = 0; i < n_rows && !refused; i++) {
            if (rows[i].next == rows[i].end) continue;
            busy = true;
            refused = !place(w, &rows[i], !fails);
        }
    }
    w->n_refused += refused;
    for (size_t i = 0; i < n_rows; i++) {
        expected *e = rows[i].e;
        if (fails || refused) {
            pe_kv_rollback(w->cache, e->id);
            continue;
        }
        size_t end = rows[i].end - rows[i].n_drafted;
        for (; e->length < end; e->length++) pe_kv_commit(w->cache, e->id, e->tokens[e->length]);
        for (size_t k = end; k < rows[i].end; k++) pe_kv_draft(w->cache, e->id, e->tokens[k]);
        settle_drafts(w, &rows[i]);
    }
}

/* Of `n` tokens that were asked for, the cache has left e->length: fewer only where a window has slid on. */
static void take_length(world *w, expected *e, size_t n) {
    e->length = pe_kv_tokens(w->cache, e->id, NULL, 0);
    CHECK(e->length == n || (w->max_window > 0 && e->length < n), "%zu tokens are left, %zu were asked for", e->length, n);
    w->n_shortened += e->length < n;
}

static void fork_one(world *w, const expected *source) {
    if (w->n_live == MAX_LIVE) return;
    char err[PE_ERR_LEN];
    expected *e = &w->live[w->n_live];
    *e = *source;
    if (rng_below(&w->random, 2) == 0) e->length = rng_below(&w->random, source->length + 1);
    CHECK(pe_kv_fork(w->cache, source->id, e->length, &e->id, err) == PE_OK, "%s", err);
    take_length(w, e, e->length);
    w->n_live++;
}

static void drop(world *w, size_t index) {
    char err[PE_ERR_LEN];
    CHECK(pe_kv_drop(w->cache, w->live[index].id, err) == PE_OK, "%s", err);
    w->live[index] = w->live[--w->n_live];
}

/* Drafts of the last forward are no part of it. */
static void save(world *w, const expected *source) {
    snapshot *s = &w->saved[rng_below(&w->random, N_SAVED)];
    char err[PE_ERR_LEN];
    free(s->bytes);
    s->of = *source;
    s->n_bytes = pe_kv_snapshot_bytes(w->cache, source->id);
    s->bytes = malloc(s->n_bytes + 1);
    CHECK(pe_kv_snapshot_save(w->cache, source->id, s->bytes, s->n_bytes, err) == PE_OK, "%s", err);
    CHECK(pe_kv_snapshot_save(w->cache, source->id, s->bytes, s->n_bytes + 64, err) == PE_ERR_INVALID_ARGUMENT, "a wrong size");
}

static void restore(world *w, const snapshot *s) {
    if (w->n_live == MAX_LIVE || s->bytes == NULL) return;
    char err[PE_ERR_LEN];
    expected *e = &w->live[w->n_live];
    *e = s->of;
    size_t n_bytes = s->n_bytes + (rng_below(&w->random, 8) == 0 ? 64 : 0); /* a wrong size: refused before a byte is read */
    pe_cache_stats before, after;
    pe_kv_cache_stats(w->cache, &before);
    pe_status status = pe_kv_snapshot_restore(w->cache, &pe_kernels_scalar, e->tokens, e->length, e->salt, s->bytes, n_bytes,
                                              &e->id, err);
    pe_kv_cache_stats(w->cache, &after);
    CHECK(status == PE_OK || after.n_evicted == before.n_evicted, "something cached made room in vain");
    CHECK(n_bytes == s->n_bytes || status == PE_ERR_INVALID_ARGUMENT, "%zu bytes for %zu", n_bytes, s->n_bytes);
    CHECK(n_bytes != s->n_bytes || status == PE_OK || (status == PE_ERR_OUT_OF_MEMORY && w->max_pages > 0), "%s", err);
    w->n_live += status == PE_OK;
    w->n_restored += status == PE_OK && e->length > 0;
}

static void step(world *w) {
    char err[PE_ERR_LEN];
    size_t action = rng_below(&w->random, 24), index = w->n_live > 0 ? rng_below(&w->random, w->n_live) : 0;
    if (w->n_live == 0 || action < 3) {
        begin(w);
    } else if (action < 13) {
        append(w);
    } else if (action < 15) {
        fork_one(w, &w->live[index]);
    } else if (action < 17) {
        expected *e = &w->live[index];
        size_t n = rng_below(&w->random, e->length + 1);
        CHECK(pe_kv_truncate(w->cache, e->id, n, err) == PE_OK, "%s", err);
        take_length(w, e, n);
    } else if (action < 19) {
        drop(w, index);
    } else if (action < 21) {
        save(w, &w->live[index]);
    } else if (action < 23) {
        restore(w, &w->saved[rng_below(&w->random, N_SAVED)]);
    } else if (rng_below(&w->random, 10) == 0) {
        pe_kv_cache_drop_cached(w->cache);
    }
}

/* How many sequences were cut back to where a window begins. */
static size_t run_schedule(const layer_windows *layers, uint64_t seed, size_t n_steps, size_t max_pages) {
    /* One head, the smallest pages. */
    pe_layer specs[3] = {{0}};
    pe_model model = {.config = {.n_layers = layers->n, .dim = CONV_DIM, .n_kv_heads = 1, .head_dim = 32, .max_seq_len = MAX_LENGTH},
                      .layers = specs, .head_dim_p = 32};
    world *w = calloc(1, sizeof *w);
    char err[PE_ERR_LEN];
    w->random.state = seed;
    w->layers = *layers;
    for (uint32_t i = 0; i < layers->n; i++) {
        specs[i].window = layers->window[i];
        specs[i].short_conv = layers->short_conv[i];
        if (layers->window[i] > w->max_window) w->max_window = layers->window[i];
    }
    w->max_pages = max_pages;
    CHECK(pe_kv_cache_create(&w->cache, &model, PE_KV_INT8, err) == PE_OK, "%s", err);
    pe_kv_cache_set_max_pages(w->cache, max_pages);
    for (size_t b = 0; b < N_BASES; b++)
        for (size_t i = 0; i < MAX_LENGTH; i++)
            w->bases[b][i] = b > 0 && i < 300 * b ? w->bases[b - 1][i] : (int32_t)rng_below(&w->random, 2);
    for (size_t i = 0; i < n_steps; i++) {
        step(w);
        check_world(w);
    }
    CHECK(w->n_matched > 0, "no prompt ever found its beginning");
    CHECK(w->n_accepted > 0, "no guess ever came true");
    CHECK(w->n_restored > 0, "no snapshot was ever restored");
    CHECK((max_pages > 0) == (w->n_refused > 0), "%zu appends were refused", w->n_refused);
    while (w->n_live > 0) drop(w, 0);
    check_world(w);
    pe_cache_stats stats;
    size_t n_dropped = pe_kv_cache_drop_cached(w->cache);
    pe_kv_cache_stats(w->cache, &stats);
    CHECK(n_dropped > 0 && stats.n_cached == 0 && stats.n_pages == stats.n_free, "%zu pages are left", stats.n_pages);
    pe_kv_cache_destroy(w->cache);
    size_t n_shortened = w->n_shortened;
    for (size_t i = 0; i < N_SAVED; i++) free(w->saved[i].bytes);
    free(w);
    return n_shortened;
}

/* A long text, token by token: a layer with a window keeps the pages that it may still need, and no others stay allocated. */
static void test_sliding(bool keep) {
    enum { WINDOW = 300, LENGTH = 6000 };
    pe_layer specs[2] = {{.window = WINDOW}, {0}};
    pe_model model = {.config = {.n_layers = 2, .n_kv_heads = 1, .head_dim = 32, .max_seq_len = LENGTH}, .layers = specs,
                      .head_dim_p = 32};
    pe_kv_cache *cache;
    char err[PE_ERR_LEN];
    int32_t id;
    size_t n_matched;
    const uint8_t salt[PE_SALT_BYTES] = {0};
    CHECK(pe_kv_cache_create(&cache, &model, PE_KV_INT8, err) == PE_OK, "%s", err);
    CHECK(pe_kv_match(cache, NULL, 0, salt, keep, &id, &n_matched, err) == PE_OK, "%s", err);
    for (size_t n = 1; n <= LENGTH; n++) {
        CHECK(pe_kv_extend(cache, id, 1, err) == PE_OK, "%s", err);
        pe_kv_commit(cache, id, (int32_t)n);
        size_t first = n > WINDOW + PE_KV_UNDO ? (n + 1 - WINDOW - PE_KV_UNDO) / PE_CHUNK : 0, n_pages = (n + PE_CHUNK - 1) / PE_CHUNK;
        pe_cache_stats stats;
        pe_kv_cache_stats(cache, &stats);
        size_t expected = (n_pages + n_pages - first) * pe_kv_chunk_bytes(cache);
        CHECK(stats.page_bytes == 2 * pe_kv_chunk_bytes(cache) && stats.window_bytes == pe_kv_chunk_bytes(cache), "the sizes of a page");
        CHECK(stats.n_held_bytes == expected, "%zu tokens hold %zu bytes, expected %zu", n, stats.n_held_bytes, expected);
        /* What slides out is free for the next page, or cached for a while. */
        size_t n_slid = !keep ? 0 : first < PE_KV_KEEP_SLID ? first : PE_KV_KEEP_SLID;
        size_t least = expected + n_slid * pe_kv_chunk_bytes(cache);
        CHECK(stats.n_bytes >= least && stats.n_bytes <= least + pe_kv_chunk_bytes(cache), "%zu tokens: %zu bytes, of them %zu held",
              n, stats.n_bytes, expected);
        if (n % 40 != 0) continue;
        int32_t fork;
        size_t left = n > PE_KV_UNDO ? n - PE_KV_UNDO : 0; /* so many tokens it can always take back */
        CHECK(pe_kv_fork(cache, id, left, &fork, err) == PE_OK && pe_kv_length(cache, fork) == left, "%zu of %zu tokens", left, n);
        CHECK(pe_kv_drop(cache, fork, err) == PE_OK, "%s", err);
    }
    CHECK(pe_kv_drop(cache, id, err) == PE_OK && pe_kv_cache_check(cache, err) == PE_OK, "%s", err);
    pe_kv_cache_destroy(cache);
}

void test_kv_cache(void) {
    static const layer_windows models[] = {
        {24, 1, {0}, {0}}, {16, 2, {300, 0}, {0}}, {10, 3, {0, 1, 40}, {0}}, {7, 1, {500}, {0}}, {10, 3, {3, 0, 3}, {true, false, true}},
    };
    for (size_t m = 0; m < sizeof models / sizeof models[0]; m++) {
        size_t n_shortened = 0;
        for (uint64_t seed = 1; seed <= (quick ? 3u : 30u); seed++) {
            n_shortened += run_schedule(&models[m], seed, 600, 0);
            n_shortened += run_schedule(&models[m], seed, 600, models[m].too_few);
        }
        CHECK((m > 0) == (n_shortened > 0), "model %zu: %zu sequences were cut back", m, n_shortened);
    }
    test_sliding(false);
    test_sliding(true);
}

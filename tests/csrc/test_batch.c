/* test_batch.c: what a forward promises for each row of a batch. A row in which an infinity or NaN appears ends its own sequence
 * and moves no bit of another; hidden states are what the logits are made of; a flag that somebody else sets ends the call. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"
#include "harness.h"
#include "platform.h"
#include "tiny_model.h"

#define EXPECT(expected, call) \
    do { \
        char err[PE_ERR_LEN] = ""; \
        pe_status got = (call); \
        CHECK(got == (expected) && (got == PE_OK || err[0] != '\0'), "%s: %d '%s'", #call, (int)got, err); \
    } while (0)

/* An odd dim: the residual stream is not transformed, and a column of the embeddings is one of the stream. */
static const pe_config config = {.dim = 73, .hidden_dim = 64, .n_layers = 2, .n_heads = 2, .n_kv_heads = 1, .head_dim = 32,
                                 .vocab_size = 60, .max_seq_len = 400, .norm_eps = 0x1p-17f, .tie_embeddings = true};

/* ------------------------------------------------------------------ a model that one token overflows */

enum { BAD_TOKEN = 41, BAD_COLUMN = 5 };

/* Where the infinity appears: behind a norm with such a gain, or, with experts, in the product of gate and up. */
typedef struct place {
    const char *norm;
    float gain;
    bool experts;
} place;
static const place places[] = {{"layers.0.attention_norm", 0x1.fp127f, false},
                               {"layers.1.attention_norm", 0x1.fp127f, false},
                               {"layers.1.ffn_norm", 0x1.fp127f, false},
                               {"norm", 0x1.fp127f, false},
                               {"layers.1.ffn_norm", 0x1p80f, true}};
enum { N_PLACES = sizeof places / sizeof places[0] };

static void clear_row(tiny_model *t, const char *name, size_t row, size_t columns) {
    int8_t *codes = tiny_model_tensor(t, name);
    size_t n_groups = pe_pad(columns, PE_GROUP) / PE_GROUP;
    for (size_t i = 0; i < columns; i++)
        codes[(row / 16 * n_groups + i / 64) * 1024 + i % 64 / 4 * 64 + row % 16 * 4 + i % 4] = 0;
}

/* In one column of the residual stream, every token's embedding is 0 and BAD_TOKEN's is large; no layer writes to that column, and one
 * norm multiplies it by nearly the largest float. */
static void make_fragile(tiny_model *t, const place *where) {
    pe_config c = config;
    if (where->experts) c.n_experts = 4, c.n_experts_used = 2;
    tiny_model_make(t, &c, 3, 1.0f);
    int8_t *codes = tiny_model_tensor(t, "tok_embeddings.codes");
    size_t n_groups = pe_pad(config.dim, PE_GROUP) / PE_GROUP;
    for (size_t token = 0; token < config.vocab_size; token++)
        codes[token / 16 * n_groups * 1024 + BAD_COLUMN / 4 * 64 + token % 16 * 4 + BAD_COLUMN % 4] = token == BAD_TOKEN ? 127 : 0;
    uint16_t *scales = tiny_model_tensor(t, "tok_embeddings.scales");
    scales[BAD_TOKEN / 16 * n_groups * 16 + BAD_TOKEN % 16] = 0x5c00; /* 256: this column outweighs the others */
    clear_row(t, "layers.0.wo.codes", BAD_COLUMN, config.n_heads * config.head_dim);
    clear_row(t, "layers.1.wo.codes", BAD_COLUMN, config.n_heads * config.head_dim);
    for (int layer = 0; layer < 2; layer++)
        for (uint32_t e = 0; e < (c.n_experts > 0 ? c.n_experts : 1); e++) {
            char expert[24] = "", name[64];
            if (c.n_experts > 0) snprintf(expert, sizeof expert, "experts.%u.", e);
            snprintf(name, sizeof name, "layers.%d.%sw_down.codes", layer, expert);
            clear_row(t, name, BAD_COLUMN, config.hidden_dim);
        }
    ((float *)tiny_model_tensor(t, where->norm))[BAD_COLUMN] = where->gain;
    EXPECT(PE_OK, tiny_model_load(t, 1, err));
}

/* ------------------------------------------------------------------ a table that counts and cancels */

/* Its quantizer counts its calls, one for each block of tokens, and sets the flag at one of them: a cancellation in the middle of a forward, always at the same place
 * when one thread computes. */
static const struct pe_kernels *inner;
static atomic_int n_calls;
static int cancel_at, cancel_flag;

static uint32_t cancelling_quantize(pe_activations *x, size_t first, const float *const *rows, size_t n, const float *norm, float eps) {
    if (atomic_fetch_add(&n_calls, 1) + 1 == cancel_at) pe_request_cancel(&cancel_flag);
    return inner->quantize(x, first, rows, n, norm, eps);
}

/* ------------------------------------------------------------------ batches */

enum { MAX_ROWS = 300, N_SEQUENCES = 4 };

typedef struct batch {
    size_t n;
    int32_t tokens[MAX_ROWS], sequences[MAX_ROWS];
    uint8_t wants[MAX_ROWS], failed[MAX_ROWS];
} batch;

static void add(batch *b, int32_t sequence, int32_t token, uint8_t wants) {
    b->tokens[b->n] = token, b->sequences[b->n] = sequence, b->wants[b->n] = wants, b->n++;
}

static pe_status forward(pe_context *c, batch *b, bool rows_may_fail, char *err) {
    pe_batch view = {.n_tokens = b->n, .tokens = b->tokens, .sequences = b->sequences, .wants = b->wants};
    if (rows_may_fail) view.failed = b->failed;
    memset(b->failed, 9, sizeof b->failed);
    return pe_forward(c, &view, err);
}

/* Rows of four sequences, mixed. The same call without sequences 1 and 2 gives the same rows of 0 and 3. Sequence 1 has a bad token in
 * the middle, sequence 2 at its end; with `n` beyond a slice both go on after it. */
static void make_rows(batch *b, size_t n, const int32_t ids[N_SEQUENCES], bool with_bad) {
    rng r = {17};
    b->n = 0;
    for (size_t i = 0; i < n; i++) {
        size_t which = i < 4 ? i : rng_below(&r, N_SEQUENCES); /* every sequence has a row */
        int32_t token = (int32_t)rng_below(&r, BAD_TOKEN);
        if ((which == 1 && (i == 1 || rng_below(&r, 3) == 0)) || (which == 2 && i + 12 > n)) token = BAD_TOKEN;
        if (which == 2 && i == 2 && n < 12) token = BAD_TOKEN;
        uint8_t wants = (uint8_t)(token == BAD_TOKEN ? 1 + i % 3 : rng_below(&r, 4)); /* the last norm is seen by rows that want something */
        if (with_bad || which == 0 || which == 3) add(b, ids[which], token, wants);
    }
}

static pe_context *context_new(const tiny_model *t, const struct pe_kernels *table, pe_kv_dtype dtype, int n_threads,
                               int32_t ids[N_SEQUENCES]) {
    pe_context *c = NULL;
    EXPECT(PE_OK, pe_context_create(&c, t->model, dtype, n_threads, err));
    c->slice.kernels = table;
    for (size_t i = 0; i < N_SEQUENCES; i++) {
        batch b = {0};
        EXPECT(PE_OK, pe_sequence_new(c, &ids[i], err));
        for (int32_t k = 0; k < 5; k++) add(&b, ids[i], (int32_t)i * 7 + k, 0); /* the sequences hold something before */
        EXPECT(PE_OK, forward(c, &b, false, err));
    }
    return c;
}

static size_t length_of(const pe_context *c, int32_t id) {
    size_t length = 0;
    EXPECT(PE_OK, pe_sequence_length(c, id, &length, err));
    return length;
}

/* The results of row i of `all` in c equal those of the same row in a call without bad sequences. */
static void compare_good_rows(const pe_context *c, const batch *all, const pe_context *alone, const batch *good, const char *what) {
    size_t logits[2] = {0, 0}, hidden[2] = {0, 0}, k = 0;
    for (size_t i = 0; i < all->n; i++) {
        bool is_good = k < good->n && all->sequences[i] == good->sequences[k];
        k += is_good;
        if (all->wants[i] & PE_WANT_LOGITS) {
            const float *row = pe_context_logits(c, logits[0]++);
            if (is_good) CHECK(same_floats(row, pe_context_logits(alone, logits[1]++), config.vocab_size), "%s: logits of row %zu", what, i);
        }
        if (all->wants[i] & PE_WANT_HIDDEN) {
            const float *row = pe_context_hidden(c, hidden[0]++);
            if (is_good) CHECK(same_floats(row, pe_context_hidden(alone, hidden[1]++), config.dim), "%s: hidden state of row %zu", what, i);
        }
    }
    CHECK(k == good->n && logits[0] == pe_context_n_logits(c) && hidden[0] == pe_context_n_hidden(c), "%s: %zu rows", what, k);
    CHECK(pe_context_hidden(c, hidden[0]) == NULL && pe_context_logits(c, logits[0]) == NULL, "%s: rows past the end", what);
}

static void test_bad_rows(const struct pe_kernels *table, const tiny_model *t, const char *place, pe_kv_dtype dtype, int n_threads,
                          size_t n_rows) {
    int32_t ids[N_SEQUENCES], ids_alone[N_SEQUENCES];
    pe_context *c = context_new(t, table, dtype, n_threads, ids), *alone = context_new(t, table, dtype, 1, ids_alone);
    batch all, good;
    make_rows(&all, n_rows, ids, true), make_rows(&good, n_rows, ids_alone, false);
    EXPECT(PE_ERR_NOT_FINITE, forward(c, &all, false, err));
    for (size_t i = 0; i < N_SEQUENCES; i++) CHECK(length_of(c, ids[i]) == 5, "%s: sequence %zu after a refused call", place, i);
    CHECK(pe_context_n_logits(c) == 0 && pe_context_n_hidden(c) == 0, "%s: results of a refused call", place);

    EXPECT(PE_OK, forward(alone, &good, false, err));
    for (int round = 0; round < 2; round++) { /* again and again: what failed before has left nothing */
        size_t before[N_SEQUENCES], grown[N_SEQUENCES] = {0};
        for (size_t i = 0; i < N_SEQUENCES; i++) before[i] = length_of(c, ids[i]);
        EXPECT(PE_OK, forward(c, &all, true, err));
        for (size_t i = 0; i < all.n; i++) {
            bool bad = all.sequences[i] == ids[1] || all.sequences[i] == ids[2];
            CHECK(all.failed[i] == bad, "%s, %s, %d threads, %zu rows: failed[%zu] is %d", table->name, place, n_threads, n_rows, i,
                  all.failed[i]);
            for (size_t k = 0; k < N_SEQUENCES; k++) grown[k] += !bad && all.sequences[i] == ids[k];
        }
        for (size_t i = 0; i < N_SEQUENCES; i++)
            CHECK(length_of(c, ids[i]) == before[i] + grown[i], "%s: sequence %zu has %zu positions", place, i, length_of(c, ids[i]));
        if (round == 0) compare_good_rows(c, &all, alone, &good, place);
        EXPECT(PE_OK, pe_context_check(c, err));
        EXPECT(PE_OK, pe_sequence_truncate(c, ids[0], 5, err));
        EXPECT(PE_OK, pe_sequence_truncate(c, ids[3], 5, err));
        EXPECT(PE_OK, pe_sequence_truncate(alone, ids_alone[0], 5, err));
        EXPECT(PE_OK, pe_sequence_truncate(alone, ids_alone[3], 5, err));
    }
    /* Good tokens for everybody: also the sequences that failed go on from where they were. */
    all.n = good.n = 0;
    for (size_t i = 0; i < N_SEQUENCES; i++) add(&all, ids[i], (int32_t)i, 3), add(&good, ids_alone[i], (int32_t)i, 3);
    EXPECT(PE_OK, forward(c, &all, true, err));
    EXPECT(PE_OK, forward(alone, &good, false, err));
    for (size_t i = 0; i < N_SEQUENCES; i++)
        CHECK(!all.failed[i] && same_floats(pe_context_logits(c, i), pe_context_logits(alone, i), config.vocab_size), "%s: sequence %zu goes on",
              place, i);
    pe_context_destroy(c), pe_context_destroy(alone);
}

static void test_failures(const struct pe_kernels *table) {
    for (size_t i = 0; i < N_PLACES; i++) {
        tiny_model t;
        make_fragile(&t, &places[i]);
        for (int dtype = PE_KV_INT8; dtype <= PE_KV_F32; dtype++)
            for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
                test_bad_rows(table, &t, places[i].norm, (pe_kv_dtype)dtype, n_threads, 4);
                test_bad_rows(table, &t, places[i].norm, (pe_kv_dtype)dtype, n_threads, 29);
                if (!quick || n_threads == 3) test_bad_rows(table, &t, places[i].norm, (pe_kv_dtype)dtype, n_threads, MAX_ROWS);
            }
        tiny_model_free(&t);
    }
}

/* Of the last layer a row that wants nothing computes its key and value: an infinity on the way there is seen, and ends its sequence alone;
 * one that would come later is nobody's. */
static void test_rows_that_want_nothing(const struct pe_kernels *table) {
    for (size_t place = 1; place < 3; place++) {
        tiny_model t;
        int32_t ids[N_SEQUENCES];
        bool fails = place == 1;
        make_fragile(&t, &places[place]);
        pe_context *c = context_new(&t, table, PE_KV_INT8, 2, ids);
        batch b = {0};
        add(&b, ids[1], BAD_TOKEN, 0), add(&b, ids[0], 7, PE_WANT_LOGITS), add(&b, ids[2], 8, 0), add(&b, ids[1], 9, 0);
        EXPECT(fails ? PE_ERR_NOT_FINITE : PE_OK, forward(c, &b, false, err));
        for (size_t i = 0; i < 3; i++) CHECK(length_of(c, ids[i]) == 5 + (size_t)(fails ? 0 : 1 + (i == 1)), "place %zu, sequence %zu", place, i);
        EXPECT(PE_OK, forward(c, &b, true, err));
        for (size_t i = 0; i < b.n; i++)
            CHECK(b.failed[i] == (fails && b.sequences[i] == ids[1]), "place %zu, failed[%zu] is %d", place, i, b.failed[i]);
        CHECK(pe_context_n_logits(c) == 1, "place %zu: %zu rows", place, pe_context_n_logits(c));
        pe_context_destroy(c);
        tiny_model_free(&t);
    }
}

/* Blocks that a forward of b quantizes; its rows may fail. */
static int count_blocks(pe_context *c, const struct pe_kernels *table, batch *b) {
    struct pe_kernels counting = *table;
    counting.quantize = cancelling_quantize, inner = table, cancel_at = -1, c->slice.kernels = &counting;
    atomic_store(&n_calls, 0);
    EXPECT(PE_OK, forward(c, b, true, err));
    c->slice.kernels = table;
    return atomic_load(&n_calls);
}

/* A sequence that has failed is not computed any further, unless its rows lie in a slice with others: of 300 rows only the first slice
 * sees a layer, and of its layers the first. If all others leave the last layer, it is not computed either. */
static void test_failed_rows_stop(const struct pe_kernels *table) {
    for (size_t layer = 0; layer < 2; layer++) {
        tiny_model t;
        int32_t ids[N_SEQUENCES];
        make_fragile(&t, &places[layer]);
        pe_context *c = context_new(&t, table, PE_KV_INT8, 1, ids);
        batch b = {0};
        if (layer == 0)
            for (int i = 0; i < MAX_ROWS; i++) add(&b, ids[1], BAD_TOKEN, 0);
        else
            add(&b, ids[0], 7, 0), add(&b, ids[1], BAD_TOKEN, PE_WANT_LOGITS), add(&b, ids[0], 8, 0);
        int expected = layer == 0 ? 4 * PE_SLICE / PE_TOKEN_BLOCK : 4 + 1 + 1; /* then layer 1's input, and that of the logits */
        int n = count_blocks(c, table, &b);
        CHECK(n == expected, "%s, layer %zu: %d blocks quantized, not %d", table->name, layer, n, expected);
        for (size_t i = 0; i < b.n; i++) CHECK(b.failed[i] == (b.sequences[i] == ids[1]), "layer %zu: failed[%zu]", layer, i);
        pe_context_destroy(c);
        tiny_model_free(&t);
    }
}

/* Finite values of which a sum of squares, or a float32 cache, is all that overflows: a norm would make zeros of them. */
typedef struct too_large {
    const char *bias; /* one element of it is `value` */
    size_t element;
    float value;
    bool all_heads, after_rope, qk_norm;
    pe_kv_dtype dtype;
    uint8_t want;
} too_large;

static void test_too_large(const struct pe_kernels *table) {
    static const too_large cases[] = {
        {"layers.1.w_down.bias", 9, 0x1p80f, false, false, false, PE_KV_INT8, PE_WANT_HIDDEN},
        {"layers.1.w_down.bias", 9, 0x1p80f, false, false, false, PE_KV_INT8, PE_WANT_LOGITS},
        {"layers.0.wqkv.bias", 3, 0x1p80f, false, false, true, PE_KV_INT8, 0},
        {"layers.0.wqkv.bias", 64 + 3, 0x1p80f, false, false, true, PE_KV_F32, 0},
        {"layers.1.wqkv.bias", 3, -0x1p80f, true, false, true, PE_KV_INT8, 0},
        {"layers.1.wqkv.bias", 64 + 3, 0x1p80f, true, false, true, PE_KV_INT8, 0},
        {"layers.1.wqkv.bias", 40, 0x1p80f, false, true, true, PE_KV_INT8, 0},
        {"layers.1.wqkv.bias", 40, 0x1p80f, false, true, true, PE_KV_F32, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const too_large *z = &cases[i];
        tiny_model t;
        int32_t ids[N_SEQUENCES];
        pe_config c = config;
        c.down_bias = c.qkv_bias = true;
        c.qk_norm = z->qk_norm, c.qk_norm_all_heads = z->all_heads, c.qk_norm_after_rope = z->after_rope;
        tiny_model_make(&t, &c, 3, 1.0f);
        EXPECT(PE_OK, tiny_model_load(&t, 1, err));
        pe_context *context = context_new(&t, table, z->dtype, 1, ids);
        ((float *)tiny_model_tensor(&t, z->bias))[z->element] = z->value;
        batch b = {0};
        for (int row = 0; row < 3; row++) add(&b, ids[0], row, z->want);
        EXPECT(PE_ERR_NOT_FINITE, forward(context, &b, false, err));
        CHECK(length_of(context, ids[0]) == 5, "%s: case %zu", table->name, i);
        pe_context_destroy(context);
        tiny_model_free(&t);
    }
}

/* An error of the whole call beside a row that failed: nobody changes, and no row is told to have failed. */
static void test_errors_beside_failures(const struct pe_kernels *table) {
    tiny_model t;
    int32_t ids[N_SEQUENCES];
    make_fragile(&t, &places[0]);
    pe_context *c = context_new(&t, table, PE_KV_INT8, 2, ids);
    batch b = {0};
    for (int i = 0; i < 280; i++) add(&b, ids[0], 1, 0);
    EXPECT(PE_OK, forward(c, &b, false, err));
    b.n = 0;
    add(&b, ids[1], BAD_TOKEN, 1);
    for (int i = 0; i < 260; i++) add(&b, ids[0], 1, 0); /* 5 + 280 + 260 positions are more than the context holds: seen in the second slice */
    EXPECT(PE_ERR_CONTEXT_FULL, forward(c, &b, true, err));
    CHECK(length_of(c, ids[0]) == 285 && length_of(c, ids[1]) == 5, "%zu and %zu positions", length_of(c, ids[0]), length_of(c, ids[1]));
    for (size_t i = 0; i < b.n; i++) CHECK(b.failed[i] == 0, "failed[%zu] after an error", i);
    b.n = 0;
    add(&b, ids[1], 3, 4);
    EXPECT(PE_ERR_INVALID_ARGUMENT, forward(c, &b, true, err)); /* a want that is not known */
    EXPECT(PE_OK, pe_context_check(c, err));
    pe_context_destroy(c);
    tiny_model_free(&t);
}

/* ------------------------------------------------------------------ hidden states */

/* The logits are the output matrix times the quantized hidden state, so from hidden states alone the scalar table computes the same
 * logits; and a row's hidden state is the same bits whatever else is wanted and computed beside it. */
static void test_hidden(const struct pe_kernels *table) {
    tiny_model t;
    int32_t ids[N_SEQUENCES];
    tiny_model_make(&t, &config, 5, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&t, 1, err));
    pe_context *c = context_new(&t, table, PE_KV_INT8, 3, ids), *one = context_new(&t, table, PE_KV_INT8, 1, ids);
    batch b = {0};
    rng r = {6};
    for (int i = 0; i < MAX_ROWS; i++) add(&b, ids[rng_below(&r, 4)], (int32_t)rng_below(&r, config.vocab_size), (uint8_t)rng_below(&r, 4));
    EXPECT(PE_OK, forward(c, &b, false, err));
    size_t logits = 0, hidden = 0, n = pe_pad(config.dim, PE_GROUP), vocab_padded = pe_pad(config.vocab_size, PE_PANEL);
    int8_t codes[128];
    float scales[4], expected[64];
    int32_t corrections[4];
    CHECK(n == sizeof codes && vocab_padded == 64, "buffers");
    for (size_t i = 0; i < b.n; i++) {
        batch single = {.n = 0};
        add(&single, b.sequences[i], b.tokens[i], b.wants[i] & PE_WANT_HIDDEN);
        EXPECT(PE_OK, forward(one, &single, false, err));
        if (b.wants[i] & PE_WANT_HIDDEN) {
            const float *row = pe_context_hidden(c, hidden++);
            CHECK(same_floats(row, pe_context_hidden(one, 0), config.dim), "%s: hidden state of row %zu", table->name, i);
            if (b.wants[i] & PE_WANT_LOGITS) {
                pe_activations x = {codes, scales, corrections, n, 1, false};
                pe_kernels_scalar.quantize(&x, 0, &row, config.dim, NULL, 0.0f);
                pe_kernels_scalar.matmul(expected, 64, &t.model->output, 0, vocab_padded / PE_PANEL, &x, 0, 1, NULL, false);
                CHECK(same_floats(expected, pe_context_logits(c, logits), config.vocab_size), "%s: logits from the hidden state of row %zu",
                      table->name, i);
            }
        }
        logits += (b.wants[i] & PE_WANT_LOGITS) != 0;
    }
    CHECK(logits == pe_context_n_logits(c) && hidden == pe_context_n_hidden(c), "%zu, %zu", logits, hidden);
    pe_context_destroy(c), pe_context_destroy(one);
    tiny_model_free(&t);
}

/* ------------------------------------------------------------------ cancellation from outside */

static pe_status cancel_after(pe_context *c, batch *b, int at, char *err) {
    pe_batch view = {.n_tokens = b->n, .tokens = b->tokens, .sequences = b->sequences, .wants = b->wants, .cancel = &cancel_flag};
    cancel_at = at;
    atomic_store(&n_calls, 0);
    pe_status status = pe_forward(c, &view, err);
    int n_after = atomic_load(&n_calls) - at; /* one thread finishes the unit that it was in */
    CHECK(status == PE_OK || c->slice.n_threads > 1 || n_after <= 0, "%d blocks quantized after the flag was set at %d", n_after, at);
    return status;
}

static void test_cancel_flag(const struct pe_kernels *table, int n_threads) {
    tiny_model t;
    int32_t ids[N_SEQUENCES];
    struct pe_kernels cancelling = *table;
    tiny_model_make(&t, &config, 5, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&t, 1, err));
    pe_context *c = context_new(&t, table, PE_KV_INT8, n_threads, ids);
    cancelling.quantize = cancelling_quantize, inner = table, c->slice.kernels = &cancelling;
    batch b = {0};
    for (int i = 0; i < MAX_ROWS; i++) add(&b, ids[i % 4], i % 40, 1);

    cancel_flag = 0;
    EXPECT(PE_OK, cancel_after(c, &b, INT32_MAX, err));
    uint64_t expected = hash_bytes(HASH_START, pe_context_logits(c, 0), MAX_ROWS * c->logits.stride * sizeof(float));
    int n_blocks = atomic_load(&n_calls);
    for (size_t i = 0; i < 4; i++) EXPECT(PE_OK, pe_sequence_truncate(c, ids[i], 5, err));

    cancel_flag = 1; /* set before the call begins: nothing is computed at all */
    EXPECT(PE_ERR_CANCELLED, cancel_after(c, &b, INT32_MAX, err));
    CHECK(atomic_load(&n_calls) == 0, "%d blocks quantized", atomic_load(&n_calls));
    for (int at = 1; at <= n_blocks - n_threads; at += n_blocks / (quick ? 7 : 50)) {
        cancel_flag = 0;
        EXPECT(PE_ERR_CANCELLED, cancel_after(c, &b, at, err));
        for (size_t i = 0; i < 4; i++) CHECK(length_of(c, ids[i]) == 5, "sequence %zu after a cancelled call", i);
        CHECK(pe_context_n_logits(c) == 0, "logits of a cancelled call");
    }
    EXPECT(PE_OK, pe_context_check(c, err));
    cancel_flag = 0;
    EXPECT(PE_OK, cancel_after(c, &b, INT32_MAX, err));
    CHECK(hash_bytes(HASH_START, pe_context_logits(c, 0), MAX_ROWS * c->logits.stride * sizeof(float)) == expected,
          "%s: logits after cancelled calls", table->name);
    pe_context_destroy(c);
    tiny_model_free(&t);
}

/* Another thread sets the flag at any time; the call either has the right length or has changed nothing. For ThreadSanitizer above all. */
static void *canceller(void *flag) {
    pe_request_cancel(flag);
    return NULL;
}

static void test_cancel_from_thread(const struct pe_kernels *table) {
    tiny_model t;
    int32_t ids[N_SEQUENCES];
    tiny_model_make(&t, &config, 5, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&t, 1, err));
    pe_context *c = context_new(&t, table, PE_KV_INT8, 2, ids);
    batch b = {0};
    for (int i = 0; i < MAX_ROWS; i++) add(&b, ids[0], i % 40, 0);
    for (int i = 0; i < (quick ? 10 : 50); i++) {
        char err[PE_ERR_LEN] = "";
        int flag = 0;
        pe_thread thread;
        pe_batch view = {.n_tokens = b.n, .tokens = b.tokens, .sequences = b.sequences, .wants = b.wants, .cancel = &flag};
        if (!CHECK(pe_thread_start(&thread, canceller, &flag) == 0, "no thread")) break;
        pe_status status = pe_forward(c, &view, err);
        pe_thread_join(thread);
        CHECK(status == PE_OK || status == PE_ERR_CANCELLED, "%d '%s'", (int)status, err);
        CHECK(length_of(c, ids[0]) == (status == PE_OK ? 5 + b.n : 5), "%zu positions after status %d", length_of(c, ids[0]), (int)status);
        EXPECT(PE_OK, pe_sequence_truncate(c, ids[0], 5, err));
    }
    pe_context_destroy(c);
    tiny_model_free(&t);
}

void test_batch(const struct pe_kernels *table) {
    test_failures(table);
    test_failed_rows_stop(table);
    test_rows_that_want_nothing(table);
    test_too_large(table);
    test_errors_beside_failures(table);
    test_hidden(table);
    test_cancel_flag(table, 1);
    test_cancel_flag(table, 3);
    test_cancel_from_thread(table);
}

/* test_errors.c: wrong arguments, full contexts, overflow, cancellation. Every one gives its status and a sentence, and changes nothing. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"
#include "harness.h"
#include "platform.h"
#include "tiny_model.h"

static const pe_config small = {.dim = 64, .hidden_dim = 64, .n_layers = 2, .n_heads = 2, .n_kv_heads = 1, .head_dim = 32,
                                .vocab_size = 40, .max_seq_len = 30, .norm_eps = 0x1p-17f, .tie_embeddings = true};

#define EXPECT(expected, call) \
    do { \
        char err[PE_ERR_LEN] = ""; \
        pe_status got = (call); \
        CHECK(got == (expected) && (got == PE_OK || err[0] != '\0'), "%s: %d '%s'", #call, (int)got, err); \
    } while (0)

/* ------------------------------------------------------------------ models */

static const pe_layer_spec plain[2] = {{0, 0, "rmsnorm", "swiglu", NULL}, {0, 0, "rmsnorm", "swiglu", NULL}};

static pe_status create(pe_config config, char *err) {
    pe_model *model = NULL;
    if (config.layers == NULL) config.layers = plain;
    pe_status status = pe_model_create(&model, &config, err);
    pe_model_destroy(model);
    return status;
}

static void test_config(void) {
    EXPECT(PE_OK, create(small, err));
#define WITH(member, value) \
    do { \
        pe_config c = small; \
        c.member = (value); \
        EXPECT(PE_ERR_FORMAT, create(c, err)); \
    } while (0)
    WITH(dim, 0);
    WITH(dim, (1u << 20) + 1);
    WITH(hidden_dim, 0);
    WITH(n_layers, 0);
    WITH(n_layers, 5000);
    WITH(n_heads, 0);
    WITH(n_heads, UINT32_MAX);
    WITH(n_kv_heads, 0);
    WITH(n_kv_heads, 3);
    WITH(head_dim, 0);
    WITH(head_dim, 31);
    WITH(head_dim, 514);
    WITH(vocab_size, 0);
    WITH(vocab_size, UINT32_MAX);
    WITH(max_seq_len, 0);
    WITH(norm_eps, -1.0f);
    WITH(norm_eps, NAN);
    WITH(norm_eps, INFINITY);
    WITH(key_bias, true); /* without qkv_bias */
    WITH(qk_norm_all_heads, true); /* without qk_norm */
    WITH(qk_norm_after_rope, true); /* likewise */
    WITH(n_experts, 4); /* none of them used */
    WITH(n_experts_used, 1);
    WITH(n_experts, UINT32_MAX);
    WITH(experts_normalized, true);
    WITH(router_bias, true);    /* without experts */
    WITH(shared_hidden_dim, 8); /* likewise */
    WITH(shared_gated, true);
    WITH(attention_softcap, -1.0f);
    WITH(attention_softcap, NAN);
    WITH(attention_softcap, 0x1p-11f);
    WITH(logits_softcap, INFINITY);
    WITH(logits_softcap, 0x1p21f);
#undef WITH
#define WITH_LAYER(member, value) \
    do { \
        pe_layer_spec layers[2] = {plain[0], plain[1]}; \
        layers[1].member = (value); \
        pe_config c = small; \
        c.layers = layers; \
        EXPECT(PE_ERR_FORMAT, create(c, err)); \
    } while (0)
    WITH_LAYER(window, (1u << 24) + 1);
    WITH_LAYER(window, UINT32_MAX);
    WITH_LAYER(rope, PE_MAX_ROPE_TABLES);
    WITH_LAYER(rope, UINT32_MAX);
    WITH_LAYER(norm, NULL);
    WITH_LAYER(norm, "layernorm");
    WITH_LAYER(activation, NULL);
    WITH_LAYER(activation, "swiglu2");
    WITH_LAYER(mixer, "mamba");
    WITH_LAYER(mixer, "short_conv"); /* that sees everything */
    pe_layer_spec convolutions[2] = {plain[0], {16, 0, "rmsnorm", "swiglu", "short_conv"}};
    pe_config convolved = small;
    convolved.layers = convolutions;
    EXPECT(PE_OK, create(convolved, err));
    convolutions[1].window = 17;
    EXPECT(PE_ERR_FORMAT, create(convolved, err));
    convolutions[1].window = 16, convolutions[1].norm = "rmsnorm_parallel";
    EXPECT(PE_ERR_FORMAT, create(convolved, err));
    pe_config mixture = small;
    mixture.layers = plain, mixture.n_experts = 2, mixture.n_experts_used = 1;
    EXPECT(PE_OK, create(mixture, err));
    mixture.shared_hidden_dim = (1u << 22) + 1;
    EXPECT(PE_ERR_FORMAT, create(mixture, err));
    mixture.shared_hidden_dim = 8, mixture.down_bias = true;
    EXPECT(PE_ERR_FORMAT, create(mixture, err));
    mixture.down_bias = false, mixture.gate_up_bias = true;
    EXPECT(PE_ERR_FORMAT, create(mixture, err));
    mixture.shared_hidden_dim = 0;
    EXPECT(PE_OK, create(mixture, err));
    const pe_layer_spec parallel[2] = {{0, 0, "rmsnorm_parallel", "swiglu", NULL}, {0, 0, "rmsnorm_parallel", "swiglu", NULL}};
    mixture.gate_up_bias = false, mixture.layers = parallel;
    EXPECT(PE_ERR_FORMAT, create(mixture, err));
#undef WITH_LAYER
    pe_model *model = NULL;
    EXPECT(PE_ERR_FORMAT, pe_model_create(&model, &small, err)); /* layers is NULL */
}

/* Load, having changed one thing. */
static void expect_load(pe_status expected, const pe_config *config, void (*change)(tiny_model *), const char *what) {
    tiny_model t;
    char err[PE_ERR_LEN] = "";
    tiny_model_make(&t, config, 3, 1.0f);
    change(&t);
    pe_status status = tiny_model_load(&t, 2, err);
    CHECK(status == expected && (status == PE_OK || err[0] != '\0'), "%s: %d '%s'", what, (int)status, err);
    if (status != PE_OK) {
        pe_context *c = NULL;
        EXPECT(PE_ERR_INVALID_ARGUMENT, pe_context_create(&c, t.model, PE_KV_INT8, 1, err));
        CHECK(c == NULL, "%s: a context over a model that was refused", what);
    }
    tiny_model_free(&t);
}

static void nothing(tiny_model *t) { (void)t; }
static void one_less(tiny_model *t) { memory_free(t->memory[--t->n_tensors]); }
static void wrong_name(tiny_model *t) { t->tensors[3].name = "layers.0.wq.codes"; }
static void wrong_kind(tiny_model *t) { t->tensors[3].kind = "int4_g32"; }
static void no_kind(tiny_model *t) { t->tensors[2].kind = NULL; }
static void wrong_size(tiny_model *t) { t->tensors[2].n_bytes += 64; }
static void no_data(tiny_model *t) { t->tensors[2].data = NULL; }
static void misaligned(tiny_model *t) { t->tensors[2].data = (char *)t->memory[2] + 4; }
static void illegal_code(tiny_model *t) { ((int8_t *)t->memory[0])[777] = -128; }
static void infinite_scale(tiny_model *t) { ((uint16_t *)t->memory[1])[5] = 0x7c00; }
static void nan_norm(tiny_model *t) { ((float *)tiny_model_tensor(t, "layers.1.ffn_norm"))[63] = NAN; }
static void huge_frequency(tiny_model *t) { ((float *)tiny_model_tensor(t, "rope.0.inv_freq"))[3] = 1e30f; }
static void negative_frequency(tiny_model *t) { ((float *)tiny_model_tensor(t, "rope.0.inv_freq"))[0] = -0.5f; }
static void one_more(tiny_model *t) {
    size_t i = t->n_tensors++;
    t->memory[i] = memory_new(64);
    t->tensors[i] = (pe_tensor){"surplus", "f32", t->memory[i], 64};
}

static void test_loading(void) {
    expect_load(PE_OK, &small, nothing, "unchanged");
    expect_load(PE_ERR_FORMAT, &small, one_less, "a tensor is missing");
    expect_load(PE_ERR_FORMAT, &small, one_more, "a tensor too many");
    expect_load(PE_ERR_FORMAT, &small, wrong_name, "wrong name");
    expect_load(PE_ERR_FORMAT, &small, wrong_kind, "a kind that is not known");
    expect_load(PE_ERR_FORMAT, &small, no_kind, "no kind");
    expect_load(PE_ERR_FORMAT, &small, wrong_size, "wrong size");
    expect_load(PE_ERR_INVALID_ARGUMENT, &small, no_data, "no data");
    expect_load(PE_ERR_INVALID_ARGUMENT, &small, misaligned, "misaligned");
    expect_load(PE_ERR_FORMAT, &small, illegal_code, "code -128");
    expect_load(PE_ERR_FORMAT, &small, infinite_scale, "infinite scale");
    expect_load(PE_ERR_FORMAT, &small, nan_norm, "NaN in a norm");
    expect_load(PE_ERR_FORMAT, &small, huge_frequency, "huge frequency");
    expect_load(PE_ERR_FORMAT, &small, negative_frequency, "negative frequency");
    tiny_model t;
    tiny_model_make(&t, &small, 3, 1.0f);
    EXPECT(PE_ERR_INVALID_ARGUMENT, tiny_model_load(&t, 100000, err));
    pe_model_destroy(t.model);
    EXPECT(PE_ERR_INVALID_ARGUMENT, tiny_model_load(&t, -1, err));
    tiny_model_free(&t);
}

/* One bad value as the last of each tensor in turn: the sentence names that tensor. The embeddings are read in two pieces. */
static void test_bad_values_are_named(void) {
    pe_config config = small;
    config.vocab_size = 20000;
    tiny_model t;
    tiny_model_make(&t, &config, 3, 1.0f);
    for (size_t i = 0; i < t.n_tensors; i++) {
        size_t n_bytes = t.tensors[i].n_bytes;
        bool is_codes = strstr(t.names[i], ".codes") != NULL, is_scales = strstr(t.names[i], ".scales") != NULL;
        unsigned char *last = (unsigned char *)t.memory[i] + n_bytes - (is_codes ? 1 : 2), kept[2];
        char err[PE_ERR_LEN] = "";
        memcpy(kept, last, is_codes ? 1 : 2);
        last[0] = is_codes ? 0x80 : 0x00;
        if (!is_codes) last[1] = is_scales ? 0x7c : 0x7f; /* the upper byte of an infinite half, or of a NaN or infinity */
        if (!is_codes && !is_scales) last[0] = 0x80;
        pe_status status = tiny_model_load(&t, 1 + (int)(i % 2), err);
        CHECK(status == PE_ERR_FORMAT && strstr(err, t.names[i]) != NULL, "%s: %d '%s'", t.names[i], (int)status, err);
        memcpy(last, kept, is_codes ? 1 : 2);
        pe_model_destroy(t.model);
    }
    EXPECT(PE_OK, tiny_model_load(&t, 1, err));
    tiny_model_free(&t);
}

/* ------------------------------------------------------------------ contexts, sequences, batches */

static pe_status forward_one(pe_context *c, int32_t token, int32_t sequence, char *err) {
    const uint8_t want = 1;
    pe_batch batch = {.n_tokens = 1, .tokens = &token, .sequences = &sequence, .wants = &want};
    return pe_forward(c, &batch, err);
}

static void test_sequences(pe_context *c) {
    int32_t a = -1, b = -1;
    size_t length = 0;
    EXPECT(PE_OK, pe_sequence_new(c, &a, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sequence_fork(c, a, 1, &b, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sequence_fork(c, 77, 0, &b, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sequence_fork(c, -1, 0, &b, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sequence_truncate(c, a, 1, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sequence_truncate(c, 1000, 0, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sequence_length(c, -5, &length, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, forward_one(c, 40, a, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, forward_one(c, -1, a, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, forward_one(c, 0, a + 1, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, forward_one(c, 0, INT32_MIN, err));
    pe_batch empty = {0};
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_forward(c, &empty, err));
    EXPECT(PE_OK, forward_one(c, 39, a, err));
    CHECK(pe_context_logits(c, 1) == NULL, "a row that does not exist");
    EXPECT(PE_OK, pe_sequence_drop(c, a, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_sequence_drop(c, a, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, forward_one(c, 0, a, err));
    CHECK(pe_debug_kv_page(c, a, 0, 0, 0, NULL, 0) == 0, "a page of a dropped sequence");
    float x[64] = {0};
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_debug_block(c, 2, x, 1, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_debug_block(c, 0, x, 0, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_debug_block(c, 0, x, 513, err));
}

/* 31 tokens do not fit 30 positions; two sequences of which one is full, in one batch: neither changes. */
static void test_full(pe_context *c) {
    int32_t tokens[31] = {0}, sequences[31], a = -1, b = -1;
    uint8_t want[31] = {0};
    size_t length;
    EXPECT(PE_OK, pe_sequence_new(c, &a, err));
    EXPECT(PE_OK, pe_sequence_new(c, &b, err));
    for (int i = 0; i < 31; i++) sequences[i] = a;
    pe_batch batch = {.n_tokens = 31, .tokens = tokens, .sequences = sequences, .wants = want};
    EXPECT(PE_ERR_CONTEXT_FULL, pe_forward(c, &batch, err));
    EXPECT(PE_OK, pe_sequence_length(c, a, &length, err));
    CHECK(length == 0, "%zu positions after a refusal", length);
    batch.n_tokens = 30;
    EXPECT(PE_OK, pe_forward(c, &batch, err));
    sequences[0] = sequences[1] = b;
    batch.n_tokens = 3;
    EXPECT(PE_ERR_CONTEXT_FULL, pe_forward(c, &batch, err));
    EXPECT(PE_OK, pe_sequence_length(c, a, &length, err));
    CHECK(length == 30, "%zu positions", length);
    EXPECT(PE_OK, pe_sequence_length(c, b, &length, err));
    CHECK(length == 0 && pe_context_n_logits(c) == 0, "%zu positions", length);
    EXPECT(PE_OK, pe_sequence_drop(c, a, err));
    EXPECT(PE_OK, pe_sequence_drop(c, b, err));
}

/* Finite weights whose products overflow: an error, not a NaN; the sequence is as before. */
static void test_overflow(void) {
    tiny_model t;
    pe_context *c = NULL;
    int32_t a = -1;
    size_t length = 1;
    tiny_model_make(&t, &small, 3, 2.5e38f);
    EXPECT(PE_OK, tiny_model_load(&t, 1, err));
    for (int dtype = PE_KV_INT8; dtype <= PE_KV_F32; dtype++)
        for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
            EXPECT(PE_OK, pe_context_create(&c, t.model, (pe_kv_dtype)dtype, n_threads, err));
            EXPECT(PE_OK, pe_sequence_new(c, &a, err));
            EXPECT(PE_ERR_NOT_FINITE, forward_one(c, 1, a, err));
            EXPECT(PE_OK, pe_sequence_length(c, a, &length, err));
            CHECK(length == 0 && pe_context_n_logits(c) == 0, "%zu positions", length);
            pe_context_destroy(c);
        }
    tiny_model_free(&t);
}

static void test_isa_names(void) {
    const char *name = NULL;
    EXPECT(PE_ERR_UNSUPPORTED_ISA, pe_isa_select("sse9", err));
    EXPECT(PE_ERR_UNSUPPORTED_ISA, pe_isa_select("a name that is far longer than any name of an instruction set could ever be", err));
    EXPECT(PE_OK, pe_isa_select("scalar", err));
    EXPECT(PE_OK, pe_isa_active(&name, err));
    CHECK(name != NULL && strcmp(name, "scalar") == 0, "active is %s", name);
    set_environment("PYENGINE_ISA", "nonsense");
    EXPECT(PE_ERR_UNSUPPORTED_ISA, pe_isa_select(NULL, err));
    set_environment("PYENGINE_ISA", NULL);
    EXPECT(PE_OK, pe_isa_select(NULL, err));
}

static void test_status(void) {
    for (int i = 0; i < PE_STATUS_COUNT; i++) {
        CHECK(strlen(pe_status_message((pe_status)i)) > 5, "status %d has no message", i);
        for (int k = 0; k < i; k++)
            CHECK(strcmp(pe_status_message((pe_status)i), pe_status_message((pe_status)k)) != 0, "statuses %d and %d", i, k);
    }
    CHECK(pe_status_message(PE_STATUS_COUNT) != NULL && pe_status_message((pe_status)-1) != NULL, "out of range");
}

void test_arguments(void) {
    tiny_model t;
    pe_context *c = NULL;
    test_status();
    test_isa_names();
    test_config();
    test_loading();
    test_bad_values_are_named();
    test_overflow();
    tiny_model_make(&t, &small, 3, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&t, 0, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_context_create(&c, t.model, PE_KV_INT8, -1, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_context_create(&c, t.model, PE_KV_INT8, 257, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_context_create(&c, t.model, (pe_kv_dtype)2, 1, err));
    EXPECT(PE_OK, pe_context_create(&c, t.model, PE_KV_INT8, 2, err));
    test_sequences(c);
    test_full(c);
    pe_context_destroy(c);
    pe_context_destroy(NULL);
    tiny_model_free(&t);
}

/* ------------------------------------------------------------------ cancellation */

enum { N_TOKENS = 100, N_BEFORE = 5 };

static const pe_config slow = {.dim = 128, .hidden_dim = 128, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 32,
                               .vocab_size = 1500, .max_seq_len = 200, .norm_eps = 0x1p-17f, .tie_embeddings = true};

static int stop_at_once(void *user) {
    ++*(int *)user;
    return 1;
}

static uint64_t hash_logits(const pe_context *c) {
    uint64_t hash = HASH_START;
    for (size_t i = 0; i < pe_context_n_logits(c); i++) hash = hash_bytes(hash, pe_context_logits(c, i), slow.vocab_size * sizeof(float));
    return hash;
}

static void check_unchanged(pe_context *c, int32_t id, const char *how) {
    size_t length = 0;
    EXPECT(PE_OK, pe_sequence_length(c, id, &length, err));
    CHECK(length == N_BEFORE && pe_context_n_logits(c) == 0, "%s left %zu positions, %zu logits", how, length, pe_context_n_logits(c));
}

/* A prefill with deadlines spread over its duration, the logits' stage included: each call either completes with the right
 * bits, or is cancelled and has changed nothing. */
static void deadlines(pe_context *c, pe_batch *batch, int32_t id, uint64_t expected, int64_t duration) {
    int n_cancelled = 0, n_rounds = quick ? 5 : 24;
    for (int i = 0; i < n_rounds; i++) {
        char err[PE_ERR_LEN] = "";
        int64_t start = pe_now_ns();
        batch->deadline_ns = start + duration * i / n_rounds;
        pe_status status = pe_forward(c, batch, err);
        if (status == PE_OK) {
            CHECK(hash_logits(c) == expected, "%s: a call that met its deadline has wrong logits", c->slice.kernels->name);
            EXPECT(PE_OK, pe_sequence_truncate(c, id, N_BEFORE, err));
        } else {
            CHECK(status == PE_ERR_CANCELLED && err[0] != '\0', "status %d", (int)status);
            check_unchanged(c, id, "a deadline");
            n_cancelled++;
        }
    }
    CHECK(n_cancelled > 0, "%s: no deadline was noticed", c->slice.kernels->name);
    batch->deadline_ns = 0;
}

static void cancel_with(const struct pe_kernels *table, const tiny_model *t, int n_threads) {
    int32_t tokens[N_TOKENS], sequences[N_TOKENS], id = -1;
    uint8_t want[N_TOKENS];
    pe_context *c = NULL;
    EXPECT(PE_OK, pe_context_create(&c, t->model, PE_KV_INT8, n_threads, err));
    c->slice.kernels = table;
    EXPECT(PE_OK, pe_sequence_new(c, &id, err));
    for (int i = 0; i < N_TOKENS; i++) tokens[i] = i * 7 % (int32_t)slow.vocab_size, sequences[i] = id, want[i] = 1;
    pe_batch batch = {.n_tokens = N_BEFORE, .tokens = tokens, .sequences = sequences, .wants = want};
    EXPECT(PE_OK, pe_forward(c, &batch, err));
    batch.n_tokens = N_TOKENS;
    int64_t start = pe_now_ns();
    EXPECT(PE_OK, pe_forward(c, &batch, err));
    int64_t duration = pe_now_ns() - start;
    uint64_t expected = hash_logits(c);
    EXPECT(PE_OK, pe_sequence_truncate(c, id, N_BEFORE, err));

    deadlines(c, &batch, id, expected, duration);
    int n_polls = 0;
    batch.poll = stop_at_once, batch.poll_user = &n_polls;
    char err[PE_ERR_LEN] = "";
    pe_status status = pe_forward(c, &batch, err);
    if (n_polls > 0) {
        CHECK(status == PE_ERR_CANCELLED && n_polls < 3, "status %d after %d polls", (int)status, n_polls);
        check_unchanged(c, id, "the poll callback");
    } else {
        CHECK(status == PE_OK && duration < 100 * 1000 * 1000, "%s: %lld ns without a poll", table->name, (long long)duration);
        EXPECT(PE_OK, pe_sequence_truncate(c, id, N_BEFORE, err));
    }
    batch.poll = NULL;
    EXPECT(PE_OK, pe_forward(c, &batch, err)); /* and afterwards everything works as before */
    CHECK(hash_logits(c) == expected, "%s: logits after cancelled calls", table->name);
    pe_context_destroy(c);
}

void test_cancellation(const struct pe_kernels *table) {
    tiny_model t;
    tiny_model_make(&t, &slow, 4, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&t, 1, err));
    cancel_with(table, &t, 1);
    cancel_with(table, &t, 2);
    tiny_model_free(&t);
}

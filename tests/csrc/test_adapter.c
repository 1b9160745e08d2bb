/* test_adapter.c: rows of a batch that choose adapters. The reference is the scalar table, one thread, one token at a time, every
 * sequence alone; every table, thread count and mixture must give its bits, and rows without an adapter those of a context that never
 * saw one. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"
#include "harness.h"
#include "tiny_model.h"

#define EXPECT(expected, call) \
    do { \
        char err[PE_ERR_LEN] = ""; \
        pe_status got = (call); \
        CHECK(got == (expected) && (got == PE_OK || err[0] != '\0'), "%s: %d '%s'", #call, (int)got, err); \
    } while (0)

enum { N_STREAMS = 5, LENGTH = 90, N_ADAPTERS = 2 };
static const int adapter_of[N_STREAMS] = {-1, 0, 1, 0, -1}; /* streams 0 and 4 have none */

static const pe_layer_spec around[2] = {{40, 0, "rmsnorm_around", "geglu_tanh", NULL}, {0, 1, "rmsnorm_around", "geglu_tanh", NULL}};
static const pe_layer_spec after[2] = {{0, 0, "rmsnorm_after", "swiglu", NULL}, {0, 0, "rmsnorm_after", "swiglu", NULL}};

typedef struct model_case {
    const char *name;
    pe_config config;
    pe_kv_dtype kv_dtype;
    uint64_t golden; /* hash of the reference's logits, all streams */
} model_case;

/* Widths that neither 64 nor 16 divides: q ends within a panel of the fused product, and so does gate. */
static const model_case cases[] = {
    {"biases, qk_norm",
     {.dim = 72, .hidden_dim = 100, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 101,
      .max_seq_len = 200, .norm_eps = 0x1p-17f, .qkv_bias = true, .o_bias = true, .qk_norm = true},
     PE_KV_INT8, 0x8038f6fade52c197},
    {"norms around, GELU, key bias",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 50, .max_seq_len = 200,
      .layers = around, .norm_eps = 0x1p-17f, .tie_embeddings = true, .qkv_bias = true, .key_bias = true},
     PE_KV_INT8, 0xb4d469ef840036f9},
    {"norms after, float32 KV",
     {.dim = 40, .hidden_dim = 300, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 200,
      .layers = after, .norm_eps = 0x1p-17f, .qk_norm = true, .qk_norm_all_heads = true},
     PE_KV_F32, 0xc29691b61cb2fae2},
    {"biases of the MLP",
     {.dim = 40, .hidden_dim = 50, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 200,
      .norm_eps = 0x1p-17f, .o_bias = true, .gate_up_bias = true, .down_bias = true, .output_bias = true},
     PE_KV_INT8, 0x05a7d3e4d1ed4cf0},
    {"experts, attention alone adapted",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 200,
      .norm_eps = 0x1p-17f, .n_experts = 6, .n_experts_used = 2, .experts_normalized = true},
     PE_KV_INT8, 0xad4f2ea242bc127c},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

/* ------------------------------------------------------------------ adapters */

static size_t inputs_of(const pe_config *c, int matrix) {
    return matrix == PE_ADAPTER_O ? (size_t)c->n_heads * c->head_dim : matrix == PE_ADAPTER_DOWN ? c->hidden_dim : c->dim;
}
static size_t outputs_of(const pe_config *c, int matrix) {
    if (matrix == PE_ADAPTER_Q) return (size_t)c->n_heads * c->head_dim;
    if (matrix == PE_ADAPTER_K || matrix == PE_ADAPTER_V) return (size_t)c->n_kv_heads * c->head_dim;
    return matrix == PE_ADAPTER_GATE || matrix == PE_ADAPTER_UP ? c->hidden_dim : c->dim;
}

/* Thirds of small whole numbers: every compiler has the same. */
static float *factors(rng *r, size_t n) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)rng_code(r) / 384.0f;
    return x;
}

static pe_status set(pe_adapter *adapter, const pe_config *c, uint32_t layer, int matrix, size_t rank, float scale, rng *r, char *err) {
    size_t n_in = inputs_of(c, matrix), n_out = outputs_of(c, matrix);
    float *a = factors(r, rank * n_in), *b = factors(r, n_out * rank);
    pe_adapter_product product = {a, b, rank, n_in, n_out, scale};
    pe_status status = pe_adapter_set(adapter, layer, (pe_adapter_matrix)matrix, &product, err);
    free(a), free(b);
    return status;
}

/* The first changes every matrix, with ranks from 1 to 40; the second only some of layer 0. */
static pe_adapter *adapter_new(const tiny_model *t, int which) {
    pe_adapter *adapter = NULL;
    rng r = {(uint64_t)which + 100};
    EXPECT(PE_OK, pe_adapter_create(&adapter, t->model, err));
    int n_matrices = t->config.n_experts > 0 ? PE_ADAPTER_GATE : PE_ADAPTER_N_MATRICES;
    for (uint32_t layer = 0; layer < (which == 0 ? t->config.n_layers : 1); layer++)
        for (int m = which; m < n_matrices; m += 1 + which)
            EXPECT(PE_OK, set(adapter, &t->config, layer, m, (size_t)(1 + (m * 13 + (int)layer) % 40), which == 0 ? 1.5f : -0.7f, &r, err));
    return adapter;
}

/* ------------------------------------------------------------------ the reference */

typedef struct reference {
    tiny_model tiny;
    pe_adapter *adapters[N_ADAPTERS];
    int32_t tokens[N_STREAMS][LENGTH];
    float *logits[N_STREAMS]; /* (LENGTH, vocab_size) */
} reference;

static pe_context *context_new(const reference *ref, pe_kv_dtype dtype, const struct pe_kernels *table, int n_threads) {
    pe_context *c = NULL;
    EXPECT(PE_OK, pe_context_create(&c, ref->tiny.model, dtype, n_threads, err));
    c->slice.kernels = table;
    return c;
}

static const pe_adapter *adapter_for(const reference *ref, size_t stream) {
    return adapter_of[stream] < 0 ? NULL : ref->adapters[adapter_of[stream]];
}

/* One stream alone, a token at a time. A stream without an adapter is in a batch without any. */
static void compute_alone(reference *ref, pe_kv_dtype dtype, size_t stream) {
    size_t vocab = ref->tiny.config.vocab_size;
    pe_context *c = context_new(ref, dtype, &pe_kernels_scalar, 1);
    const pe_adapter *adapter = adapter_for(ref, stream);
    int32_t id = -1;
    uint8_t want = PE_WANT_LOGITS;
    EXPECT(PE_OK, pe_sequence_new(c, &id, err));
    ref->logits[stream] = malloc(LENGTH * vocab * sizeof(float));
    for (size_t i = 0; i < LENGTH; i++) {
        pe_batch batch = {.n_tokens = 1, .tokens = &ref->tokens[stream][i], .sequences = &id, .wants = &want};
        if (adapter != NULL) batch.adapters = &adapter;
        EXPECT(PE_OK, pe_forward(c, &batch, err));
        memcpy(ref->logits[stream] + i * vocab, pe_context_logits(c, 0), vocab * sizeof(float));
    }
    pe_context_destroy(c);
}

static reference *reference_new(const model_case *which) {
    reference *ref = calloc(1, sizeof *ref);
    uint64_t hash = HASH_START;
    rng r = {7};
    tiny_model_make(&ref->tiny, &which->config, 11, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&ref->tiny, 1, err));
    for (int i = 0; i < N_ADAPTERS; i++) ref->adapters[i] = adapter_new(&ref->tiny, i);
    for (size_t i = 0; i < LENGTH; i++) { /* the same text in all streams */
        int32_t token = (int32_t)rng_below(&r, which->config.vocab_size);
        for (size_t s = 0; s < N_STREAMS; s++) ref->tokens[s][i] = token;
    }
    for (size_t s = 0; s < N_STREAMS; s++) {
        compute_alone(ref, which->kv_dtype, s);
        hash = hash_bytes(hash, ref->logits[s], LENGTH * which->config.vocab_size * sizeof(float));
    }
    CHECK(hash == which->golden, "%s: the logits hash to 0x%llx", which->name, (unsigned long long)hash);
    return ref;
}

static void reference_free(reference *ref) {
    for (size_t s = 0; s < N_STREAMS; s++) free(ref->logits[s]);
    for (int i = 0; i < N_ADAPTERS; i++) pe_adapter_destroy(ref->adapters[i]);
    tiny_model_free(&ref->tiny);
    free(ref);
}

static void test_effects(const reference *ref, const char *name) {
    size_t n = LENGTH * ref->tiny.config.vocab_size;
    CHECK(same_floats(ref->logits[0], ref->logits[4], n) && same_floats(ref->logits[1], ref->logits[3], n), "%s: equal streams", name);
    for (size_t s = 1; s <= 2; s++) CHECK(!same_floats(ref->logits[0], ref->logits[s], 1), "%s: adapter of stream %zu", name, s);
    CHECK(!same_floats(ref->logits[1], ref->logits[2], 1), "%s: two adapters", name);
}

/* ------------------------------------------------------------------ mixtures */

/* All streams through one context, in batches of random rows: sequences mixed, chunks of any length. */
static void test_mixture(const reference *ref, const model_case *which, const struct pe_kernels *table, int n_threads, uint64_t seed) {
    enum { MAX_ROWS = N_STREAMS * LENGTH };
    static int32_t tokens[MAX_ROWS], sequences[MAX_ROWS];
    static uint8_t wants[MAX_ROWS];
    static const pe_adapter *adapters[MAX_ROWS];
    static size_t streams[MAX_ROWS], positions[MAX_ROWS];
    pe_context *c = context_new(ref, which->kv_dtype, table, n_threads);
    int32_t ids[N_STREAMS];
    size_t done[N_STREAMS] = {0}, vocab = which->config.vocab_size, left = MAX_ROWS;
    rng r = {seed};
    for (size_t s = 0; s < N_STREAMS; s++) EXPECT(PE_OK, pe_sequence_new(c, &ids[s], err));
    while (left > 0) {
        size_t most = rng_below(&r, 3) == 0 ? 6 : left, wanted = 1 + rng_below(&r, most < left ? most : left), n = 0;
        while (n < wanted) {
            size_t s = rng_below(&r, N_STREAMS);
            if (done[s] == LENGTH) continue;
            tokens[n] = ref->tokens[s][done[s]], sequences[n] = ids[s], wants[n] = PE_WANT_LOGITS, adapters[n] = adapter_for(ref, s);
            streams[n] = s, positions[n] = done[s]++, n++;
        }
        pe_batch batch = {.n_tokens = n, .tokens = tokens, .sequences = sequences, .wants = wants, .adapters = adapters};
        EXPECT(PE_OK, pe_forward(c, &batch, err));
        for (size_t i = 0; i < n; i++)
            CHECK(same_floats(pe_context_logits(c, i), ref->logits[streams[i]] + positions[i] * vocab, vocab),
                  "%s, %s, %d threads: stream %zu at %zu", which->name, table->name, n_threads, streams[i], positions[i]);
        left -= n;
    }
    EXPECT(PE_OK, pe_context_check(c, err));
    pe_context_destroy(c);
}

/* ------------------------------------------------------------------ what is refused */

static void test_refused(const reference *ref, const model_case *which) {
    const pe_config *config = &ref->tiny.config;
    pe_adapter *adapter = NULL;
    rng r = {3};
    EXPECT(PE_OK, pe_adapter_create(&adapter, ref->tiny.model, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, config, config->n_layers, PE_ADAPTER_Q, 2, 1.0f, &r, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, config, 0, PE_ADAPTER_N_MATRICES, 2, 1.0f, &r, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, config, 0, PE_ADAPTER_Q, 0, 1.0f, &r, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, config, 0, PE_ADAPTER_Q, 2, INFINITY, &r, err));
    float values[16] = {1.0f, NAN};
    pe_adapter_product product = {values, values, 1, 16, 16, 1.0f};
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_adapter_set(adapter, 0, PE_ADAPTER_Q, &product, err));
    float *a = calloc(config->dim, sizeof *a), *b = calloc(config->dim * 8, sizeof *b);
    product = (pe_adapter_product){a, b, 1, config->dim, outputs_of(config, PE_ADAPTER_K), 1.0f};
    b[3] = -INFINITY;
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_adapter_set(adapter, 0, PE_ADAPTER_K, &product, err));
    free(a), free(b);
    CHECK(pe_adapter_bytes(adapter) == 0, "%zu bytes", pe_adapter_bytes(adapter));
    EXPECT(config->n_experts > 0 ? PE_ERR_INVALID_ARGUMENT : PE_OK, set(adapter, config, 0, PE_ADAPTER_UP, 2, 1.0f, &r, err));
    EXPECT(PE_OK, set(adapter, config, 0, PE_ADAPTER_Q, 2, 1.0f, &r, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, config, 0, PE_ADAPTER_Q, 2, 1.0f, &r, err)); /* once more */
    pe_adapter_destroy(adapter);

    tiny_model other;
    tiny_model_make(&other, &which->config, 11, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&other, 1, err));
    EXPECT(PE_OK, pe_adapter_create(&adapter, other.model, err));
    pe_context *c = context_new(ref, which->kv_dtype, &pe_kernels_scalar, 1);
    int32_t id = -1, token = 1;
    uint8_t want = PE_WANT_LOGITS;
    EXPECT(PE_OK, pe_sequence_new(c, &id, err));
    const pe_adapter *chosen = adapter;
    pe_batch batch = {.n_tokens = 1, .tokens = &token, .sequences = &id, .wants = &want, .adapters = &chosen};
    EXPECT(PE_ERR_INVALID_ARGUMENT, pe_forward(c, &batch, err)); /* another model's */
    pe_context_destroy(c);
    pe_adapter_destroy(adapter);
    tiny_model_free(&other);
}

/* Layers whose halves are parallel cannot be changed, nor can an MLP without a gate. */
static void test_refused_layers(void) {
    static const pe_layer_spec layers[2] = {{0, 0, "rmsnorm_parallel", "swiglu", NULL}, {0, 0, "rmsnorm", "gelu_tanh", NULL}};
    const pe_config config = {.dim = 16, .hidden_dim = 16, .n_layers = 2, .n_heads = 2, .n_kv_heads = 2, .head_dim = 8, .vocab_size = 16,
                              .max_seq_len = 16, .norm_eps = 0x1p-17f, .layers = layers};
    rng r = {19};
    tiny_model tiny;
    pe_adapter *adapter = NULL;
    tiny_model_make(&tiny, &config, 12, 1.0f);
    EXPECT(PE_OK, tiny_model_load(&tiny, 1, err));
    EXPECT(PE_OK, pe_adapter_create(&adapter, tiny.model, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, &config, 0, PE_ADAPTER_Q, 2, 1.0f, &r, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, &config, 0, PE_ADAPTER_DOWN, 2, 1.0f, &r, err));
    EXPECT(PE_ERR_INVALID_ARGUMENT, set(adapter, &config, 1, PE_ADAPTER_UP, 2, 1.0f, &r, err));
    EXPECT(PE_OK, set(adapter, &config, 1, PE_ADAPTER_O, 2, 1.0f, &r, err));
    pe_adapter_destroy(adapter);
    tiny_model_free(&tiny);
}

/* An adapter that changes nothing is none, also in the first batch of a context. */
static void test_empty(const reference *ref, const model_case *which) {
    pe_adapter *adapter = NULL;
    EXPECT(PE_OK, pe_adapter_create(&adapter, ref->tiny.model, err));
    pe_context *c = context_new(ref, which->kv_dtype, &pe_kernels_scalar, 1);
    int32_t id = -1;
    uint8_t want = PE_WANT_LOGITS;
    EXPECT(PE_OK, pe_sequence_new(c, &id, err));
    const pe_adapter *chosen = adapter;
    pe_batch batch = {.n_tokens = 1, .tokens = ref->tokens[0], .sequences = &id, .wants = &want, .adapters = &chosen};
    EXPECT(PE_OK, pe_forward(c, &batch, err));
    CHECK(same_floats(pe_context_logits(c, 0), ref->logits[0], which->config.vocab_size), "%s", which->name);
    pe_context_destroy(c);
    pe_adapter_destroy(adapter);
}

/* One batch of a stream's first tokens, with its adapter or without. */
static size_t scratch_after(pe_context *c, const reference *ref, int32_t id, const pe_adapter *adapter) {
    uint8_t want = PE_WANT_LOGITS;
    size_t bytes = 0;
    pe_batch batch = {.n_tokens = 1, .tokens = ref->tokens[0], .sequences = &id, .wants = &want, .adapters = adapter == NULL ? NULL : &adapter};
    EXPECT(PE_OK, pe_sequence_truncate(c, id, 0, err));
    EXPECT(PE_OK, pe_forward(c, &batch, err));
    pe_context_memory(c, &bytes);
    return bytes;
}

/* Room for adapters is given back once many batches had none, and not while some of them have. */
static void test_room(const reference *ref, const model_case *which) {
    pe_context *c = context_new(ref, which->kv_dtype, &pe_kernels_scalar, 1);
    int32_t id = -1;
    EXPECT(PE_OK, pe_sequence_new(c, &id, err));
    const pe_adapter *adapter = adapter_for(ref, 1);
    size_t without = scratch_after(c, ref, id, NULL), with = scratch_after(c, ref, id, adapter);
    CHECK(with > without, "%zu bytes with an adapter, %zu without", with, without);
    for (int i = 0; i < 2 * PE_SLICE_RECENT; i++) CHECK(scratch_after(c, ref, id, i % 8 == 0 ? adapter : NULL) == with, "batch %d", i);
    for (int i = 0; i < 2 * PE_SLICE_RECENT; i++) scratch_after(c, ref, id, NULL);
    CHECK(scratch_after(c, ref, id, NULL) == without, "%s: the room is given back", which->name);
    CHECK(same_floats(pe_context_logits(c, 0), ref->logits[0], which->config.vocab_size), "%s: and no bit changes", which->name);
    pe_context_destroy(c);
}

void test_adapters(const struct pe_kernels *const *tables, size_t n_tables) {
    for (size_t i = 0; i < N_CASES; i++) {
        reference *ref = reference_new(&cases[i]);
        test_effects(ref, cases[i].name);
        for (size_t t = 0; t < n_tables; t++)
            for (int n_threads = 1; n_threads <= 3; n_threads += 2)
                for (uint64_t seed = 0; seed < (quick ? 1 : 4); seed++) test_mixture(ref, &cases[i], tables[t], n_threads, seed);
        test_refused(ref, &cases[i]);
        test_empty(ref, &cases[i]);
        if (i == 0) test_room(ref, &cases[i]);
        reference_free(ref);
    }
    test_refused_layers();
}

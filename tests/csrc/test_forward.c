/* test_forward.c: the forward pass gives one answer. The reference is the scalar table on one thread, one token at a time; every
 * table, thread count, chunking, batch mixture, fork and truncation must give its bits, logits and KV cache alike. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"
#include "float_env.h"
#include "harness.h"
#include "tiny_model.h"

/* ------------------------------------------------------------------ cases */

enum { N_STREAMS = 3, MAX_LENGTH = 600 };

/* Streams of tokens; stream 1 and 2 equal stream 0 up to here and then go their own way, so that forks can part. */
static const size_t diverges[N_STREAMS] = {0, 70, 270}, stream_length[N_STREAMS] = {600, 300, 330};

typedef struct model_case {
    const char *name;
    pe_config config;
    pe_kv_dtype kv_dtype;
    uint64_t golden; /* hash of the reference's logits, all streams */
} model_case;

static const pe_layer_spec window_37[2] = {{37, 0, "rmsnorm", "swiglu", NULL}, {37, 0, "rmsnorm", "swiglu", NULL}};
static const pe_layer_spec window_300[1] = {{300, 0, "rmsnorm", "swiglu", NULL}};
static const pe_layer_spec alternating[5] = {
    {40, 0, "rmsnorm", "swiglu", NULL}, {0, 1, "rmsnorm", "swiglu", NULL}, {300, 2, "rmsnorm", "swiglu", NULL},
    {1, 1, "rmsnorm", "swiglu", NULL}, {0, 0, "rmsnorm", "swiglu", NULL},
};

static const pe_layer_spec around[3] = {
    {40, 0, "rmsnorm_around", "geglu_tanh", NULL}, {0, 1, "rmsnorm_around", "geglu_tanh", NULL}, {300, 0, "rmsnorm", "geglu_tanh", NULL},
};
static const pe_layer_spec after[2] = {{0, 0, "rmsnorm_after", "swiglu", NULL}, {0, 0, "rmsnorm_after", "swiglu", NULL}};

static const pe_layer_spec parallel[3] = {
    {0, 0, "rmsnorm_parallel", "gelu_tanh", NULL}, {40, 1, "rmsnorm_parallel", "swiglu", NULL}, {0, 0, "rmsnorm", "gelu_tanh", NULL},
};
static const pe_layer_spec ungated[2] = {{0, 0, "rmsnorm_around", "gelu_tanh", NULL}, {0, 0, "rmsnorm_around", "gelu_tanh", NULL}};
static const pe_layer_spec clamped[2] = {{40, 0, "rmsnorm", "swiglu_clamped", NULL}, {0, 0, "rmsnorm", "swiglu_clamped", NULL}};

static const pe_layer_spec convolutions[4] = {
    {3, 0, "rmsnorm", "swiglu", "short_conv"}, {0, 0, "rmsnorm", "swiglu", "attention"}, {40, 0, "rmsnorm", "swiglu", NULL},
    {5, 0, "rmsnorm_around", "swiglu", "short_conv"},
};
static const pe_layer_spec curves[3] = {{0, 0, "rmsnorm", "relu2", NULL}, {40, 0, "rmsnorm_parallel", "gelu", NULL}, {0, 0, "rmsnorm", "xielu", NULL}};

/* Widths that no group divides; n_rep 3, 1 and 34 (more rows than a query block holds); 600 positions are three chunks. */
static const model_case cases[] = {
    {"biases, qk_norm, untied",
     {.dim = 72, .hidden_dim = 100, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 101,
      .max_seq_len = 700, .norm_eps = 0x1p-17f, .qkv_bias = true, .o_bias = true, .qk_norm = true},
     PE_KV_INT8, 0xba3927715357fa3f},
    {"window 37, tied",
     {.dim = 64, .hidden_dim = 96, .n_layers = 2, .n_heads = 2, .n_kv_heads = 2, .head_dim = 32, .vocab_size = 64, .max_seq_len = 700,
      .layers = window_37, .norm_eps = 0x1p-17f, .tie_embeddings = true},
     PE_KV_INT8, 0x4050f05832e973ed},
    {"window 300, n_rep 34",
     {.dim = 40, .hidden_dim = 30, .n_layers = 1, .n_heads = 34, .n_kv_heads = 1, .head_dim = 4, .vocab_size = 33, .max_seq_len = 700,
      .layers = window_300, .norm_eps = 0x1p-17f},
     PE_KV_INT8, 0x5cacf48b5b4c9229},
    {"windows and RoPE tables by layer",
     {.dim = 48, .hidden_dim = 50, .n_layers = 5, .n_heads = 4, .n_kv_heads = 2, .head_dim = 16, .vocab_size = 40, .max_seq_len = 700,
      .layers = alternating, .norm_eps = 0x1p-17f, .tie_embeddings = true},
     PE_KV_INT8, 0x7e99e150a13cf9fe},
    {"key bias apart, windows and RoPE tables by layer",
     {.dim = 48, .hidden_dim = 50, .n_layers = 5, .n_heads = 12, .n_kv_heads = 3, .head_dim = 24, .vocab_size = 40, .max_seq_len = 700,
      .layers = alternating, .norm_eps = 0x1p-17f, .tie_embeddings = true, .qkv_bias = true, .key_bias = true},
     PE_KV_INT8, 0x1450321e93e6d15b},
    {"key bias apart, n_rep 34",
     {.dim = 40, .hidden_dim = 30, .n_layers = 1, .n_heads = 34, .n_kv_heads = 1, .head_dim = 80, .vocab_size = 33, .max_seq_len = 700,
      .norm_eps = 0x1p-17f, .qkv_bias = true, .key_bias = true},
     PE_KV_INT8, 0xe877ae0dbc0cfa34},
    {"key bias apart, float32 KV",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .norm_eps = 0x1p-17f, .qkv_bias = true, .key_bias = true},
     PE_KV_F32, 0x8524f9b5e5f133b7},
    {"norms around, GELU, softcaps",
     {.dim = 40, .hidden_dim = 30, .n_layers = 3, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 50, .max_seq_len = 700,
      .layers = around, .norm_eps = 0x1p-17f, .tie_embeddings = true, .qk_norm = true, .attention_softcap = 5.0f,
      .logits_softcap = 30.0f},
     PE_KV_INT8, 0x5e343155b2e12d47},
    {"norms after, norms of all heads, softcap, float32 KV",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = after, .norm_eps = 0x1p-17f, .o_bias = true, .qk_norm = true, .qk_norm_all_heads = true, .attention_softcap = 5.0f},
     PE_KV_F32, 0xf60b0d2b1f5f5105},
    {"6 experts, 2 a row",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .norm_eps = 0x1p-17f, .n_experts = 6, .n_experts_used = 2, .experts_normalized = true},
     PE_KV_INT8, 0xdf882b65263f1c02},
    {"a shared expert with a weight",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .norm_eps = 0x1p-17f, .n_experts = 5, .n_experts_used = 2, .shared_hidden_dim = 100, .shared_gated = true},
     PE_KV_INT8, 0xd5cd0a5b7876d099},
    {"a narrow shared expert",
     {.dim = 40, .hidden_dim = 70, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = window_37, .norm_eps = 0x1p-17f, .n_experts = 3, .n_experts_used = 1, .shared_hidden_dim = 20},
     PE_KV_INT8, 0xf2ee3b44331b4055},
    {"MLPs without gates, all biases, parallel",
     {.dim = 40, .hidden_dim = 300, .n_layers = 3, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = parallel, .norm_eps = 0x1p-17f, .qkv_bias = true, .o_bias = true, .key_bias = true, .gate_up_bias = true,
      .down_bias = true, .output_bias = true},
     PE_KV_INT8, 0x1f1f7bb9cd2ce9e3},
    {"experts without gates",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = ungated, .norm_eps = 0x1p-17f, .tie_embeddings = true, .n_experts = 3, .n_experts_used = 2, .output_bias = true},
     PE_KV_F32, 0x15bdf7b22daecb7b},
    {"squares, GELU and xIELU",
     {.dim = 40, .hidden_dim = 300, .n_layers = 3, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = curves, .norm_eps = 0x1p-17f, .gate_up_bias = true},
     PE_KV_INT8, 0xa4beeed1b137c880},
    {"sinks, experts with biases and clamped gates",
     {.dim = 40, .hidden_dim = 70, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = clamped, .norm_eps = 0x1p-17f, .qkv_bias = true, .o_bias = true, .key_bias = true, .gate_up_bias = true,
      .down_bias = true, .attention_sinks = true, .n_experts = 4, .n_experts_used = 2, .experts_normalized = true,
      .router_bias = true},
     PE_KV_INT8, 0xdac05cb97f03d02c},
    {"sinks, float32 KV",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = clamped, .norm_eps = 0x1p-17f, .attention_sinks = true},
     PE_KV_F32, 0x6008b110ae0aface},
    {"norms of heads after RoPE",
     {.dim = 40, .hidden_dim = 30, .n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .norm_eps = 0x1p-17f, .qk_norm = true, .qk_norm_after_rope = true},
     PE_KV_INT8, 0xf9d6291bf5345a0a},
    {"convolutions beside attention with a bias, wider than its heads",
     {.dim = 72, .hidden_dim = 100, .n_layers = 4, .n_heads = 2, .n_kv_heads = 1, .head_dim = 20, .vocab_size = 33, .max_seq_len = 700,
      .layers = convolutions, .norm_eps = 0x1p-17f, .tie_embeddings = true, .qkv_bias = true, .key_bias = true},
     PE_KV_INT8, 0x3dd90fd08428ff7c},
    {"float32 KV",
     {.dim = 72, .hidden_dim = 100, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 40, .vocab_size = 50, .max_seq_len = 700,
      .norm_eps = 0x1p-17f, .tie_embeddings = true},
     PE_KV_F32, 0x80428beea775722a},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

typedef struct reference {
    const model_case *which;
    tiny_model tiny;
    size_t vocab_size;
    int32_t tokens[N_STREAMS][MAX_LENGTH];
    float *logits[N_STREAMS]; /* (length, vocab_size) */
    pe_context *context;      /* scalar, holds stream s as sequence s */
} reference;

static pe_context *context_new(const reference *ref, const struct pe_kernels *table, int n_threads) {
    char err[PE_ERR_LEN] = "";
    pe_context *c = NULL;
    pe_status status = pe_context_create(&c, ref->tiny.model, ref->which->kv_dtype, n_threads, err);
    CHECK(status == PE_OK, "%s", err);
    if (c != NULL) c->slice.kernels = table; /* also a table that dispatch does not offer */
    return c;
}

static pe_status append(pe_context *c, size_t n, const int32_t *tokens, const int32_t *sequences, const uint8_t *want) {
    char err[PE_ERR_LEN] = "";
    pe_batch batch = {.n_tokens = n, .tokens = tokens, .sequences = sequences, .wants = want};
    pe_status status = pe_forward(c, &batch, err);
    CHECK((status == PE_OK) == (err[0] == '\0'), "status %d, message '%s'", (int)status, err);
    return status;
}

static int32_t sequence_new(pe_context *c) {
    char err[PE_ERR_LEN];
    int32_t id = -1;
    CHECK(pe_sequence_new(c, &id, err) == PE_OK, "%s", err);
    return id;
}

static reference *reference_new(const model_case *which) {
    reference *ref = calloc(1, sizeof *ref);
    char err[PE_ERR_LEN] = "";
    if (ref == NULL) exit(2);
    ref->which = which, ref->vocab_size = which->config.vocab_size;
    tiny_model_make(&ref->tiny, &which->config, 1, 1.0f);
    CHECK(tiny_model_load(&ref->tiny, 1, err) == PE_OK, "%s: %s", which->name, err);
    rng r = {2};
    for (size_t s = 0; s < N_STREAMS; s++)
        for (size_t i = 0; i < MAX_LENGTH; i++)
            ref->tokens[s][i] = i < diverges[s] ? ref->tokens[0][i] : (int32_t)rng_below(&r, ref->vocab_size);
    ref->context = context_new(ref, &pe_kernels_scalar, 1);
    uint64_t hash = HASH_START;
    for (size_t s = 0; s < N_STREAMS; s++) {
        int32_t id = sequence_new(ref->context);
        const uint8_t want = 1;
        ref->logits[s] = calloc(stream_length[s] * ref->vocab_size, sizeof(float));
        for (size_t i = 0; i < stream_length[s]; i++) {
            pe_status status = append(ref->context, 1, &ref->tokens[s][i], &id, &want);
            if (!CHECK(status == PE_OK, "%s: stream %zu position %zu: %d", which->name, s, i, (int)status)) break;
            memcpy(ref->logits[s] + i * ref->vocab_size, pe_context_logits(ref->context, 0), ref->vocab_size * sizeof(float));
        }
        hash = hash_bytes(hash, ref->logits[s], stream_length[s] * ref->vocab_size * sizeof(float));
    }
    printf("  %s: logits %016llx\n", which->name, (unsigned long long)hash);
    CHECK(hash == which->golden, "%s: the reference's bits changed: %016llx, golden %016llx", which->name, (unsigned long long)hash,
          (unsigned long long)which->golden);
    return ref;
}

static void reference_free(reference *ref) {
    pe_context_destroy(ref->context);
    for (size_t s = 0; s < N_STREAMS; s++) free(ref->logits[s]);
    tiny_model_free(&ref->tiny);
    free(ref);
}

/* ------------------------------------------------------------------ comparing */

static bool same_logits(const pe_context *c, size_t row, const reference *ref, size_t stream, size_t position) {
    const float *got = pe_context_logits(c, row);
    return got != NULL && memcmp(got, ref->logits[stream] + position * ref->vocab_size, ref->vocab_size * sizeof(float)) == 0;
}

/* What a fork or a truncation left of the `n` tokens that were asked for. */
static size_t length_left(const pe_context *c, int32_t id, size_t n) {
    char err[PE_ERR_LEN];
    size_t length = 0;
    CHECK(pe_sequence_length(c, id, &length, err) == PE_OK, "%s", err);
    CHECK(length <= n, "%zu tokens are left, %zu were asked for", length, n);
    return length;
}

/* Position `in_chunk` of two chunks: its lane of every K panel, its scales, its place in every four of V. Behind a sequence's end a page holds anything. */
static bool same_position(const pe_kv_chunk *a, const pe_kv_chunk *b, size_t d, size_t in_chunk) {
    size_t panel = in_chunk / 16, lane = in_chunk % 16;
    bool same = true;
    if (a->k == NULL) {
        for (size_t i = 0; i < d; i++) {
            size_t k = (panel * d + i) * 16 + lane;
            same &= memcmp(a->k_f32 + k, b->k_f32 + k, 4) == 0;
        }
        return same && memcmp(a->v_f32 + in_chunk * d, b->v_f32 + in_chunk * d, d * 4) == 0;
    }
    for (size_t i = 0; i < d; i += 4) same &= memcmp(a->k + (panel * d + i) * 16 + lane * 4, b->k + (panel * d + i) * 16 + lane * 4, 4) == 0;
    same &= memcmp(a->k_scales + in_chunk, b->k_scales + in_chunk, 4) == 0;
    for (size_t i = 0; i < d; i++) {
        size_t v = (in_chunk / 4 * d + i) * 4 + in_chunk % 4;
        same &= a->v[v] == b->v[v];
    }
    return same && memcmp(a->v_scales + in_chunk, b->v_scales + in_chunk, 4) == 0;
}

/* The same of a convolution's inputs. */
static bool same_inputs(const pe_context *c, int32_t id, const reference *ref, size_t stream, size_t length, uint32_t layer) {
    const pe_model *model = ref->tiny.model;
    size_t stride = pe_x_stride(model), window = model->layers[layer].window;
    for (size_t position = 0; position < length; position++) {
        const float *a = pe_kv_inputs_at(c->kv, id, position / 256, layer);
        const float *b = pe_kv_inputs_at(ref->context->kv, (int32_t)stream, position / 256, layer);
        if (a == NULL && position + window > length) return false;
        if (a == NULL || b == NULL) continue;
        if (memcmp(a + position % 256 * stride, b + position % 256 * stride, stride * sizeof *a) != 0) return false;
    }
    return true;
}

/* Whatever a layer with a window has let go of, no later query may see it. */
static bool same_cache(const pe_context *c, int32_t id, const reference *ref, size_t stream, size_t length) {
    const pe_model *model = ref->tiny.model;
    for (uint32_t layer = 0; layer < model->config.n_layers; layer++) {
        size_t window = model->layers[layer].window;
        if (model->layers[layer].short_conv) {
            if (!same_inputs(c, id, ref, stream, length, layer)) return false;
            continue;
        }
        for (uint32_t head = 0; head < model->config.n_kv_heads; head++)
            for (size_t position = 0; position < length; position++) {
                pe_kv_chunk a = pe_kv_chunk_at(c->kv, id, position / 256, layer, head);
                pe_kv_chunk b = pe_kv_chunk_at(ref->context->kv, (int32_t)stream, position / 256, layer, head);
                bool is_gone = a.k == NULL && a.k_f32 == NULL;
                if (is_gone && (window == 0 || position + window > length)) return false;
                if (is_gone || (b.k == NULL && b.k_f32 == NULL)) continue;
                if (!same_position(&a, &b, model->head_dim_p, position % 256)) return false;
            }
    }
    return true;
}

/* Append positions [begin, end) of a stream in one call, all logits wanted, and compare them. */
static void append_and_compare(pe_context *c, int32_t id, const reference *ref, size_t stream, size_t begin, size_t end) {
    int32_t sequences[MAX_LENGTH];
    uint8_t want[MAX_LENGTH];
    for (size_t i = 0; i < end - begin; i++) sequences[i] = id, want[i] = 1;
    if (!CHECK(append(c, end - begin, ref->tokens[stream] + begin, sequences, want) == PE_OK, "%zu-%zu", begin, end)) return;
    for (size_t i = begin; i < end; i++)
        CHECK(same_logits(c, i - begin, ref, stream, i), "%s, %s, %d threads: positions %zu-%zu in one call, logits of %zu",
              c->slice.kernels->name, ref->which->name, c->slice.n_threads, begin, end, i);
}

/* ------------------------------------------------------------------ chunkings */

static void test_chunking(const reference *ref, const struct pe_kernels *table, int n_threads, size_t size) {
    pe_context *c = context_new(ref, table, n_threads);
    int32_t id = sequence_new(c);
    for (size_t begin = 0; begin < MAX_LENGTH; begin += size)
        append_and_compare(c, id, ref, 0, begin, begin + size < MAX_LENGTH ? begin + size : MAX_LENGTH);
    CHECK(same_cache(c, id, ref, 0, MAX_LENGTH), "%s, %s, %d threads, chunks of %zu: KV differs", table->name, ref->which->name, n_threads,
          size);
    pe_context_destroy(c);
}

/* ------------------------------------------------------------------ random schedules */

enum { MAX_SEQUENCES = 5, MAX_BATCH = 48 };

typedef struct live {
    bool used;
    int32_t id;
    size_t stream, length;
} live;

/* A batch of random rows over the live sequences: each row continues one of them; a third of the rows want logits. */
static void random_batch(pe_context *c, const reference *ref, live *s, rng *r) {
    int32_t tokens[MAX_BATCH], sequences[MAX_BATCH];
    uint8_t want[MAX_BATCH];
    size_t streams[MAX_BATCH], positions[MAX_BATCH], n = 0, limit = 1 + rng_below(r, rng_below(r, 3) ? 6 : MAX_BATCH), which = 0;
    while (n < limit) {
        if (n == 0 || rng_below(r, 4) == 0) which = rng_below(r, MAX_SEQUENCES); /* runs of one sequence, interleaved */
        if (!s[which].used || s[which].length == stream_length[s[which].stream]) {
            limit--;
            which = rng_below(r, MAX_SEQUENCES);
            continue;
        }
        streams[n] = s[which].stream, positions[n] = s[which].length++, sequences[n] = s[which].id, want[n] = rng_below(r, 3) == 0;
        tokens[n] = ref->tokens[streams[n]][positions[n]];
        n++;
    }
    if (n == 0 || !CHECK(append(c, n, tokens, sequences, want) == PE_OK, "a batch of %zu rows", n)) return;
    size_t row = 0;
    for (size_t i = 0; i < n; i++)
        if (want[i])
            CHECK(same_logits(c, row++, ref, streams[i], positions[i]), "%s, %s, %d threads: row %zu of a mixed batch of %zu, position %zu",
                  c->slice.kernels->name, ref->which->name, c->slice.n_threads, i, n, positions[i]);
    CHECK(pe_context_n_logits(c) == row, "%zu rows of logits, expected %zu", pe_context_n_logits(c), row);
}

/* One random change of the set of sequences: new, fork, truncate, drop, or a sequence takes another stream that agrees so far. */
static void random_change(pe_context *c, const reference *ref, live *s, rng *r) {
    char err[PE_ERR_LEN];
    live *one = &s[rng_below(r, MAX_SEQUENCES)], *other = &s[rng_below(r, MAX_SEQUENCES)];
    if (!one->used) {
        *one = (live){true, -1, rng_below(r, N_STREAMS), 0};
        if (other != one && other->used) {
            one->stream = other->stream, one->length = rng_below(r, other->length + 1);
            CHECK(pe_sequence_fork(c, other->id, one->length, &one->id, err) == PE_OK, "%s", err);
            one->length = length_left(c, one->id, one->length);
        } else {
            one->id = sequence_new(c);
        }
        return;
    }
    size_t stream = rng_below(r, N_STREAMS);
    size_t agree = diverges[one->stream] < diverges[stream] ? diverges[one->stream] : diverges[stream];
    if (one->stream == 0) agree = diverges[stream];
    if (stream == 0) agree = diverges[one->stream];
    switch (rng_below(r, 4)) {
    case 0:
        CHECK(same_cache(c, one->id, ref, one->stream, one->length), "%s, %s: KV before a drop", c->slice.kernels->name, ref->which->name);
        CHECK(pe_sequence_drop(c, one->id, err) == PE_OK, "%s", err);
        one->used = false;
        break;
    case 1:
        one->length -= rng_below(r, one->length / 4 + 1);
        CHECK(pe_sequence_truncate(c, one->id, one->length, err) == PE_OK, "%s", err);
        one->length = length_left(c, one->id, one->length);
        break;
    default:
        if (stream != one->stream && one->length <= agree) one->stream = stream;
    }
}

static void test_schedule(const reference *ref, const struct pe_kernels *table, int n_threads, uint64_t seed, size_t n_steps) {
    pe_context *c = context_new(ref, table, n_threads);
    live sequences[MAX_SEQUENCES] = {{0}};
    rng r = {seed};
    /* One sequence starts deep, so that schedules cross chunks of attention. */
    sequences[0] = (live){true, sequence_new(c), 0, 240};
    append_and_compare(c, sequences[0].id, ref, 0, 0, 240);
    for (size_t step = 0; step < n_steps; step++) {
        if (rng_below(&r, 3) == 0) random_change(c, ref, sequences, &r);
        else random_batch(c, ref, sequences, &r);
    }
    for (size_t i = 0; i < MAX_SEQUENCES; i++)
        if (sequences[i].used)
            CHECK(same_cache(c, sequences[i].id, ref, sequences[i].stream, sequences[i].length), "%s, %s, %d threads: KV after a schedule",
                  table->name, ref->which->name, n_threads);
    pe_context_destroy(c);
}

/* ------------------------------------------------------------------ the caller's floating-point environment */

static uint64_t float_env_get(void) {
    uint64_t now = pe_float_env_enter();
    pe_float_env_leave(now);
    return now;
}

/* With flush-to-zero and rounding upwards set by somebody else: the same bits, and his settings back afterwards. */
static void test_float_env(const reference *ref, const struct pe_kernels *table, int n_threads) {
#if defined(__x86_64__)
    const uint64_t strange = 0x1f80 | 0x8000 | 0x0040 | 0x4000; /* FTZ, DAZ, round up */
#else
    const uint64_t strange = 1u << 24 | 1u << 22; /* FZ, round up */
#endif
    pe_context *c = context_new(ref, table, n_threads);
    int32_t id = sequence_new(c);
    uint64_t before = float_env_get();
    pe_float_env_leave(strange);
    int32_t sequences[40];
    uint8_t want[40];
    for (int i = 0; i < 40; i++) sequences[i] = id, want[i] = 1;
    pe_status status = append(c, 40, ref->tokens[0], sequences, want);
    uint64_t after = float_env_get();
    pe_float_env_leave(before);
    CHECK(status == PE_OK && after == strange, "the caller's environment %llx became %llx", (unsigned long long)strange,
          (unsigned long long)after);
    for (size_t i = 0; i < 40; i++) CHECK(same_logits(c, i, ref, 0, i), "%s: position %zu with FTZ and rounding up", table->name, i);
    pe_context_destroy(c);
}

/* ------------------------------------------------------------------ one layer alone */

static void test_debug_block(const reference *ref, const struct pe_kernels *table) {
    size_t dim = ref->which->config.dim, n = 21 * dim;
    float *x[2] = {malloc(n * sizeof(float)), malloc(n * sizeof(float))};
    rng r = {5};
    for (size_t i = 0; i < n; i++) x[0][i] = x[1][i] = rng_float(&r);
    for (int which = 0; which < 2; which++) {
        char err[PE_ERR_LEN] = "";
        pe_context *c = context_new(ref, which ? table : &pe_kernels_scalar, 1 + which * 2);
        CHECK(pe_debug_block(c, ref->which->config.n_layers - 1, x[which], 21, err) == PE_OK, "%s", err);
        pe_context_destroy(c);
    }
    CHECK(same_floats(x[0], x[1], n), "%s, %s: one block", table->name, ref->which->name);
    free(x[0]), free(x[1]);
}

/* A quick run takes turns, from case to case, between small and large chunks and between one thread and three: every table meets all of them. */
static void test_case(const reference *ref, const struct pe_kernels *table, uint64_t seed) {
    static const size_t sizes[] = {7, 600, 64, 1, 256, 257, 255, 513};
    bool few = table == &pe_kernels_scalar; /* it is slow, and much of this compares it with itself */
    if (quick) {
        if (!few) test_chunking(ref, table, 1 + (int)(seed / 2) % 4, sizes[seed % 2]);
        test_schedule(ref, table, seed % 4 < 2 ? 3 : 1, seed, 40);
    } else {
        for (size_t i = 0; i < (few ? 2 : sizeof sizes / sizeof sizes[0]); i++) test_chunking(ref, table, 1 + (int)(i + seed) % 4, sizes[i]);
        for (int n_threads = 1; n_threads <= 4; n_threads += few ? 2 : 1)
            test_schedule(ref, table, n_threads, 100 * seed + (uint64_t)n_threads, 80);
    }
    test_float_env(ref, table, 1);
    test_float_env(ref, table, 3);
    test_debug_block(ref, table);
}

void test_forward(const struct pe_kernels *const *tables, size_t n_tables) {
    for (size_t i = 0; i < N_CASES; i++) {
        reference *ref = reference_new(&cases[i]);
        for (size_t t = 0; t < n_tables; t++) test_case(ref, tables[t], i);
        reference_free(ref);
    }
}

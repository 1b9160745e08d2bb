/* tiny_model.c: see tiny_model.h. */
#include "tiny_model.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

static void *add_tensor(tiny_model *t, const char *kind, size_t n_bytes, const char *format, ...) {
    if (t->n_tensors == TINY_MAX_TENSORS) exit(2);
    size_t i = t->n_tensors++;
    va_list args;
    va_start(args, format);
    vsnprintf(t->names[i], sizeof t->names[i], format, args);
    va_end(args);
    n_bytes = pe_pad(n_bytes, 64);
    t->memory[i] = memory_new(n_bytes);
    memset(t->memory[i], 0, n_bytes);
    t->tensors[i] = (pe_tensor){t->names[i], kind, t->memory[i], n_bytes};
    return t->memory[i];
}

/* `parts` matrices of (rows, columns), alternating by panel: 1 is plain, 2 is gate and up. Scales around 2^-10, some zero or subnormal. */
static void add_matrix(tiny_model *t, rng *r, size_t parts, size_t rows, size_t columns, int exponent, const char *name) {
    size_t n_panels = parts * (pe_pad(rows, 16) / 16), n_groups = pe_pad(columns, 64) / 64, n_scales = n_panels * n_groups * 16;
    int8_t *codes = add_tensor(t, "int8_g64", n_scales * 64, "%s.codes", name);
    uint16_t *scales = add_tensor(t, "int8_g64", n_scales * 2, "%s.scales", name);
    for (size_t panel = 0; panel < n_panels; panel++)
        for (size_t group = 0; group < n_groups; group++)
            for (size_t row = 0; row < 16; row++) {
                if (panel / parts * 16 + row >= rows) continue;
                uint16_t half = (uint16_t)((size_t)exponent << 10 | rng_below(r, 1024));
                if (rng_below(r, 16) == 0) half = (uint16_t)rng_below(r, 1024);
                scales[(panel * n_groups + group) * 16 + row] = half;
                for (size_t i = 0; i < 64 && group * 64 + i < columns; i++)
                    codes[(panel * n_groups + group) * 1024 + i / 4 * 64 + row * 4 + i % 4] = rng_code(r);
            }
}

static void add_vector(tiny_model *t, rng *r, size_t n, float scale, float offset, const char *name) {
    float *x = add_tensor(t, "f32", n * sizeof(float), "%s", name);
    for (size_t i = 0; i < n; i++) x[i] = ((float)rng_below(r, 256) * 0x1p-9f + offset) * scale;
}

/* Most pairs of RoPE without a bias; of the others one element of two, now and then, is 0. Every head has pairs of its own, the
 * last none. */
static void add_key_bias(tiny_model *t, rng *r, const char *name) {
    size_t n_heads = t->config.n_kv_heads, head_dim = t->config.head_dim, half = head_dim / 2;
    float *x = add_tensor(t, "f32", n_heads * head_dim * sizeof(float), "%s", name);
    for (size_t head = 0; head + 1 < n_heads || (n_heads == 1 && head == 0); head++)
        for (size_t i = 0; i < half; i++) {
            if (rng_below(r, 3) != 0) continue;
            x[head * head_dim + i] = (float)rng_below(r, 256) - 128.0f;
            if (rng_below(r, 3) != 0) x[head * head_dim + half + i] = (float)rng_below(r, 256) * 0.25f - 32.0f;
        }
}

static void add_mlp(tiny_model *t, rng *r, uint32_t layer, size_t hidden_dim, const char *prefix) {
    const pe_config *c = &t->config;
    bool gated = strstr(t->layers[layer].activation, "glu") != NULL;
    size_t parts = gated ? 2 : 1;
    char name[64];
    snprintf(name, sizeof name, "layers.%u.%s%s", layer, prefix, gated ? "w_gate_up" : "w_up");
    add_matrix(t, r, parts, hidden_dim, c->dim, 6, name);
    if (c->gate_up_bias) {
        snprintf(name, sizeof name, "layers.%u.%s%s.bias", layer, prefix, gated ? "w_gate_up" : "w_up");
        add_vector(t, r, parts * pe_pad(hidden_dim, 16), 0.5f, -0.25f, name);
    }
    snprintf(name, sizeof name, "layers.%u.%sw_down", layer, prefix);
    add_matrix(t, r, 1, c->dim, hidden_dim, 5, name);
    snprintf(name, sizeof name, "layers.%u.%sw_down.bias", layer, prefix);
    if (c->down_bias) add_vector(t, r, c->dim, 0.5f, -0.25f, name);
}

#define NAME(suffix) (snprintf(name, sizeof name, "layers.%u." suffix, index), name)

static void add_attention(tiny_model *t, rng *r, uint32_t index) {
    const pe_config *c = &t->config;
    size_t q_dim = (size_t)c->n_heads * c->head_dim, qkv = q_dim + 2 * (size_t)c->n_kv_heads * c->head_dim;
    size_t q_norm = c->qk_norm_all_heads ? q_dim : c->head_dim, k_norm = c->qk_norm_all_heads ? (qkv - q_dim) / 2 : c->head_dim;
    char name[64];
    add_matrix(t, r, 1, qkv, c->dim, 6, NAME("wqkv"));
    if (c->qkv_bias) add_vector(t, r, qkv, 0.5f, -0.25f, NAME("wqkv.bias"));
    if (c->key_bias) add_key_bias(t, r, NAME("key_bias"));
    if (c->qk_norm) add_vector(t, r, q_norm, 1.0f, 0.75f, NAME("q_norm"));
    if (c->qk_norm) add_vector(t, r, k_norm, 1.0f, 0.75f, NAME("k_norm"));
    if (c->attention_sinks) add_vector(t, r, c->n_heads, 16.0f, -0.25f, NAME("sinks"));
    add_matrix(t, r, 1, c->dim, q_dim, 5, NAME("wo"));
    if (c->o_bias) add_vector(t, r, c->dim, 0.5f, -0.25f, NAME("wo.bias"));
}

static void add_layer(tiny_model *t, rng *r, uint32_t index, float loudness) {
    const pe_config *c = &t->config;
    char name[64];
    const char *norm = t->layers[index].norm;
    bool before = strcmp(norm, "rmsnorm_after") != 0, parallel = strcmp(norm, "rmsnorm_parallel") == 0;
    bool after = !before || strcmp(norm, "rmsnorm_around") == 0;
    if (before) add_vector(t, r, c->dim, loudness, 0.75f, NAME("attention_norm"));
    bool conv = t->layers[index].mixer != NULL && strcmp(t->layers[index].mixer, "short_conv") == 0;
    if (conv) {
        add_matrix(t, r, 1, 3 * (size_t)c->dim, c->dim, 6, NAME("conv_in"));
        add_vector(t, r, t->layers[index].window * (size_t)c->dim, 4.0f, -0.25f, NAME("taps"));
        add_matrix(t, r, 1, c->dim, c->dim, 5, NAME("conv_out"));
    } else {
        add_attention(t, r, index);
    }
    if (after) add_vector(t, r, c->dim, loudness, 0.75f, NAME("post_attention_norm"));
    if (before && !parallel) add_vector(t, r, c->dim, loudness, 0.75f, NAME("ffn_norm"));
    if (strcmp(t->layers[index].activation, "xielu") == 0) add_vector(t, r, 3, 1.0f, 0.25f, NAME("xielu"));
    if (c->n_experts > 0) add_vector(t, r, (size_t)c->n_experts * c->dim, 1.0f, -0.25f, NAME("router"));
    if (c->router_bias) add_vector(t, r, c->n_experts, 8.0f, -0.25f, NAME("router.bias"));
    if (c->shared_gated) add_vector(t, r, c->dim, 1.0f, -0.25f, NAME("shared_router"));
    for (uint32_t e = 0; e < (c->n_experts > 0 ? c->n_experts : 1); e++) {
        char expert[24] = "";
        if (c->n_experts > 0) snprintf(expert, sizeof expert, "experts.%u.", e);
        add_mlp(t, r, index, c->hidden_dim, expert);
    }
    if (c->shared_hidden_dim > 0) add_mlp(t, r, index, c->shared_hidden_dim, "shared.");
    if (after) add_vector(t, r, c->dim, loudness, 0.75f, NAME("post_ffn_norm"));
}
#undef NAME

void tiny_model_make(tiny_model *t, const pe_config *config, uint64_t seed, float loudness) {
    rng r = {seed};
    *t = (tiny_model){.config = *config};
    uint32_t n_tables = 1;
    for (uint32_t i = 0; i < config->n_layers && i < TINY_MAX_LAYERS; i++) {
        t->layers[i] = config->layers == NULL ? (pe_layer_spec){0, 0, "rmsnorm", "swiglu", NULL} : config->layers[i];
        if (t->layers[i].rope >= n_tables) n_tables = t->layers[i].rope + 1;
    }
    t->config.layers = t->layers;
    add_matrix(t, &r, 1, config->vocab_size, config->dim, 8, "tok_embeddings");
    for (uint32_t i = 0; i < config->n_layers; i++) add_layer(t, &r, i, loudness);
    add_vector(t, &r, config->dim, loudness, 0.75f, "norm");
    if (!config->tie_embeddings) add_matrix(t, &r, 1, config->vocab_size, config->dim, 6, "output");
    if (config->output_bias) add_vector(t, &r, config->vocab_size, 0.5f, -0.25f, "output.bias");
    for (uint32_t table = 0; table < n_tables; table++) {
        float *inv_freq = add_tensor(t, "f32", config->head_dim / 2 * sizeof(float), "rope.%u.inv_freq", table);
        for (size_t i = 0; i < config->head_dim / 2; i++) inv_freq[i] = 1.0f / (float)((1 + 3 * i * i) << (4 * table));
    }
}

pe_status tiny_model_load(tiny_model *t, int n_threads, char *err) {
    pe_status status = pe_model_create(&t->model, &t->config, err);
    return status != PE_OK ? status : pe_model_set_tensors(t->model, t->tensors, t->n_tensors, n_threads, err);
}

void *tiny_model_tensor(const tiny_model *t, const char *name) {
    for (size_t i = 0; i < t->n_tensors; i++)
        if (strcmp(t->names[i], name) == 0) return t->memory[i];
    CHECK(false, "no tensor %s", name);
    exit(2);
}

void tiny_model_free(tiny_model *t) {
    pe_model_destroy(t->model);
    for (size_t i = 0; i < t->n_tensors; i++) memory_free(t->memory[i]);
    t->n_tensors = 0;
}

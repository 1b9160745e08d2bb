/* model.c: from named views to a pe_model. The names and sizes of FORMAT.md section 2 are written once, in
 * visit_tensors. */
#include "model.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "float_env.h"
#include "kernels/pe_math.h"
#include "platform.h"
#include "status.h"
#include "tensors.h"
#include "threadpool.h"

/* ------------------------------------------------------------------ config */

static pe_status check_softcap(const char *name, float value, char *err) {
    if (value == 0.0f || (value >= 0x1p-10f && value <= 0x1p20f)) return PE_OK;
    return pe_fail(PE_ERR_FORMAT, err, "config: %s is %g, expected 0 or a number in [2^-10, 2^20]", name, (double)value);
}

static pe_status check_config(const pe_config *c, char *err) {
    const struct {
        const char *name;
        uint32_t value, least, most;
    } ranges[] = {
        {"dim", c->dim, 1, 1 << 20},
        {"hidden_dim", c->hidden_dim, 1, 1 << 22},
        {"n_layers", c->n_layers, 1, 4096},
        {"n_heads", c->n_heads, 1, 4096},
        {"n_kv_heads", c->n_kv_heads, 1, 4096},
        {"head_dim", c->head_dim, 2, PE_MAX_HEAD_DIM},
        {"vocab_size", c->vocab_size, 1, 1 << 24},
        {"max_seq_len", c->max_seq_len, 1, 1 << 24},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++)
        if (ranges[i].value < ranges[i].least || ranges[i].value > ranges[i].most)
            return pe_fail(PE_ERR_FORMAT, err, "config: %s is %u, expected %u to %u", ranges[i].name, ranges[i].value,
                           ranges[i].least, ranges[i].most);
    if (c->head_dim % 2 != 0)
        return pe_fail(PE_ERR_FORMAT, err, "config: head_dim %u is odd, RoPE needs pairs", c->head_dim);
    if (c->n_heads % c->n_kv_heads != 0)
        return pe_fail(PE_ERR_FORMAT, err, "config: n_heads %u is not a multiple of n_kv_heads %u", c->n_heads,
                           c->n_kv_heads);
    if (!(c->norm_eps >= 0.0f && c->norm_eps < 1.0f))
        return pe_fail(PE_ERR_FORMAT, err, "config: norm_eps is outside [0, 1)");
    if (c->key_bias && (!c->qkv_bias || c->qk_norm))
        return pe_fail(PE_ERR_FORMAT, err, "config: key_bias needs qkv_bias, and a bias that no norm follows");
    if (c->qk_norm_all_heads && !c->qk_norm)
        return pe_fail(PE_ERR_FORMAT, err, "config: qk_norm_all_heads needs qk_norm");
    if (c->qk_norm_after_rope && (!c->qk_norm || c->qk_norm_all_heads))
        return pe_fail(PE_ERR_FORMAT, err, "config: qk_norm_after_rope needs qk_norm, of each head");
    if (c->n_experts > PE_MAX_EXPERTS || c->n_experts_used > c->n_experts || (c->n_experts > 0 && c->n_experts_used == 0))
        return pe_fail(PE_ERR_FORMAT, err, "config: %u of %u experts, expected 1 of 1 to %u of %u, or none", c->n_experts_used,
                       c->n_experts, PE_MAX_EXPERTS, PE_MAX_EXPERTS);
    if ((uint64_t)c->n_layers * c->n_experts > PE_MAX_MODEL_EXPERTS)
        return pe_fail(PE_ERR_FORMAT, err, "config: %u layers of %u experts, expected at most %d experts in all", c->n_layers,
                       c->n_experts, PE_MAX_MODEL_EXPERTS);
    if (c->experts_normalized && c->n_experts == 0)
        return pe_fail(PE_ERR_FORMAT, err, "config: experts_normalized needs experts");
    if (c->shared_hidden_dim > 1 << 22 || (c->shared_hidden_dim > 0 && c->n_experts == 0))
        return pe_fail(PE_ERR_FORMAT, err, "config: shared_hidden_dim is %u, expected 0, or with experts 1 to %u",
                       c->shared_hidden_dim, 1u << 22);
    if (c->shared_gated && c->shared_hidden_dim == 0)
        return pe_fail(PE_ERR_FORMAT, err, "config: shared_gated needs shared_hidden_dim");
    if ((c->gate_up_bias || c->down_bias) && c->shared_hidden_dim > 0)
        return pe_fail(PE_ERR_FORMAT, err, "config: gate_up_bias and down_bias beside a shared expert");
    if (c->router_bias && c->n_experts == 0) return pe_fail(PE_ERR_FORMAT, err, "config: router_bias needs experts");
    pe_status status = check_softcap("attention_softcap", c->attention_softcap, err);
    return status != PE_OK ? status : check_softcap("logits_softcap", c->logits_softcap, err);
}

/* The known names, what they mean to a layer. */
static const struct {
    const char *name;
    bool before, after, parallel;
} norms[] = {{"rmsnorm", true, false, false},
             {"rmsnorm_after", false, true, false},
             {"rmsnorm_around", true, true, false},
             {"rmsnorm_parallel", true, false, true}};
static const struct {
    const char *name;
    pe_activation activation;
} activations[] = {{"swiglu", PE_ACTIVATION_SWIGLU},
                   {"swiglu_clamped", PE_ACTIVATION_SWIGLU_CLAMPED},
                   {"geglu_tanh", PE_ACTIVATION_GEGLU_TANH},
                   {"gelu_tanh", PE_ACTIVATION_GELU_TANH},
                   {"gelu", PE_ACTIVATION_GELU},
                   {"relu2", PE_ACTIVATION_RELU2},
                   {"xielu", PE_ACTIVATION_XIELU}};
enum { N_NORMS = sizeof norms / sizeof norms[0], N_ACTIVATIONS = sizeof activations / sizeof activations[0] };

/* N_NORMS or N_ACTIVATIONS if the name is not known. */
static size_t find_norm(const char *name) {
    size_t i = 0;
    while (i < N_NORMS && (name == NULL || strcmp(norms[i].name, name) != 0)) i++;
    return i;
}
static size_t find_activation(const char *name) {
    size_t i = 0;
    while (i < N_ACTIVATIONS && (name == NULL || strcmp(activations[i].name, name) != 0)) i++;
    return i;
}

/* Whether the layer is a convolution: its mixer is known. */
static bool is_convolution(const pe_layer_spec *layer) { return layer->mixer != NULL && strcmp(layer->mixer, "short_conv") == 0; }

static pe_status check_mixer(const pe_layer_spec *layer, uint32_t i, char *err) {
    if (!is_convolution(layer) && layer->mixer != NULL && strcmp(layer->mixer, "attention") != 0)
        return pe_fail(PE_ERR_FORMAT, err, "config: layer %u has the mixer %.64s, which is not known", i, layer->mixer);
    if (!is_convolution(layer)) return PE_OK;
    if (layer->window < 1 || layer->window > PE_MAX_TAPS)
        return pe_fail(PE_ERR_FORMAT, err, "config: window of layer %u, a short_conv, is %u, expected 1 to %u", i, layer->window,
                       PE_MAX_TAPS);
    if (norms[find_norm(layer->norm)].parallel)
        return pe_fail(PE_ERR_FORMAT, err, "config: layer %u has the norm rmsnorm_parallel and is a short_conv", i);
    return PE_OK;
}

static pe_status check_layer(const pe_layer_spec *layer, uint32_t i, uint32_t n_experts, char *err) {
    if (layer->window > 1 << 24)
        return pe_fail(PE_ERR_FORMAT, err, "config: window of layer %u is %u, expected 0 to %u", i, layer->window,
                       1u << 24);
    if (layer->rope >= PE_MAX_ROPE_TABLES)
        return pe_fail(PE_ERR_FORMAT, err, "config: layer %u uses RoPE table %u, expected 0 to %u", i, layer->rope,
                       PE_MAX_ROPE_TABLES - 1);
    if (find_norm(layer->norm) == N_NORMS)
        return pe_fail(PE_ERR_FORMAT, err, "config: layer %u has the norm %.64s, which is not known", i,
                       layer->norm == NULL ? "(none)" : layer->norm);
    if (find_activation(layer->activation) == N_ACTIVATIONS)
        return pe_fail(PE_ERR_FORMAT, err, "config: layer %u has the activation %.64s, which is not known", i,
                       layer->activation == NULL ? "(none)" : layer->activation);
    if (norms[find_norm(layer->norm)].parallel && n_experts > 0)
        return pe_fail(PE_ERR_FORMAT, err, "config: layer %u has the norm rmsnorm_parallel and experts", i);
    return check_mixer(layer, i, err);
}

static pe_status set_layers(pe_model *model, const pe_layer_spec *specs, char *err) {
    if (specs == NULL) return pe_fail(PE_ERR_FORMAT, err, "config: no layers are described");
    for (uint32_t i = 0; i < model->config.n_layers; i++) {
        pe_status status = check_layer(&specs[i], i, model->config.n_experts, err);
        if (status != PE_OK) return status;
        model->layers[i].short_conv = is_convolution(&specs[i]);
        model->has_convolutions |= model->layers[i].short_conv;
        model->layers[i].window = specs[i].window;
        model->layers[i].rope = specs[i].rope;
        model->layers[i].norm_before = norms[find_norm(specs[i].norm)].before;
        model->layers[i].norm_after = norms[find_norm(specs[i].norm)].after;
        model->layers[i].parallel = norms[find_norm(specs[i].norm)].parallel;
        model->layers[i].activation = activations[find_activation(specs[i].activation)].activation;
        model->has_branches |= model->layers[i].norm_after || model->layers[i].parallel;
        if (specs[i].rope >= model->n_rope_tables) model->n_rope_tables = specs[i].rope + 1;
    }
    return PE_OK;
}

pe_status pe_model_create(pe_model **out, const pe_config *config, char *err) {
    *out = NULL;
    pe_status status = check_config(config, err);
    if (status != PE_OK) return status;
    pe_model *model = calloc(1, sizeof *model);
    if (model != NULL) model->layers = calloc(config->n_layers, sizeof *model->layers);
    size_t n_mlps = pe_n_mlps(config);
    if (model != NULL) model->experts = calloc(config->n_layers * n_mlps, sizeof *model->experts);
    if (model == NULL || model->layers == NULL || model->experts == NULL) {
        if (model != NULL) free(model->layers), free(model->experts);
        free(model);
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the model's tables");
    }
    for (uint32_t i = 0; i < config->n_layers; i++) model->layers[i].experts = model->experts + i * n_mlps;
    model->config = *config;
    model->config.layers = NULL;
    model->q_dim = (size_t)config->n_heads * config->head_dim;
    model->kv_dim = (size_t)config->n_kv_heads * config->head_dim;
    model->head_dim_p = pe_pad(config->head_dim, PE_PANEL);
    status = set_layers(model, config->layers, err);
    if (status != PE_OK) {
        pe_model_destroy(model);
        return status;
    }
    size_t convolved = model->has_convolutions ? config->dim : 0, qkv = model->q_dim + 2 * model->kv_dim;
    model->qkv_width = 3 * convolved > qkv ? 3 * convolved : qkv;
    model->mixed_width = convolved > model->q_dim ? convolved : model->q_dim;
    *out = model;
    return PE_OK;
}

static void free_tables(pe_model *model) {
    for (uint32_t i = 0; i < model->config.n_layers; i++) {
        free(model->layers[i].key_bias);
        model->layers[i].key_bias = NULL;
    }
    for (uint32_t i = 0; i < PE_MAX_ROPE_TABLES; i++) {
        pe_aligned_free(model->chunk_angles[i]);
        model->chunk_angles[i] = NULL;
    }
}

void pe_model_destroy(pe_model *model) {
    if (model == NULL) return;
    free_tables(model);
    free(model->experts);
    free(model->layers);
    free(model);
}

/* ------------------------------------------------------------------ tensors */

/* Called for every tensor that this model must have, in file order; a non-zero return ends the visit and is passed on. */
typedef int (*visit_fn)(const pe_tensor_slot *s, void *arg);

typedef struct visitor {
    visit_fn fn;
    void *arg;
    int result;
} visitor;

static void visit(visitor *v, const void **data, size_t n_bytes, pe_contents contents, const char *format, ...) {
    if (v->result != 0) return;
    pe_tensor_slot s = {.data = data, .n_bytes = n_bytes, .contents = contents};
    s.kind = contents == PE_FLOATS ? "f32" : "int8_g64";
    va_list args;
    va_start(args, format);
    vsnprintf(s.name, sizeof s.name, format, args);
    va_end(args);
    v->result = v->fn(&s, v->arg);
}

/* rows counts padded rows here: gate and up are padded apart. */
static void visit_matrix(visitor *v, pe_matrix *m, size_t rows_padded, size_t columns, const char *name, int layer) {
    m->n_panels = rows_padded / PE_PANEL;
    m->n_groups = pe_pad(columns, PE_GROUP) / PE_GROUP;
    char prefix[48] = "";
    if (layer >= 0) snprintf(prefix, sizeof prefix, "layers.%d.", layer);
    size_t n_scales = m->n_panels * m->n_groups * PE_PANEL;
    visit(v, (const void **)&m->codes, n_scales * PE_GROUP, PE_CODES, "%s%s.codes", prefix, name);
    visit(v, (const void **)&m->scales, pe_pad(n_scales * 2, 64), PE_HALVES, "%s%s.scales", prefix, name);
}

static void visit_vector(visitor *v, const float **data, size_t n, const char *name, int layer) {
    char prefix[48] = "";
    if (layer >= 0) snprintf(prefix, sizeof prefix, "layers.%d.", layer);
    visit(v, (const void **)data, pe_pad(n * sizeof(float), 64), PE_FLOATS, "%s%s", prefix, name);
}

/* One of a layer's MLPs; `prefix` is "", "shared." or "experts.E.". */
static void visit_mlp(visitor *v, const pe_config *c, pe_layer *layer, size_t mlp, size_t hidden_dim, const char *prefix, int index) {
    bool gated = pe_has_gate(layer->activation);
    size_t rows = (gated ? 2 : 1) * pe_pad(hidden_dim, PE_PANEL);
    pe_expert *expert = &layer->experts[mlp];
    char name[48];
    snprintf(name, sizeof name, "%s%s", prefix, gated ? "w_gate_up" : "w_up");
    visit_matrix(v, &expert->w_gate_up, rows, c->dim, name, index);
    snprintf(name, sizeof name, "%s%s.bias", prefix, gated ? "w_gate_up" : "w_up");
    if (c->gate_up_bias) visit_vector(v, &expert->gate_up_bias, rows, name, index);
    snprintf(name, sizeof name, "%sw_down", prefix);
    visit_matrix(v, &expert->w_down, pe_pad(c->dim, PE_PANEL), hidden_dim, name, index);
    snprintf(name, sizeof name, "%sw_down.bias", prefix);
    if (c->down_bias) visit_vector(v, &expert->down_bias, c->dim, name, index);
}

/* A dense MLP, or a router and its experts. */
static void visit_mlps(visitor *v, const pe_config *c, pe_layer *layer, int index) {
    if (c->n_experts == 0) visit_mlp(v, c, layer, 0, c->hidden_dim, "", index);
    if (c->n_experts == 0) return;
    visit_vector(v, &layer->router, (size_t)c->n_experts * c->dim, "router", index);
    if (c->router_bias) visit_vector(v, &layer->router_bias, c->n_experts, "router.bias", index);
    if (c->shared_gated) visit_vector(v, &layer->shared_router, c->dim, "shared_router", index);
    for (uint32_t e = 0; e < c->n_experts; e++) {
        char prefix[24];
        snprintf(prefix, sizeof prefix, "experts.%u.", e);
        visit_mlp(v, c, layer, e, c->hidden_dim, prefix, index);
    }
    if (c->shared_hidden_dim > 0) visit_mlp(v, c, layer, c->n_experts, c->shared_hidden_dim, "shared.", index);
}

static void visit_convolution(visitor *v, const pe_config *c, pe_layer *layer, int index) {
    visit_matrix(v, &layer->wqkv, pe_pad(3 * (size_t)c->dim, PE_PANEL), c->dim, "conv_in", index);
    visit_vector(v, &layer->taps, (size_t)layer->window * c->dim, "taps", index);
    visit_matrix(v, &layer->wo, pe_pad(c->dim, PE_PANEL), c->dim, "conv_out", index);
}

static void visit_attention(visitor *v, const pe_model *model, pe_layer *layer, int index) {
    const pe_config *c = &model->config;
    size_t qkv = model->q_dim + 2 * model->kv_dim;
    size_t q_norm = c->qk_norm_all_heads ? model->q_dim : c->head_dim, k_norm = c->qk_norm_all_heads ? model->kv_dim : c->head_dim;
    visit_matrix(v, &layer->wqkv, pe_pad(qkv, PE_PANEL), c->dim, "wqkv", index);
    if (c->qkv_bias) visit_vector(v, &layer->wqkv_bias, qkv, "wqkv.bias", index);
    if (c->key_bias) visit_vector(v, &layer->key_bias_vector, model->kv_dim, "key_bias", index);
    if (c->qk_norm) visit_vector(v, &layer->q_norm, q_norm, "q_norm", index);
    if (c->qk_norm) visit_vector(v, &layer->k_norm, k_norm, "k_norm", index);
    if (c->attention_sinks) visit_vector(v, &layer->sinks, c->n_heads, "sinks", index);
    visit_matrix(v, &layer->wo, pe_pad(c->dim, PE_PANEL), model->q_dim, "wo", index);
    if (c->o_bias) visit_vector(v, &layer->wo_bias, c->dim, "wo.bias", index);
}

static int visit_tensors(pe_model *model, visit_fn fn, void *arg) {
    const pe_config *c = &model->config;
    visitor v = {.fn = fn, .arg = arg};
    size_t vocab_padded = pe_pad(c->vocab_size, PE_PANEL);
    visit_matrix(&v, &model->tok_embeddings, vocab_padded, c->dim, "tok_embeddings", -1);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        pe_layer *layer = &model->layers[i];
        if (layer->norm_before) visit_vector(&v, &layer->attention_norm, c->dim, "attention_norm", (int)i);
        if (layer->short_conv)
            visit_convolution(&v, c, layer, (int)i);
        else
            visit_attention(&v, model, layer, (int)i);
        if (layer->norm_after) visit_vector(&v, &layer->post_attention_norm, c->dim, "post_attention_norm", (int)i);
        if (layer->norm_before && !layer->parallel) visit_vector(&v, &layer->ffn_norm, c->dim, "ffn_norm", (int)i);
        if (layer->activation == PE_ACTIVATION_XIELU) visit_vector(&v, &layer->xielu, 3, "xielu", (int)i);
        visit_mlps(&v, c, layer, (int)i);
        if (layer->norm_after) visit_vector(&v, &layer->post_ffn_norm, c->dim, "post_ffn_norm", (int)i);
    }
    visit_vector(&v, &model->norm, c->dim, "norm", -1);
    if (!c->tie_embeddings) visit_matrix(&v, &model->output, vocab_padded, c->dim, "output", -1);
    if (c->output_bias) visit_vector(&v, &model->output_bias, c->vocab_size, "output.bias", -1);
    for (uint32_t i = 0; i < model->n_rope_tables; i++)
        visit(&v, (const void **)&model->inv_freq[i], pe_pad(c->head_dim / 2 * sizeof(float), 64), PE_FLOATS,
              "rope.%u.inv_freq", i);
    return v.result;
}

typedef struct assignment {
    const pe_tensor *tensors;
    size_t n_tensors, next;
    pe_status status;
    char *err;
} assignment;

static int assign_next(const pe_tensor_slot *s, void *arg) {
    assignment *a = arg;
    a->status = a->next == a->n_tensors ? pe_fail(PE_ERR_FORMAT, a->err, "tensor %s is missing", s->name)
                                        : pe_tensor_assign(s, &a->tensors[a->next++], a->err);
    return a->status == PE_OK ? 0 : -1;
}

/* ------------------------------------------------------------------ checking the values */

/* Every weight is read once: it costs what mapping the pages costs, and they will be needed at once. */
static int count_slot(const pe_tensor_slot *s, void *arg) {
    (void)s;
    ++*(size_t *)arg;
    return 0;
}

static int collect_slot(const pe_tensor_slot *s, void *arg) {
    pe_tensor_slot **next = arg;
    *(*next)++ = *s;
    return 0;
}

static pe_status check_values(pe_model *model, int n_threads, char *err) {
    size_t n_slots = 0;
    visit_tensors(model, count_slot, &n_slots);
    pe_tensor_slot *slots = calloc(n_slots, sizeof *slots), *next = slots;
    if (slots == NULL) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the model's tables");
    visit_tensors(model, collect_slot, &next);
    pe_status status = pe_tensors_check(slots, n_slots, n_threads, err);
    free(slots);
    return status;
}

/* Positions reach 2^24: with frequencies up to 16 every angle's quarter turns fit an int64. Real ones are at most 1. */
static pe_status check_inv_freq(const pe_model *model, char *err) {
    for (uint32_t table = 0; table < model->n_rope_tables; table++)
        for (uint32_t i = 0; i < model->config.head_dim / 2; i++)
            if (!(model->inv_freq[table][i] >= 0.0f && model->inv_freq[table][i] <= 16.0f))
                return pe_fail(PE_ERR_FORMAT, err, "tensor rope.%u.inv_freq holds a value outside [0, 16]", table);
    return PE_OK;
}

/* ------------------------------------------------------------------ tables */

/* What is computed from the weights once. */
static pe_status make_tables(pe_model *model, char *err) {
    const pe_config *c = &model->config;
    bool complete = true;
    free_tables(model);
    if (!c->key_bias) return PE_OK;
    uint64_t float_env = pe_float_env_enter();
    for (uint32_t i = 0; i < c->n_layers && complete; i++) {
        pe_layer *layer = &model->layers[i];
        if (layer->short_conv) continue;
        layer->key_bias = pe_key_bias_create(layer->key_bias_vector, c->n_kv_heads, c->head_dim);
        complete = layer->key_bias != NULL;
    }
    for (uint32_t i = 0; i < model->n_rope_tables && complete; i++) {
        model->chunk_angles[i] = pe_chunk_angles_create(model->inv_freq[i], c->head_dim);
        complete = model->chunk_angles[i] != NULL;
    }
    pe_float_env_leave(float_env);
    return complete ? PE_OK : pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the tables of key biases");
}

pe_status pe_model_set_tensors(pe_model *model, const pe_tensor *tensors, size_t n_tensors, int n_threads, char *err) {
    if (n_threads < 0 || n_threads > PE_MAX_THREADS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "n_threads is %d, expected 0 (automatic) to %d", n_threads,
                           PE_MAX_THREADS);
    assignment a = {.tensors = tensors, .n_tensors = n_tensors, .err = err};
    model->ready = false;
    if (visit_tensors(model, assign_next, &a) != 0) return a.status;
    if (a.next < n_tensors)
        return pe_fail(PE_ERR_FORMAT, err, "tensor %.80s does not belong to this model", tensors[a.next].name);
    if (model->config.tie_embeddings) model->output = model->tok_embeddings;
    if (n_threads == 0) {
        pe_thread_info info;
        pe_thread_info_get(&info);
        n_threads = info.n_default;
    }
    pe_status status = check_values(model, n_threads, err);
    if (status == PE_OK) status = check_inv_freq(model, err);
    if (status == PE_OK) status = make_tables(model, err);
    model->ready = status == PE_OK;
    return status;
}

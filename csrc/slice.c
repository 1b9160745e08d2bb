/* slice.c: see slice.h. Memory, then what is the same for all layers. */
#include "slice.h"

#include <string.h>

#include "platform.h"
#include "status.h"

/* ------------------------------------------------------------------ memory */

/* A buffer of the slice, to be allocated together with the others. */
typedef struct buffer {
    void **pointer;
    size_t n_bytes;
} buffer;

enum { N_BUFFERS = 29 };

/* Every buffer and its size for n rows. Sizes cannot overflow: dims are capped at 2^22, n at PE_SLICE_MAX. */
static size_t list_buffers(pe_slice *s, size_t n, buffer buffers[N_BUFFERS]) {
    const pe_model *model = s->model;
    const pe_config *config = &model->config;
    size_t widest = pe_widest_mlp(config), n_mlps = pe_n_mlps(config);
    if (config->dim > widest) widest = config->dim;
    if (model->q_dim > widest) widest = model->q_dim;
    widest = pe_pad(widest, PE_GROUP);
    size_t q_rows = n * config->n_heads, q_elements = q_rows * model->head_dim_p;
    bool f32 = s->kv_dtype == PE_KV_F32, experts = config->n_experts > 0, adapters = s->n_ranks > 0;
    const buffer list[] = {
        {(void **)&s->failed, n},
        {(void **)&s->origins, n * sizeof *s->origins},
        {(void **)&s->selected, n * sizeof *s->selected},
        {(void **)&s->sequences, n * sizeof *s->sequences},
        {(void **)&s->positions, n * sizeof *s->positions},
        {(void **)&s->x, n * pe_x_stride(model) * sizeof(float)},
        {(void **)&s->branch, model->has_branches || experts ? n * pe_x_stride(model) * sizeof(float) : 0},
        {(void **)&s->normed, experts || adapters ? n * pe_x_stride(model) * sizeof(float) : 0},
        {(void **)&s->expert_out, experts ? n * pe_x_stride(model) * sizeof(float) : 0},
        {(void **)&s->expert_weights, experts ? n * n_mlps * sizeof(float) : 0},
        {(void **)&s->expert_taken, experts ? n * n_mlps : 0},
        {(void **)&s->qkv, n * pe_qkv_stride(model) * sizeof(float)},
        {(void **)&s->att, n * model->mixed_width * sizeof(float)},
        {(void **)&s->h, n * pe_h_stride(model) * sizeof(float)},
        {(void **)&s->act.codes, n * widest},
        {(void **)&s->act.scales, n * widest / PE_GROUP * sizeof(float)},
        {(void **)&s->act.corrections, n * widest / PE_GROUP * sizeof(int32_t)},
        {(void **)&s->q, f32 ? 0 : q_elements},
        {(void **)&s->q_scales, f32 ? 0 : q_rows * sizeof(float)},
        {(void **)&s->q_corrections, f32 ? 0 : q_rows * sizeof(int32_t)},
        {(void **)&s->q_f32, f32 ? q_elements * sizeof(float) : 0},
        {(void **)&s->cos, model->n_rope_tables * n * (config->head_dim / 2) * sizeof(float)},
        {(void **)&s->sin, model->n_rope_tables * n * (config->head_dim / 2) * sizeof(float)},
        {(void **)&s->q_key_bias, pe_slice_has_key_bias(s) ? n * model->q_dim * sizeof(float) : 0},
        {(void **)&s->blocks, n * sizeof *s->blocks},
        {(void **)&s->adapted, adapters ? n * sizeof *s->adapted : 0},
        {(void **)&s->groups, adapters ? n * sizeof *s->groups : 0},
        {(void **)&s->projected, n * s->n_ranks * sizeof(float)},
        {(void **)&s->gate_up, adapters && !experts ? 2 * n * pe_h_stride(model) * sizeof(float) : 0},
    };
    _Static_assert(sizeof list / sizeof list[0] == N_BUFFERS, "N_BUFFERS");
    memcpy(buffers, list, sizeof list);
    return N_BUFFERS;
}

static void free_buffers(pe_slice *s) {
    buffer buffers[N_BUFFERS];
    size_t n = list_buffers(s, s->capacity, buffers);
    for (size_t i = 0; i < n; i++) {
        pe_aligned_free(*buffers[i].pointer);
        *buffers[i].pointer = NULL;
    }
    s->capacity = 0;
    s->n_bytes = 0;
}

pe_status pe_slice_reserve(pe_slice *s, size_t n_tokens, char *err) {
    if (n_tokens <= s->capacity) return PE_OK;
    /* One token for a decode, else doubling: few sizes, so few reallocations, and whole blocks of tokens. */
    size_t capacity = s->capacity == 0 ? 1 : s->capacity;
    while (capacity < n_tokens) capacity *= 2;
    free_buffers(s);
    buffer buffers[N_BUFFERS];
    size_t n = list_buffers(s, capacity, buffers);
    for (size_t i = 0; i < n; i++) {
        if (buffers[i].n_bytes == 0) continue;
        *buffers[i].pointer = pe_aligned_alloc(buffers[i].n_bytes);
        if (*buffers[i].pointer == NULL) {
            free_buffers(s);
            return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the buffers of %zu tokens", capacity);
        }
        s->n_bytes += buffers[i].n_bytes;
    }
    s->capacity = capacity;
    return PE_OK;
}

void pe_slice_expect_adapters(pe_slice *s, size_t n_ranks) {
    if (n_ranks == 0 && s->n_ranks == 0) return;
    if (n_ranks > s->recent_ranks) s->recent_ranks = n_ranks;
    size_t wanted = n_ranks > s->n_ranks ? n_ranks : s->n_ranks;
    if (++s->n_recent == PE_SLICE_RECENT) {
        wanted = s->recent_ranks;
        s->n_recent = s->recent_ranks = 0;
    }
    if (wanted == s->n_ranks) return;
    free_buffers(s);
    s->n_ranks = wanted;
}

pe_status pe_slice_reserve_partials(pe_slice *s, size_t n_floats, char *err) {
    if (n_floats <= s->partials_capacity) return PE_OK;
    pe_aligned_free(s->partials);
    s->partials_capacity = 0;
    s->partials = pe_aligned_alloc(n_floats * sizeof(float));
    if (s->partials == NULL)
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for %zu bytes of attention states",
                       n_floats * sizeof(float));
    s->partials_capacity = n_floats;
    return PE_OK;
}

pe_status pe_slice_create(pe_slice *s, const pe_model *model, const struct pe_kernels *kernels, pe_kv_dtype kv_dtype,
                          int n_threads, size_t thread_scratch_floats, char *err) {
    *s = (pe_slice){.model = model, .kernels = kernels, .kv_dtype = kv_dtype, .n_threads = n_threads};
    s->thread_scratch_floats = pe_pad(thread_scratch_floats, 64);
    s->thread_scratch = pe_aligned_alloc(s->thread_scratch_floats * (size_t)n_threads * sizeof(float));
    if (s->thread_scratch != NULL) return PE_OK;
    return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the scratch of %d threads", n_threads);
}

void pe_slice_destroy(pe_slice *s) {
    if (s->model == NULL) return;
    free_buffers(s);
    pe_aligned_free(s->chunk_cos);
    pe_aligned_free(s->chunk_sin);
    pe_aligned_free(s->partials);
    pe_aligned_free(s->thread_scratch);
    *s = (pe_slice){0};
}

size_t pe_slice_bytes(const pe_slice *s) {
    size_t chunk_floats = s->n_chunks * s->model->n_rope_tables * s->model->config.head_dim;
    return s->n_bytes + (s->thread_scratch_floats * (size_t)s->n_threads + s->partials_capacity + chunk_floats) * sizeof(float);
}

/* ------------------------------------------------------------------ what all layers share */

/* Runs of a sequence's positions without gaps, cut so that a block's rows (tokens x heads of one kv head) fit the attention kernels'
 * scratch. */
static void find_query_blocks(pe_slice *s) {
    size_t n_rep = s->model->config.n_heads / s->model->config.n_kv_heads;
    size_t most = n_rep >= PE_ATTENTION_ROWS ? 1 : PE_ATTENTION_ROWS / n_rep;
    s->n_blocks = 0;
    for (size_t i = 0; i < s->n_tokens; i++) {
        pe_query_block *last = s->n_blocks > 0 ? &s->blocks[s->n_blocks - 1] : NULL;
        bool follows = last != NULL && last->sequence == s->sequences[i] && last->first_position + last->n_tokens == s->positions[i];
        if (follows && last->n_tokens < most) {
            last->n_tokens++;
        } else {
            s->blocks[s->n_blocks++] = (pe_query_block){i, 1, s->positions[i], s->sequences[i]};
        }
    }
}

/* cos, sin (head_dim / 2) of a position by one table of frequencies. */
static void rope_angles(const pe_slice *s, uint32_t table, size_t position, float *cos, float *sin) {
    for (size_t i = 0; i < s->model->config.head_dim / 2; i++)
        pe_cos_sin((float)position * s->model->inv_freq[table][i], &cos[i], &sin[i]);
}

/* Grow chunk_cos and chunk_sin to cover the slice's positions. */
static pe_status reserve_chunks(pe_slice *s, char *err) {
    size_t last = 0, half = s->model->config.head_dim / 2, n_tables = s->model->n_rope_tables;
    for (size_t t = 0; t < s->n_tokens; t++) last = s->positions[t] > last ? s->positions[t] : last;
    if (last / PE_CHUNK < s->n_chunks) return PE_OK;
    size_t n = s->n_chunks == 0 ? 16 : s->n_chunks;
    while (n <= last / PE_CHUNK) n *= 2;
    pe_aligned_free(s->chunk_cos);
    pe_aligned_free(s->chunk_sin);
    s->n_chunks = 0;
    s->chunk_cos = pe_aligned_alloc(n_tables * n * half * sizeof(float));
    s->chunk_sin = pe_aligned_alloc(n_tables * n * half * sizeof(float));
    if (s->chunk_cos == NULL || s->chunk_sin == NULL)
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the angles of %zu chunks", n);
    for (uint32_t table = 0; table < n_tables; table++)
        for (size_t chunk = 0; chunk < n; chunk++) {
            float *cos = s->chunk_cos + (table * n + chunk) * half, *sin = s->chunk_sin + (table * n + chunk) * half;
            rope_angles(s, table, chunk * PE_CHUNK, cos, sin);
            for (size_t i = 0; i < half; i++) sin[i] = -sin[i];
        }
    s->n_chunks = n;
    return PE_OK;
}

/* The angles of one token by every table. */
static void angles_unit(void *arg, size_t token, int thread) {
    (void)thread;
    pe_slice *s = arg;
    for (uint32_t table = 0; table < s->model->n_rope_tables; table++) {
        size_t at = (table * s->capacity + token) * (s->model->config.head_dim / 2);
        rope_angles(s, table, s->positions[token], s->cos + at, s->sin + at);
    }
}

pe_status pe_slice_prepare(pe_slice *s, char *err) {
    memset(s->failed, 0, s->n_tokens);
    for (size_t t = 0; t < s->n_tokens; t++) s->origins[t] = t;
    pe_parallel_for(s->n_threads, s->n_tokens, angles_unit, s, s->control);
    find_query_blocks(s);
    return pe_slice_has_key_bias(s) ? reserve_chunks(s, err) : PE_OK;
}

/* ------------------------------------------------------------------ rows that leave */

/* Row `to` of a buffer = row `from`; a buffer that is not there has none. */
static void move_row(void *buffer, size_t row_bytes, size_t to, size_t from) {
    if (buffer != NULL) memcpy((char *)buffer + to * row_bytes, (char *)buffer + from * row_bytes, row_bytes);
}

/* The queries of a row: n_rep rows of each kv head. */
static void move_queries(pe_slice *s, size_t to, size_t from) {
    const pe_model *model = s->model;
    size_t n_rep = model->config.n_heads / model->config.n_kv_heads, d = model->head_dim_p;
    for (size_t head = 0; head < model->config.n_kv_heads; head++) {
        size_t first = head * s->capacity;
        move_row(s->q, n_rep * d, first + to, first + from);
        move_row(s->q_scales, n_rep * sizeof(float), first + to, first + from);
        move_row(s->q_corrections, n_rep * sizeof(int32_t), first + to, first + from);
        move_row(s->q_f32, n_rep * d * sizeof(float), first + to, first + from);
        move_row(s->q_key_bias, n_rep * model->config.head_dim * sizeof(float), first + to, first + from);
    }
}

/* The adapters' rows by their new places; an adapter without rows is one of the slice no more. */
static void regroup(pe_slice *s, size_t n_kept) {
    size_t n_groups = 0, n = 0;
    for (size_t g = 0; g < s->n_groups; g++) {
        pe_adapter_group group = {s->groups[g].adapter, n, 0};
        const size_t *rows = s->adapted + s->groups[g].first;
        for (size_t i = 0, to = 0; i < s->groups[g].n; i++) { /* both lists ascend */
            while (to < n_kept && s->selected[to] < rows[i]) to++;
            if (to < n_kept && s->selected[to] == rows[i]) s->adapted[n++] = to;
        }
        group.n = n - group.first;
        if (group.n > 0) s->groups[n_groups++] = group;
    }
    s->n_groups = n_groups;
}

void pe_slice_keep(pe_slice *s, size_t n_kept) {
    regroup(s, n_kept);
    for (size_t to = 0; to < n_kept; to++) {
        size_t from = s->selected[to];
        if (from == to) continue;
        move_row(s->x, pe_x_stride(s->model) * sizeof(float), to, from);
        move_queries(s, to, from);
        if (s->model->has_convolutions) move_row(s->qkv, pe_qkv_stride(s->model) * sizeof(float), to, from);
        s->origins[to] = s->origins[from];
        s->sequences[to] = s->sequences[from];
        s->positions[to] = s->positions[from];
        s->failed[to] = s->failed[from];
    }
    s->n_tokens = n_kept;
    find_query_blocks(s);
}

size_t pe_slice_n_failed(const pe_slice *s) {
    size_t n = 0;
    for (size_t t = 0; t < s->n_tokens; t++) n += s->failed[t];
    return n;
}

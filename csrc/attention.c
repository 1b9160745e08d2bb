/* attention.c: FORMAT.md section 8 over the paged cache.
 *
 * The unit of arithmetic is one chunk of 256 positions seen by the query rows of one block and kv head: it yields a
 * state (m, l, o) per row. States are merged in ascending order of chunks. Whether one thread walks all chunks of a
 * block (prefill, batches) or every chunk is a unit of its own and the states are merged afterwards (decode at depth)
 * is a matter of speed: the bits are the same. */
#include "attention.h"

#include <math.h>
#include <string.h>

#include "kernels/pe_math.h"

static size_t max_rows(const pe_model *model) {
    size_t n_rep = model->config.n_heads / model->config.n_kv_heads;
    return n_rep > PE_ATTENTION_ROWS ? n_rep : PE_ATTENTION_ROWS;
}

static size_t state_floats(const pe_model *model) { return max_rows(model) * (2 + model->head_dim_p); }

static pe_attention_state state_at(float *memory, const pe_model *model) {
    size_t rows = max_rows(model);
    return (pe_attention_state){memory, memory + rows, memory + 2 * rows};
}

size_t pe_attention_scratch_floats(const pe_model *model) {
    return max_rows(model) * PE_CHUNK + 2 * state_floats(model) + max_rows(model) * model->config.head_dim;
}

/* One block and kv head; thread scratch: scores (rows, 256), then two states, then queries rotated back (rows, head_dim). */
typedef struct task {
    const pe_slice *slice;
    const pe_kv_cache *kv;
    const pe_query_block *block;
    uint32_t layer, kv_head;
    size_t window; /* of the layer: positions that a query sees, 0 = all */
    size_t n_rep, n_rows;
    float *scores;
} task;

typedef struct job {
    pe_slice *slice;
    const pe_kv_cache *kv;
    uint32_t layer;
    size_t chunks_per_task; /* most that a task has; split mode: the stride of partials */
} job;

static task task_make(const job *j, size_t index, int thread) {
    const pe_slice *s = j->slice;
    const pe_config *config = &s->model->config;
    task t = {.slice = s, .kv = j->kv, .layer = j->layer, .window = s->model->layers[j->layer].window};
    t.block = &s->blocks[index / config->n_kv_heads];
    t.kv_head = (uint32_t)(index % config->n_kv_heads);
    t.n_rep = config->n_heads / config->n_kv_heads;
    t.n_rows = t.block->n_tokens * t.n_rep;
    t.scores = pe_thread_scratch(s, thread);
    return t;
}

/* First position that a query at `position` sees. */
static size_t first_visible(const task *t, size_t position) {
    return t->window != 0 && position + 1 > t->window ? position + 1 - t->window : 0;
}

static size_t chunk_begin(const task *t) { return first_visible(t, t->block->first_position) / PE_CHUNK; }

static size_t chunk_end(const task *t) { return (t->block->first_position + t->block->n_tokens - 1) / PE_CHUNK + 1; }

/* What the block's token number `token` sees of the chunk. */
static pe_visible visible_to(const task *t, size_t chunk, size_t token) {
    size_t position = t->block->first_position + token, base = chunk * PE_CHUNK, first = first_visible(t, position);
    size_t end = position + 1 > base ? position + 1 - base : 0;
    return (pe_visible){first > base ? first - base : 0, end < PE_CHUNK ? end : PE_CHUNK};
}

/* The part of the keys' bias that the cache does not hold. */
static void add_key_bias(const task *t, size_t chunk, size_t first_row, size_t n_positions) {
    const pe_slice *s = t->slice;
    const pe_layer *layer = &s->model->layers[t->layer];
    const pe_key_bias *bias = layer->key_bias;
    size_t head_dim = s->model->config.head_dim, first = bias->first[t->kv_head], n = bias->first[t->kv_head + 1] - first;
    size_t angle = (layer->rope * s->n_chunks + chunk) * (head_dim / 2);
    float cos[PE_MAX_HEAD_DIM / 2], sin[PE_MAX_HEAD_DIM / 2];
    float *rotated = t->scores + max_rows(s->model) * PE_CHUNK + 2 * state_floats(s->model);
    if (n == 0) return;
    for (size_t p = 0; p < n; p++) {
        cos[p] = s->chunk_cos[angle + bias->pairs[first + p]];
        sin[p] = s->chunk_sin[angle + bias->pairs[first + p]];
    }
    for (size_t r = 0; r < t->n_rows; r++) {
        memcpy(rotated + r * 2 * n, s->q_key_bias + (first_row + r) * head_dim, 2 * n * sizeof(float));
        s->kernels->rope(rotated + r * 2 * n, cos, sin, 2 * n);
    }
    s->kernels->attention_key_bias(t->scores, rotated, t->n_rows, bias->pairs + first, n, s->model->chunk_angles[layer->rope],
                                   head_dim / 2, n_positions);
}

static void chunk_scores(const task *t, size_t chunk, const pe_kv_chunk *kv, size_t n_positions) {
    const pe_slice *s = t->slice;
    size_t d = s->model->head_dim_p,
           first_row = (t->kv_head * s->capacity + t->block->first_token) * t->n_rep;
    float c = 1.0f / sqrtf((float)s->model->config.head_dim);
    if (s->kv_dtype == PE_KV_F32) {
        s->kernels->attention_scores_f32(t->scores, s->q_f32 + first_row * d, t->n_rows, d, kv, n_positions,
                                               c);
    } else {
        s->kernels->attention_scores(t->scores, s->q + first_row * d, s->q_scales + first_row, s->q_corrections + first_row,
                                     t->n_rows, d, kv, n_positions, c);
        if (s->model->layers[t->layer].key_bias != NULL) add_key_bias(t, chunk, first_row, n_positions);
    }
    float cap = s->model->config.attention_softcap;
    for (size_t r = 0; r < t->n_rows && cap > 0.0f; r++) s->kernels->softcap(t->scores + r * PE_CHUNK, n_positions, cap);
}

/* A chunk that a thread will probably work on next; task NULL = none. */
typedef struct chunk_ahead {
    const task *task;
    size_t chunk;
} chunk_ahead;

/* Part `part` of n_parts: the keys of a chunk and the scales of its values are on their way from here on, into the second-level
 * cache: in a decode each chunk is read from memory, which would rest while one computes, and the next chunk would wait. What the
 * kernel of scores fetches itself are the values. A core has few lines on their way at a time, and stands still when it asks for
 * more: so they are asked for part by part, with work in between. */
static void fetch_keys(chunk_ahead ahead, size_t part, size_t n_parts) {
    const task *t = ahead.task;
    size_t n = t->block->first_position + t->block->n_tokens - ahead.chunk * PE_CHUNK;
    pe_kv_chunk kv = pe_kv_chunk_at(t->kv, t->block->sequence, ahead.chunk, t->layer, t->kv_head);
    if (t->slice->kv_dtype == PE_KV_F32) return;
    n = n < PE_CHUNK ? pe_pad(n, PE_PANEL) : PE_CHUNK;
    size_t n_lines = n * t->slice->model->head_dim_p / 64, end = n_lines * (part + 1) / n_parts;
    for (size_t line = n_lines * part / n_parts; line < end; line++) __builtin_prefetch(kv.k + line * 64, 0, 2);
    for (size_t i = 0; part == 0 && i < n; i += 64 / sizeof(float)) {
        __builtin_prefetch(kv.k_scales + i, 0, 2);
        __builtin_prefetch(kv.v_scales + i, 0, 2);
    }
}

/* The state of one chunk. */
static void attend_chunk(const task *t, size_t chunk, pe_attention_state *out, chunk_ahead ahead) {
    const pe_slice *s = t->slice;
    pe_kv_chunk kv = pe_kv_chunk_at(t->kv, t->block->sequence, chunk, t->layer, t->kv_head);
    pe_visible seen[PE_ATTENTION_ROWS], all = {PE_CHUNK, 0}; /* by each token of the block; by any */
    for (size_t token = 0; token < t->block->n_tokens; token++) {
        pe_visible its = seen[token] = visible_to(t, chunk, token);
        if (its.begin >= its.end) continue;
        all.begin = its.begin < all.begin ? its.begin : all.begin;
        all.end = its.end > all.end ? its.end : all.end;
    }
    chunk_scores(t, chunk, &kv, all.end);
    if (ahead.task != NULL) fetch_keys(ahead, 0, 2);
    s->kernels->attention_weights(out->m, out->l, t->scores, seen, t->block->n_tokens, t->n_rep, all, kv.v_scales);
    if (ahead.task != NULL) fetch_keys(ahead, 1, 2);
    void (*values)(float *, const float *, size_t, size_t, const pe_kv_chunk *, size_t, size_t) =
        s->kv_dtype == PE_KV_F32 ? s->kernels->attention_values_f32 : s->kernels->attention_values;
    values(out->o, t->scores, t->n_rows, s->model->head_dim_p, &kv, all.begin, all.end);
}

/* What a row's o is multiplied by: 1 / l, or beside a score without a value, *sink, what is left of that (FORMAT.md section 8);
 * sink is NULL where there is none. */
static float output_factor(float m, float l, const float *sink) {
    if (sink == NULL) return 1.0f / l;
    float most = *sink > m ? *sink : m, share = pe_expf(m - most);
    return share / fmaf(l, share, pe_expf(*sink - most));
}

static void write_output(const task *t, const pe_attention_state *total) {
    const pe_model *model = t->slice->model;
    const float *sinks = model->layers[t->layer].sinks;
    size_t head_dim = model->config.head_dim;
    for (size_t r = 0; r < t->n_rows; r++) {
        size_t token = t->block->first_token + r / t->n_rep, head = t->kv_head * t->n_rep + r % t->n_rep;
        float *out = t->slice->att + token * model->q_dim + head * head_dim;
        float factor = output_factor(total->m[r], total->l[r], sinks == NULL ? NULL : sinks + head);
        t->slice->kernels->scale(out, total->o + r * model->head_dim_p, factor, head_dim);
    }
}

/* Unit: a task with all its chunks. */
static void whole_unit(void *arg, size_t unit, int thread) {
    job *j = arg;
    const pe_model *model = j->slice->model;
    task t = task_make(j, unit, thread);
    float *memory = t.scores + max_rows(model) * PE_CHUNK;
    pe_attention_state total = state_at(memory, model), chunk_state = state_at(memory + state_floats(model), model);
    bool is_last = unit + 1 == j->slice->n_blocks * model->config.n_kv_heads;
    task next = task_make(j, is_last ? unit : unit + 1, thread);
    size_t first = chunk_begin(&t);
    for (size_t chunk = first; chunk < chunk_end(&t); chunk++) {
        chunk_ahead ahead = chunk + 1 < chunk_end(&t) ? (chunk_ahead){&t, chunk + 1} : (chunk_ahead){&next, chunk_begin(&next)};
        if (is_last && ahead.task == &next) ahead.task = NULL;
        attend_chunk(&t, chunk, chunk == first ? &total : &chunk_state, ahead);
        if (chunk > first) j->slice->kernels->attention_merge(&total, &chunk_state, t.n_rows, model->head_dim_p);
    }
    write_output(&t, &total);
}

/* Unit of split mode: one chunk of a task, its state kept in partials. */
static void chunk_unit(void *arg, size_t unit, int thread) {
    job *j = arg;
    const pe_model *model = j->slice->model;
    task t = task_make(j, unit / j->chunks_per_task, thread);
    size_t chunk = unit % j->chunks_per_task;
    if (chunk < chunk_begin(&t) || chunk >= chunk_end(&t)) return;
    pe_attention_state out = state_at(j->slice->partials + unit * state_floats(model), model);
    attend_chunk(&t, chunk, &out, (chunk_ahead){chunk + 1 < chunk_end(&t) ? &t : NULL, chunk + 1});
}

/* Unit of split mode, afterwards: merge a task's states. */
static void merge_unit(void *arg, size_t unit, int thread) {
    job *j = arg;
    const pe_model *model = j->slice->model;
    task t = task_make(j, unit, thread);
    pe_attention_state total = state_at(t.scores, model);
    memset(total.l, 0, t.n_rows * sizeof *total.l);
    for (size_t chunk = chunk_begin(&t); chunk < chunk_end(&t); chunk++) {
        size_t index = unit * j->chunks_per_task + chunk;
        pe_attention_state part = state_at(j->slice->partials + index * state_floats(model), model);
        j->slice->kernels->attention_merge(&total, &part, t.n_rows, model->head_dim_p);
    }
    write_output(&t, &total);
}

pe_status pe_attention(pe_slice *s, const pe_kv_cache *kv, uint32_t layer, char *err) {
    job j = {s, kv, layer, 0};
    size_t n_tasks = s->n_blocks * s->model->config.n_kv_heads;
    for (size_t i = 0; i < s->n_blocks; i++) {
        const pe_query_block *block = &s->blocks[i];
        size_t n_chunks = (block->first_position + block->n_tokens - 1) / PE_CHUNK + 1;
        if (n_chunks > j.chunks_per_task) j.chunks_per_task = n_chunks;
    }
    /* With four tasks a thread the last ones are a small part of all: whole tasks then keep every thread at work, and write no
     * states to memory. */
    bool split = s->n_threads > 1 && n_tasks < 4 * (size_t)s->n_threads && j.chunks_per_task > 1;
    if (!split) {
        pe_parallel_for(s->n_threads, n_tasks, whole_unit, &j, s->control);
        return PE_OK;
    }
    size_t n_units = n_tasks * j.chunks_per_task;
    pe_status status = pe_slice_reserve_partials(s, n_units * state_floats(s->model), err);
    if (status != PE_OK) return status;
    pe_parallel_for(s->n_threads, n_units, chunk_unit, &j, s->control);
    pe_parallel_for(s->n_threads, n_tasks, merge_unit, &j, s->control);
    return PE_OK;
}

/* test_draft_head.c: a step of a draft head: one row or many, on any table, the same bits; wrong tensors and arguments are refused. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "draft_head.h"
#include "harness.h"
#include "tiny_model.h"

/* No dimension is a multiple of a panel or a group, and a row of the embeddings, padded, is longer than the two inputs need. */
enum { DIM = 40, HIDDEN = 27, VOCAB = 90, KNOWN = 33, N_TENSORS = 13, MAX_ROWS = 11 };

static const pe_config config = {.dim = DIM, .hidden_dim = 64, .n_layers = 1, .n_heads = 2, .n_kv_heads = 1, .head_dim = 20,
                                 .vocab_size = VOCAB, .max_seq_len = 30, .norm_eps = 0x1p-17f, .tie_embeddings = true};

typedef struct head_tensors {
    pe_tensor list[N_TENSORS];
    char names[N_TENSORS][64];
    void *memory[N_TENSORS];
    size_t n;
} head_tensors;

static void *add(head_tensors *h, const char *kind, size_t n_bytes, const char *name, const char *suffix) {
    size_t i = h->n++;
    snprintf(h->names[i], sizeof h->names[i], "extra.draft.%s%s", name, suffix);
    n_bytes = pe_pad(n_bytes, 64);
    h->memory[i] = memory_new(n_bytes);
    memset(h->memory[i], 0, n_bytes);
    h->list[i] = (pe_tensor){h->names[i], kind, h->memory[i], n_bytes};
    return h->memory[i];
}

static void add_norm(head_tensors *h, rng *r, const char *name) {
    float *w = add(h, "f32", DIM * sizeof(float), name, "");
    for (size_t i = 0; i < DIM; i++) w[i] = 0.5f + (float)rng_below(r, 256) * 0x1p-8f;
}

static void add_matrix(head_tensors *h, rng *r, size_t n_panels, size_t columns, const char *name) {
    size_t n_scales = n_panels * (pe_pad(columns, 64) / 64) * 16;
    int8_t *codes = add(h, "int8_g64", n_scales * 64, name, ".codes");
    uint16_t *scales = add(h, "int8_g64", n_scales * 2, name, ".scales");
    for (size_t i = 0; i < n_scales * 64; i++) codes[i] = rng_code(r);
    for (size_t i = 0; i < n_scales; i++) scales[i] = (uint16_t)(6u << 10 | rng_below(r, 1024));
}

/* The names lie in *h, which must not move. */
static void make(head_tensors *h, rng *r) {
    h->n = 0;
    add_norm(h, r, "token_norm");
    add_norm(h, r, "state_norm");
    add_matrix(h, r, 3, 2 * DIM, "w_in");
    add_norm(h, r, "mlp_norm");
    add_matrix(h, r, 4, DIM, "w_gate_up");
    add_matrix(h, r, 3, HIDDEN, "w_down");
    add_norm(h, r, "output_norm");
    add_matrix(h, r, 3, DIM, "output");
    int32_t *vocab = add(h, "i32", KNOWN * sizeof(int32_t), "vocab", "");
    for (int32_t i = 0; i < KNOWN; i++) vocab[i] = 2 * i + 1;
}

static pe_draft_head *create(const pe_model *model, const head_tensors *h, int n_threads, pe_status expected) {
    char err[PE_ERR_LEN] = "";
    pe_draft_head *head = NULL;
    pe_status status = pe_draft_head_create(&head, model, HIDDEN, KNOWN, h->list, h->n, n_threads, err);
    CHECK(status == expected && (head != NULL) == (status == PE_OK), "%d '%s'", (int)status, err);
    return head;
}

/* Two steps of the first n of the rows, from fresh states; logits go to out (n, KNOWN). The hash of all that came. */
static uint64_t run(pe_draft_head *head, size_t first, size_t n, float *out) {
    float states[MAX_ROWS * DIM];
    int32_t tokens[MAX_ROWS];
    uint8_t failed[MAX_ROWS];
    char err[PE_ERR_LEN] = "";
    uint64_t hash = HASH_START;
    rng r = {7};
    for (size_t i = 0; i < MAX_ROWS * DIM; i++) {
        float x = rng_float(&r);
        if (i >= first * DIM && i < (first + n) * DIM) states[i - first * DIM] = x;
    }
    for (size_t step = 0; step < 2; step++) {
        for (size_t i = 0; i < n; i++) tokens[i] = (int32_t)((first + i) * 8 + step);
        pe_status status = pe_draft_head_step(head, states, tokens, n, failed, err);
        CHECK(status == PE_OK, "%s", err);
        for (size_t i = 0; i < n; i++) CHECK(!failed[i], "row %zu", i);
    }
    for (size_t i = 0; i < n; i++) memcpy(out + i * KNOWN, pe_draft_head_logits(head, i), KNOWN * sizeof(float));
    CHECK(pe_draft_head_logits(head, n) == NULL, "no row %zu", n);
    hash = hash_bytes(hash, states, n * DIM * sizeof(float));
    return hash_bytes(hash, out, n * KNOWN * sizeof(float));
}

static void test_rows(const pe_model *model, const head_tensors *h) {
    float together[MAX_ROWS * KNOWN], alone[KNOWN];
    uint64_t expected = 0;
    for (size_t isa = 0; pe_isa_available(isa) != NULL; isa++) {
        char err[PE_ERR_LEN];
        CHECK(pe_isa_select(pe_isa_available(isa), err) == PE_OK, "%s", err);
        for (int n_threads = 1; n_threads <= 2; n_threads++) {
            pe_draft_head *head = create(model, h, n_threads, PE_OK);
            if (head == NULL) return;
            for (size_t i = 0; i < MAX_ROWS; i += 5) { /* buffers grow meanwhile */
                run(head, i, 1, alone);
                uint64_t hash = run(head, 0, MAX_ROWS, together);
                CHECK(same_floats(alone, together + i * KNOWN, KNOWN), "row %zu alone, %s", i, pe_isa_available(isa));
                if (expected == 0) expected = hash;
                CHECK(hash == expected, "%s, %d threads", pe_isa_available(isa), n_threads);
            }
            for (int32_t i = 0; i < KNOWN; i++) CHECK(pe_draft_head_vocab(head)[i] == 2 * i + 1, "token %d", (int)i);
            CHECK(pe_draft_head_logits(head, 1) - pe_draft_head_logits(head, 0) == 48, "whole panels");
            CHECK(pe_draft_head_logits_stride(head) == 48, "whole panels");
            CHECK(pe_draft_head_memory(head) > MAX_ROWS * KNOWN * sizeof(float), "scratch is counted");
            pe_draft_head_destroy(head);
        }
    }
    char err[PE_ERR_LEN];
    pe_isa_select(NULL, err);
}

static void test_steps(const pe_model *model, const head_tensors *h) {
    pe_draft_head *head = create(model, h, 1, PE_OK);
    if (head == NULL) return;
    float states[65 * DIM] = {0};
    int32_t tokens[65] = {0}, beyond = VOCAB, negative = -1;
    uint8_t failed[65];
    char err[PE_ERR_LEN];
    CHECK(pe_draft_head_logits(head, 0) == NULL, "no step so far");
    CHECK(pe_draft_head_step(head, states, tokens, 0, failed, err) == PE_ERR_INVALID_ARGUMENT, "no row");
    CHECK(pe_draft_head_step(head, states, tokens, 65, failed, err) == PE_ERR_INVALID_ARGUMENT, "too many rows");
    CHECK(pe_draft_head_step(head, states, &beyond, 1, failed, err) == PE_ERR_INVALID_ARGUMENT, "no such token");
    CHECK(pe_draft_head_step(head, states, &negative, 1, failed, err) == PE_ERR_INVALID_ARGUMENT, "no such token");
    states[DIM + 3] = INFINITY;
    CHECK(pe_draft_head_step(head, states, tokens, 64, failed, err) == PE_OK, "%s", err);
    for (size_t i = 0; i < 64; i++) CHECK(failed[i] == (i == 1), "row %zu", i);
    pe_draft_head_destroy(head);
}

static void test_tensors(const pe_model *model, head_tensors *h) {
    for (size_t i = 0; i < N_TENSORS; i++) {
        pe_tensor whole = h->list[i];
        h->list[i].n_bytes -= 64;
        create(model, h, 1, PE_ERR_FORMAT);
        h->list[i] = whole;
        h->list[i].kind = "f16";
        create(model, h, 1, PE_ERR_FORMAT);
        h->list[i] = whole;
        h->list[i].name = "extra.draft.other";
        create(model, h, 1, PE_ERR_FORMAT);
        h->list[i] = whole;
        h->list[i].data = (const char *)whole.data + 4;
        create(model, h, 1, PE_ERR_INVALID_ARGUMENT);
        h->list[i] = whole;
    }
    h->n--;
    create(model, h, 1, PE_ERR_FORMAT);
    h->n++;
    create(model, h, 0, PE_ERR_INVALID_ARGUMENT);
    int32_t *vocab = h->memory[N_TENSORS - 1];
    for (size_t i = 0; i < KNOWN; i += KNOWN - 1) {
        int32_t whole = vocab[i];
        vocab[i] = i == 0 ? -1 : VOCAB;
        create(model, h, 1, PE_ERR_FORMAT);
        vocab[i] = i == 0 ? vocab[1] : vocab[i - 1];
        create(model, h, 1, PE_ERR_FORMAT);
        vocab[i] = whole;
    }
    pe_draft_head_destroy(create(model, h, 1, PE_OK));
}

void test_draft_head(void) {
    tiny_model t;
    char err[PE_ERR_LEN] = "";
    tiny_model_make(&t, &config, 3, 1.0f);
    CHECK(tiny_model_load(&t, 1, err) == PE_OK, "%s", err);
    rng r = {11};
    head_tensors h;
    make(&h, &r);
    test_rows(t.model, &h);
    test_steps(t.model, &h);
    test_tensors(t.model, &h);
    for (size_t i = 0; i < N_TENSORS; i++) memory_free(h.memory[i]);
    tiny_model_free(&t);
}

/* count_instructions.c: small fixed workloads whose instructions callgrind counts (tests/engine/test_instruction_counts.py).
 *
 *     count_instructions TABLE
 *
 * Each work_* function is one workload; what happens outside of them is not looked at. One thread, no clock, no randomness: the
 * counts are the same at every run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pyengine.h"
#include "tiny_model.h"

enum { N_STEPS = 4, N_PREFILL = 24, N_BATCH = 5, N_PAST = 300 };

static void require(pe_status status, const char *err) {
    if (status == PE_OK) return;
    fprintf(stderr, "%s: %s\n", pe_status_message(status), err);
    exit(1);
}

static int32_t sequence_new(pe_context *c) {
    char err[PE_ERR_LEN] = "";
    int32_t sequence = -1;
    require(pe_sequence_new(c, &sequence, err), err);
    return sequence;
}

/* n tokens, appended to one sequence or, with `apart`, one to each of n sequences that follow it. Logits of the last row, or of all; the
 * other rows want their hidden states, or they would leave before the only layer's attention. */
static void append(pe_context *c, int32_t sequence, size_t n, bool apart) {
    int32_t tokens[N_PAST], sequences[N_PAST];
    uint8_t want[N_PAST];
    char err[PE_ERR_LEN] = "";
    for (size_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)(i * 7 % 64);
        sequences[i] = apart ? sequence + (int32_t)i : sequence;
        want[i] = apart || i + 1 == n ? PE_WANT_LOGITS : PE_WANT_HIDDEN;
    }
    pe_batch batch = {.n_tokens = n, .tokens = tokens, .sequences = sequences, .wants = want};
    require(pe_forward(c, &batch, err), err);
}

/* ------------------------------------------------------------------ workloads */

#define WORKLOAD __attribute__((noinline, noclone)) void

/* One token after the other: matrix-vector products. */
WORKLOAD work_decode(pe_context *c, int32_t sequence) {
    for (int i = 0; i < N_STEPS; i++) append(c, sequence, 1, false);
}
/* Many tokens at once: full register blocks. */
WORKLOAD work_prefill(pe_context *c, int32_t sequence) { append(c, sequence, N_PREFILL, false); }
/* A few sequences side by side: partial register blocks. */
WORKLOAD work_batch(pe_context *c, int32_t first) { append(c, first, N_BATCH, true); }
/* One token after the other behind a long past: attention. */
WORKLOAD work_attention(pe_context *c, int32_t sequence) {
    for (int i = 0; i < N_STEPS; i++) append(c, sequence, 1, false);
}
/* Many tokens behind a long past: attention of blocks of queries. */
WORKLOAD work_attention_prefill(pe_context *c, int32_t sequence) { append(c, sequence, N_PREFILL, false); }

/* ------------------------------------------------------------------ models */

static pe_context *context_new(tiny_model *tiny, const pe_config *config) {
    char err[PE_ERR_LEN] = "";
    pe_context *c = NULL;
    tiny_model_make(tiny, config, 1, 1.0f);
    require(tiny_model_load(tiny, 1, err), err);
    require(pe_context_create(&c, tiny->model, PE_KV_INT8, 1, err), err);
    return c;
}

/* Nearly all of its time goes into matrices. */
static const pe_config matrices = {.dim = 192, .hidden_dim = 512, .n_layers = 1, .n_heads = 3, .n_kv_heads = 1, .head_dim = 64,
                                   .vocab_size = 256, .max_seq_len = 512, .norm_eps = 0x1p-17f, .tie_embeddings = true};
/* Nearly all of its time goes into attention, once there is a past. */
static const pe_config attention = {.dim = 32, .hidden_dim = 32, .n_layers = 1, .n_heads = 6, .n_kv_heads = 2, .head_dim = 64,
                                    .vocab_size = 64, .max_seq_len = 512, .norm_eps = 0x1p-17f, .tie_embeddings = true};

int main(int argc, char **argv) {
    char err[PE_ERR_LEN] = "";
    static tiny_model first, second;
    if (argc != 2) return fprintf(stderr, "usage: count_instructions TABLE\n"), 2;
    pe_status status = pe_isa_select(argv[1], err);
    if (status != PE_OK) return fprintf(stderr, "%s\n", err), 77; /* what test drivers take for "skipped" */

    pe_context *c = context_new(&first, &matrices);
    int32_t sequences[N_BATCH];
    for (int i = 0; i < N_BATCH; i++) sequences[i] = sequence_new(c);
    append(c, sequences[0], N_PREFILL, false); /* buffers grow here, not in a workload */
    append(c, sequences[0], N_BATCH, true);
    work_decode(c, sequences[0]);
    work_prefill(c, sequences[1]);
    work_batch(c, sequences[0]);
    pe_context_destroy(c);
    tiny_model_free(&first);

    c = context_new(&second, &attention);
    int32_t sequence = sequence_new(c);
    append(c, sequence, N_PAST, false);
    work_attention(c, sequence);
    work_attention_prefill(c, sequence);
    pe_context_destroy(c);
    tiny_model_free(&second);
    return 0;
}

/* draft_head.h: a draft head, FORMAT.md section 10: a small network that continues from the model's final hidden state.
 *
 *   state s (dim), token w  ->  the next state, and logits of the tokens that come after w
 *
 * It has no keys and values, so it reads no prompt: a text's first state is the hidden state at the position whose logits
 * gave its newest token. What it guesses changes no output; its arithmetic is that of the model all the same, bit for bit
 * the same on every instruction set. */
#ifndef PE_DRAFT_HEAD_H
#define PE_DRAFT_HEAD_H

#include "pyengine.h"

#define PE_DRAFT_HEAD_MAX_ROWS 64

typedef struct pe_draft_head pe_draft_head;

/* A head of `model`, which has its weights and must outlive it. hidden_dim and vocab_size are the head's, as
 * pe_model_create would take them. tensors (n_tensors): those of FORMAT.md section 10 in its order, like those of
 * pe_model_set_tensors; their values are read once and checked, the ids for being ascending and in the model's vocabulary. */
pe_status pe_draft_head_create(pe_draft_head **out, const pe_model *model, uint32_t hidden_dim, uint32_t vocab_size,
                               const pe_tensor *tensors, size_t n_tensors, int n_threads, char *err);
/* NULL is allowed. */
void pe_draft_head_destroy(pe_draft_head *head);
/* Bytes of scratch. */
size_t pe_draft_head_memory(const pe_draft_head *head);

/* One step of n rows (1 to PE_DRAFT_HEAD_MAX_ROWS): states (n, dim) float32 become the next ones, tokens (n) are in the model's
 * vocabulary. failed[i] (n) is 1 if an infinity or NaN appeared in row i, whose state and logits then mean nothing, else 0. On an
 * error `states` has not changed, and there are no logits. */
pe_status pe_draft_head_step(pe_draft_head *head, float *states, const int32_t *tokens, size_t n, uint8_t *failed, char *err);

/* Logits of row `row` of the last step, float32 (vocab_size): of the tokens that the head knows, pe_draft_head_vocab (vocab_size),
 * ascending. NULL if there are not so many rows. */
const float *pe_draft_head_logits(const pe_draft_head *head, size_t row);
/* Floats from one row of logits to the next. */
size_t pe_draft_head_logits_stride(const pe_draft_head *head);
/* (vocab_size) the model's ids of its outputs, ascending; the head's, or rather its file's. */
const int32_t *pe_draft_head_vocab(const pe_draft_head *head);

#endif

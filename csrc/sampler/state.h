/* state.h: a sampler from inside, and what its files ask of one another. */
#ifndef PE_SAMPLER_STATE_H
#define PE_SAMPLER_STATE_H

#include "kernels/kernels.h"
#include "sampler.h"

/* A token in the running. `score` is 0 except while typical sampling orders by it. */
typedef struct pe_candidate {
    double score;
    uint64_t weight;
    float logit;
    int32_t id;
} pe_candidate;

struct pe_sampler {
    const struct pe_kernels *kernels;
    size_t vocab_size;
    pe_sampler_params params; /* its list pointers point into the copies below */
    int32_t *id_lists;        /* bias_ids, bad and stop, one behind the other */
    float *bias_values;
    uint8_t *banned;    /* (vocab_size) 1 = outside `allowed`; NULL = no such list */
    uint32_t *n_output; /* (vocab_size) times in the output;      these three only if a penalty is on */
    uint8_t *in_prompt; /* (vocab_size) */
    int32_t *seen;      /* (n_seen of vocab_size) distinct tokens of prompt and output */
    size_t n_seen;
    uint64_t n_outputs; /* tokens accepted as output */
    float *adjusted;    /* (vocab_size) logits after step 1; NULL until these parameters or a mask ask for it */
    uint64_t *weights;  /* (vocab_size); NULL if top-k alone decides which tokens need one */
    int32_t *reachable; /* (vocab_size); NULL with top-k */
    pe_candidate *pool; /* (vocab_size) for typical sampling, else (top_k), else NULL */
    bool marked;        /* within samplers_are_distinct */
};

/* Logits of some tokens: values (n) of ids (n), ascending, or of the whole vocabulary if ids is NULL. */
typedef struct pe_logit_row {
    const float *values;
    const int32_t *ids;
    size_t n;
} pe_logit_row;

/* edits.c: step 1. *out (row->n) is row->values itself if there is nothing to change, else the sampler's edited copy of them. */
pe_status pe_sampler_edit(pe_sampler *sampler, const pe_logit_row *row, const uint32_t *mask, const float **out, char *err);
/* choice.c: steps 2 to 7 for a temperature above 0: the index of the token drawn at `position`. logits (n_logits <= vocab_size)
 * are those after step 1, of tokens with ascending ids; top, the largest of them, is finite. */
int32_t pe_sampler_choose(pe_sampler *sampler, const float *logits, size_t n_logits, float top, uint64_t position);
/* choice.c: softmax(logits / temperature)[index] to a thousandth of itself; logits (n) are finite or -infinity, top is the largest,
 * temperature > 0. */
float pe_sampler_probability(const float *logits, size_t n, size_t index, float top, double temperature);
/* logprobs.c: fill in the log-probability of out->token and the n_top (<= 64) most probable tokens. logits (n) finite,
 * top the largest; mask as of pe_logprobs. */
void pe_sampler_fill_logprobs(const struct pe_kernels *kernels, const float *logits, size_t n, float top,
                              const uint32_t *mask, size_t n_top, pe_sample_result *out);

#endif

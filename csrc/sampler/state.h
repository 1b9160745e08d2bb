/* state.h: a sampler from inside, and what its files ask of one another. */
#ifndef PE_SAMPLER_STATE_H
#define PE_SAMPLER_STATE_H

#include "kernels/kernels.h"
#include "sampler.h"

#define WEIGHT_ONE 0x1p42    /* the weight of the most probable token */
#define MIN_EXPONENT (-30.0) /* exp(-30) * 2^42 < 0.42: the weight of anything below is 0 */

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
    int32_t *id_lists;        /* bias_ids, bad, stop and the sequences with their lengths, one behind the other */
    float *bias_values;
    uint8_t *banned;    /* (vocab_size) 1 = outside `allowed`; NULL = no such list */
    uint32_t *n_output; /* (vocab_size) times in the output, and      these four only if a penalty is on; of the last */
    uint32_t *n_prompt; /* (vocab_size) in the prompt                 repeat_last_n tokens */
    uint8_t *is_seen;   /* (vocab_size) 1 = in `seen` */
    int32_t *seen;      /* (n_seen of vocab_size) distinct tokens of prompt and output, whatever the window */
    size_t n_seen;
    int32_t *history; /* (n_history of history_capacity) accepted tokens, if keeps_history */
    uint32_t *common; /* (history_capacity) scratch of repeats.c */
    size_t n_history, history_capacity;
    bool keeps_history;
    uint32_t *longest;      /* (vocab_size) scratch of DRY, 0 between two calls;      these three only with DRY */
    uint32_t *breaker_from; /* (vocab_size) 1 + number of a breaker that begins with the token; 0 = none */
    uint32_t *breaker_next; /* (breakers.n) the same of the next one with that first token */
    const int32_t **breaker_ids; /* (breakers.n) */
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

/* Where the token lies in the row; row->n if it is not there. */
static inline size_t pe_logit_row_find(const pe_logit_row *row, int32_t id) {
    if (row->ids == NULL) return (size_t)id;
    size_t begin = 0, end = row->n;
    while (begin < end) {
        size_t middle = begin + (end - begin) / 2;
        if (row->ids[middle] < id)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin < row->n && row->ids[begin] == id ? begin : row->n;
}

/* Whether DRY can change a logit. */
static inline bool pe_sampler_has_dry(const pe_sampler_params *p) { return p->dry_multiplier > 0.0 && p->dry_last_n != 0; }

/* Whether step 1 asks in which order tokens came (repeats.c). */
static inline bool pe_sampler_looks_back(const pe_sampler_params *p) {
    return pe_sampler_has_dry(p) || p->no_repeat_ngram_size || p->bad_sequences.n;
}

/* edits.c: step 1, with the ban of n-grams or without it. *out (row->n) is row->values itself if there is nothing to change, else the
 * sampler's edited copy of them. */
pe_status pe_sampler_edit(pe_sampler *sampler, const pe_logit_row *row, const uint32_t *mask, bool with_ngrams, const float **out,
                          char *err);
/* repeats.c: what step 1 takes from the history's order, in the sampler's edited copy of the row's logits. Prepares for both others: */
void pe_sampler_find_repeats(pe_sampler *sampler, bool with_ngrams);
void pe_sampler_penalize_repeats(pe_sampler *sampler, const pe_logit_row *row); /* DRY */
void pe_sampler_ban_repeats(pe_sampler *sampler, const pe_logit_row *row, bool with_ngrams);
/* spread.c: top-n-sigma: what is too far from `top`, the largest of the logits (n), becomes -infinity. */
void pe_sampler_keep_sigma(const pe_sampler *sampler, float *logits, size_t n, float top);
/* spread.c: the temperature of step 3, which may be 0; logits (n) as of pe_sampler_choose. */
double pe_sampler_temperature(pe_sampler *sampler, const float *logits, size_t n, float top);
/* choice.c: the rest of step 3 and what follows: the index of the token drawn at `position`. logits (n_logits <= vocab_size)
 * are those after step 2, of tokens with ascending ids; top, the largest of them, is finite; temperature > 0. */
int32_t pe_sampler_choose(pe_sampler *sampler, const float *logits, size_t n_logits, float top, double temperature,
                          uint64_t position);
/* choice.c: softmax(logits / temperature)[index] to a thousandth of itself; logits (n) are finite or -infinity, top is the largest,
 * temperature > 0. */
float pe_sampler_probability(const float *logits, size_t n, size_t index, float top, double temperature);
/* logprobs.c: fill in the log-probability of out->token and the n_top (<= 64) most probable tokens. logits (n) finite,
 * top the largest; mask as of pe_logprobs. */
void pe_sampler_fill_logprobs(const struct pe_kernels *kernels, const float *logits, size_t n, float top,
                              const uint32_t *mask, size_t n_top, pe_sample_result *out);

#endif

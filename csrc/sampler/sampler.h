/* sampler.h: logits -> token. One sampler belongs to one sequence; distinct samplers may run on distinct threads.
 *
 * The specification. Every step is exact or has one written order, so the same logits, history, seed and position give the same
 * token everywhere. "The order" of tokens is (logit descending, id ascending), with -0 equal to +0.
 *
 *   1. penalties     in double, in this order, then rounded to float32:
 *                    repetition r, tokens of prompt or output: l > 0 ? l / r : l * r
 *                    frequency f and presence p, tokens of the output seen c times: (l - f * c) - p
 *                    of the text only the last repeat_last_n tokens count, where that is not -1
 *      DRY           against what would repeat a passage. The text is the last dry_last_n tokens of prompt and output; n(t) is the
 *                    most tokens at its end that also stand earlier in it (the two may overlap) with t behind them, but no
 *                    more than stand behind the text's last breaker: the occurrence of one that begins last, of these the
 *                    longest. Where n(t) >= a = dry_allowed_length and t is no breaker by itself: l - multiplier * base^(n(t) - a),
 *                    in double, its powers one multiplication after the other, at least -FLT_MAX, rounded to float32
 *      bias          l + bias in float32; a bias of -infinity bans
 *      bans          tokens outside `allowed` or outside the call's mask (where given), in `bad`, or in `stop` before
 *                    min_tokens outputs; the last token of a sequence of `bad_sequences` whose others end the output
 *      n-grams       g = no_repeat_ngram_size: tokens that would end g tokens that stand in prompt and output already. Where this
 *                    ban leaves no token, it is not applied
 *   2. greedy        temperature 0: the first token of the order. Otherwise M is its logit
 *      top-n-sigma   keep (M - l)^2 <= top_n_sigma^2 * V, the variance of the logits that are not banned, around their mean: in double,
 *                    both sums in sixteen lanes by id modulo 16, added as a tree (l with l + 8, then + 4, + 2, + 1)
 *   3. temperature   T; with a dynatemp_range R from max(T - R, 0) = A to T + R = B, by entropy: with the w of T = 1,
 *                    H = ln(Z / 2^42) - E (Z and E as in 5),  h = H / ln(number of tokens not banned), in [0, 1], 0 for one token;
 *                    T = A + (B - A) * h^dynatemp_exponent = exp(dynatemp_exponent * ln h). T = 0 is greedy. Each token has
 *                    d = (l - M) / T  and the weight  w = rint(exp(d) * 2^42), an integer (0 if d < -30)
 *   4. min-p         keep d >= ln(min_p)
 *   5. typical       Z = sum of w;  E = (sum of w * d by ascending id, in double) / Z;  keep the shortest prefix of
 *                    (|d - E| ascending, then the order) whose sum of w reaches typical_p * Z.
 *                    |d - E| is |-ln p - entropy|: ln Z cancels
 *   6. top-k         keep the first top_k of the order
 *   7. top-p         keep the shortest prefix of the order whose sum of w reaches top_p * (sum of w of what is left)
 *   8. XTC           if x < xtc_probability, for the 53 upper bits x in [0, 1) of 64 random ones: of the tokens that have
 *                    d >= ln(xtc_threshold * (sum of w of what is left) / 2^42) keep only the last of the order, and all others
 *   9. draw          r = 64 random bits; t = floor(r * (sum of w of what is left) / 2^64); the first token of the order at
 *                    which the running sum of w exceeds t
 *
 * Weights are integers so that sums are exact in any order: the draw finds its token by sums over ranges of logits, and
 * nobody sorts a vocabulary. A token below 2^-43 of the most probable one cannot be drawn.
 *
 * The random bits are Philox4x32-10 with key = seed and counter = (position, sample_index), words 0 and 1 for the draw, 2 and 3
 * for XTC: they depend on nothing that ran before, so batching, caching and speculation do not move them.
 *
 * Log-probabilities are those of the model: log-softmax of the logits as given, before step 1. */
#ifndef PE_SAMPLER_H
#define PE_SAMPLER_H

#include "pyengine.h"

#define PE_SAMPLER_MAX_TOP_LOGPROBS 64
#define PE_SAMPLER_MAX_VOCAB (1u << 21) /* 2^21 weights of at most 2^42 fit 64 bits */

/* Sequences of token ids: ids (sum of the lengths), one sequence behind the other; lengths (n), each at least 1. */
typedef struct pe_id_sequences {
    const int32_t *ids;
    const int32_t *lengths;
    size_t n;
} pe_id_sequences;

/* The lists are copied by pe_sampler_create; ids must lie in [0, vocab_size). */
typedef struct pe_sampler_params {
    uint64_t seed;
    uint64_t sample_index;     /* which of the n samples of one prompt */
    double temperature;        /* >= 0; 0 = greedy */
    int32_t top_k;             /* 0 = off */
    double top_p;              /* (0, 1]; 1 = off */
    double min_p;              /* [0, 1]; 0 = off */
    double typical_p;          /* (0, 1]; 1 = off */
    double top_n_sigma;        /* >= 0; 0 = off */
    double dynatemp_range;     /* >= 0; 0 = a constant temperature */
    double dynatemp_exponent;  /* >= 0 */
    double xtc_probability;    /* [0, 1]; 0 = off */
    double xtc_threshold;      /* [0, 1]; above 1/2 = off */
    double repetition_penalty; /* > 0; 1 = off */
    double frequency_penalty;  /* finite; 0 = off */
    double presence_penalty;   /* finite; 0 = off */
    int32_t repeat_last_n;     /* tokens that the three penalties look at; -1 = all, 0 = off */
    double dry_multiplier;     /* >= 0; 0 = off */
    double dry_base;           /* >= 1 */
    int32_t dry_allowed_length;   /* >= 1: so long a repetition is penalized */
    int32_t dry_last_n;           /* tokens that DRY looks at; -1 = all, 0 = off */
    int32_t no_repeat_ngram_size; /* 0 = off */
    int32_t min_tokens;        /* outputs before any of `stop` may come */
    int32_t n_top_logprobs;    /* -1 = no log-probabilities, else alternatives beside the token's own, at most 64 */
    const int32_t *bias_ids;   /* (n_bias); duplicates add up */
    const float *bias_values;  /* (n_bias) finite or -infinity */
    size_t n_bias;
    const int32_t *allowed; /* NULL = every token */
    size_t n_allowed;
    const int32_t *bad;
    size_t n_bad;
    const int32_t *stop;
    size_t n_stop;
    pe_id_sequences bad_sequences;
    pe_id_sequences breakers; /* of DRY */
} pe_sampler_params;

typedef struct pe_sample_result {
    int32_t token;
    int32_t n_top;                                /* entries below; 0 unless asked for */
    double logprob;                               /* of `token`; 0 if n_top_logprobs is -1 */
    int32_t top_ids[PE_SAMPLER_MAX_TOP_LOGPROBS]; /* most probable first, in the order */
    double top_logprobs[PE_SAMPLER_MAX_TOP_LOGPROBS];
} pe_sample_result;

typedef struct pe_sampler pe_sampler;

/* Every neutral value: greedy, nothing banned, no log-probabilities. */
void pe_sampler_params_init(pe_sampler_params *params);
/* A sampler without history over vocab_size tokens (1 to PE_SAMPLER_MAX_VOCAB), which computes with the table of kernels that is
 * selected now. PE_ERR_INVALID_ARGUMENT names the parameter that is out of range. The only function that allocates, but for the buffer of
 * a sampler's first masked call, and the history of one whose parameters look back (pe_sampler_accept). */
pe_status pe_sampler_create(pe_sampler **out, size_t vocab_size, const pe_sampler_params *params, char *err);
/* NULL is allowed. */
void pe_sampler_destroy(pe_sampler *sampler);
/* Forget every accepted token. */
void pe_sampler_reset(pe_sampler *sampler);
/* Tell the sampler of a token of the prompt, or of the output (the sampler does not accept what it samples by itself,
 * so a token may be sampled and then dropped). Those of the prompt come first. PE_ERR_OUT_OF_MEMORY has changed nothing. */
pe_status pe_sampler_accept(pe_sampler *sampler, int32_t token, bool is_prompt, char *err);
/* Choose the token at absolute position `position` of the sequence. logits (vocab_size) float32, not changed. mask
 * ((vocab_size + 31) / 32): bit i % 32 of word i / 32 is 1 where token i is allowed in this call; NULL = every token.
 * PE_ERR_NOT_FINITE if a logit is an infinity or NaN, PE_ERR_INVALID_ARGUMENT if every token is banned. */
pe_status pe_sampler_sample(pe_sampler *sampler, const float *logits, uint64_t position, const uint32_t *mask,
                            pe_sample_result *out, char *err);

/* What a network that guesses makes of a position. */
typedef enum pe_guess_kind {
    PE_GUESS_DRAWN,     /* the token that pe_sampler_sample would choose of its logits: right whenever both models agree */
    PE_GUESS_LIKELIEST, /* the first of the order, whatever the random number: of a network that knows less than the model */
} pe_guess_kind;

typedef struct pe_guess {
    int32_t token;
    /* About that of the token at this temperature (1 if it is 0), after step 1 and before the filters. Of the likeliest token, where
     * the position's random number r in [0, 1) lies beyond it, p < r: p * p / r. There the network would draw another one; the model,
     * which is surer, may still draw this one. */
    float probability;
} pe_guess;

/* A guess of a network that knows only some tokens: logits (n) of the tokens ids (n), ascending and in the vocabulary; NULL = the
 * whole vocabulary. All others count as banned. Returns as pe_sampler_sample does, and PE_ERR_INVALID_ARGUMENT for other ids. */
pe_status pe_sampler_guess(pe_sampler *sampler, const float *logits, const int32_t *ids, size_t n, uint64_t position,
                           const uint32_t *mask, pe_guess_kind kind, pe_guess *out, char *err);

/* One call of pe_sampler_sample among many. */
typedef struct pe_sample_row {
    pe_sampler *sampler;     /* of this row alone */
    const float *logits;     /* (vocab_size) */
    uint64_t position;
    const uint32_t *mask;    /* or NULL */
    pe_status status;        /* out: as pe_sampler_sample returns it */
    char err[PE_ERR_LEN];    /* out */
    pe_sample_result result; /* out, if status is PE_OK */
} pe_sample_row;

/* pe_sampler_sample for every row, on at most n_threads (>= 1) threads of the pool: the same tokens as one by one. A
 * row that fails says so itself and disturbs no other. The call fails, and has looked at no row, if a sampler is in two
 * rows or the threads cannot be had. */
pe_status pe_sample_many(pe_sample_row *rows, size_t n_rows, int n_threads, char *err);

/* Log-probability of `token` and of the n_top (<= 64) most probable tokens, without a sampler: for scoring given text, and
 * for beams. mask as of pe_sampler_sample or NULL: the latter are of tokens that may come, fewer if these are fewer; their
 * log-probabilities are those among all tokens. */
pe_status pe_logprobs(const float *logits, size_t vocab_size, int32_t token, const uint32_t *mask, size_t n_top,
                      pe_sample_result *out, char *err);

#endif

/* draft.h: guesses at the next tokens of a text, without a model.
 *
 * A draft changes no output: the engine computes the guessed tokens together with the one that is known, samples at each
 * of them as always, and goes on as far as the guesses were right. It changes how many tokens one reading of the weights
 * yields. Everything here may therefore be approximate: hashes are not compared in full, tables forget, and what a step
 * costs is measured while running.
 *
 *   n-grams    the last 1, 2, 3, 6 and 12 tokens -> the token that came next last time, and how often in a row
 *   chances    for each source, order and count: how often such a prediction came true. It is learnt from every token of
 *              an output, drafted or not, so a drafter that is off knows when it would pay again
 *   costs      what a step of so many rows takes, relative to others, on this machine and this model
 *
 * A draft is the likeliest prediction again and again; drafts of all texts of a step together are as long as makes the
 * geometric mean of the texts' speeds largest, (tokens expected of this text) / (cost of the step). Not the sum of the
 * speeds: a text that repeats itself must not slow its neighbours by more than it gains, and when texts are computed together,
 * whoever waits for all of them waits for the slowest. */
#ifndef PE_DRAFT_H
#define PE_DRAFT_H

#include "pyengine.h"

#define PE_DRAFT_MAX 24        /* tokens of one draft at most */
#define PE_DRAFT_MAX_ROWS 64   /* rows of a step with drafts at most */
#define PE_DRAFT_N_ORDERS 5
#define PE_DRAFT_MAX_ORDER 12
#define PE_DRAFT_N_COUNTS 4
#define PE_DRAFT_N_EIGHTHS 8

/* What follows which tokens, of one text or of many: a table of fixed size, whose least confirmed entries make room. */
typedef struct pe_ngrams pe_ngrams;
/* Room for the n-grams of about n_tokens tokens (at most 2^17): 60 to 120 bytes a token. */
pe_status pe_ngrams_create(pe_ngrams **out, size_t n_tokens, char *err);
/* NULL is allowed. */
void pe_ngrams_destroy(pe_ngrams *ngrams);

/* How often predictions came true. [0] by the text's own n-grams, [1] by those of other texts. */
typedef struct pe_draft_chances {
    float right[2][PE_DRAFT_N_ORDERS][PE_DRAFT_N_COUNTS], all[2][PE_DRAFT_N_ORDERS][PE_DRAFT_N_COUNTS];
    /* Of the likeliest prediction, by its chance in eighths: how often it came true, and should have. The largest of several
     * chances that err is too large more often than too small. */
    float came[PE_DRAFT_N_EIGHTHS], expected[PE_DRAFT_N_EIGHTHS];
} pe_draft_chances;
/* What was measured on a small chat model: a start. */
void pe_draft_chances_init(pe_draft_chances *chances);

/* One text. */
typedef struct pe_drafter {
    pe_ngrams *own;
    pe_ngrams *others;        /* n-grams of other texts, shared, or NULL */
    pe_draft_chances *shared; /* of all texts */
    pe_draft_chances chances; /* of this one */
    int32_t recent[PE_DRAFT_MAX_ORDER]; /* (n_recent) the last tokens, newest last */
    size_t n_recent;
} pe_drafter;

/* The text goes on with `token`. is_output: a model said it; chances are learnt from such tokens, and others may draft
 * by them. */
void pe_drafter_read(pe_drafter *drafter, int32_t token, bool is_output);
/* At most `most` (<= PE_DRAFT_MAX) guesses at the tokens after the text and `behind` (n_behind), which somebody else guesses, and for
 * each the chance that it is right if those before it are, as long as the chance of all of them is at least `least`. How many. */
size_t pe_drafter_propose(const pe_drafter *drafter, const int32_t *behind, size_t n_behind, size_t most, float least,
                          int32_t *tokens, float *chances);

/* cost[r] is the time of a step of r rows; only ratios mean something. */
typedef struct pe_step_costs {
    double scale; /* seconds of a step of cost 1, lately */
    size_t last_rows; /* the last step, 0 = none yet */
    double last_seconds;
    bool is_cold; /* the next step is not measured */
    double cost[PE_DRAFT_MAX_ROWS + 1];
    uint32_t n_seen[PE_DRAFT_MAX_ROWS + 1];
} pe_step_costs;
void pe_step_costs_init(pe_step_costs *costs);
/* A step of n_rows (1 to PE_DRAFT_MAX_ROWS) took so long. 0 = a step of another kind (a prompt): the next one, which touches
 * memory that it left cold, counts for nothing. */
void pe_step_costs_note(pe_step_costs *costs, size_t n_rows, double seconds);

/* A guess with a smaller chance pays in no draft of a step that has n_rows rows without drafts. */
float pe_draft_least_chance(const pe_step_costs *costs, size_t n_rows);
/* How much of each proposal to compute in one step that has n_rows rows without them: n_chosen (n), n at most n_rows. chances (n,
 * PE_DRAFT_MAX); n_proposed (n), each at most PE_DRAFT_MAX. Nothing unless it pays by 4 %. What it gains: the logarithm of the mean
 * factor by which the texts of the step become faster, 0 without drafts. */
double pe_draft_choose(const pe_step_costs *costs, size_t n_rows, size_t n, const float *chances,
                     const size_t *n_proposed, size_t *n_chosen);

#endif

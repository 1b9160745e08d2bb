/* logprobs.c: log-probabilities of the model: log-softmax of logits as given. */
#include "candidates.h"
#include "double_math.h"
#include "float_env.h"
#include "status.h"

void pe_sampler_fill_logprobs(const float *logits, size_t n, float top, size_t n_top, pe_sample_result *out) {
    pe_candidate best[PE_SAMPLER_MAX_TOP_LOGPROBS];
    double sum = 0.0; /* by ascending id */
    for (size_t begin = 0; begin < n; begin += PE_SAMPLER_BLOCK) {
        double terms[PE_SAMPLER_BLOCK];
        size_t length = n - begin < PE_SAMPLER_BLOCK ? n - begin : PE_SAMPLER_BLOCK;
        for (size_t i = 0; i < length; i++) terms[i] = pe_exp((double)logits[begin + i] - top);
        for (size_t i = 0; i < length; i++) sum += terms[i];
    }
    double log_sum = pe_log(sum);
    out->logprob = (double)logits[out->token] - top - log_sum;
    size_t count = n_top ? select_first(logits, NULL, n, n_top, best) : 0;
    out->n_top = (int32_t)count;
    make_heap(best, count, false);
    for (size_t i = 0; i < count; i++) {
        const pe_candidate *next = pop_first(best, count - i);
        out->top_ids[i] = next->id;
        out->top_logprobs[i] = (double)next->logit - top - log_sum;
    }
}

pe_status pe_logprobs(const float *logits, size_t vocab_size, int32_t token, size_t n_top, pe_sample_result *out,
                      char *err) {
    if (vocab_size == 0 || vocab_size > PE_SAMPLER_MAX_VOCAB)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "vocab_size %zu is not in [1, %u]", vocab_size,
                       PE_SAMPLER_MAX_VOCAB);
    if (token < 0 || (size_t)token >= vocab_size)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token %d is not in a vocabulary of %zu", (int)token, vocab_size);
    if (n_top > PE_SAMPLER_MAX_TOP_LOGPROBS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%zu alternatives asked for, at most %d", n_top,
                       PE_SAMPLER_MAX_TOP_LOGPROBS);
    uint64_t env = pe_float_env_enter();
    float top;
    bool finite = pe_sampler_finite_maximum(logits, vocab_size, &top);
    if (finite) {
        out->token = token;
        pe_sampler_fill_logprobs(logits, vocab_size, top, n_top, out);
    }
    pe_float_env_leave(env);
    return finite ? PE_OK : pe_fail(PE_ERR_NOT_FINITE, err, "a logit is an infinity or NaN");
}

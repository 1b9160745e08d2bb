/* logprobs.c: log-probabilities of the model: log-softmax of logits as given. */
#include "candidates.h"
#include "float_env.h"
#include "kernels/double_math.h"
#include "status.h"

void pe_sampler_fill_logprobs(const struct pe_kernels *kernels, const float *logits, size_t n, float top,
                              const uint32_t *mask, size_t n_top, pe_sample_result *out) {
    pe_candidate best[PE_SAMPLER_MAX_TOP_LOGPROBS];
    double log_sum = pe_log(kernels->sum_of_exps(logits, n, top));
    out->logprob = (double)logits[out->token] - top - log_sum;
    size_t count = n_top ? select_first(logits, NULL, mask, n, n_top, best) : 0;
    out->n_top = (int32_t)count;
    make_heap(best, count, false);
    for (size_t i = 0; i < count; i++) {
        const pe_candidate *next = pop_first(best, count - i);
        out->top_ids[i] = next->id;
        out->top_logprobs[i] = (double)next->logit - top - log_sum;
    }
}

pe_status pe_logprobs(const float *logits, size_t vocab_size, int32_t token, const uint32_t *mask, size_t n_top,
                      pe_sample_result *out, char *err) {
    if (vocab_size == 0 || vocab_size > PE_SAMPLER_MAX_VOCAB)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "vocab_size %zu is not in [1, %u]", vocab_size,
                       PE_SAMPLER_MAX_VOCAB);
    if (token < 0 || (size_t)token >= vocab_size)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token %d is not in a vocabulary of %zu", (int)token, vocab_size);
    if (n_top > PE_SAMPLER_MAX_TOP_LOGPROBS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%zu alternatives asked for, at most %d", n_top,
                       PE_SAMPLER_MAX_TOP_LOGPROBS);
    const char *isa;
    pe_status status = pe_isa_active(&isa, err);
    if (status != PE_OK) return status;
    const struct pe_kernels *kernels = pe_kernels_selected();
    uint64_t env = pe_float_env_enter();
    float top;
    bool finite = kernels->maximum(logits, vocab_size, &top);
    if (finite) {
        out->token = token;
        pe_sampler_fill_logprobs(kernels, logits, vocab_size, top, mask, n_top, out);
    }
    pe_float_env_leave(env);
    return finite ? PE_OK : pe_fail(PE_ERR_NOT_FINITE, err, "a logit is an infinity or NaN");
}

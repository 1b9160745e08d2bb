/* choice.c: steps 2 to 7 of the law in sampler.h, without sorting the vocabulary. Reads in the order of the law. */
#include <math.h>
#include <string.h>

#include "candidates.h"
#include "double_math.h"
#include "kernels/pe_math.h"
#include "philox.h"

#define WEIGHT_ONE 0x1p42    /* the weight of the most probable token */
#define MIN_EXPONENT (-30.0) /* exp(-30) * 2^42 < 0.42: the weight of anything below is 0 */

/* ------------------------------------------------------------------ steps 2 and 3: weights, min-p */

/* Where weights stop: at min-p, or where they would round to 0. */
static double exponent_cut(const pe_sampler_params *p) {
    if (p->min_p < 1e-13) return MIN_EXPONENT; /* ln 1e-13 = -29.93: nothing lies between */
    double cut = pe_log(p->min_p);
    return cut > MIN_EXPONENT ? cut : MIN_EXPONENT;
}

/* rint(exp(d) * 2^42), or 0 below the cut: added to 1.5 * 2^10, whose last place is 2^-42, exp(d) rounds to it. */
static inline uint64_t weight_of(double d, double cut) {
    uint64_t weight = pe_double_bits(pe_exp(d) + 1536.0) - pe_double_bits(1536.0);
    return d < cut ? 0 : weight;
}

/* weights (n) of all logits; returns their sum. Banned tokens have d = -infinity. Blocks that lie wholly below the cut
 * (lowered by a hundredth of the temperature, so that rounding cannot matter) are not exponentiated. */
static uint64_t weigh_all(const float *logits, size_t n, double top, double temperature, double cut,
                          uint64_t *weights) {
    const double lowest = top + temperature * (cut - 0.01);
    uint64_t total = 0;
    for (size_t begin = 0; begin < n; begin += PE_SAMPLER_BLOCK) {
        const size_t length = n - begin < PE_SAMPLER_BLOCK ? n - begin : PE_SAMPLER_BLOCK;
        const float *l = logits + begin;
        uint64_t *w = weights + begin;
        int any = 0;
        for (size_t i = 0; i < length; i++) any |= (double)l[i] >= lowest;
        if (!any) {
            memset(w, 0, length * sizeof *w);
            continue;
        }
        for (size_t i = 0; i < length; i++) w[i] = weight_of(((double)l[i] - top) / temperature, cut);
        for (size_t i = 0; i < length; i++) total += w[i];
    }
    return total;
}

/* ------------------------------------------------------------------ step 4: typical */

/* Set the weights of what is not typical to 0; returns the sum of what is left. */
static uint64_t keep_typical(pe_sampler *s, const float *logits, double top, uint64_t total) {
    double temperature = s->params.temperature, expectation = 0.0;
    size_t n = 0;
    for (size_t i = 0; i < s->vocab_size; i++)
        if (s->weights[i]) expectation += (double)s->weights[i] * (((double)logits[i] - top) / temperature);
    expectation /= (double)total;
    for (size_t i = 0; i < s->vocab_size; i++) {
        if (!s->weights[i]) continue;
        double score = ((double)logits[i] - top) / temperature - expectation;
        s->pool[n++] = (pe_candidate){score < 0.0 ? -score : score, s->weights[i], logits[i], (int32_t)i};
        s->weights[i] = 0;
    }
    make_heap(s->pool, n, false);
    double wanted = s->params.typical_p * (double)total;
    uint64_t kept = 0;
    while (n > 0 && (kept == 0 || (double)kept < wanted)) {
        const pe_candidate *next = pop_first(s->pool, n--);
        s->weights[next->id] = next->weight;
        kept += next->weight;
    }
    return kept;
}

/* ------------------------------------------------------------------ steps 5 to 7: top-k, top-p, draw */

/* All candidates whose weight can matter when only the first `needed` of the sum `total` is asked for. What is left out
 * weighs less than (total - needed) / vocab_size apiece, so together less than total - needed; and it is the end of the
 * order, because the limit is one on logits (lowered by a hundredth of the temperature, far more than exp and log can
 * err). */
static size_t collect(pe_sampler *s, const float *logits, double top, uint64_t total, uint64_t needed) {
    uint64_t share = (total - needed) / s->vocab_size;
    double lowest = -INFINITY;
    size_t n = 0;
    if (share >= 1000) lowest = top + s->params.temperature * (pe_log((double)share / WEIGHT_ONE) - 0.01);
    for (size_t i = 0; i < s->vocab_size; i++)
        if ((double)logits[i] >= lowest && s->weights[i])
            s->pool[n++] = (pe_candidate){0.0, s->weights[i], logits[i], (int32_t)i};
    return n;
}

/* The first token of the order at which the running sum exceeds r * (sum of what is left), r in [0, 2^64) / 2^64.
 * pool (n): a heap, first on top, of at least the part of the order that matters; total: the sum of all that step 5
 * left. */
static int32_t draw(const pe_sampler_params *p, pe_candidate *pool, size_t n, uint64_t total, uint64_t random) {
    uint64_t running = 0;
    if (p->top_p >= 1.0) {
        uint64_t target = pe_mul_high(random, total);
        for (;;) {
            const pe_candidate *next = pop_first(pool, n--);
            running += next->weight;
            if (running > target || n == 0) return next->id;
        }
    }
    const size_t end = n;
    double wanted = p->top_p * (double)total;
    do running += pop_first(pool, n--)->weight;
    while (n > 0 && (double)running < wanted);
    uint64_t target = pe_mul_high(random, running);
    size_t i = end;
    for (running = 0; i-- > n;) {
        running += pool[i].weight;
        if (running > target) break;
    }
    return pool[i].id;
}

int32_t pe_sampler_choose(pe_sampler *s, const float *logits, float top, uint64_t position) {
    const pe_sampler_params *p = &s->params;
    const double cut = exponent_cut(p);
    const uint64_t random = pe_philox_draw(p->seed, position, p->sample_index);
    const bool use_weights = s->weights != NULL;
    uint64_t total = 0;
    size_t n;
    if (use_weights) total = weigh_all(logits, s->vocab_size, top, p->temperature, cut, s->weights);
    if (p->typical_p < 1.0) total = keep_typical(s, logits, top, total);
    if (p->top_k > 0 && (size_t)p->top_k < s->vocab_size) {
        n = select_first(logits, s->weights, s->vocab_size, (size_t)p->top_k, s->pool);
        total = 0;
        for (size_t i = 0; i < n; i++) {
            if (!use_weights) s->pool[i].weight = weight_of(((double)s->pool[i].logit - top) / p->temperature, cut);
            total += s->pool[i].weight;
        }
    } else {
        uint64_t needed = p->top_p < 1.0 ? (uint64_t)(p->top_p * (double)total) + 1 : pe_mul_high(random, total) + 1;
        n = collect(s, logits, top, total, needed < total ? needed : total);
    }
    make_heap(s->pool, n, false);
    return draw(p, s->pool, n, total, random);
}

/* logits.h: passes over the logits of a whole vocabulary, for the sampler. Plain loops: every table's file includes them, and
 * its compiler makes them as wide as its registers are. The bits are the same in all of them, since each operation is one of
 * IEEE or of integers, and no sum of floats changes its order.
 *
 * Vocabularies are looked at in blocks: most of a block's work is not done where all of it is far below the top. */
#ifndef PE_LOGITS_H
#define PE_LOGITS_H

#include <string.h>

#include "kernels.h"
#include "double_math.h"

enum { LOGITS_BLOCK = 64 };

/* rint(exp(d) * 2^42), or 0 below the cut: added to 1.5 * 2^10, whose last place is 2^-42, exp(d) rounds to it. */
static inline uint64_t weight_of(double d, double cut) {
    uint64_t weight = pe_double_bits(pe_exp(d) + 1536.0) - pe_double_bits(1536.0);
    return d < cut ? 0 : weight;
}

/* kernels.h: weigh. A block below the cut, lowered by a hundredth of the temperature so that rounding cannot matter, is not
 * exponentiated. */
static uint64_t logits_weigh(uint64_t *weights, const float *logits, size_t n, double top, double temperature, double cut) {
    const double lowest = top + temperature * (cut - 0.01);
    uint64_t total = 0;
    for (size_t begin = 0; begin < n; begin += LOGITS_BLOCK) {
        const size_t length = n - begin < LOGITS_BLOCK ? n - begin : LOGITS_BLOCK;
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

/* kernels.h: sum_of_exps. */
static double logits_sum_of_exps(const float *logits, size_t n, double top) {
    double sum = 0.0;
    for (size_t begin = 0; begin < n; begin += LOGITS_BLOCK) {
        double terms[LOGITS_BLOCK];
        size_t length = n - begin < LOGITS_BLOCK ? n - begin : LOGITS_BLOCK;
        for (size_t i = 0; i < length; i++) terms[i] = pe_exp((double)logits[begin + i] - top);
        for (size_t i = 0; i < length; i++) sum += terms[i];
    }
    return sum;
}

#endif

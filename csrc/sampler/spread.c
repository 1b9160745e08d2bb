/* spread.c: what depends on how far the logits lie apart: top-n-sigma, and the temperature that follows their entropy. */
#include <math.h>

#include "kernels/double_math.h"
#include "state.h"

enum { LANES = 16 };

static double tree_sum(double lanes[LANES]) {
    for (size_t width = LANES / 2; width > 0; width /= 2)
        for (size_t l = 0; l < width; l++) lanes[l] += lanes[l + width];
    return lanes[0];
}

static size_t count_allowed(const float *logits, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += logits[i] > -INFINITY;
    return count;
}

void pe_sampler_keep_sigma(const pe_sampler *s, float *logits, size_t n, float top) {
    const double count = (double)count_allowed(logits, n);
    double lanes[LANES] = {0}, squares[LANES] = {0};
    for (size_t i = 0; i < n; i++) lanes[i % LANES] += logits[i] > -INFINITY ? (double)logits[i] : 0.0;
    const double mean = tree_sum(lanes) / count;
    for (size_t i = 0; i < n; i++) {
        double d = logits[i] > -INFINITY ? (double)logits[i] - mean : 0.0;
        squares[i % LANES] += d * d;
    }
    const double limit = s->params.top_n_sigma * s->params.top_n_sigma * (tree_sum(squares) / count);
    for (size_t i = 0; i < n; i++) {
        double d = (double)top - logits[i];
        if (d * d > limit) logits[i] = -INFINITY;
    }
}

double pe_sampler_temperature(pe_sampler *s, const float *logits, size_t n, float top) {
    const pe_sampler_params *p = &s->params;
    if (!(p->dynatemp_range > 0.0)) return p->temperature;
    const double lowest = p->temperature > p->dynatemp_range ? p->temperature - p->dynatemp_range : 0.0;
    const double highest = p->temperature + p->dynatemp_range;
    const double total = (double)s->kernels->weigh(s->weights, logits, n, top, 1.0, MIN_EXPONENT);
    double expectation = 0.0;
    for (size_t i = 0; i < n; i++)
        if (s->weights[i]) expectation += (double)s->weights[i] * ((double)logits[i] - top);
    const double entropy = pe_log(total / WEIGHT_ONE) - expectation / total;
    const size_t count = count_allowed(logits, n);
    double share = count > 1 ? entropy / pe_log((double)count) : 0.0;
    share = share < 1.0 ? share : 1.0;
    if (p->dynatemp_exponent == 0.0) return lowest + (highest - lowest);
    if (!(share > 1e-300)) return lowest; /* a rounding below 0 too */
    return lowest + (highest - lowest) * pe_exp(p->dynatemp_exponent * pe_log(share));
}

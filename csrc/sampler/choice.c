/* choice.c: steps 3 to 9 of the specification in sampler.h, but for the temperature (spread.c), in their order and without sorting the
 * vocabulary. */
#include <math.h>
#include <string.h>

#include "candidates.h"
#include "kernels/double_math.h"
#include "kernels/pe_math.h"
#include "philox.h"

/* ------------------------------------------------------------------ steps 3 and 4: weights, min-p */

/* Where weights stop: at min-p, or where they would round to 0. */
static double exponent_cut(const pe_sampler_params *p) {
    if (p->min_p < 1e-13) return MIN_EXPONENT; /* ln 1e-13 = -29.93: nothing lies between */
    double cut = pe_log(p->min_p);
    return cut > MIN_EXPONENT ? cut : MIN_EXPONENT;
}

/* ------------------------------------------------------------------ step 5: typical */

/* Set the weights of what is not typical to 0; returns the sum of what is left. */
static uint64_t keep_typical(pe_sampler *s, const float *logits, size_t n_logits, double top, double temperature,
                             uint64_t total) {
    double expectation = 0.0;
    size_t n = 0;
    for (size_t i = 0; i < n_logits; i++)
        if (s->weights[i]) expectation += (double)s->weights[i] * (((double)logits[i] - top) / temperature);
    expectation /= (double)total;
    for (size_t i = 0; i < n_logits; i++) {
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

/* ------------------------------------------------------------------ step 6: top-k */

/* The first top_k tokens of the order into s->pool, as a heap with the first on top; how many there are. Their weights
 * are computed here if those of all were not needed before. *total: the sum of their weights. */
static size_t keep_first(pe_sampler *s, const float *logits, size_t n_logits, double top, double temperature, double cut,
                         uint64_t *total) {
    size_t n = select_first(logits, s->weights, NULL, n_logits, (size_t)s->params.top_k, s->pool);
    *total = 0;
    for (size_t i = 0; i < n; i++) {
        pe_candidate *c = &s->pool[i];
        if (s->weights == NULL) s->kernels->weigh(&c->weight, &c->logit, 1, top, temperature, cut);
        *total += c->weight;
    }
    make_heap(s->pool, n, false);
    return n;
}

/* ------------------------------------------------------------------ step 8: XTC */

/* The tokens from some logit on: a beginning of the order. */
typedef struct beginning {
    double lowest; /* d */
    uint64_t weight, last_weight; /* of all of them, and of the last of the order */
    size_t n;
    float last_logit;
    int32_t last_id;
} beginning;

/* What everything from this share of `total` on is. */
static beginning beginning_of(const pe_sampler_params *p, uint64_t total) {
    double share = p->xtc_threshold * ((double)total / WEIGHT_ONE);
    return (beginning){.lowest = share > 1e-300 ? pe_log(share) : -INFINITY};
}

static inline void meet(beginning *b, uint64_t weight, float logit, int32_t id, double top, double temperature) {
    if (weight == 0 || ((double)logit - top) / temperature < b->lowest) return;
    b->weight += weight;
    if (b->n++ == 0 || logit < b->last_logit || (logit == b->last_logit && id > b->last_id))
        b->last_logit = logit, b->last_id = id, b->last_weight = weight;
}

/* How much of the beginning of what is left, which weighs `total`, XTC takes away. */
static uint64_t taken_away(const beginning *b, uint64_t total) {
    if (b->weight >= total) return total - 1; /* all are in it: of the last one any share will do */
    return b->weight - b->last_weight;
}

static bool excludes_top_choices(const pe_sampler_params *p, uint64_t position) {
    if (!(p->xtc_probability > 0.0)) return false;
    return (double)(pe_philox_second(p->seed, position, p->sample_index) >> 11) * 0x1p-53 < p->xtc_probability;
}

/* ------------------------------------------------------------------ steps 7 and 9: top-p, draw */

/* What the last steps ask of the others, for one token. */
typedef struct draw {
    double top, temperature;
    uint64_t total, random; /* `total`: the sum of the weights before top-p */
    bool excludes;          /* whether XTC takes place */
} draw;

/* From the few candidates that step 6 left: pool (n), a heap with the first on top. */
static int32_t draw_from_heap(const pe_sampler_params *p, pe_candidate *pool, size_t n, const draw *d) {
    uint64_t running = 0;
    if (p->top_p >= 1.0 && !d->excludes) {
        uint64_t target = pe_mul_high(d->random, d->total);
        for (;;) {
            const pe_candidate *next = pop_first(pool, n--);
            running += next->weight;
            if (running > target || n == 0) return next->id;
        }
    }
    const size_t end = n;
    double wanted = p->top_p * (double)d->total;
    do running += pop_first(pool, n--)->weight;
    while (n > 0 && (p->top_p >= 1.0 || (double)running < wanted));
    uint64_t without = 0;
    if (d->excludes) {
        beginning b = beginning_of(p, running);
        for (size_t k = n; k < end; k++) meet(&b, pool[k].weight, pool[k].logit, pool[k].id, d->top, d->temperature);
        without = taken_away(&b, running);
    }
    uint64_t target = without + pe_mul_high(d->random, running - without);
    size_t i = end;
    for (running = 0; i-- > n;) {
        running += pool[i].weight;
        if (running > target) break;
    }
    return pool[i].id;
}

/* The smallest integer from 1 on that is at least `wanted` after its conversion to double. */
static uint64_t least_reaching(double wanted) {
    uint64_t least = (uint64_t)wanted;
    if ((double)least < wanted) least++;
    while (least > 1 && (double)(least - 1) >= wanted) least--; /* by half a last place of wanted: at most 2^9 times */
    return least > 1 ? least : 1;
}

/* An unsigned integer with the order of the logits: adding 0 turns -0 into +0. */
static inline uint32_t key_of(float logit) {
    uint32_t bits = pe_float_bits(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The least float32 that is at least x. */
static float float_from(double x) {
    float rounded = (float)x;
    return (double)rounded < x ? nextafterf(rounded, INFINITY) : rounded;
}

static inline bool any_at_least(const float *logits, size_t n, float lowest) {
    int any = 0;
    for (size_t i = 0; i < n; i++) any |= logits[i] >= lowest;
    return any;
}

/* Into s->reachable, ascending, the tokens that can be drawn when only the first `least` of the sum d->total is asked
 * for; how many they are. What is left out weighs less than (total - least) / n_logits apiece, so together less than
 * total - least; and it is the end of the order, because the limit is one on logits (lowered by a hundredth of the
 * temperature, far more than exp and log can err, and than the rounding of a weight of 1000 to a whole number: with a smaller share
 * nothing is left out). */
static size_t find_reachable(const pe_sampler *s, const float *logits, size_t n_logits, const draw *d, uint64_t least) {
    enum { STRIP = 16 };
    uint64_t share = (d->total - least) / n_logits;
    float lowest = -INFINITY;
    size_t n = 0;
    if (share >= 1000) lowest = float_from(d->top + d->temperature * (pe_log((double)share / WEIGHT_ONE) - 0.01));
    for (size_t begin = 0; begin < n_logits; begin += STRIP) {
        size_t end = begin + STRIP < n_logits ? begin + STRIP : n_logits;
        if (end - begin == STRIP && !any_at_least(logits + begin, STRIP, lowest)) continue;
        for (size_t i = begin; i < end; i++) {
            s->reachable[n] = (int32_t)i;
            n += (size_t)(logits[i] >= lowest) & (size_t)(s->weights[i] != 0); /* no branch: nobody foresees it */
        }
    }
    return n;
}

/* The first token of the order at which the running sum of weights is at least `least`; *running becomes that sum. The
 * n reachable tokens weigh so much together.
 *
 * No order is made. The keys' upper 11 bits cut the logits into 2,048 ranges: the sum over each says in which of them
 * the token lies. The next 11 bits cut that range, the last 10 tell every logit from every other, and among equal
 * logits the order is that of the ids. */
static int32_t find_in_order(const pe_sampler *s, const float *logits, size_t n, uint64_t least, uint64_t *running) {
    static const struct {
        int shift, n_bits;
    } levels[] = {{21, 11}, {10, 11}, {0, 10}};
    uint32_t known = 0, known_mask = 0; /* of the token's key */
    uint64_t sum = 0;                   /* of all tokens with larger keys */
    for (size_t level = 0; level < 3; level++) {
        const int shift = levels[level].shift;
        const uint32_t last = (1u << levels[level].n_bits) - 1;
        uint64_t sums[1 << 11] = {0};
        for (size_t i = 0; i < n; i++) {
            uint32_t key = key_of(logits[s->reachable[i]]);
            if ((key & known_mask) == known) sums[key >> shift & last] += s->weights[s->reachable[i]];
        }
        uint32_t range = last;
        while (range > 0 && sum + sums[range] < least) sum += sums[range--];
        known |= range << shift;
        known_mask |= last << shift;
    }
    int32_t token = 0;
    for (size_t i = 0; i < n && sum < least; i++) {
        if (key_of(logits[s->reachable[i]]) != known) continue;
        token = s->reachable[i];
        sum += s->weights[token];
    }
    *running = sum;
    return token;
}

/* From all n_logits tokens. */
static int32_t draw_from_all(const pe_sampler *s, const float *logits, size_t n_logits, const draw *d) {
    const pe_sampler_params *p = &s->params;
    const bool cuts = p->top_p < 1.0;
    uint64_t kept = d->total, without = 0;
    size_t n = 0;
    if (cuts) {
        uint64_t least = least_reaching(p->top_p * (double)d->total);
        n = find_reachable(s, logits, n_logits, d, least);
        find_in_order(s, logits, n, least, &kept);
    }
    if (d->excludes) {
        beginning b = beginning_of(p, kept);
        for (size_t i = 0; i < n_logits; i++) meet(&b, s->weights[i], logits[i], (int32_t)i, d->top, d->temperature);
        without = taken_away(&b, kept);
    }
    uint64_t least = without + pe_mul_high(d->random, kept - without) + 1;
    if (!cuts) n = find_reachable(s, logits, n_logits, d, least);
    return find_in_order(s, logits, n, least, &kept);
}

int32_t pe_sampler_choose(pe_sampler *s, const float *logits, size_t n_logits, float top, double temperature,
                          uint64_t position) {
    const pe_sampler_params *p = &s->params;
    const double cut = exponent_cut(p);
    draw d = {.top = top, .temperature = temperature, .random = pe_philox_draw(p->seed, position, p->sample_index)};
    d.excludes = excludes_top_choices(p, position);
    if (s->weights != NULL) d.total = s->kernels->weigh(s->weights, logits, n_logits, top, temperature, cut);
    if (p->typical_p < 1.0) d.total = keep_typical(s, logits, n_logits, top, temperature, d.total);
    if (p->top_k == 0 || (size_t)p->top_k >= s->vocab_size) return draw_from_all(s, logits, n_logits, &d);
    size_t n = keep_first(s, logits, n_logits, top, temperature, cut, &d.total);
    return draw_from_heap(p, s->pool, n, &d);
}

/* 2^z for -126 <= z <= 0 to 2e-4: an integer power in the exponent's bits times a cubic on [-1/2, 1/2]. */
static inline float rough_exp2(float z) {
    float shifted = z + 12582912.0f; /* 1.5 * 2^23: its low bits are rint(z) */
    float f = z - (shifted - 12582912.0f);
    float p = ((0.0558f * f + 0.2402f) * f + 0.6931f) * f + 1.0f;
    return pe_float_from_bits(pe_float_bits(p) + (pe_float_bits(shifted) << 23));
}

float pe_sampler_probability(const float *logits, size_t n, size_t index, float top, double temperature) {
    enum { LANES = 16 };
    const float scale = (float)(1.44269504 / temperature);
    float lanes[LANES] = {0}, sum = 0.0f;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++) {
            float z = (logits[i + l] - top) * scale;
            lanes[l] += rough_exp2(z > -126.0f ? z : -126.0f);
        }
    for (; i < n; i++) {
        float z = (logits[i] - top) * scale;
        sum += rough_exp2(z > -126.0f ? z : -126.0f);
    }
    for (size_t l = 0; l < LANES; l++) sum += lanes[l];
    float z = (logits[index] - top) * scale;
    return rough_exp2(z > -126.0f ? z : -126.0f) / sum;
}

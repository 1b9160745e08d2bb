/* candidates.h: tokens in the running, the order between them, a heap of them, and the first k of a vocabulary. */
#ifndef PE_SAMPLER_CANDIDATES_H
#define PE_SAMPLER_CANDIDATES_H

#include <math.h>

#include "state.h"

enum { PE_SAMPLER_BLOCK = 64 }; /* logits looked at together, so that the compiler can use vectors */

static inline bool comes_before(const pe_candidate *a, const pe_candidate *b) {
    if (a->score != b->score) return a->score < b->score;
    if (a->logit != b->logit) return a->logit > b->logit;
    return a->id < b->id;
}

/* A binary heap: with `last_on_top` the root is the candidate that comes last, otherwise the one that comes first. */
static inline void sift_down(pe_candidate *heap, size_t n, size_t parent, bool last_on_top) {
    pe_candidate moving = heap[parent];
    for (;;) {
        size_t child = 2 * parent + 1;
        if (child >= n) break;
        if (child + 1 < n && comes_before(&heap[child + 1], &heap[child]) != last_on_top) child++;
        if (comes_before(&moving, &heap[child]) != last_on_top) break;
        heap[parent] = heap[child];
        parent = child;
    }
    heap[parent] = moving;
}

static inline void make_heap(pe_candidate *heap, size_t n, bool last_on_top) {
    for (size_t i = n / 2; i-- > 0;) sift_down(heap, n, i, last_on_top);
}

/* Take the first candidate out of heap[0..n): it moves to heap[n - 1], so what was taken lies at the end, the latest of
 * it first. */
static inline const pe_candidate *pop_first(pe_candidate *heap, size_t n) {
    pe_candidate first = heap[0];
    heap[0] = heap[n - 1];
    heap[n - 1] = first;
    if (n > 1) sift_down(heap, n - 1, 0, false);
    return &heap[n - 1];
}

static inline bool any_above(const float *logits, size_t n, float threshold) {
    int any = 0;
    for (size_t i = 0; i < n; i++) any |= logits[i] > threshold;
    return any;
}

/* The first k tokens of the order into pool, as a heap with the last of them on top; returns how many there were
 * (banned tokens, with `weights` those of weight 0, and with `mask` those whose bit is 0, are not candidates). Ids
 * ascend, so a token that ties with the last one of a full heap comes after it: only strictly larger logits enter, and
 * whole blocks are skipped by one comparison. */
static inline size_t select_first(const float *logits, const uint64_t *weights, const uint32_t *mask, size_t n, size_t k,
                                  pe_candidate *pool) {
    size_t count = 0;
    float threshold = -INFINITY;
    for (size_t begin = 0; begin < n; begin += PE_SAMPLER_BLOCK) {
        size_t end = begin + PE_SAMPLER_BLOCK < n ? begin + PE_SAMPLER_BLOCK : n;
        if (!any_above(logits + begin, end - begin, threshold)) continue;
        for (size_t i = begin; i < end; i++) {
            if (!(logits[i] > threshold) || (weights && weights[i] == 0)) continue;
            if (mask && !(mask[i / 32] >> i % 32 & 1)) continue;
            pe_candidate entering = {0.0, weights ? weights[i] : 0, logits[i], (int32_t)i};
            if (count < k) {
                pool[count++] = entering;
                if (count < k) continue;
                make_heap(pool, k, true);
            } else {
                pool[0] = entering;
                sift_down(pool, k, 0, true);
            }
            threshold = pool[0].logit;
        }
    }
    return count;
}

#endif

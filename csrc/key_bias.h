/* key_bias.h: the key biases that are kept out of the cache (FORMAT.md section 8).
 *
 * A bias of 200 on one element of k would set the scale of its whole head. It is the same for every key but for
 * RoPE, so its part of a score is computed and not stored: per pair of RoPE, a product of the query with the bias, rotated
 * back to the beginning of a chunk, meets the cosines and sines of the chunk's 256 positions, which all layers share. */
#ifndef PE_KEY_BIAS_H
#define PE_KEY_BIAS_H

#include "kernels/kernels.h"

/* One layer's, in one piece of memory. The pairs of kv head h are [first[h], first[h + 1]): those of RoPE, ascending, whose
 * bias is not (0, 0). */
typedef struct pe_key_bias {
    uint32_t *first; /* (n_kv_heads + 1) */
    uint32_t *pairs; /* (first[n_kv_heads]) i of the pair (i, i + head_dim / 2) */
    float *cos;      /* (first[n_kv_heads]) c * bias[i], c = 1 / sqrt(head_dim) */
    float *sin;      /* (first[n_kv_heads]) -(c * bias[i + head_dim / 2]) */
} pe_key_bias;

/* From a layer's bias (n_kv_heads, head_dim); NULL = out of memory. One free() is enough. */
pe_key_bias *pe_key_bias_create(const float *bias, size_t n_kv_heads, size_t head_dim);

/* cos and sin of a chunk's positions from its beginning: (16 panels, head_dim / 2, 2, 16), the 2 being cos and sin. NULL =
 * out of memory; pe_aligned_free() it. */
float *pe_chunk_angles_create(const float *inv_freq, size_t head_dim);

/* rotated (2, n_pairs) = the rotated query q (head_dim) times the bias of its kv head. */
void pe_key_bias_times_query(const pe_key_bias *bias, const struct pe_kernels *kernels, size_t kv_head, size_t head_dim,
                             const float *q, float *rotated);

#endif

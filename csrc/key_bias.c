/* key_bias.c: see key_bias.h. */
#include "key_bias.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "kernels/pe_math.h"
#include "platform.h"

static bool is_pair(const float *head, size_t half, size_t i) { return head[i] != 0.0f || head[i + half] != 0.0f; }

pe_key_bias *pe_key_bias_create(const float *bias, size_t n_kv_heads, size_t head_dim) {
    size_t n = 0, half = head_dim / 2;
    for (size_t head = 0; head < n_kv_heads; head++)
        for (size_t i = 0; i < half; i++) n += is_pair(bias + head * head_dim, half, i);
    size_t n_words = n_kv_heads + 1 + 3 * n;
    pe_key_bias *out = malloc(sizeof *out + n_words * sizeof(uint32_t));
    if (out == NULL) return NULL;
    out->first = (uint32_t *)(out + 1);
    out->pairs = out->first + n_kv_heads + 1;
    out->cos = (float *)(out->pairs + n);
    out->sin = out->cos + n;
    float c = 1.0f / sqrtf((float)head_dim);
    uint32_t at = 0;
    for (size_t head = 0; head < n_kv_heads; head++) {
        const float *b = bias + head * head_dim;
        out->first[head] = at;
        for (size_t i = 0; i < half; i++) {
            if (!is_pair(b, half, i)) continue;
            out->pairs[at] = (uint32_t)i;
            out->cos[at] = c * b[i];
            out->sin[at] = -(c * b[i + half]);
            at++;
        }
    }
    out->first[n_kv_heads] = at;
    return out;
}

float *pe_chunk_angles_create(const float *inv_freq, size_t head_dim) {
    size_t half = head_dim / 2;
    float *angles = pe_aligned_alloc(PE_CHUNK * head_dim * sizeof(float));
    if (angles == NULL) return NULL;
    for (size_t j = 0; j < PE_CHUNK; j++)
        for (size_t i = 0; i < half; i++) {
            float *cos = angles + (j / PE_PANEL * half + i) * 2 * PE_PANEL + j % PE_PANEL;
            pe_cos_sin((float)j * inv_freq[i], cos, cos + PE_PANEL);
        }
    return angles;
}

/* RoPE's own kernel multiplies: (q[i], q[i + half]) as a complex number, times the conjugate of the bias. */
void pe_key_bias_times_query(const pe_key_bias *bias, const struct pe_kernels *kernels, size_t kv_head, size_t head_dim,
                             const float *q, float *rotated) {
    size_t first = bias->first[kv_head], n = bias->first[kv_head + 1] - first, half = head_dim / 2;
    for (size_t p = 0; p < n; p++) {
        rotated[p] = q[bias->pairs[first + p]];
        rotated[n + p] = q[bias->pairs[first + p] + half];
    }
    kernels->rope(rotated, bias->cos + first, bias->sin + first, 2 * n);
}
